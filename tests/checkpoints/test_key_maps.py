"""Names of CLIP's tensors in transformers, open_clip and the task-vectors checkpoints."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import open_clip
import pytest
import torch
from tiny_clip import OPEN_CLIP, TEXT, VISION, randomized, same
from torch import Tensor

from lit_merge.checkpoints.clip_keys import LAYOUTS, TABLES
from lit_merge.checkpoints.key_maps import PROJECTION, convert_layout, detect_layout
from lit_merge.encoders import HuggingFaceEncoder, OpenClipEncoder
from lit_merge.errors import MergeError

transformers = pytest.importorskip("transformers")
State = dict[str, Tensor]


class Watched(Mapping[str, Tensor]):
    """A state dict that remembers what was read."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.state[name]

    def __contains__(self, name: object) -> bool:
        return name in self.state

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


@pytest.fixture(scope="module")
def full() -> Any:
    """A whole CLIP of transformers."""
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    return randomized(transformers.CLIPModel(config))


@pytest.fixture(scope="module")
def towers(full: Any) -> dict[str, State]:
    """The same image tower in every layout, made without the code under test where the libraries can."""
    whole = {name: value.detach() for name, value in full.state_dict().items()}
    tower = {name: value for name, value in whole.items() if name.startswith("vision_model.")}
    found = {"hugging_face_full": whole, "hugging_face": {**tower, PROJECTION: whole[PROJECTION]}}
    found["hugging_face_5"] = {name.removeprefix("vision_model."): value for name, value in tower.items()}
    found["hugging_face_5"][PROJECTION] = whole[PROJECTION]
    visual = {name: value.clone() for name, value in convert_layout(found["hugging_face"], "open_clip").items()}
    found["open_clip"] = visual
    found["open_clip_visual"] = {name.removeprefix("visual."): value for name, value in visual.items()}
    found["task_vectors"] = {f"model.{name}": value for name, value in visual.items()}
    found["open_clip_full"] = dict(convert_layout(whole, "open_clip_full"))
    return found


class TestRealShapes:
    @pytest.mark.parametrize("name", ["ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu"])
    def test_round_trip_is_exact_and_both_towers_agree(self, name: str) -> None:
        with torch.device("meta"):
            theirs = OpenClipEncoder(name).eval()
            ours = HuggingFaceEncoder(theirs.hugging_face_config()).eval()
        # views of one pool of numbers: 300 million fresh ones would take most of the time and the memory
        generator = torch.Generator().manual_seed(0)
        width = ours.config["hidden_size"]
        pool = torch.randn(8_000_000, generator=generator) * width**-0.5
        state: State = {}
        for position, (key, like) in enumerate(ours.state_dict().items()):
            values = pool[7919 * position :][: like.numel()].view(like.shape)
            state[key] = values + 1 if "norm" in key and key.endswith("weight") else values
        projection = pool[: width * theirs.config["embed_dim"]].view(-1, width)
        visual = dict(convert_layout(state, "open_clip", projection=projection))
        back = convert_layout(visual, "hugging_face")
        assert same(back, {**state, PROJECTION: projection})
        theirs.load_state_dict(visual, strict=True, assign=True)
        ours.load_state_dict(state, strict=True, assign=True)
        ours.projection = projection
        image = torch.randn(1, 3, 224, 224, generator=generator)
        with torch.inference_mode():
            expected, found = theirs(image), ours(image)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


