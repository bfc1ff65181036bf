"""What ``finetune.json`` says is compared with what an expert is put to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lit_merge.checkpoints.digests import state_digest
from lit_merge.checkpoints.origin import check_origin, expecting, read_origin
from lit_merge.errors import MergeError

BASE = {"weight": torch.arange(3.0)}
FITTING = {"method": "full", "base": state_digest(BASE)}


def expert(folder: Path, **facts: object) -> Path:
    """A folder with an adapter in it; only the names of files matter."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "finetune.json").write_text(json.dumps(FITTING | facts))
    return folder


@pytest.mark.parametrize("place", [".", "model.safetensors", "adapter", "adapter/adapter_model.safetensors"])
def test_it_is_found_wherever_the_weights_are(place: str, tmp_path: Path) -> None:
    check_origin(expert(tmp_path / "good") / place, BASE, "expert 'a'")
    with pytest.raises(
        MergeError, match=r"bad/finetune\.json: expert 'a': expected base .*, found x; .* give that base"
    ):
        check_origin(expert(tmp_path / "bad", base="x") / place, BASE, "expert 'a'")


def test_a_relative_adapter_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(expert(tmp_path / "a") / "adapter")
    assert read_origin(Path()) is not None


def test_methods(tmp_path: Path) -> None:
    tangent = expert(tmp_path / "tangent", method="linearized")
    with pytest.raises(MergeError, match=r"expected method full or lora, found linearized; .* use LinearizedSuite"):
        check_origin(tangent, BASE, "expert 'a'")
    check_origin(tangent, BASE, "expert 'a'", methods=["linearized"])
    with expecting("linearized"):
        check_origin(tangent, BASE, "expert 'a'")
        with pytest.raises(MergeError, match=r"expected method linearized, found lora; .* without LinearizedSuite"):
            check_origin(expert(tmp_path / "lora", method="lora"), BASE, "expert 'a'")
    with pytest.raises(MergeError, match=r"expected method full or lora, found \['full'\]"):
        check_origin(expert(tmp_path / "odd", method=["full"]), BASE, "expert 'a'")


def test_without_a_file_there_is_nothing_to_check(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "finetune.json").write_text("broken")  # of the folder above, which is no expert's
    check_origin(tmp_path / "inner", BASE, "expert 'a'")
    check_origin(tmp_path / "inner" / "model.safetensors", BASE, "expert 'a'")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff"])
def test_damaged(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "finetune.json").write_bytes(text)
    with pytest.raises(MergeError, match=r"finetune\.json: .*(JSON|empty|UTF-8)"):
        check_origin(tmp_path, BASE, "expert 'a'")
