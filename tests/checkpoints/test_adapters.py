"""Adapters give what peft itself gives, or are refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_merge.checkpoints.adapters import AdaptedState, is_adapter, read_adapter
from lit_merge.checkpoints.digests import state_digest
from lit_merge.errors import MergeError

peft = pytest.importorskip("peft")


class Mixed(nn.Module):
    """One layer of every kind that an adapter may change."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.conv = nn.Conv2d(3, 6, (3, 2))
        self.point = nn.Conv2d(6, 4, 1)
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        x = self.point(self.conv(x)).flatten(2).mT
        x = self.attn(x, x, x, need_weights=False)[0].mean(1) + self.words(words)[:, :4]
        out: Tensor = self.norm(self.mlp(x))
        return out


def saved(network: nn.Module, folder: Path, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Save an adapter with random values through peft; the base's weights before, and peft's network."""
    base = {name: value.detach().clone() for name, value in network.state_dict().items()}
    torch.manual_seed(0)
    adapted = peft.get_peft_model(network, peft.LoraConfig(**{"init_lora_weights": False, **options}))
    with torch.no_grad():
        for value in adapted.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn_like(value))
    adapted.save_pretrained(folder)
    return base, adapted.eval()


def mixed(folder: Path, **options: Any) -> tuple[dict[str, Tensor], Any]:
    torch.manual_seed(1)
    return saved(Mixed(), folder, **options)


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)  # peft registers parameters of attention anew
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


NORM = [f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
CONV_AND_LINEAR = ["conv.weight", "conv.bias", "mlp.0.weight", "mlp.0.bias"]


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"target_modules": ["mlp.0", "mlp.2"], "r": 3, "lora_alpha": 5}, ["mlp.0.weight", "mlp.2.weight"]),
        ({"target_modules": ["mlp.0"], "r": 4, "use_rslora": True}, ["mlp.0.weight"]),
        (
            {"target_modules": ["mlp.0", "mlp.2"], "r": 2, "rank_pattern": {"0": 3}, "alpha_pattern": {r"mlp\.2": 7}},
            ["mlp.0.weight", "mlp.2.weight"],
        ),
        ({"target_modules": ["conv", "point", "words"], "r": 2}, ["words.weight", "conv.weight", "point.weight"]),
        (
            {"target_modules": ["attn"], "r": 2, "alpha_pattern": {"attn": 3}},
            ["attn.in_proj_weight", "attn.out_proj.weight"],
        ),
        (
            {"target_modules": ["mlp.0"], "bias": "all"},
            ["conv.bias", "point.bias", "attn.out_proj.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.bias", "norm.bias"],
        ),
        ({"target_modules": ["conv", "mlp.0"], "bias": "lora_only"}, CONV_AND_LINEAR),
        ({"target_modules": ["conv", "mlp.0"], "lora_bias": True}, CONV_AND_LINEAR),
        (
            {"target_modules": ["mlp.0"], "modules_to_save": ["norm", "mlp.2"]},
            ["mlp.0.weight", "mlp.2.weight", "mlp.2.bias", *NORM],
        ),
    ],
    ids=[
        "linear",
        "stabilised",
        "patterns",
        "conv, embedding",
        "attention",
        "bias",
        "lora_only",
        "lora_bias",
        "modules",
    ],
)
def test_equals_what_peft_merges_and_computes(tmp_path: Path, options: dict[str, Any], changed: list[str]) -> None:
    base, adapted = mixed(tmp_path, **options)
    images, words = torch.randn(3, 3, 5, 4), torch.tensor([1, 6, 1])
    with torch.no_grad():
        computed = adapted(images, words)
    expert = read_adapter(tmp_path, base)
    assert isinstance(expert, AdaptedState)
    assert list(expert.changed) == changed
    plain = Mixed().eval()
    plain.load_state_dict(dict(expert))
    with torch.no_grad():
        torch.testing.assert_close(plain(images, words), computed, rtol=1e-5, atol=1e-5)
    assert_equal(expert, adapted.merge_and_unload().state_dict())


@pytest.mark.parametrize("prefix", [None, "vision_model."])
def test_transformers_vision_tower_in_both_layouts(tmp_path: Path, prefix: str | None) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    base, adapted = saved(transformers.CLIPVisionModel(config), tmp_path, target_modules=["q_proj", "v_proj", "fc1"])
    merged = adapted.merge_and_unload().state_dict()
    if prefix:  # the other layout than that of the installed version
        flip: Callable[[str], str] = lambda k: k.removeprefix(prefix) if k.startswith(prefix) else prefix + k  # noqa: E731
        base, merged = ({flip(name): value for name, value in state.items()} for state in (base, merged))
    expert = read_adapter(tmp_path, base)
    assert len(expert.changed) == 6  # type: ignore[attr-defined]
    assert_equal(expert, merged)


def test_transposed_weights(tmp_path: Path) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    base, adapted = saved(nn.Sequential(conv1d(6, 4)), tmp_path, target_modules=["0"], fan_in_fan_out=True)
    assert_equal(read_adapter(tmp_path, base), adapted.merge_and_unload().state_dict())


def test_sums_in_single_or_double_precision_and_keeps_the_dtype(tmp_path: Path) -> None:
    base, _ = mixed(tmp_path, target_modules=["mlp.0"], r=2, lora_alpha=6)
    file = load_file(tmp_path / "adapter_model.safetensors")
    a, b = (file[f"base_model.model.mlp.0.lora_{part}.weight"].double() for part in "AB")
    for dtype, exact in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        stored = {name: value.to(dtype) if value.is_floating_point() else value for name, value in base.items()}
        expert = read_adapter(tmp_path, stored)
        expected = (stored["mlp.0.weight"].to(exact) + 3 * (b.to(exact) @ a.to(exact))).to(dtype)
        assert torch.equal(expert["mlp.0.weight"], expected)
        assert expert["mlp.2.weight"] is stored["mlp.2.weight"]


def test_tensors_are_computed_when_asked_for_and_nothing_is_mutated(tmp_path: Path) -> None:
    base, _ = mixed(tmp_path, target_modules=["mlp.0"])
    before = {name: value.clone() for name, value in base.items()}
    expert = read_adapter(tmp_path, base)
    assert expert["mlp.0.weight"] is not expert["mlp.0.weight"]
    assert "mlp.0.weight" in expert
    assert "mlp.9.weight" not in expert
    assert len(expert) == len(base)
    with pytest.raises(KeyError):
        expert["mlp.9.weight"]
    assert all(torch.equal(base[name], value) for name, value in before.items())


def test_weights_may_be_a_pickle_of_tensors_but_not_code(tmp_path: Path) -> None:
    base, adapted = mixed(tmp_path, target_modules=["mlp.0"])
    file = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(file, tmp_path / "adapter_model.bin")
    assert_equal(read_adapter(tmp_path, base), adapted.merge_and_unload().state_dict())
    torch.save(nn.Linear(1, 1), tmp_path / "adapter_model.bin")
    with pytest.raises(MergeError, match=r"adapter_model\.bin"):
        read_adapter(tmp_path, base)


@pytest.mark.parametrize(
    ("named", "base_names", "fits"),
    [
        ("openai/clip-vit-base-patch32", ["openai/clip-vit-base-patch32"], True),
        ("/data/models/clip-vit-base-patch32/", ["openai/clip-vit-base-patch32"], True),
        ("D:\\models\\clip-vit-base-patch32", ["other", "mirror/clip-vit-base-patch32"], True),
        ("/c/hub/models--openai--clip-vit-base-patch32/snapshots/3d74acf", ["openai/clip-vit-base-patch32"], True),
        ("openai/clip-vit-base-patch32", [], True),
        ("", ["openai/clip-vit-base-patch32"], True),
        ("openai/clip-vit-base-patch16", ["openai/clip-vit-base-patch32"], False),
        ("openai/CLIP-vit-base-patch32", ["openai/clip-vit-base-patch32"], False),
        ("/c/models--openai--clip-vit-base-patch16/snapshots/clip", ["openai/clip"], False),
    ],
)  # fmt: skip
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, named: str, base_names: list[str], fits: bool) -> None:
    base, _ = mixed(tmp_path, target_modules=["mlp.0"])
    edit(tmp_path, base_model_name_or_path=named)
    if fits:
        read_adapter(tmp_path, base, base_names=base_names)
    else:
        with pytest.raises(MergeError, match="give the adapter's own base") as error:
            read_adapter(tmp_path, base, base_names=base_names)
        assert repr(named) in str(error.value)
        assert repr(base_names[0]) in str(error.value)


def edit(folder: Path, **options: Any) -> None:
    """Change options of a saved adapter; an ellipsis removes one."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | options
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"use_dora": True}, "use_dora: true: more than plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type: expected LORA, found 'IA3'"),
        ({"peft_type": "ADALORA"}, "peft_type: expected LORA, found 'ADALORA'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"use_qalora": True}, "use_qalora"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"option_of_next_year": 3}, "option_of_next_year"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base"),
        ({"r": ...}, "r: expected a positive number, found None"),
        ({"lora_alpha": ...}, "lora_alpha: expected a positive number, found None"),
        ({"lora_alpha": float("nan")}, "lora_alpha: expected a positive number, found nan"),
        ({"r": True}, "r: expected a positive number, found True"),
        ({"r": 4}, r"mlp\.0: expected A \(4, …\)"),
        ({"rank_pattern": {"mlp.0": 5}}, r"mlp\.0: expected A \(5, …\)"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern: not a regular expression"),
        ({"rank_pattern": [3]}, "rank_pattern"),
        ({"modules_to_save": "norm"}, "modules_to_save: expected names"),
        ({"bias": "some"}, "bias: expected none, all or lora_only"),
        ({"fan_in_fan_out": True}, r"it changes a tensor of floats \(4, 8\)"),
        ({"peft_version": "0.30.1"}, "what PEFT 0.30 does is not known"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_refuses_options_that_it_does_not_know(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    base, _ = mixed(tmp_path, target_modules=["attn" if "peft_version" in options else "mlp.0"])
    edit(tmp_path, **options)
    with pytest.raises(MergeError, match=says) as error:
        read_adapter(tmp_path, base)
    assert str(tmp_path) in str(error.value)


def test_the_base_must_be_the_one_that_finetune_started_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, _ = mixed(tmp_path / "adapter", target_modules=["mlp.0"])
    other = base | {"norm.weight": base["norm.weight"] + 1}
    facts = tmp_path / "finetune.json"
    for start in ("", "vision_model."):  # the layout is not what makes a base
        facts.write_text(json.dumps({"base": state_digest({start + name: value for name, value in base.items()})}))
        read_adapter(tmp_path / "adapter", base)
    monkeypatch.chdir(tmp_path / "adapter")
    for folder in (tmp_path / "adapter", Path()):
        with pytest.raises(MergeError, match="give the base that it was trained on") as error:
            read_adapter(folder, other)
    for expected in (str(facts), json.loads(facts.read_text())["base"][:12], state_digest(other)[:12]):
        assert expected in str(error.value)
    facts.write_text("{}")  # of somebody else
    read_adapter(tmp_path / "adapter", other)
    facts.write_text("{")
    with pytest.raises(MergeError, match=r"finetune\.json"):
        read_adapter(tmp_path / "adapter", base)


LINEAR = "base_model.model.mlp.0.lora_"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({f"{LINEAR}B.weight": None}, r"mlp\.0: expected lora_A\.weight and lora_B\.weight, found lora_A\.weight"),
        ({f"{LINEAR}A.weight": torch.full((8, 4), torch.nan)}, "32 of 32 values are NaN"),
        ({f"{LINEAR}A.weight": torch.ones(8, 5)}, r"a tensor of floats \(8, 5\), and mlp\.0\.weight .* \(8, 4\)"),
        ({f"{LINEAR}B.weight": torch.ones(8, 7)}, r"found \(8, 4\) and \(8, 7\)"),
        ({f"{LINEAR}magnitude_vector": torch.ones(8)}, "magnitude_vector: not a tensor of plain LoRA"),
        ({"base_model.model.mlp.2.weight": torch.ones(4, 8)}, r"mlp\.2\.weight: not a tensor of plain LoRA"),
        ({"base_model.model.mlp.0.bias": torch.ones(8)}, r"mlp\.0\.bias: not a tensor of plain LoRA"),
        ({"mlp.0.lora_A.weight": torch.ones(8, 4)}, r"mlp\.0\.lora_A\.weight: not a tensor of plain LoRA"),
        ({"base_model.model.norm.weight": torch.ones(9)}, r"norm\.weight: expected \(4,\)"),
        ({"base_model.model.head.norm.weight": torch.ones(4)}, r"the base has no head\.norm\.weight"),
        (
            {f"base_model.model.text.lora_{p}.weight": torch.ones(s) for p, s in (("A", (8, 4)), ("B", (4, 8)))},
            r"text: the base has no text\.weight",
        ),
        (
            {f"base_model.model.mlp.base_layer.0.lora_{p}.weight": torch.ones(8, 4 * (p == "A") or 8) for p in "AB"},
            r"a second change of mlp\.0\.weight",
        ),
        ({f"{LINEAR}A.weight": torch.ones(8, 4).to(torch.float8_e4m3fn)}, "float8"),
        ({f"{LINEAR}{p}.weight": None for p in "AB"}, "no LoRA tensors"),
    ],
)  # fmt: skip
def test_refuses_tensors_that_do_not_fit(tmp_path: Path, change: dict[str, Tensor | None], says: str) -> None:
    base, _ = mixed(tmp_path, target_modules=["mlp.0"], modules_to_save=["norm"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = {key: value for key, value in (load_file(path) | change).items() if value is not None}
    save_file(tensors, path)
    with pytest.raises(MergeError, match=says) as error:
        read_adapter(tmp_path, base)
    assert str(path) in str(error.value)


def test_refuses_damaged_folders(tmp_path: Path) -> None:
    base, _ = mixed(tmp_path / "good", target_modules=["mlp.0"])
    assert is_adapter(tmp_path / "good")
    assert not is_adapter(tmp_path)
    for content, says in (("{", "not readable as JSON"), ("[1]", "expected an object"), (None, "no such file")):
        path = tmp_path / "good" / "adapter_config.json"
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(MergeError, match=says):
            read_adapter(tmp_path / "good", base)
    (tmp_path / "good" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 8}')
    weights = tmp_path / "good" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(MergeError, match=r"adapter_model\.safetensors"):
        read_adapter(tmp_path / "good", base)
    weights.unlink()
    with pytest.raises(MergeError, match="an adapter without weights"):
        read_adapter(tmp_path / "good", base)
