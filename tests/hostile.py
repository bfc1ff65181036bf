"""Files that want to run code, and files that are broken: each function writes one and returns its name."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import old_checkpoints as old
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

RAN: list[str] = []
STATE = {"a": torch.arange(4.0), "b": torch.ones(2, 3)}


def mark() -> None:
    """What a payload does; nobody may call it."""
    RAN.append("ran")
    Path("executed").touch()


def executed() -> bool:
    """Whether a payload ran since the last question."""
    found = bool(RAN) or Path("executed").exists()
    RAN.clear()
    Path("executed").unlink(missing_ok=True)
    return found


def run(path: str) -> None:
    """Load a file the way that nobody should."""
    try:
        torch.load(path, weights_only=False)
    except (AttributeError, pickle.UnpicklingError, RuntimeError):  # a plain pickle is none of torch's files
        with Path(path).open("rb") as file:
            pickle.load(file)


class Calls:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable[..., Any], *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Restores:
    """Unpickling it runs its own ``__setstate__``; it lives where image encoders live."""

    def __init__(self) -> None:
        self.training = False

    def __setstate__(self, state: object) -> None:
        mark()


def shell() -> Calls:
    """A shell command."""
    return Calls(os.system, "touch executed")


def evaluated() -> Calls:
    """An expression."""
    return Calls(eval, "__import__('pathlib').Path('executed').touch()")


def nested() -> Calls:
    """A file within the file, which torch would load without restrictions."""
    inner = io.BytesIO()
    torch.save(shell(), inner)
    return Calls(torch.storage._load_from_bytes, inner.getvalue())


def in_module(**how: Any) -> str:
    encoder = old.encoder()
    encoder.cache_dir = shell()
    old.save_whole(encoder, "expert.pt", **how)
    return "expert.pt"


def in_head() -> str:
    head = old.head()
    head.__dict__["payload"] = evaluated()
    old.save_whole(head, "head_MNIST.pt")
    return "head_MNIST.pt"


def in_optimizer() -> str:
    torch.save({"state_dict": STATE, "optimizer_states": [{"state": {0: {"step": shell()}}}]}, "last.ckpt")
    return "last.ckpt"


def in_nested() -> str:
    torch.save({**STATE, "c": nested()}, "nested.pt")
    return "nested.pt"


def in_plain_pickle(name: str = "plain.bin", protocol: int = 2) -> str:
    Path(name).write_bytes(pickle.dumps({**STATE, "c": nested()}, protocol=protocol))
    return name


def in_newer_protocol() -> str:
    torch.save({**STATE, "c": shell()}, "newer.pt", pickle_protocol=4)
    return "newer.pt"


def in_setstate() -> str:
    old.save_whole(Restores(), "restores.pt", extra=(Restores,))
    return "restores.pt"


def in_allowed_name() -> str:
    """A function that a file may name, but not call."""
    old.save_whole({**STATE, "c": Calls(mark)}, "named.pt", extra=(mark,))
    return "named.pt"


def in_hook() -> str:
    encoder = old.encoder()
    encoder.model.__dict__["_forward_hooks"][0] = shell()  # hooks are pickled too
    old.save_whole(encoder, "hook.pt")
    return "hook.pt"


def torch_script() -> str:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), "script.pt")
    return "script.pt"


def repacked(compression: int = zipfile.ZIP_STORED, **replaced: Callable[[bytes], bytes]) -> str:
    """A torch file with other entries."""
    torch.save(STATE, "whole.pt")
    with zipfile.ZipFile("whole.pt") as whole, zipfile.ZipFile("packed.pt", "w", compression) as packed:
        for entry in whole.infolist():
            leaf = entry.filename.rpartition("/")[2].replace(".", "_")
            packed.writestr(entry.filename, replaced.get(leaf, bytes)(whole.read(entry)))
    return "packed.pt"


def bomb() -> str:
    return repacked(zipfile.ZIP_DEFLATED)


def claimed_entry() -> str:
    """A directory that promises a terabyte."""
    repacked()
    with zipfile.ZipFile("packed.pt", "a") as archive:
        archive.infolist()[0].file_size = 2**40
        archive.writestr("more", b"")
    return "packed.pt"


def claimed_storage() -> str:
    """A storage of 64 numbers, of which the file has 4: mapped, it would run into its neighbours."""
    return repacked(data_pkl=lambda text: text.replace(b"K\x04t", b"K\x40t", 1))


def twice_in_zip() -> str:
    repacked()
    with zipfile.ZipFile("packed.pt", "a") as archive:
        archive.writestr(archive.infolist()[0].filename, b"")
    return "packed.pt"


def tensor_file(value: object, name: object = "a") -> Callable[[], str]:
    """A torch file with one odd tensor."""

    def write() -> str:
        content: dict[Any, Any] = {**STATE, name: value}
        torch.save(content, "odd.pt")
        return "odd.pt"

    return write


def giant() -> str:
    """Sixteen bytes that stand for four terabytes."""
    storage = torch.arange(4.0).storage()
    view = Calls(torch._utils._rebuild_tensor_v2, storage, 0, (10**6, 10**6), (0, 0), False, {})
    return tensor_file(view)()


def safetensors(header: object, data: bytes = bytes(16), length: int | None = None) -> str:
    """A safetensors file, byte by byte."""
    name = "odd.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    Path(name).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return name


def entry(start: int, end: int, dtype: str = "F32", size: int = 4) -> dict[str, Any]:
    """What the header says about a vector."""
    return {"dtype": dtype, "shape": [(end - start) // size], "data_offsets": [start, end]}


def duplicate() -> str:
    one, two = json.dumps(entry(0, 16)), json.dumps(entry(0, 16, "I32"))
    return safetensors(f'{{"a": {one}, "a": {two}}}'.encode())


def truncated() -> str:
    save_file(STATE, "whole.safetensors")
    Path("cut.safetensors").write_bytes(Path("whole.safetensors").read_bytes()[:-5])
    return "cut.safetensors"


def sharded(weight_map: dict[str, object] | str, folder: str = ".") -> str:
    """Two shards, ``a`` and ``b``, and an index that may lie."""
    for name, value in STATE.items():
        save_file({name: value}, f"{folder}/{name}.safetensors")
    index = f"{folder}/model.safetensors.index.json"
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    Path(index).write_text(text)
    return index


def outside(name: str) -> str:
    """An index whose shard is in the folder above."""
    Path("inner").mkdir()
    save_file({"a": STATE["a"]}, "a.safetensors")
    return sharded({"a": name, "b": "b.safetensors"}, "inner")


def linked_outside() -> str:
    path = outside("link.safetensors")
    Path("inner/link.safetensors").symlink_to(Path("a.safetensors").absolute())
    return path


def text(name: str, content: bytes) -> Callable[[], str]:
    """A file of something else."""

    def write() -> str:
        Path(name).write_bytes(content)
        return name

    return write


def state_file(**changed: Tensor | None) -> Callable[[], str]:
    """A sound file of a network that does not fit."""

    def write() -> str:
        values = {name: value for name, value in {**STATE, **changed}.items() if value is not None}
        save_file(values, "expert.safetensors")
        return "expert.safetensors"

    return write
