"""Missing extras and bad input have their own errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lit_merge.errors import MergeError, MissingExtraError, require


def test_an_installed_module_is_returned() -> None:
    assert require("json", "demo") is json
    assert require("os.path", "demo").join("a", "b") == str(Path("a/b"))


@pytest.mark.parametrize("module", ["no_such_package", "no_such_package.part"])
def test_a_missing_module_names_its_extra(module: str) -> None:
    with pytest.raises(MissingExtraError) as error:
        require(module, "clip")
    assert str(error.value) == f'{module} is not installed; pip install "lit-merge[clip]" brings it'
    assert isinstance(error.value, ImportError)


def test_a_package_without_that_part_is_another_version() -> None:
    with pytest.raises(MissingExtraError, match=r"json\.no_such_part is not installed"):
        require("json.no_such_part", "clip")


def test_a_package_that_is_broken_says_so_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package.py").write_text("import not_there_at_all\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_there_at_all'") as error:
        require("broken_package", "clip")
    assert not isinstance(error.value, MissingExtraError)


def test_bad_input_is_a_value_error() -> None:
    assert issubclass(MergeError, ValueError)