class TestTables:
    @pytest.mark.parametrize("source", [layout for layout in LAYOUTS if not layout.endswith("_full")])
    @pytest.mark.parametrize("target", [layout for layout in LAYOUTS if not layout.endswith("_full")])
    def test_every_tower_converts_to_every_other(self, towers: dict[str, State], source: str, target: str) -> None:
        assert detect_layout(towers[source]) == source
        assert same(convert_layout(towers[source], target), towers[target])

    @pytest.mark.parametrize("source", ["hugging_face_full", "open_clip_full"])
    @pytest.mark.parametrize("target", ["hugging_face", "hugging_face_5", "open_clip", "task_vectors"])
    def test_a_full_clip_gives_its_image_tower(self, towers: dict[str, State], source: str, target: str) -> None:
        assert detect_layout(towers[source]) == source
        assert same(convert_layout(towers[source], target), towers[target])

    def test_a_full_clip_computes_the_same_in_both_libraries(self, full: Any, towers: dict[str, State]) -> None:
        theirs = open_clip.CLIP(**copy.deepcopy(OPEN_CLIP)).eval()
        theirs.load_state_dict(dict(convert_layout(towers["hugging_face_full"], "open_clip_full")), strict=True)
        images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        tokens = torch.randint(3, 60, (5, 8), generator=torch.Generator().manual_seed(2))
        tokens[range(5), [7, 3, 5, 1, 4]] = 63  # the largest token ends a text
        with torch.inference_mode():
            image = full.visual_projection(full.vision_model(images).pooler_output)
            text = full.text_projection(full.text_model(tokens).pooler_output)
            torch.testing.assert_close(theirs.encode_image(images), image, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(theirs.encode_text(tokens), text, rtol=1e-5, atol=1e-5)
        assert same(convert_layout(theirs.state_dict(), "hugging_face_full"), towers["hugging_face_full"])

    def test_names_are_those_of_the_libraries(self, towers: dict[str, State]) -> None:
        assert list(towers["open_clip_visual"]) == list(open_clip.CLIP(**copy.deepcopy(OPEN_CLIP)).visual.state_dict())
        alone = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
        bare = set(towers["hugging_face_5"]) - {PROJECTION}
        assert set(alone.state_dict()) in (bare, {f"vision_model.{name}" for name in bare})

    def test_every_pair_is_in_one_table_only(self) -> None:
        pairs = [frozenset((table.left, table.right)) for table in TABLES]
        assert len(set(pairs)) == len(pairs)
        assert set().union(*pairs) == set(LAYOUTS)


class TestLeftovers:
    def test_text_tensors_of_task_vector_checkpoints_are_left_out(self, towers: dict[str, State]) -> None:
        names = ("positional_embedding", "text_projection", "logit_scale", "token_embedding.weight")
        extra = {f"model.{name}": torch.ones(2) for name in (*names, "ln_final.weight", "ln_final.bias")}
        state = {**extra, **towers["task_vectors"]}
        assert detect_layout(state) == "task_vectors"
        assert same(convert_layout(state, "open_clip"), towers["open_clip"])
        assert same(convert_layout(state, "task_vectors"), towers["task_vectors"])

    @pytest.mark.parametrize(
        ("layout", "name"),
        [
            ("hugging_face", "vision_model.embeddings.position_ids"),
            ("hugging_face_5", "embeddings.position_ids"),
            ("hugging_face_full", "vision_model.embeddings.position_ids"),
        ],
    )
    @pytest.mark.parametrize("target", ["hugging_face", "hugging_face_5", "open_clip"])
    def test_constants_of_old_files_are_left_out(
        self, towers: dict[str, State], layout: str, name: str, target: str
    ) -> None:
        state = {name: torch.arange(5)[None], **towers[layout]}
        assert same(convert_layout(state, target), towers[target])

    def test_a_tower_without_projection_needs_one(self, towers: dict[str, State]) -> None:
        tower = {name: value for name, value in towers["hugging_face"].items() if name != PROJECTION}
        with pytest.raises(MergeError, match=r"cars: the layout open_clip has a projection.*give projection="):
            convert_layout(tower, "open_clip", where="cars")
        matrix = towers["hugging_face"][PROJECTION]
        assert same(convert_layout(tower, "open_clip", projection=matrix), towers["open_clip"])
        assert same(convert_layout(tower, "hugging_face_5"), {k[13:]: v for k, v in tower.items()})
        for target in ("hugging_face", "hugging_face_5"):
            assert PROJECTION not in convert_layout(towers["open_clip"], target, drop_projection=True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"target": "open_clip", "projection": torch.ones(24, 32)}, "has a projection of its own"),
            ({"target": "open_clip", "drop_projection": True}, "has its projection as a part"),
            ({"target": "open_clip_full"}, "it has no text tower"),
            ({"target": "openclip"}, "expected one of hugging_face_full, .*found 'openclip'"),
            ({"target": "open_clip", "source": "jax"}, "found 'jax'"),
        ],
    )
    def test_what_cannot_be_is_refused(self, towers: dict[str, State], options: dict[str, Any], message: str) -> None:
        with pytest.raises(MergeError, match=message):
            convert_layout(towers["hugging_face"], **options)


