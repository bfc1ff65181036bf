"""Zero-shot heads: the same through transformers and open_clip, by their own functions, and from the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_merge import MergeError
from lit_merge.encoders.heads import CosineHead
from lit_merge.encoders.text_towers import HuggingFaceText, OpenClipText, TextTower
from lit_merge.encoders.zero_shot import zero_shot_head, zero_shot_weights
from lit_merge.suites.task_files import load_task, task_names

transformers = pytest.importorskip("transformers")

CLASSES = ["annual crop land", "T - shirt / top", "お", 'the "stop" sign']
TEMPLATES = ["a photo of a {c}.", "{c}", 'a close up photo of a "{c}" {curly}.']
WORDS = ["an apple", "a pear"]
NAME = "lit-merge-tiny-text"


def tokenizer() -> Any:
    """CLIP's tokenizer as transformers has it, from the vocabulary that comes with open_clip."""
    simple = open_clip.SimpleTokenizer()
    rename = {49406: "<|startoftext|>", 49407: "<|endoftext|>"}
    vocab = {rename.get(number, token): number for token, number in simple.encoder.items()}
    return transformers.CLIPTokenizer(vocab=vocab, merges=list(simple.bpe_ranks))


def write_clip(path: Path, tokens: Any, vocabulary: int) -> None:
    """Let transformers write a tiny CLIP."""
    common = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = {**common, "vocab_size": vocabulary, "eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2}
        vision = {**common, "image_size": 8, "patch_size": 4}
        model = transformers.CLIPModel(
            transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
        )
        for value in model.parameters():
            value.data.normal_(std=0.3)  # far from the small values that hide mistakes
        model.logit_scale.data.fill_(4.0)
    model.save_pretrained(path)
    tokens.save_pretrained(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP that knows the letters, quick to read."""
    path = tmp_path_factory.mktemp("small") / "tiny"
    vocab = {
        letter + end: 2 * n + bool(end) for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz") for end in ("", "</w>")
    }
    vocab |= {"an</w>": 52, "<|startoftext|>": 53, "<|endoftext|>": 54}
    write_clip(path, transformers.CLIPTokenizer(vocab=vocab, merges=[("a", "n</w>")]), 55)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with CLIP's vocabulary, and its open_clip architecture."""
    path = tmp_path_factory.mktemp("clip") / "tiny"
    write_clip(path, tokenizer(), 49408)
    config = {
        "embed_dim": 6,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 2},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (path.parent / f"{NAME}.json").write_text(json.dumps(config))
    open_clip.add_model_config(path.parent / f"{NAME}.json")
    return path


def open_clip_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The text tower of transformers under open_clip's names, by hand."""
    found = {
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T.contiguous(),
        "logit_scale": state["logit_scale"],
        "visual.proj": torch.zeros(1),  # not looked at
    }
    for n in range(2):
        old, new = f"text_model.encoder.layers.{n}.", f"transformer.resblocks.{n}."
        for part in ("weight", "bias"):
            third = [state[f"{old}self_attn.{x}_proj.{part}"] for x in "qkv"]
            found[f"{new}attn.in_proj_{part}"] = torch.cat(third)
            pairs = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
            pairs |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
            found |= {f"{new}{ours}.{part}": state[f"{old}{theirs}.{part}"] for theirs, ours in pairs.items()}
    return found


@pytest.fixture(scope="module")
def towers(folder: Path) -> tuple[HuggingFaceText, OpenClipText]:
    """The same weights through both libraries."""
    return HuggingFaceText(folder), OpenClipText(NAME, open_clip_names(load_file(folder / "model.safetensors")))


def test_both_libraries_give_the_same_head(towers: tuple[HuggingFaceText, OpenClipText]) -> None:
    heads = [zero_shot_weights(tower, CLASSES, TEMPLATES) for tower in towers]
    assert (heads[0] - heads[1]).abs().max() < 1e-5
    assert heads[0].shape == (4, 6)
    assert (heads[0].norm(dim=-1) - 1).abs().max() < 1e-6
    assert towers[0].logit_scale == pytest.approx(torch.tensor(4.0).exp().item()) == towers[1].logit_scale


def test_the_head_is_that_of_open_clip_itself(towers: tuple[HuggingFaceText, OpenClipText]) -> None:
    templates = [lambda c, text=text: text.replace("{c}", c) for text in TEMPLATES]
    theirs = open_clip.build_zero_shot_classifier(towers[1]._model, towers[1]._tokenizer, CLASSES, templates)
    assert (zero_shot_weights(towers[1], CLASSES, TEMPLATES) - theirs.T).abs().max() < 1e-6


def test_embeddings_are_those_of_the_whole_clip(towers: tuple[HuggingFaceText, OpenClipText], folder: Path) -> None:
    whole = transformers.CLIPModel.from_pretrained(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(CLASSES, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = whole.get_text_features(**tokens)
    theirs = getattr(theirs, "pooler_output", theirs)  # transformers 5 returns an output object
    assert (towers[0].encode(CLASSES) - theirs).abs().max() < 1e-5


def test_logits_are_those_of_the_whole_clip(folder: Path, tmp_path: Path) -> None:
    """The scale counts once."""
    whole = transformers.CLIPModel.from_pretrained(folder)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(CLASSES, padding=True, return_tensors="pt")
    pictures = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = whole(**tokens, pixel_values=pictures).logits_per_image
        features = whole.visual_projection(whole.vision_model(pixel_values=pictures).pooler_output)
        head = zero_shot_head(HuggingFaceText(folder), CLASSES, ["{c}"], cache_dir=tmp_path)
        assert (head(features) - theirs).abs().max() < 1e-4
    assert not any(value.requires_grad for value in head.parameters())


def test_tokens_agree_on_all_bundled_classes() -> None:
    names = [name for task in task_names() for name in load_task(task).class_names()]
    prompts = [text.replace("{c}", name) for text in TEMPLATES for name in names]
    ours = tokenizer()(prompts)["input_ids"]
    theirs = open_clip.SimpleTokenizer()(prompts).tolist()
    assert all(theirs_[: len(ours_)] == ours_ for ours_, theirs_ in zip(ours, theirs, strict=True))


class Counting:
    """A tower of four features that counts its prompts."""

    logit_scale = 7.0

    def __init__(self, weights: str = "a") -> None:
        self.weights = weights
        self.seen: list[str] = []

    def encode(self, prompts: Sequence[str]) -> Tensor:
        self.seen += prompts
        return torch.tensor([[len(p), p.count("a"), p.count("b") + 1, 2.0] for p in prompts])

    def digest(self) -> str:
        return self.weights


def test_a_mean_of_unit_vectors_over_batches() -> None:
    classes = [f"class {'ab' * n}" for n in range(150)]  # 450 prompts: a class is cut by the end of a batch
    tower = Counting()
    weight = zero_shot_weights(tower, classes, TEMPLATES)
    expected = tower.encode([text.replace("{c}", classes[85]) for text in TEMPLATES]).double()
    mean = torch.nn.functional.normalize(expected, dim=-1).mean(0)
    assert torch.allclose(weight[85].double(), mean / mean.norm(), atol=1e-7)
    assert isinstance(tower, TextTower)


class TestCache:
    def test_a_second_time_nothing_is_encoded(self, tmp_path: Path) -> None:
        first = zero_shot_head(Counting(), ["x", "y"], TEMPLATES, cache_dir=tmp_path)
        tower = Counting()
        again = zero_shot_head(tower, ["x", "y"], TEMPLATES, cache_dir=tmp_path)
        assert tower.seen == []
        assert torch.equal(first.weight, again.weight)
        assert isinstance(again, CosineHead)
        assert again.scale == 7.0

    @pytest.mark.parametrize(
        ("tower", "classes", "templates"),
        [
            (Counting("b"), ["x", "y"], TEMPLATES),
            (Counting(), ["y", "x"], TEMPLATES),
            (Counting(), ["x", "y"], TEMPLATES[:2]),
            (Counting(), ["x", "z"], TEMPLATES),
        ],
    )
    def test_whatever_decides_the_head_is_in_its_name(
        self, tmp_path: Path, tower: Counting, classes: list[str], templates: list[str]
    ) -> None:
        zero_shot_head(Counting(), ["x", "y"], TEMPLATES, cache_dir=tmp_path)
        zero_shot_head(tower, classes, templates, cache_dir=tmp_path)
        assert len(tower.seen) == len(classes) * len(templates)
        assert len(list((tmp_path / "heads").iterdir())) == 2

    @pytest.mark.parametrize("damage", ["cut", "rows", "values", "names"])
    def test_a_damaged_file_is_made_again(self, tmp_path: Path, damage: str) -> None:
        good = zero_shot_head(Counting(), ["x", "y"], TEMPLATES, cache_dir=tmp_path)
        (path,) = (tmp_path / "heads").iterdir()
        if damage == "cut":
            path.write_bytes(path.read_bytes()[:-5])
        else:
            weight = {"rows": torch.eye(4), "values": torch.zeros(2, 4), "names": torch.eye(4)[:2]}[damage]
            save_file({"wrong" if damage == "names" else "weight": weight}, path)
        with pytest.warns(UserWarning, match="damaged"):
            again = zero_shot_head(Counting(), ["x", "y"], TEMPLATES, cache_dir=tmp_path)
        assert torch.equal(good.weight, again.weight)
        assert torch.equal(load_file(path)["weight"], good.weight)

    def test_digests_tell_weights_and_tokenizers_apart(self, small: Path, tmp_path: Path) -> None:
        digests = {HuggingFaceText(small).digest()}
        for change in ("weights", "tokenizer", "config"):
            copy = Path(shutil.copytree(small, tmp_path / change))
            if change == "weights":
                state = load_file(copy / "model.safetensors")
                state["text_projection.weight"][0, 0] += 1
                save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
            elif change == "tokenizer":
                content = json.loads((copy / "tokenizer.json").read_text())
                content["model"]["merges"].pop()
                (copy / "tokenizer.json").write_text(json.dumps(content))
            else:
                content = json.loads((copy / "config.json").read_text())
                content["text_config"]["hidden_act"] = "gelu"
                (copy / "config.json").write_text(json.dumps(content))
            digests.add(HuggingFaceText(copy).digest())
        assert len(digests) == 4


class TestFiles:
    @pytest.mark.parametrize("kind", ["bin", "sharded"])
    def test_other_formats(self, small: Path, tmp_path: Path, kind: str) -> None:
        copy = Path(shutil.copytree(small, tmp_path / "copy"))
        state = load_file(copy / "model.safetensors")
        (copy / "model.safetensors").unlink()
        if kind == "bin":  # as old transformers wrote it, with the numbers of the positions
            positions = torch.arange(77)[None]
            torch.save({**state, "text_model.embeddings.position_ids": positions}, copy / "pytorch_model.bin")
        else:
            transformers.CLIPModel.from_pretrained(small).save_pretrained(copy, max_shard_size="20KB")
            assert (copy / "model.safetensors.index.json").is_file()
        assert torch.equal(HuggingFaceText(copy).encode(WORDS), HuggingFaceText(small).encode(WORDS))

    def test_randomness_elsewhere_is_left_alone(self, folder: Path) -> None:
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        HuggingFaceText(folder).encode(["x"])
        OpenClipText(NAME, open_clip_names(load_file(folder / "model.safetensors"))).encode(["x"])
        assert torch.equal(torch.rand(1), expected)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"logit_scale": None}, "logit_scale: missing"),
            ({"logit_scale": torch.tensor(100.0)}, "logit_scale: expected one number, the logarithm"),
            ({"text_projection.weight": None}, "1 tensors missing: text_projection.weight"),
            ({"text_model.extra": torch.zeros(1)}, "1 tensors unexpected: text_model.extra"),
            ({"text_projection.weight": torch.zeros(5, 16)}, r"shape \(6, 16\), found \(5, 16\)"),
            ({"text_projection.weight": torch.full((6, 16), float("nan"))}, "text_projection.weight"),
            ({"text_projection.weight": torch.zeros(6, 16)}, "embedding of 'x' is zero"),
        ],
    )
    def test_wrong_weights(self, small: Path, tmp_path: Path, change: dict[str, Tensor | None], message: str) -> None:
        copy = Path(shutil.copytree(small, tmp_path / "copy"))
        state = load_file(copy / "model.safetensors") | change
        save_file({name: value for name, value in state.items() if value is not None}, copy / "model.safetensors")
        with pytest.raises(MergeError, match=message):
            zero_shot_head(HuggingFaceText(copy), ["x"], ["{c}"], cache_dir=tmp_path)

    def test_not_a_full_clip(self, small: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(small, tmp_path / "copy"))
        (copy / "tokenizer.json").unlink()
        with pytest.raises(MergeError, match=r"no tokenizer; expected tokenizer\.json"):
            HuggingFaceText(copy)
        (copy / "config.json").write_text('{"model_type": "clip_vision_model"}')
        with pytest.raises(MergeError, match=r"expected clip, .*found 'clip_vision_model'"):
            HuggingFaceText(copy)

    def test_a_tokenizer_of_another_model(self, small: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(small, tmp_path / "copy"))
        special = {"<|startoftext|>": 0, "<|endoftext|>": 1, "x</w>": 2}
        (copy / "tokenizer.json").unlink()
        transformers.CLIPTokenizer(vocab=special, merges=[]).save_pretrained(copy)
        with pytest.raises(MergeError, match="does not end a text with token 54"):
            HuggingFaceText(copy).encode(["x"])

    def test_wrong_architectures(self) -> None:
        with pytest.raises(MergeError, match="ViT-B-33: no architecture of open_clip"):
            OpenClipText("ViT-B-33", {})
        with pytest.raises(MergeError, match="roberta-base of the Hugging Face hub"):
            OpenClipText("roberta-ViT-B-32", {})

    @pytest.mark.parametrize(
        ("classes", "templates", "message"),
        [([], ["{c}"], "as lists"), ("cat", ["{c}"], "as lists"), (["x"], ["a photo"], "expected {c} where")],
    )
    def test_wrong_lists(self, classes: list[str], templates: list[str], message: str) -> None:
        with pytest.raises(MergeError, match=message):
            zero_shot_weights(Counting(), classes, templates)
