"""CLIP's image tower as in transformers, and its preprocessing."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_clip import TEXT, VISION, randomized, same
from torch import nn
from torch.func import functional_call

from lit_merge.encoders import HuggingFaceEncoder
from lit_merge.encoders.preprocessing import clip_preprocessor, hugging_face_preprocess, preprocessor_of
from lit_merge.errors import MergeError, MissingExtraError
from lit_merge.skeleton import Skeleton

transformers = pytest.importorskip("transformers")
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MATRIX = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Image.fromarray(noise.numpy()).convert(mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A full CLIP as ``save_pretrained`` writes it."""
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    randomized(transformers.CLIPModel(config)).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


class TestNetwork:
    def test_it_computes_the_image_embeddings_of_the_full_clip(self, folder: Path) -> None:
        whole = transformers.CLIPModel.from_pretrained(folder).eval()
        encoder = HuggingFaceEncoder(folder, projection=folder / "model.safetensors").eval()
        tower = {name: value for name, value in load_file(folder / "model.safetensors").items() if "vision" in name}
        encoder.load_state_dict(tower, strict=True)  # the projection is none of its tensors
        with torch.inference_mode():
            pooled = whole.vision_model(IMAGES).pooler_output
            torch.testing.assert_close(encoder(IMAGES), whole.visual_projection(pooled))
            assert HuggingFaceEncoder(folder)(IMAGES).shape == pooled.shape
        assert all(name.startswith("vision_model.") for name in encoder.state_dict())
        assert (encoder.layout, encoder.activation) == ("hugging_face", "quick_gelu")

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # of torch, at the first tangent
    def test_it_runs_in_a_skeleton_and_takes_gradients_and_tangents(self, attention: str) -> None:
        encoder = randomized(HuggingFaceEncoder(VISION, MATRIX, attention))
        state = {name: value.detach().clone().requires_grad_() for name, value in encoder.state_dict().items()}
        found = Skeleton(encoder)(state, IMAGES)
        torch.testing.assert_close(found, encoder(IMAGES))
        found.square().sum().backward()
        assert all(value.grad is not None for value in state.values())
        plain = {name: value.detach() for name, value in state.items()}
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            tangent = torch.func.jvp(lambda s: functional_call(encoder, s, (IMAGES,)), (plain,), (plain,))[1]
        assert bool(tangent.isfinite().all())

    def test_made_on_meta_it_is_whole_after_loading(self) -> None:
        encoder = randomized(HuggingFaceEncoder(VISION, MATRIX))
        with torch.device("meta"):
            empty = HuggingFaceEncoder(VISION, MATRIX).eval()
        empty.load_state_dict(encoder.state_dict(), strict=True, assign=True)
        assert torch.equal(empty(IMAGES), encoder(IMAGES))
        twin = copy.deepcopy(empty)
        assert torch.equal(twin(IMAGES), encoder(IMAGES))

    def test_the_tower_of_transformers_4_is_inside_another_module(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Wrapped(nn.Module):
            def __init__(self, config: object) -> None:
                super().__init__()
                whole = tower(config)
                self.vision_model = whole._modules.get("vision_model") or whole

        encoder = randomized(HuggingFaceEncoder(VISION, MATRIX))
        tower = transformers.CLIPVisionModel
        stand_in = SimpleNamespace(CLIPVisionConfig=transformers.CLIPVisionConfig, CLIPVisionModel=Wrapped)
        monkeypatch.setitem(sys.modules, "transformers", stand_in)
        old = HuggingFaceEncoder(VISION, MATRIX).eval()
        old.load_state_dict(encoder.state_dict(), strict=True)
        assert torch.equal(old(IMAGES), encoder(IMAGES))

    def test_the_projection_is_copied_and_moves_with_the_network(self) -> None:
        matrix = MATRIX.clone()
        encoder = HuggingFaceEncoder(VISION, matrix)
        matrix.zero_()
        assert encoder.projection is not None
        assert torch.equal(encoder.projection, MATRIX)
        assert encoder.to(torch.float64).get_buffer("projection").dtype == torch.float64

    @pytest.mark.parametrize("old", [False, True], ids=["vision_config", "vision_config_dict"])
    def test_config_of_a_full_clip(self, tmp_path: Path, old: bool) -> None:
        vision = {key: value for key, value in VISION.items() if key not in ("hidden_act", "model_type")}
        part = {"vision_config": {}, "vision_config_dict": vision} if old else {"vision_config": vision}
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "projection_dim": 24, **part}))
        config = HuggingFaceEncoder(tmp_path / "config.json").hugging_face_config()
        assert {**config, **VISION} == config
        assert config["hidden_act"] == "quick_gelu"  # the default of transformers
        assert config["architectures"] == ["CLIPVisionModel"]

    def test_activation_is_checked(self) -> None:
        encoder = HuggingFaceEncoder({**VISION, "hidden_act": "gelu"})
        encoder.require_activation("GELU", "w")
        with pytest.raises(MergeError, match=r"w: .*trained with quick_gelu.*set hidden_act: quick_gelu in config"):
            encoder.require_activation("quick_gelu", "w")


