"""Hostile and broken files: each is refused with its name and the reason, and no code in it runs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hostile
import old_checkpoints as old
import pytest
import torch
from hostile import STATE, entry, safetensors, sharded, state_file, tensor_file, text

from lit_merge import TaskVectors
from lit_merge.checkpoints.convert import convert
from lit_merge.checkpoints.reading import read_checkpoint, read_state
from lit_merge.errors import MergeError

pytestmark = pytest.mark.filterwarnings("ignore")  # torch warns of old formats, with which these files are made
Write = Callable[[], str]
NAN, INF = torch.tensor([0, torch.nan, 0, 0]), torch.tensor([0, torch.inf, 0, 0])
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 605\n"

# name: file, what `read_state` says, what `convert` says
CODE: dict[str, tuple[Write, str, str]] = {
    "module": (
        hostile.in_module,
        r"\(open_clip.*which could run code",
        "it names .*system, which",
    ),
    "head": (hostile.in_head, "builtins.eval.*which could run code", "it names builtins.eval, which"),
    "optimizer": (hostile.in_optimizer, "system.*which could run code", "it names .*system, which"),
    "nested": (hostile.in_nested, "_load_from_bytes.*which could run code", "it names torch.storage._load_from_bytes"),
    "hook": (hostile.in_hook, "which could run code", "it names .*system"),
    "plain pickle": (hostile.in_plain_pickle, "which could run code", "before torch 1.6"),
    "newer pickle": (lambda: hostile.in_plain_pickle(protocol=4), "which could run code", "before torch 1.6"),
    "newer protocol": (hostile.in_newer_protocol, "is not of the protocol of torch.save", "is not of the protocol"),
    "legacy module": (lambda: hostile.in_module(_use_new_zipfile_serialization=False), "could run", "before torch 1.6"),
    "setstate": (
        hostile.in_setstate,
        "src.modeling.Restores.*could run code",
        "it holds a src.modeling.Restores",
    ),
    "allowed name": (hostile.in_allowed_name, "src.modeling.mark.*could run code", "expected a module, found dict"),
}

BROKEN: dict[str, tuple[Write, str]] = {
    "pickle as safetensors": (lambda: hostile.in_plain_pickle("x.safetensors"), "it is a pickle, .*name it .pt"),
    "torch script": (hostile.torch_script, "it is a TorchScript archive, which is a program"),
    "zip bomb": (hostile.bomb, "is compressed; torch.save never compresses"),
    "zip that claims": (hostile.claimed_entry, "its entries claim 1099511.* bytes, the file has"),
    "zip with a name twice": (hostile.twice_in_zip, "it has two entries whole/data.pkl"),
    "storage that claims": (hostile.claimed_storage, "a: its storage claims 256 bytes, and the archive has no such"),
    "tensor that claims": (hostile.giant, r"a: \(1000000, 1000000\) .* its storage holds only 16 bytes"),
    "meta tensor": (tensor_file(torch.empty(4, device="meta")), "a: expected a dense tensor with values"),
    "sparse tensor": (tensor_file(torch.eye(4).to_sparse()), "a: expected a dense tensor with values"),
    "name that is no text": (tensor_file(STATE["a"], 3), "expected names of tensors"),
    "truncated": (hostile.truncated, "not a complete safetensors file"),
    "header too long": (lambda: safetensors({"a": entry(0, 16)}, length=2**40), "its header should have 1099511627776"),
    "header too short": (lambda: safetensors({"a": entry(0, 16)}, length=7), "its header is not JSON"),
    "header too large": (lambda: safetensors(b" " * (16 * 2**20 + 1)), "bytes of JSON; expected at most 16777216"),
    "header nested": (lambda: safetensors(b"[" * 10**5), "its header is not JSON"),
    "duplicate": (hostile.duplicate, "'a' stands twice in its JSON"),
    "overlap": (lambda: safetensors({"a": entry(0, 12), "b": entry(8, 16)}), "invalid offset for tensor"),
    "hole": (lambda: safetensors({"a": entry(8, 16)}), "invalid offset for tensor"),
    "beyond the end": (lambda: safetensors({"a": entry(0, 32)}), "not a complete safetensors file"),
    "wrong size": (lambda: safetensors({"a": entry(0, 16) | {"shape": [5]}}), "invalid shape, data type, or offset"),
    "no tensors": (lambda: safetensors({}, b""), "expected a state dict, found no tensor"),
    "index upwards": (lambda: hostile.outside("../a.safetensors"), "'../a.safetensors' is not the plain name"),
    "index absolute": (lambda: hostile.outside(str(Path("a.safetensors").absolute())), "is not the plain name"),
    "index backslash": (lambda: hostile.outside("..\\a.safetensors"), "is not the plain name"),
    "index to a pickle": (lambda: sharded({"a": "a.bin"}), "'a.bin' is not the plain name of a .safetensors file"),
    "index to a link": (hostile.linked_outside, r"its shard link.safetensors is a link to .*, outside the folder"),
    "index without shard": (lambda: sharded({"a": "gone.safetensors"}), "its shard gone.safetensors is not there"),
    "index with more": (
        lambda: sharded({"a": "a.safetensors", "c": "a.safetensors"}),
        r"index .*: 1 missing \(c\), 0 extra; fetch the index and all shards again, from one revision",
    ),
    "index with less": (lambda: sharded({"b": "a.safetensors"}), r"1 missing \(b\), 1 extra \(a\)"),
    "index without map": (lambda: sharded("{}"), "expected weight_map"),
    "index of numbers": (lambda: sharded({"a": 3}), "expected weight_map"),
    "index duplicate": (
        lambda: sharded('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}'),
        "'a' stands twice in its JSON",
    ),
    "index of a list": (lambda: sharded("[]"), "expected a JSON object, found list"),
    "index cut": (lambda: sharded('{"weight_map": {"a": "a.sa'), "its file is not JSON"),
    "empty": (text("empty.pt", b""), "it is empty"),
    "empty safetensors": (text("empty.safetensors", b""), "it is empty"),
    "web page": (text("page.bin", PAGE), "it is a web page"),
    "web page as safetensors": (text("page.safetensors", PAGE), "it is a web page"),
    "web page as index": (text("model.safetensors.index.json", PAGE), "it is a web page"),
    "pointer": (text("pointer.safetensors", POINTER), "it is a pointer of Git LFS, .* run git lfs pull"),
    "pointer of a torch file": (text("pointer.bin", POINTER), "it is a pointer of Git LFS"),
}  # fmt: skip

UNFIT: dict[str, tuple[Write, str]] = {
    "NaN": (state_file(a=NAN), "a: 1 of 4 values are NaN or infinite"),
    "infinite": (state_file(a=INF), "a: 1 of 4 values are NaN or infinite"),
    "float8": (state_file(a=torch.zeros(4).to(torch.float8_e5m2)), "found torch.float8_e5m2; cast it first"),
    "complex": (state_file(a=torch.zeros(4, dtype=torch.complex64)), "expected a dense real tensor"),
    "integers": (state_file(a=torch.arange(4)), "a: expected torch.float32 as in the base, found torch.int64"),
    "half": (state_file(a=torch.zeros(4).half()), "a: expected torch.float32 as in the base, found torch.float16"),
    "shape": (state_file(a=torch.zeros(5)), r"a: expected shape \(4,\), found \(5,\)"),
    "extra": (state_file(c=torch.zeros(1)), r"0 missing, 1 extra \(c\)"),
    "missing": (state_file(a=None), r"1 missing \(a\), 0 extra"),
    "NaN in a torch file": (tensor_file(NAN), "a: 1 of 4 values are NaN or infinite"),
}


def refusal(run: Callable[[], Any], begins: str) -> str:
    """The message of the error, after a look at what was left behind."""
    before = sorted(Path().iterdir())
    with pytest.raises(MergeError) as error:
        run()
    assert not hostile.executed()
    assert sorted(Path().iterdir()) == before
    assert str(error.value).startswith(begins)
    return str(error.value).removeprefix(begins)


def merge(path: str) -> None:
    """Read an expert as every suite does."""
    TaskVectors.from_state_dicts(STATE, {"task": read_state(path)})


@pytest.mark.parametrize("case", CODE)
def test_no_code_runs(case: str) -> None:
    write, read, converted = CODE[case]
    path = write()
    hostile.executed()
    for reader in (merge, read_checkpoint):
        assert re.search(read, refusal(partial(reader, path), f"{path}: "))
    assert re.search(converted, refusal(partial(convert, Path(path), Path("out/new.safetensors")), f"{path}: "))


@pytest.mark.parametrize("case", CODE)
def test_the_files_are_what_they_seem(case: str) -> None:
    path = CODE[case][0]()
    hostile.executed()
    with old.present(hostile.Restores, hostile.mark):
        hostile.run(path)
    assert hostile.executed()


def test_what_is_allowed_elsewhere_is_not_allowed_here() -> None:
    path = hostile.in_optimizer()
    with torch.serialization.safe_globals([hostile.mark, hostile.Restores, (os.system, "posix.system")]):
        torch.save({**STATE, "c": hostile.Calls(hostile.mark)}, "mark.pt")
        before = set(map(str, torch.serialization.get_safe_globals()))
        for name in (path, "mark.pt"):
            assert "which could run code" in refusal(partial(merge, name), f"{name}: ")
        assert set(map(str, torch.serialization.get_safe_globals())) == before


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files(case: str) -> None:
    write, what = BROKEN[case]
    path = write()
    folder = str(Path(path).parent)
    said = refusal(partial(merge, path), "" if folder == "." else folder)
    assert Path(path).name in said or "b.safetensors" in said
    assert re.search(what, said)
    if Path(path).suffix in (".pt", ".bin"):
        assert re.search(what, refusal(partial(convert, Path(path), Path("out/new.safetensors")), f"{path}: "))


@pytest.mark.parametrize("case", UNFIT)
def test_networks_that_do_not_fit(case: str) -> None:
    write, what = UNFIT[case]
    assert re.search(what, refusal(partial(merge, write()), "expert 'task': "))


def test_a_pickle_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_merge.checkpoints.torch_files._MAX_PICKLE", 99)
    assert "data.pkl has" in refusal(partial(merge, tensor_file(NAN)()), "odd.pt: ")


@pytest.mark.parametrize(("path", "most"), [("odd.pt", 39), ("odd.bin", 39)])
def test_more_tensors_than_wanted(path: str, most: int) -> None:
    torch.save(STATE, path)
    said = refusal(lambda: read_state(path, max_bytes=most), f"{path}: ")
    assert "its tensors take 40 bytes; expected at most 39" in said
    assert len(read_state(path, max_bytes=40)) == 2
