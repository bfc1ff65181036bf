"""The classifiers of torchvision as encoders."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image

from lit_merge.encoders import TorchvisionEncoder
from lit_merge.errors import MergeError
from lit_merge.skeleton import Skeleton


@pytest.mark.parametrize(
    ("name", "classifier", "width"),
    [
        ("resnet18", "fc", 512),
        ("vit_b_32", "heads.head", 768),
        ("swin_t", "head", 768),
        ("convnext_tiny", "classifier.2", 768),  # the normalisation before the last layer stays
        ("efficientnet_b0", "classifier.1", 1280),
        ("mobilenet_v3_small", "classifier.3", 1024),
        ("vgg11", "classifier.6", 4096),
    ],
)
def test_only_the_last_layer_goes(name: str, classifier: str, width: int) -> None:
    with torch.device("meta"):
        whole = torchvision.models.get_model(name, weights=None)
        network = TorchvisionEncoder(name).eval()
    gone = [key for key in whole.state_dict() if key not in network.state_dict()]
    assert gone == [f"{classifier}.weight", f"{classifier}.bias"]
    assert whole.get_submodule(classifier).in_features == width
    assert isinstance(network.get_submodule(classifier), torch.nn.Identity)


def test_features_are_what_the_last_layer_would_see() -> None:
    network = TorchvisionEncoder("resnet18").eval()
    whole = torchvision.models.resnet18(weights=None).eval()
    state = {name: value for name, value in whole.state_dict().items() if not name.startswith("fc.")}
    network.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(whole.fc(network(images)), whole(images))
        torch.testing.assert_close(Skeleton(network)(network.state_dict(), images), network(images))


def test_preprocessing_is_that_of_the_weights() -> None:
    with torch.device("meta"):
        first: Any = TorchvisionEncoder("resnet50")
        second: Any = TorchvisionEncoder("resnet50", "ResNet50_Weights.IMAGENET1K_V2")
    assert (first.preprocess.transforms[1].resize_size, second.preprocess.transforms[1].resize_size) == ([256], [232])
    assert first.preprocess(Image.new("L", (300, 260))).shape == (3, 224, 224)
    pickle.loads(pickle.dumps(first.preprocess))


def test_made_on_meta_its_constants_have_values() -> None:
    with torch.device("meta"):
        regnet = TorchvisionEncoder("regnet_y_400mf")  # computes with values while it is made
    assert not any(value.is_meta for value in regnet.state_dict().values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet19"}, "resnet19: no classifier of torchvision; near: resnet1"),
        ({"name": "fcn_resnet50"}, "fcn_resnet50: no classifier of torchvision"),
        ({"name": "resnet18", "weights": "V9"}, "resnet18: weights: expected one of IMAGENET1K_V1, .*found V9"),
        ({"name": "squeezenet1_0"}, "squeezenet1_0: expected a network that ends in a linear layer"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(MergeError, match=message):
        TorchvisionEncoder(**arguments)