class TestReading:
    def test_a_tensor_is_read_when_it_is_asked_for(self, towers: dict[str, State]) -> None:
        state = Watched(towers["open_clip"])
        converted = convert_layout(state, "hugging_face_5")
        assert state.read == []
        assert "encoder.layers.0.self_attn.q_proj.weight" in converted
        converted["encoder.layers.0.self_attn.q_proj.weight"]
        assert state.read == ["visual.transformer.resblocks.0.attn.in_proj_weight"]
        pickle.loads(pickle.dumps(converted))  # a suite goes to the workers of a loader

    def test_a_third_does_not_hold_the_other_two(self, towers: dict[str, State]) -> None:
        for name, value in convert_layout(towers["open_clip"], "hugging_face").items():
            if "_proj" in name and "out_proj" not in name:
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
                assert value.is_contiguous()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_dtypes_stay(self, towers: dict[str, State], dtype: torch.dtype) -> None:
        state = {name: value.to(dtype) for name, value in towers["hugging_face"].items()}
        assert same(convert_layout(convert_layout(state, "task_vectors"), "hugging_face"), state)

    def test_shapes_that_cannot_be_split_or_stacked_are_refused(self, towers: dict[str, State]) -> None:
        name = "visual.transformer.resblocks.1.attn.in_proj_bias"
        with pytest.raises(MergeError, match=f"{name}: expected stacked .*found .95,"):
            convert_layout({**towers["open_clip"], name: torch.ones(95)}, "hugging_face")[
                "vision_model.encoder.layers.1.self_attn.v_proj.bias"
            ]
        name = "vision_model.encoder.layers.1.self_attn.k_proj.bias"
        with pytest.raises(MergeError, match=r"one shape and dtype, found .*k_proj\.bias torch\.float64"):
            convert_layout({**towers["hugging_face"], name: torch.ones(32).double()}, "open_clip")[
                "visual.transformer.resblocks.1.attn.in_proj_bias"
            ]


class TestErrors:
    @pytest.mark.parametrize("layout", ["hugging_face", "open_clip", "hugging_face_5", "task_vectors"])
    def test_missing_and_unknown_names_are_named(self, towers: dict[str, State], layout: str) -> None:
        target = "open_clip" if layout.startswith("hugging") else "hugging_face"
        state = dict(towers[layout])
        gone = next(name for name in state if ".1." in name and name.endswith("out_proj.bias"))
        del state[gone]
        with pytest.raises(MergeError, match=r"sun397: .*1 missing .*out_proj\.bias.*0 extra"):
            convert_layout(state, target, where="sun397")
        prefix = next(iter(towers[layout])).partition("embedd")[0].partition("class")[0]
        with pytest.raises(MergeError, match=r"0 missing, 1 extra .*surprise"):
            convert_layout({**towers[layout], f"{prefix}surprise": torch.ones(1)}, target)

    def test_a_missing_block_is_missed(self, towers: dict[str, State]) -> None:
        state = {name: value for name, value in towers["open_clip"].items() if "resblocks.0." not in name}
        with pytest.raises(MergeError, match="12 missing"):
            convert_layout(state, "hugging_face")

    @pytest.mark.parametrize("number", [999999, "9" * 5000, "01"])
    def test_a_made_up_number_of_blocks_costs_nothing(self, towers: dict[str, State], number: int | str) -> None:
        state = {**towers["open_clip"], f"visual.transformer.resblocks.{number}.ln_1.weight": torch.ones(1)}
        with pytest.raises(MergeError, match=rf"1 extra .*resblocks\.{number}"):
            convert_layout(state, "hugging_face")

    def test_other_architectures_convert_where_only_a_prefix_differs(self) -> None:
        state = {"visual.layer1.0.conv1.weight": torch.ones(1), "visual.attnpool.q_proj.weight": torch.ones(1)}
        assert set(convert_layout(state, "open_clip_visual")) == {"layer1.0.conv1.weight", "attnpool.q_proj.weight"}
        with pytest.raises(MergeError, match="only a complete CLIP converts to the layout hugging_face"):
            convert_layout(state, "hugging_face")

    @pytest.mark.parametrize("keys", [[], ["conv1.weight", "fc.weight"], ["module.visual.proj"]])
    def test_what_is_no_clip_is_not_guessed(self, keys: list[str]) -> None:
        with pytest.raises(MergeError, match=r"weights.pt: expected the tensors of a CLIP image tower"):
            detect_layout(keys, "weights.pt")
