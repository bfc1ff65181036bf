"""Files are read whole or not at all, and nothing in them is ever executed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_merge.checkpoints import SafetensorsFile, read_state, torch_files
from lit_merge.checkpoints.reading import ShardedSafetensors, file_digest, read_checkpoint
from lit_merge.checkpoints.torch_files import TorchFile, load_inert
from lit_merge.errors import MergeError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3)}


class Touch:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def write(state: dict[str, Tensor], name: str) -> None:
    """Save in the format of the suffix."""
    if name.endswith(".safetensors"):
        save_file(state, name)
    else:
        torch.save(state, name)


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


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_torch_files(suffix: str, zipped: bool) -> None:
    torch.save(STATE, f"state{suffix}", _use_new_zipfile_serialization=zipped)
    found = read_state(f"state{suffix}")
    assert same(found)
    assert same(pickle.loads(pickle.dumps(found)))
    assert ("a.weight" in found, "c" in found, len(found)) == (True, False, 2)
    with pytest.raises(KeyError, match="c"):
        found["c"]


def test_parameters_come_as_tensors_and_views_keep_their_values() -> None:
    wide = torch.randn(3, 4)
    state = {"w": nn.Parameter(wide), "turned": wide.T, "row": wide[1], "none": torch.zeros(0), "tied": wide}
    torch.save(state, "state.pt")
    found = read_state("state.pt")
    assert isinstance(found, TorchFile)
    assert found.tied == {"tied": "w"}
    assert list(found) == list(state)
    assert all(torch.equal(found[name], value) and not found[name].requires_grad for name, value in state.items())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="counts mappings as Linux lists them")
@pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
def test_what_was_read_and_dropped_is_unmapped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"w{n}": torch.full((1000,), float(n)) for n in range(8)}
    write(state, name)
    load = Mock(side_effect=load_inert)
    monkeypatch.setattr(torch_files, "_WINDOW", 2 * 4000)
    monkeypatch.setattr(torch_files, "load_inert", load)
    found = read_state(name)
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert load.call_count == (4 if name == "state.pt" else 0)
    assert Path("/proc/self/maps").read_text().count(str(Path(name).absolute())) <= (name == "state.pt")


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


@pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
def test_a_file_that_is_replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_merge.checkpoints.torch_files._WINDOW", 1)
    write({"a": torch.ones(3), "b": torch.ones(3)}, name)
    found = read_state(name)
    assert found["a"].sum() == 3
    write({"a": torch.zeros(3), "b": torch.zeros(3)}, "other")
    os.utime("other", ns=(1, 1))  # however coarse the clock of the file system
    Path("other").replace(name)
    with pytest.raises(MergeError, match=rf"{name}: the file changed while it was in use"):
        found["b"]


def test_a_folder_is_not_a_file() -> None:
    Path("net.pt").mkdir()
    assert "no such file" in refusal("net.pt")


@pytest.mark.parametrize(("name", "found"), [("state.onnx", ".onnx"), ("state", "no suffix")])
def test_wrong_suffix(name: str, found: str) -> None:
    Path(name).write_bytes(b"x")
    assert f".safetensors.index.json, .pt, .pth, .bin or .ckpt, found {found}" in refusal(name)


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
    assert "not a complete torch file (it is neither a zip archive nor a pickle)" in refusal("note.pt")


@pytest.mark.parametrize("read", [read_state, read_checkpoint])
@pytest.mark.parametrize("wrap", [lambda x: {"state_dict": {}, "w": x}, lambda x: x])
def test_code_is_not_executed(read: Any, wrap: Any) -> None:
    said = refusal("evil.ckpt", wrap(Touch()), read)
    assert "which could run code, and was not opened" in said
    assert "it holds pickled objects (" in said
    assert "safetensors instead" in said
    assert not Path("executed").exists()
    torch.load("evil.ckpt", weights_only=False)  # the file does hold what it is meant to hold
    assert Path("executed").exists()


def test_code_in_a_plain_pickle_is_not_executed() -> None:
    Path("evil.pt").write_bytes(pickle.dumps({"w": Touch()}))
    assert "evil.pt" in refusal("evil.pt")
    assert not Path("executed").exists()


def test_a_whole_module() -> None:
    said = refusal("module.pt", nn.Linear(1, 1))
    assert "save its state_dict() as safetensors instead" in said
    assert said.endswith(
        "`lit-merge convert module.pt NEW.safetensors` turns known whole-module checkpoints into safetensors"
    )


def test_a_checkpoint_around_the_state_dict() -> None:
    said = refusal("nested.pt", {"epoch": 3, "state_dict": STATE})
    assert "epoch: expected a tensor, found int" in said
    assert "save the state dict itself, not a checkpoint that contains it" in said


@pytest.mark.parametrize(("content", "found"), [([torch.ones(1)], "list"), ({}, "dict"), (torch.ones(1), "Tensor")])
def test_not_a_state_dict(content: object, found: str) -> None:
    assert f"expected a state dict, found {found}" in refusal("other.pt", content)


def shards(folder: Path) -> Path:
    """Two shards and their index, as transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {name: f"model-0000{n}-of-00002.safetensors" for n, name in enumerate(STATE, 1)}
    for name, file in names.items():
        save_file({name: STATE[name]}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": names}))
    return index


class TestShards:
    def test_read(self) -> None:
        found = read_state(shards(Path("net")))
        assert isinstance(found, ShardedSafetensors)
        assert same(found)
        assert same(pickle.loads(pickle.dumps(found)))
        assert ("b" in found, "c" in found, len(found)) == (True, False, 2)
        with pytest.raises(KeyError, match="c"):
            found["c"]

    @pytest.mark.parametrize("inner", ["", "vision"])
    def test_links_of_the_hub_cache(self, inner: str) -> None:
        snapshot, blobs = Path("models--a--b/snapshots/123", inner), Path("models--a--b/blobs")
        index = shards(snapshot)
        blobs.mkdir()
        for number, file in enumerate(sorted(snapshot.iterdir())):
            file.rename(blobs / f"hash{number}")
            file.symlink_to(Path(os.path.relpath(blobs, snapshot), f"hash{number}"))
        assert same(read_state(index))

    def test_as_transformers_writes_them(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
        )
        network = transformers.CLIPVisionModel(config)
        network.save_pretrained("clip", max_shard_size="4KB")
        assert len(list(Path("clip").glob("*.safetensors"))) > 1
        found = read_state("clip/model.safetensors.index.json")
        values = {name.removeprefix("vision_model."): value for name, value in found.items()}
        own = {name.removeprefix("vision_model."): value for name, value in network.state_dict().items()}
        assert values.keys() == own.keys()
        assert all(torch.equal(values[name], value) for name, value in own.items())


class TestDigest:
    @pytest.mark.parametrize("prefix", ["", "sha256:"])
    @pytest.mark.parametrize("name", ["state.pt", "state.safetensors"])
    def test_of_a_file(self, name: str, prefix: str) -> None:
        write(STATE, name)
        digest = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        assert file_digest(name) == digest
        assert same(read_state(name, sha256=prefix + digest.upper()))
        wrong = "0" * 64
        said = refusal(name, read=partial(read_state, sha256=prefix + wrong))
        assert f"expected sha256:{wrong}, found sha256:{digest}" in said

    def test_of_shards(self) -> None:
        index = shards(Path("net"))
        command = "sha256sum *.safetensors | sha256sum"
        said = subprocess.run(command, shell=True, cwd="net", capture_output=True, text=True, check=True).stdout
        assert file_digest(index) == said.split()[0]
        assert same(read_state(index, sha256=f"sha256:{said.split()[0]}"))

    @pytest.mark.parametrize("sha256", ["", "sha256:12", "md5:" + "0" * 64, "g" * 64])
    def test_that_is_none(self, sha256: str) -> None:
        write(STATE, "state.safetensors")
        said = refusal("state.safetensors", read=partial(read_state, sha256=sha256))
        assert "expected sha256: and 64 hex digits" in said


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
