"""The networks of timm as encoders."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import nn

from lit_merge.encoders import TimmEncoder
from lit_merge.errors import MergeError
from lit_merge.skeleton import Skeleton


def test_it_is_timms_own_network_without_classifier() -> None:
    network: Any = TimmEncoder("resnet10t").eval()
    whole: Any = timm.create_model("resnet10t").eval()
    names = [name for name in whole.state_dict() if not name.startswith("fc.")]
    assert list(network.state_dict()) == names
    network.load_state_dict({name: whole.state_dict()[name] for name in names})
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = whole.forward_head(whole.forward_features(images), pre_logits=True)
        assert torch.equal(network(images), expected)
        torch.testing.assert_close(Skeleton(network)(network.state_dict(), images), expected)
    copy.deepcopy(network)


def test_preprocessing_is_that_of_the_weights() -> None:
    with torch.device("meta"):
        openai: Any = TimmEncoder("vit_base_patch32_clip_224.openai")
        plain: Any = TimmEncoder("vit_tiny_patch16_224", img_size=96)
    assert openai.preprocess.transforms[-1].mean[0] == pytest.approx(0.48145466)
    assert plain.preprocess.transforms[-1].mean[0] == pytest.approx(0.5)
    assert plain.preprocess(Image.new("L", (130, 100))).shape == (3, 96, 96)
    assert openai.preprocess(Image.new("RGBA", (300, 100))).device.type == "cpu"
    pickle.loads(pickle.dumps(plain.preprocess))


def test_made_on_meta_its_constants_have_values() -> None:
    with torch.device("meta"):
        network = TimmEncoder("swin_tiny_patch4_window7_224")
    kept = set(network.state_dict())
    constants = {name: value for name, value in network.named_buffers() if name not in kept}
    assert constants
    assert not any(value.is_meta for value in constants.values())
    assert all(value.is_meta for value in network.parameters())


def test_it_can_stand_in_a_config() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=nn.Module)
    given: dict[str, Any] = {
        "class_path": "lit_merge.encoders.TimmEncoder",
        "init_args": {"name": "vit_tiny_patch16_224"},
        "dict_kwargs": {"img_size": 32, "depth": 1},
    }
    network = parser.instantiate(parser.parse_object({"network": given})).network
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 192)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_tinny"}, "vit_tinny: no network of timm; near: .*vit_tiny"),
        ({"name": "resnet10t", "pretrained": True}, "resnet10t: pretrained: an encoder downloads nothing"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        TimmEncoder(**arguments)
