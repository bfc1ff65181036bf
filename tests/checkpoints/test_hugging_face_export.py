"""Merged image towers as folders of transformers and open_clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_clip import VISION, randomized, register, same
from torch import Tensor

from lit_merge.checkpoints import state_digest
from lit_merge.checkpoints.hugging_face_export import write_hugging_face, write_open_clip
from lit_merge.checkpoints.key_maps import PROJECTION, convert_layout
from lit_merge.encoders import HuggingFaceEncoder, OpenClipEncoder
from lit_merge.encoders.activations import declared_activation
from lit_merge.encoders.preprocessing import clip_preprocessor
from lit_merge.errors import MergeError

transformers = pytest.importorskip("transformers")
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FACTS = {"method": "TaskArithmetic", "suite": "toys", "tasks": ["a", "b"]}


@pytest.fixture
def theirs(tmp_path: Path) -> OpenClipEncoder:
    register(tmp_path)
    return randomized(OpenClipEncoder("tiny-quickgelu"))


@pytest.fixture
def ours(theirs: OpenClipEncoder) -> HuggingFaceEncoder:
    """The same network in the other library."""
    state = dict(convert_layout(theirs.state_dict(), "hugging_face"))
    encoder = HuggingFaceEncoder(VISION, state.pop(PROJECTION)).eval()
    encoder.load_state_dict(state)
    return encoder


def written(encoder: HuggingFaceEncoder | OpenClipEncoder, **options: Any) -> Path:
    config, preprocessor = encoder.hugging_face_config(), encoder.hugging_face_preprocessor()
    return write_hugging_face("out", encoder.state_dict(), config, preprocessor, FACTS, **options)


def loaded(kind: Any) -> Any:
    network, report = kind.from_pretrained("out", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return network.eval()


class TestHuggingFace:
    @pytest.mark.parametrize("layout", ["open_clip", "hugging_face"])
    def test_transformers_loads_it_and_computes_the_same(
        self, theirs: OpenClipEncoder, ours: HuggingFaceEncoder, layout: str
    ) -> None:
        if layout == "open_clip":
            assert written(theirs) == Path("out/model.safetensors")
        else:
            written(ours, projection=ours.projection)
        network = loaded(transformers.CLIPVisionModel)
        matrix = load_file("out/visual_projection.safetensors")[PROJECTION]
        with torch.inference_mode():
            torch.testing.assert_close(network(IMAGES).pooler_output @ matrix.T, theirs(IMAGES), rtol=1e-5, atol=1e-5)
        processor = transformers.CLIPImageProcessor.from_pretrained("out")
        assert dict(processor.size) == {"shortest_edge": 16}
        again = HuggingFaceEncoder("out", "out/visual_projection.safetensors").eval()
        again.load_state_dict(load_file("out/model.safetensors"), strict=True)  # transformers 4's names
        assert torch.equal(again(IMAGES), ours(IMAGES))

    def test_with_projection_it_is_a_model_with_projection(self, theirs: OpenClipEncoder) -> None:
        written(theirs, with_projection=True)
        assert not Path("out/visual_projection.safetensors").exists()
        network = loaded(transformers.CLIPVisionModelWithProjection)
        with torch.inference_mode():
            torch.testing.assert_close(network(IMAGES).image_embeds, theirs(IMAGES), rtol=1e-5, atol=1e-5)

    def test_what_stands_beside_the_weights(self, theirs: OpenClipEncoder) -> None:
        path = written(theirs)
        names = ["README.md", "config.json", "merge.json", "model.safetensors", "preprocessor_config.json"]
        assert sorted(file.name for file in Path("out").iterdir()) == [*names, "visual_projection.safetensors"]
        said = json.loads(Path("out/merge.json").read_text())
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"  # transformers refuses files without
        assert said["weights"]["sha256"] == metadata["sha256"] == state_digest(load_file(path))
        assert said["method"] == "TaskArithmetic"
        assert (said["layout"], declared_activation(path)) == ("hugging_face", "quick_gelu")
        assert "library_name: transformers" in Path("out/README.md").read_text()

    def test_a_tower_without_projection_stays_without(self, ours: HuggingFaceEncoder) -> None:
        written(ours, card="# mine\n")
        loaded(transformers.CLIPVisionModel)
        assert not Path("out/visual_projection.safetensors").exists()
        assert Path("out/README.md").read_text() == "# mine\n"
        with pytest.raises(MergeError, match="with_projection: it has no projection; give projection="):
            written(ours, with_projection=True)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_hidden_layers": 3}, "the config means 3 layers, found 2"),
            (
                {"patch_size": 4},
                r"patch_embedding.weight: the config means shape \(32, 3, 4, 4\), found \(32, 3, 8, 8\)",
            ),
            ({"image_size": 32}, r"position_embedding.weight: the config means shape \(17, 32\)"),
            ({"intermediate_size": 65}, r"fc1.weight: the config means shape \(65, 32\)"),
            ({"projection_dim": 25}, r"visual_projection.weight: the config means shape \(25, 32\)"),
        ],
    )
    def test_nothing_is_written_that_does_not_fit_its_config(
        self, theirs: OpenClipEncoder, change: dict[str, int], message: str
    ) -> None:
        with pytest.raises(MergeError, match=message):
            write_hugging_face("out", theirs.state_dict(), VISION | change, clip_preprocessor(16), FACTS)
        assert not Path("out").exists()

    def test_nothing_is_written_if_a_tensor_is_missing(self, theirs: OpenClipEncoder) -> None:
        state = theirs.state_dict()
        del state["visual.ln_post.bias"]
        with pytest.raises(MergeError, match=r"merged network: .*1 missing \(visual.ln_post.bias\)"):
            write_hugging_face("out", state, VISION, clip_preprocessor(16), FACTS)
        assert not Path("out").exists()

    @pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32"])
    def test_architectures_that_transformers_cannot_compute_are_refused(self, name: str) -> None:
        with torch.device("meta"):
            encoder = OpenClipEncoder(name)
        with pytest.raises(MergeError, match=f"{name}: expected CLIP's plain vision transformer.*export to open_clip"):
            encoder.hugging_face_config()

    @pytest.mark.parametrize(("name", "heads", "width"), [("ViT-B-16", 12, 3072), ("ViT-H-14", 16, 5120)])
    def test_config_of_real_architectures(self, name: str, heads: int, width: int) -> None:
        with torch.device("meta"):
            config = OpenClipEncoder(name).hugging_face_config()
        found = (config["num_attention_heads"], config["intermediate_size"], config["hidden_act"])
        assert found == (heads, width, "gelu")
        with torch.device("meta"):
            transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config))


class TestOpenClip:
    def test_it_fills_the_image_tower_of_a_model(self, theirs: OpenClipEncoder) -> None:
        path = write_open_clip("out", theirs.state_dict(), FACTS, config=theirs.config)
        model = open_clip.create_model("tiny-quickgelu", load_weights=False).eval()
        report = model.load_state_dict(load_file(path), strict=False)
        assert not report.unexpected_keys
        assert not any(name.startswith("visual.") for name in report.missing_keys)
        with torch.inference_mode():
            assert torch.equal(model.encode_image(IMAGES), theirs(IMAGES))
        assert declared_activation(path) == "quick_gelu"
        assert state_digest(load_file(path)) == json.loads(Path("out/merge.json").read_text())["weights"]["sha256"]

    def test_with_the_text_tower_open_clip_loads_the_folder(self, theirs: OpenClipEncoder) -> None:
        whole = open_clip.create_model("tiny-quickgelu", load_weights=False)
        settings: dict[str, Any] = {"config": theirs.config, "preprocess": theirs.preprocess_config}
        write_open_clip("out", theirs.state_dict(), FACTS, rest=whole.state_dict(), **settings)
        model, _, preprocess = open_clip.create_model_and_transforms("local-dir:out")
        expected = {**whole.state_dict(), **theirs.state_dict()}
        assert same(model.state_dict(), expected)
        assert str(preprocess).translate({91: 40, 93: 41}) == str(theirs.preprocess)  # JSON has no tuples
        encoder = OpenClipEncoder("local-dir:out")
        encoder.load_state_dict(theirs.state_dict())
        assert encoder.activation == "quick_gelu"

    def test_a_hugging_face_tower_becomes_one(self, ours: HuggingFaceEncoder, theirs: OpenClipEncoder) -> None:
        state: dict[str, Tensor] = ours.state_dict()
        path = write_open_clip("out", state, FACTS, projection=ours.projection, activation=ours.activation)
        assert same(load_file(path), theirs.state_dict())
        assert declared_activation(path) == "quick_gelu"
        assert not Path("out/open_clip_config.json").exists()
        with pytest.raises(MergeError, match="give projection="):
            write_open_clip("out2", state, FACTS)
        assert not Path("out2").exists()

    def test_a_full_clip_of_another_architecture_is_refused(self, theirs: OpenClipEncoder) -> None:
        with pytest.raises(MergeError, match=r"rest: .* give the full CLIP that was merged"):
            write_open_clip("out", theirs.state_dict(), FACTS, rest={"visual.other": torch.ones(1)})
