"""An exported merge is a plain state dict with its provenance."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from toys import expert_state, network

from lit_merge.checkpoints import read_state, state_digest, write_merged


@pytest.mark.parametrize("kind", ["vit", "cnn", "tied", "mlp"])
def test_the_file_loads_into_the_plain_network(kind: str) -> None:
    net = network(kind)  # type: ignore[arg-type]
    state = expert_state(net, 3)
    path = write_merged("out", state, {"method": "Test"})
    assert path == Path("out/merged.safetensors")
    net.load_state_dict(load_file(path), strict=True)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


def test_provenance_and_hash() -> None:
    state = expert_state(network("tied"), 3)
    path = write_merged(Path("out"), state, {"method": "Test", "steps": 3})
    said = json.loads(Path("out/merge.json").read_text())
    assert said["method"] == "Test"
    assert said["steps"] == 3
    assert said["weights"] == {"file": "merged.safetensors", "sha256": state_digest(load_file(path))}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["sha256"] == said["weights"]["sha256"] == state_digest(read_state(path))
    assert metadata["format"] == "pt"
    assert sorted(p.name for p in Path("out").iterdir()) == ["merge.json", "merged.safetensors"]


def test_views_and_shared_memory_are_written_as_they_look() -> None:
    wide = torch.arange(6.0).reshape(2, 3)
    path = write_merged("out", {"t": wide.T, "a": wide, "b": wide, "part": wide[:, 1]}, {})
    found = load_file(path)
    assert torch.equal(found["t"], wide.T)
    assert torch.equal(found["a"], found["b"])
    assert torch.equal(found["part"], torch.tensor([1.0, 4.0]))


class TestDigest:
    def test_says_every_difference(self) -> None:
        value = torch.arange(4.0)
        states = [
            {"w": value},
            {"v": value},
            {"w": value + 1e-7},
            {"w": value.double()},
            {"w": value.reshape(2, 2)},
            {"w": value, "v": torch.empty(0)},
        ]
        assert len({state_digest(state) for state in states}) == len(states)

    def test_does_not_depend_on_storage(self) -> None:
        wide = torch.arange(6.0).reshape(2, 3)
        assert state_digest({"w": wide.T}) == state_digest({"w": wide.T.contiguous()})
        assert state_digest({"w": torch.nn.Parameter(wide)}) == state_digest({"w": wide})

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.float64])
    def test_takes_every_dtype(self, dtype: torch.dtype) -> None:
        assert len(state_digest({"w": torch.ones(3).to(dtype), "scalar": torch.tensor(1).to(dtype)})) == 64
