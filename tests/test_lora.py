"""Low-rank changes: what starts, what changes, and that peft computes the same."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import SIZE, Kind, network

from lit_merge.checkpoints.adapters import read_adapter
from lit_merge.errors import MergeError
from lit_merge.lora import LoraNetwork, LoraOptions, write_adapter

SMALL = LoraOptions(rank=2, alpha=3.0)


def images() -> Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def trained(plain: nn.Module, options: LoraOptions = SMALL) -> LoraNetwork:
    """Low-rank changes that are not zero."""
    lora, generator = LoraNetwork(plain, options), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lora


@pytest.mark.parametrize("kind", ["vit", "cnn", "mlp"])
def test_it_starts_as_the_network(kind: Kind) -> None:
    plain = network(kind).eval()
    lora = LoraNetwork(plain, SMALL)
    assert torch.equal(lora(images()), plain(images()))
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in lora.merged_state().items())


@pytest.mark.parametrize("kind", ["vit", "cnn", "mlp"])
def test_it_computes_what_its_merged_weights_do(kind: Kind) -> None:
    plain = network(kind).eval()
    lora, before = trained(plain), plain(images())
    state = lora.merged_state()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    torch.testing.assert_close(lora(images()), plain(images()))
    assert (plain(images()) - before).abs().max() > 0.01


def test_the_change_is_of_the_rank_and_scale() -> None:
    plain = network("mlp")
    lora = trained(plain)
    a, b = (lora.get_parameter(f"1.lora_{side}.weight") for side in "AB")
    change = lora.merged_state()["1.weight"] - plain.state_dict()["1.weight"]
    torch.testing.assert_close(change, 3 / 2 * b @ a, rtol=1e-4, atol=1e-6)
    assert torch.linalg.matrix_rank(b @ a) == 2


def test_only_factors_are_trained_and_kept() -> None:
    lora = LoraNetwork(network("vit"), LoraOptions(rank=3, targets=["attn", "c_proj"]))
    block = "transformer.resblocks.1."
    names = [block + end for end in ("attn.lora_A", "attn.lora_B", "mlp.c_proj.lora_A", "mlp.c_proj.lora_B")]
    kept = {name.removesuffix(".weight"): tuple(value.shape) for name, value in lora.state_dict().items()}
    assert [name for name in kept if name.startswith(block)] == names
    assert [kept[name] for name in names] == [(3, 16), (48, 3), (3, 32), (16, 3)]
    assert [name for name, _ in lora.named_parameters()] == list(lora.state_dict())


def test_seed_and_name_decide_the_start() -> None:
    def start(**options: Any) -> dict[str, Tensor]:
        torch.manual_seed(int(torch.randint(1000, ())))  # whatever the global generator does
        return LoraNetwork(network("vit"), LoraOptions(rank=4, **options)).state_dict()

    first, fewer, other = start(), start(targets=["c_fc"]), start(seed=1)
    assert all(torch.equal(value, first[name]) for name, value in start().items())
    assert all(torch.equal(value, first[name]) for name, value in fewer.items())
    for name, value in first.items():
        if name.endswith("B.weight"):
            assert not value.any()
        else:
            bound = value.shape[1] ** -0.5
            assert not torch.equal(value, other[name])
            assert value.abs().max() <= bound
            assert value.std().item() == pytest.approx(bound / 3**0.5, rel=0.35)


def test_training_leaves_running_statistics_alone() -> None:
    lora = LoraNetwork(network("cnn"), SMALL).train()
    before = {name: value.clone() for name, value in lora.frozen.named_buffers()}
    lora(images()).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in lora.frozen.named_buffers())
    assert all(parameter.grad is not None for parameter in lora.parameters())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "vit",
            {"targets": ["attn", "q_proj"]},
            "no linear or attention module is called 'q_proj'; there are attn, c_fc",
        ),
        ("vit", {"targets": ["out_proj"]}, "called 'out_proj'"),
        ("vit", {"targets": ["conv1"]}, "called 'conv1'"),
        ("tied", {}, r"first\.weight is tied to another tensor; give targets without first"),
        ("mlp", {"rank": 0}, r"lora\.rank: expected at least 1, found 0"),
        ("mlp", {"alpha": 0.0}, r"lora\.alpha: expected a positive number"),
        ("mlp", {"targets": []}, r"lora\.targets: expected a list"),
        ("mlp", {"targets": "fc"}, r"lora\.targets: expected a list"),
    ],
)
def test_refused(kind: Kind, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        LoraNetwork(network(kind), LoraOptions(**options))


def test_a_network_without_matrices_is_refused() -> None:
    with pytest.raises(MergeError, match="there are none"):
        LoraNetwork(nn.Sequential(nn.Conv2d(3, 2, 1)))


class TestAdapter:
    """What is written is an adapter to peft, and to this package."""

    @pytest.mark.parametrize("kind", ["vit", "cnn", "mlp"])
    def test_peft_computes_the_same(self, kind: Kind, tmp_path: Path) -> None:
        peft = pytest.importorskip("peft")
        plain = network(kind).eval()
        lora = trained(plain)
        folder = write_adapter(tmp_path / "adapter", copy.deepcopy(plain), lora)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder)
        torch.testing.assert_close(loaded(images()), lora(images()), rtol=1e-4, atol=1e-5)
        merged, expected = loaded.merge_and_unload().state_dict(), lora.merged_state()
        again = read_adapter(folder, plain.state_dict())
        for name, value in expected.items():
            torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)

    def test_it_names_its_base(self, tmp_path: Path) -> None:
        pytest.importorskip("peft")
        plain = network("mlp")
        folder = write_adapter(tmp_path / "adapter", copy.deepcopy(plain), trained(plain), base_name="org/mine")
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/mine"
        read_adapter(folder, plain.state_dict(), base_names=["elsewhere/mine"])
        with pytest.raises(MergeError, match=r"an adapter of 'org/mine', and the base here is 'org/other'"):
            read_adapter(folder, plain.state_dict(), base_names=["org/other"])

    def test_it_replaces_an_older_one_as_a_whole(self, tmp_path: Path) -> None:
        pytest.importorskip("peft")
        plain, folder = network("mlp"), tmp_path / "adapter"
        folder.mkdir()
        (folder / "adapter_model.bin").write_bytes(b"old")
        write_adapter(folder, copy.deepcopy(plain), trained(plain))
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
        assert not (folder / "adapter_model.bin").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (2, 3.0)
        assert sorted(config["target_modules"]) == ["1", "3"]
