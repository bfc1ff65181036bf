"""The image towers of open_clip."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from tiny_clip import OPEN_CLIP, randomized, register

from lit_merge.encoders import OpenClipEncoder
from lit_merge.encoders.activations import activation_of, declared_activation
from lit_merge.encoders.open_clip_encoder import open_clip_activation
from lit_merge.errors import MergeError
from lit_merge.skeleton import Skeleton

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _tiny(tmp_path: Path) -> None:
    register(tmp_path)


def picture(width: int = 40, height: int = 27, mode: str = "RGB") -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Image.fromarray(noise.numpy()).convert(mode)


class TestNetwork:
    def test_it_is_the_image_tower_that_open_clip_makes(self) -> None:
        encoder = OpenClipEncoder("tiny-quickgelu").eval()
        whole = open_clip.create_model("tiny-quickgelu", load_weights=False).eval()
        names = [name for name in whole.state_dict() if name.startswith("visual.")]
        assert list(encoder.state_dict()) == names
        encoder.load_state_dict({name: whole.state_dict()[name] for name in names})
        assert torch.equal(encoder(IMAGES), whole.encode_image(IMAGES))
        assert encoder(IMAGES).shape == (3, 24)

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("RN50", "none"),
            ("ViT-B-32", "gelu"),
            ("ViT-L-14-quickgelu", "quick_gelu"),
            ("ViT-SO400M-14-SigLIP", "gelu"),
            ("coca_ViT-B-32", "gelu"),
            ("nllb-clip-base-siglip", "gelu"),  # its text tower would be fetched from the hub
        ],
    )
    def test_every_architecture_can_be_made_without_a_download(self, name: str, kind: str) -> None:
        with torch.device("meta"):
            encoder = OpenClipEncoder(name)
        assert encoder.activation == kind
        assert all(key.startswith("visual.") for key in encoder.state_dict())
        assert encoder.layout == "open_clip"

    def test_made_on_meta_it_is_whole_after_loading(self) -> None:
        with torch.device("meta"):
            empty = OpenClipEncoder("PE-Core-T-16-384")  # has rotary embeddings that no state dict holds
        constants = set(dict(empty.named_buffers())) - set(empty.state_dict())
        assert constants
        assert all(value.device.type == "cpu" for name, value in empty.named_buffers() if name in constants)
        assert all(value.is_meta for value in empty.parameters())
        whole = OpenClipEncoder("PE-Core-T-16-384")
        for name in constants:
            assert torch.equal(dict(empty.named_buffers())[name], dict(whole.named_buffers())[name])

    def test_pooled_features_only_where_there_are_tokens_too(self, tmp_path: Path) -> None:
        config = {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], "output_tokens": True}}
        (tmp_path / "tiny-tokens.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / "tiny-tokens.json")
        assert OpenClipEncoder("tiny-tokens")(IMAGES).shape == (3, 24)

    def test_it_runs_in_a_skeleton_and_takes_gradients(self) -> None:
        encoder = randomized(OpenClipEncoder("tiny"))
        state = {name: value.detach().clone().requires_grad_() for name, value in encoder.state_dict().items()}
        found = Skeleton(encoder)(state, IMAGES)
        torch.testing.assert_close(found, encoder(IMAGES))
        found.square().sum().backward()
        assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in state.values())


class TestActivation:
    def test_the_two_gelus_are_different_networks_with_the_same_tensors(self) -> None:
        plain, quick = OpenClipEncoder("tiny").eval(), OpenClipEncoder("tiny-quickgelu").eval()
        randomized(plain)
        quick.load_state_dict(plain.state_dict(), strict=True)
        assert not torch.allclose(plain(IMAGES), quick(IMAGES), atol=1e-3)
        forced = OpenClipEncoder("tiny", force_quick_gelu=True).eval()
        forced.load_state_dict(plain.state_dict())
        assert torch.equal(forced(IMAGES), quick(IMAGES))
        assert (plain.activation, quick.activation, forced.activation) == ("gelu", "quick_gelu", "quick_gelu")

    def test_weights_of_openai_are_refused_with_the_right_name(self) -> None:
        with pytest.raises(MergeError, match=r"open_clip:ViT-B-32/openai: .* quick_gelu.* use ViT-B-32-quickgelu$"):
            OpenClipEncoder("ViT-B-32", tag="openai")
        assert open_clip_activation("ViT-B-32", "laion2b_s34b_b79k") == "gelu"

    @pytest.mark.parametrize(
        ("name", "expected", "message"),
        [
            ("tiny", "quick_gelu", "cars.pt: .*trained with quick_gelu, .*computes gelu.*use tiny-quickgelu"),
            ("tiny", "QuickGELU", "use tiny-quickgelu"),
            ("tiny-quickgelu", "gelu", "trained with gelu, .*computes quick_gelu.* use tiny$"),
            ("ViT-B-16-plus", "quick_gelu", "set force_quick_gelu: true"),
        ],
    )
    def test_the_wrong_one_is_refused(self, name: str, expected: str, message: str) -> None:
        with torch.device("meta"):
            encoder = OpenClipEncoder(name)
        encoder.require_activation(encoder.activation, "cars.pt")
        with pytest.raises(MergeError, match=message):
            encoder.require_activation(expected, "cars.pt")

    def test_a_network_without_gelu_takes_any(self) -> None:
        with torch.device("meta"):
            OpenClipEncoder("RN50").require_activation("quick_gelu", "RN50.pt")

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            ({}, None),
            ({"w.json": {"activation": "QuickGELU"}, "merge.json": {"activation": "gelu"}}, "quick_gelu"),
            ({"merge.json": {"activation": "gelu"}, "config.json": {"model_type": "clip"}}, "gelu"),
            ({"config.json": {"model_type": "clip_vision_model", "hidden_act": "gelu"}}, "gelu"),
            ({"config.json": {"model_type": "clip", "vision_config": {"hidden_act": "quick_gelu"}}}, "quick_gelu"),
            ({"config.json": {"model_type": "clip"}}, "quick_gelu"),  # the default of transformers
            ({"open_clip_config.json": {"model_cfg": {"embed_dim": 8}}}, "gelu"),
            (
                {"config.json": {"architecture": "timm"}, "open_clip_config.json": {"model_cfg": {"quick_gelu": True}}},
                "quick_gelu",
            ),
        ],
    )
    def test_files_declare_it(self, files: dict[str, Any], expected: str | None) -> None:
        for name, content in files.items():
            Path(name).write_text(json.dumps(content))
        assert declared_activation("w.safetensors") == expected
        assert declared_activation(Path()) == (None if not files else "gelu" if "w.json" in files else expected)

    def test_a_module_tells_it(self) -> None:
        assert activation_of(torch.nn.ReLU()) == "none"


class TestPreprocessing:
    def test_it_is_the_one_of_open_clip(self) -> None:
        encoder = OpenClipEncoder("tiny")
        _, _, theirs = open_clip.create_model_and_transforms("tiny", load_weights=False)
        for mode in ("RGB", "L", "RGBA"):
            assert torch.equal(encoder.preprocess(picture(mode=mode)), theirs(picture(mode=mode)))
        assert encoder.preprocess(picture()).shape == (3, 16, 16)
        pickle.loads(pickle.dumps(encoder.preprocess))
        copy.deepcopy(encoder)

    def test_it_is_that_of_the_weights(self) -> None:
        with torch.device("meta"):
            siglip = OpenClipEncoder("ViT-B-16-SigLIP").preprocess_config
            default = OpenClipEncoder("ViT-L-14").preprocess_config
            laion = OpenClipEncoder("ViT-L-14", tag="laion2b_s32b_b82k").preprocess_config
        assert (siglip["mean"], siglip["resize_mode"]) == ((0.5, 0.5, 0.5), "squash")
        assert default["mean"][0] == pytest.approx(0.48145466)  # its weights disagree: CLIP's
        assert laion["mean"] == (0.5, 0.5, 0.5)

    def test_a_local_folder_says_both(self, tmp_path: Path) -> None:
        settings = {"model_cfg": OPEN_CLIP, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "resize_mode": "squash"}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
        encoder = OpenClipEncoder(f"local-dir:{tmp_path}")
        assert encoder.activation == "quick_gelu"
        assert encoder.preprocess_config["mean"] == [0.1, 0.2, 0.3]
        assert encoder.preprocess_config["size"] in (16, (16, 16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ViT-B-33"}, "ViT-B-33: no architecture of open_clip; near: ViT-B-32"),
        ({"name": "hf-hub:laion/x"}, "hf-hub:laion/x: an encoder downloads nothing"),
        ({"name": "local-dir:nowhere"}, "nowhere/open_clip_config.json: .*no such file"),
        ({"name": "ViT-B-32", "tag": "openia"}, "open_clip has no such weights; for ViT-B-32 it has openai,"),
        ({"name": "ViT-B-16-SigLIP", "force_quick_gelu": True}, "comes from timm"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(MergeError, match=message):
        OpenClipEncoder(**arguments)