class TestPreprocessing:
    @pytest.mark.parametrize("size", [(40, 27), (27, 40), (31, 31), (17, 90), (224, 224)])
    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
    def test_it_is_that_of_transformers(self, size: tuple[int, int], mode: str) -> None:
        config = clip_preprocessor(17)  # odd, so that centres lie between pixels
        processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        theirs = processor(**config)(picture(*size, mode), return_tensors="pt").pixel_values[0]
        found = hugging_face_preprocess(config)(picture(*size, mode))
        torch.testing.assert_close(found, theirs, rtol=0, atol=2e-6)

    @pytest.mark.parametrize(
        "change",
        [
            {"size": {"height": 20, "width": 30}, "do_center_crop": False},
            {"size": 20, "crop_size": 18},
            {"resample": 2, "image_mean": [0.5, 0.4, 0.3]},
            {"do_normalize": False},
            {"do_rescale": False},
            {"rescale_factor": 1 / 127.5},
            {"do_resize": False, "crop_size": {"height": 50, "width": 21}},  # larger than the picture
        ],
    )
    def test_every_setting_counts(self, change: dict[str, Any]) -> None:
        config = clip_preprocessor(17) | change
        processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
        theirs = processor(**config)(picture(40, 33), return_tensors="pt").pixel_values[0]
        found = hugging_face_preprocess(config)(picture(40, 33))
        torch.testing.assert_close(found, theirs.float(), rtol=1e-5, atol=2e-6)

    def test_the_files_beside_the_config_count(self, folder: Path) -> None:
        assert HuggingFaceEncoder(folder).preprocess(picture(40, 30)).shape == (3, 16, 16)  # without a file: CLIP's
        nested = {"image_processor": clip_preprocessor(8)}  # as a processor of transformers 5 writes it
        (folder / "processor_config.json").write_text(json.dumps(nested))
        assert HuggingFaceEncoder(folder).preprocess(picture(40, 30)).shape == (3, 8, 8)
        transformers.CLIPImageProcessor(**clip_preprocessor(12)).save_pretrained(folder)
        encoder = HuggingFaceEncoder(folder)
        assert encoder.preprocess(picture(40, 30)).shape == (3, 12, 12)
        assert encoder.hugging_face_preprocessor()["size"] == {"shortest_edge": 12}
        pickle.loads(pickle.dumps(encoder.preprocess))

    def test_open_clips_settings_translate(self) -> None:
        common = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2), "interpolation": "bilinear"}
        config = preprocessor_of({**common, "size": (12, 12), "resize_mode": "shortest"})
        assert (config["resample"], config["size"], config["do_center_crop"]) == (2, {"shortest_edge": 12}, True)
        config = preprocessor_of({**common, "size": 12, "resize_mode": "squash"})
        assert hugging_face_preprocess(config)(picture(40, 30)).shape == (3, 12, 12)
        with pytest.raises(MergeError, match="found longest to 12x12"):
            preprocessor_of({**common, "size": 12, "resize_mode": "longest"})


@pytest.mark.parametrize(
    ("config", "projection", "message"),
    [
        ("nowhere", None, "nowhere: no such file; expected the config.json"),
        ({"model_type": "siglip"}, None, "config: model_type: expected clip or clip_vision_model, found 'siglip'"),
        ({**VISION, "hidden_act": "swoosh"}, None, "config: .*swoosh"),
        (
            {**VISION, "hidden_size": 33},
            None,
            "config: .*number of attention heads|config: .*divisible",
        ),
        (
            VISION,
            torch.ones(24, 31),
            r"projection: expected .* \(D_out, 32\) by hidden_size in config, found shape \(24, 31\)",
        ),
        ({**VISION, "num_hidden_layers": 2_000_000}, None, "config: num_hidden_layers: expected .* 512, found 2000000"),
        ({**VISION, "num_hidden_layers": 10**5000}, None, "num_hidden_layers: .*found a number beyond 1e18"),
        ({**VISION, "hidden_size": "x"}, None, "config: hidden_size: expected a whole number .*, found 'x'"),
        ({**VISION, "hidden_size": None}, None, "hidden_size: expected .*, found None"),
        ({**VISION, "hidden_size": 32.0}, None, r"hidden_size: expected .*, found 32\.0"),
        (
            {**VISION, "hidden_size": 65536, "num_hidden_layers": 512},
            None,
            r"expected at most 8e\+09 parameters, found",
        ),
        ({**VISION, "patch_size": 0}, None, "patch_size: expected a whole number from 1 to 4096, found 0"),
        ({**VISION, "patch_size": True}, None, "patch_size: expected .*, found True"),
        ({**VISION, "patch_size": 17}, None, "patch_size: expected at most image_size 16, found 17"),
        ({**VISION, "image_size": [16, 16]}, None, "image_size: expected a whole number"),
        ({**VISION, "layer_norm_eps": "x"}, None, "config: .*layer_norm_eps|config: transformers cannot build"),
        ({"model_type": "clip", "vision_config": [3]}, None, r"config: vision_config: expected an object .*\[3\]"),
        (VISION, torch.full((24, 32), float("nan")), "768 of 768 values are NaN"),
        (VISION, "w.safetensors", r"w.safetensors: expected visual_projection.weight of a full CLIP, found other"),
    ],
)
def test_bad_arguments_are_refused(config: Any, projection: Any, message: str) -> None:
    save_file({"other": torch.ones(1)}, "w.safetensors")
    with pytest.raises(MergeError, match=message):
        HuggingFaceEncoder(config, projection)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 9}, "p.json: resample: expected 0 to 5, found 9"),
        ({"size": {"longest_edge": 9}}, "p.json: size: expected pixels, shortest_edge"),
        ({"size": {"shortest_edge": 9, "longest_edge": 12}}, "p.json: size"),
        ({"crop_size": {"height": 0, "width": 4}}, "p.json: crop_size"),
    ],
)
def test_bad_preprocessing_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        hugging_face_preprocess(change, "p.json")


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"lit-merge\[hf\]"):
        HuggingFaceEncoder(VISION)


def test_same_compares() -> None:
    assert not same({"a": torch.ones(1)}, {"a": torch.ones(1).double()})
