from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from lit_merge import MergeError
from lit_merge.checkpoints.reading import read_state
from lit_merge.checkpoints.shards import Kind, ShardWriter

KINDS = {"a": Kind(torch.bfloat16, (3, 5)), "b": Kind(torch.float64, ()), "c": Kind(torch.int64, (0, 2))}


def value(name: str) -> torch.Tensor:
    kind = KINDS[name]
    return torch.arange(kind.numel).reshape(kind.shape).to(kind.dtype)


def test_parts_come_in_any_order(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, KINDS) as writer:
        flat = value("a").flatten()
        writer.write("a", flat[8:], 8)
        writer.write("b", value("b"))
        writer.write("a", flat[:8], 0)
        with pytest.raises(MergeError, match=r"a: expected torch.bfloat16 \(3,\), found torch.bfloat16 \(4,\)"):
            writer.write("a", flat[:4], 12)
        writer.write("c", value("c"))
    found = read_state(writer.path)
    assert all(torch.equal(found[name], value(name)) and found[name].dtype == KINDS[name].dtype for name in KINDS)


@pytest.mark.parametrize("written", [["a"], ["a", "b", "c"]], ids=["between shards", "before they are renamed"])
def test_what_a_killed_writer_leaves_is_removed_and_nothing_looks_whole(tmp_path: Path, written: list[str]) -> None:
    if (child := os.fork()) == 0:
        writer = ShardWriter(tmp_path, KINDS, shard_bytes=1)
        for name in written:
            writer.write(name, value(name))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    left = list(tmp_path.iterdir())
    assert len(left) == len(written)
    assert all(path.name.startswith(".") and path.suffix == ".tmp" for path in left)
    living = ShardWriter(tmp_path, KINDS, shard_bytes=1)
    living.write("a", value("a"))
    with ShardWriter(tmp_path, KINDS) as writer:  # removes what the killed one left, and not what the living one has
        for name in KINDS:
            writer.write(name, value(name))
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names
    assert [name.startswith(".model-00001-of-00003") for name in names - {"model.safetensors"}] == [True]
    living.__exit__(ValueError, ValueError(), None)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_weights_that_are_replaced_take_their_description_with_them(tmp_path: Path) -> None:
    for name in ("merge.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors", "config.json"):
        (tmp_path / name).write_text("old")
    with pytest.raises(MergeError, match="there are weights already"):
        ShardWriter(tmp_path, KINDS)
    with pytest.raises(ValueError, match="stop"), ShardWriter(tmp_path, KINDS, overwrite=True):
        raise ValueError("stop")
    assert len(list(tmp_path.iterdir())) == 4
    with ShardWriter(tmp_path, KINDS, overwrite=True, describing=["merge.json"]) as writer:
        for name in KINDS:
            writer.write(name, value(name))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
