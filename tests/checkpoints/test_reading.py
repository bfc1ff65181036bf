"""Files are read whole or not at all, and nothing in them is ever executed."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_merge.checkpoints import SafetensorsFile, read_state
from lit_merge.checkpoints.reading import read_checkpoint
from lit_merge.errors import MergeError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


class Touch:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def same(found: Mapping[str, Tensor]) -> bool:
    """Whether it is ``STATE``."""
    return found.keys() == STATE.keys() and all(torch.equal(found[name], value) for name, value in STATE.items())


def refusal(path: str, content: object = None, read: Any = read_state) -> str:
    """The message of the error on reading, which always begins with the file's name."""
    if content is not None:
        torch.save(content, path)
    with pytest.raises(MergeError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_torch_files(suffix: str) -> None:
    torch.save(STATE, f"state{suffix}")
    assert same(read_state(f"state{suffix}"))


def test_safetensors_files_are_lazy_mappings() -> None:
    save_file(STATE, "state.safetensors")
    found = read_state(Path("state.safetensors"))
    assert isinstance(found, SafetensorsFile)
    assert same(found)
    assert len(found) == 2
    assert "c" not in found
    with pytest.raises(KeyError, match="c"):
        found["c"]


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pt"])
def test_missing_file(name: str) -> None:
    assert "no such file; expected a state dict" in refusal(name)


def test_a_file_that_vanishes() -> None:
    save_file(STATE, "state.safetensors")
    found = read_state("state.safetensors")
    Path("state.safetensors").unlink()
    with pytest.raises(MergeError, match=r"state\.safetensors: no such file"):
        found["b"]


def test_a_folder_is_not_a_file() -> None:
    Path("net.pt").mkdir()
    assert "no such file" in refusal("net.pt")


@pytest.mark.parametrize(("name", "found"), [("state.onnx", ".onnx"), ("state", "no suffix")])
def test_wrong_suffix(name: str, found: str) -> None:
    Path(name).write_bytes(b"x")
    assert f"expected .safetensors, .pt, .pth, .bin or .ckpt, found {found}" in refusal(name)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_safetensors(keep: int) -> None:
    save_file(STATE, "whole.safetensors")
    Path("cut.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:keep])
    said = refusal("cut.safetensors")
    assert "not a complete safetensors file" in said
    assert "fetch or save it again" in said


@pytest.mark.parametrize("keep", [0, 4, 300, -30])
def test_truncated_torch_file(keep: int) -> None:
    torch.save(STATE, "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:keep])
    said = refusal("cut.pt")
    assert "fetch or save it again" in said or "was not opened" in said


def test_text_that_is_called_a_torch_file() -> None:
    Path("note.pt").write_text("hello, this is not a network at all\n")
    assert "safetensors instead" in refusal("note.pt") or "fetch or save it again" in refusal("note.pt")


@pytest.mark.parametrize("read", [read_state, read_checkpoint])
@pytest.mark.parametrize("wrap", [lambda x: {"state_dict": {}, "w": x}, lambda x: x])
def test_code_is_not_executed(read: Any, wrap: Any) -> None:
    said = refusal("evil.ckpt", wrap(Touch()), read)
    assert "it holds pickled objects, which could run code, and was not opened" in said
    assert "safetensors instead" in said
    assert not Path("executed").exists()
    torch.load("evil.ckpt", weights_only=False)  # the file does hold what it is meant to hold
    assert Path("executed").exists()


def test_code_in_a_plain_pickle_is_not_executed() -> None:
    Path("evil.pt").write_bytes(pickle.dumps({"w": Touch()}))
    assert "evil.pt" in refusal("evil.pt")
    assert not Path("executed").exists()


def test_a_whole_module() -> None:
    assert "save its state_dict() as safetensors instead" in refusal("module.pt", nn.Linear(1, 1))


def test_a_checkpoint_around_the_state_dict() -> None:
    said = refusal("nested.pt", {"epoch": 3, "state_dict": STATE})
    assert "epoch: expected a tensor, found int" in said
    assert "save the state dict itself, not a checkpoint that contains it" in said


@pytest.mark.parametrize(("content", "found"), [([torch.ones(1)], "list"), ({}, "dict"), (torch.ones(1), "Tensor")])
def test_not_a_state_dict(content: object, found: str) -> None:
    assert f"expected a state dict, found {found}" in refusal("other.pt", content)


class TestCheckpoint:
    def test_read(self) -> None:
        torch.save({"state_dict": STATE, "epoch": 1}, "last.ckpt")
        assert same(read_checkpoint("last.ckpt")["state_dict"])

    def test_missing(self) -> None:
        assert "no such checkpoint; expected a local file" in refusal("gone.ckpt", read=read_checkpoint)

    @pytest.mark.parametrize(("content", "found"), [({"a": 1, "b": 2}, "found a, b"), ([1], "found list")])
    def test_something_else(self, content: object, found: str) -> None:
        said = refusal("other.ckpt", content, read_checkpoint)
        assert "expected a checkpoint of lit-merge with state_dict" in said
        assert found in said
