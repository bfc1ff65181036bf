"""What is installed: the package with callbacks and configs, and nothing beside it."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from imports import asked_for

import lit_merge
from lit_merge.__main__ import main as entry

ROOT = Path(__file__).parents[1]
OPTIONAL = {"mlxtend", "skimage", "sklearn", "matplotlib", "tensorboard", "transformers", "peft", "datasets", "scipy"}
INSTALLED = {
    "lit_merge/__init__.py",
    "lit_merge/py.typed",
    "lit_merge/callbacks/__init__.py",
    "lit_merge/callbacks/report.py",
    "lit_merge/configs/__init__.py",
    "lit_merge/configs/adamerging.yaml",
}


def project() -> dict[str, Any]:
    """The content of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, *flags: str, cwd: Path = ROOT) -> str:
    """Run code in a fresh interpreter, and return what it prints."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_package_is_listed() -> None:
    found = {
        ".".join(Path(folder).relative_to(ROOT).parts)
        for folder, _, files in os.walk(ROOT / "lit_merge", followlinks=True)
        if "__init__.py" in files
    }
    assert found == set(project()["tool"]["setuptools"]["packages"])


def test_the_links_point_to_the_folders_at_the_top() -> None:
    for name in ("callbacks", "configs"):
        assert (ROOT / "lit_merge" / name).resolve() == ROOT / name
        assert project()["tool"]["setuptools"]["package-dir"][f"lit_merge.{name}"] == name


def test_a_class_is_one_object_by_all_its_names() -> None:
    by_module = importlib.import_module("lit_merge.callbacks.report").Report
    assert lit_merge.callbacks.Report is by_module
    assert by_module.__module__ == "lit_merge.callbacks.report"


class TestLazyImport:
    def test_every_name_resolves(self) -> None:
        for name in lit_merge.__all__:
            assert getattr(lit_merge, name) is not None
        assert len(set(lit_merge.__all__)) == len(lit_merge.__all__)
        assert dir(lit_merge) == sorted(lit_merge.__all__)

    def test_all_lists_what_can_be_had(self) -> None:
        assert set(lit_merge.__all__) == {*lit_merge._HOMES, *lit_merge._MODULES, "__version__"}

    def test_unknown_name(self) -> None:
        with pytest.raises(AttributeError, match="module 'lit_merge' has no attribute 'AdaMergin'"):
            lit_merge.AdaMergin  # noqa: B018

    def test_importing_the_package_imports_nothing_heavy(self) -> None:
        code = "import lit_merge, lit_merge.configs, sys; print({'torch', 'lightning', 'numpy'} & set(sys.modules))"
        assert python(code) == "set()"

    def test_extras_are_not_needed_to_import(self, tmp_path: Path) -> None:
        for name in ("lightning.pytorch.cli", "torchmetrics", "torchvision", "open_clip"):
            importlib.import_module(name)  # what they import for themselves does not count
        assert asked_for(lambda: importlib.import_module("lit_merge.cli"), OPTIONAL, tmp_path) == set()

    @pytest.mark.parametrize("line", ["fit --help", "fit -c adamerging --print_config", "merge --base x --help"])
    def test_help_waits_for_no_library_that_it_does_not_need(self, line: str, tmp_path: Path) -> None:
        importlib.import_module("lightning.pytorch.cli")  # what it imports for itself does not count

        def ask() -> None:
            with pytest.raises(SystemExit, match="0"):
                entry(line.split())

        assert asked_for(ask, OPTIONAL | {"open_clip", "timm", "wandb", "huggingface_hub"}, tmp_path) == set()

    def test_version(self) -> None:
        assert lit_merge.__version__.count(".") == 2
        try:
            installed = importlib.metadata.version("lit-merge")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("lit-merge is not installed here")
        assert installed == lit_merge.__version__


class TestInstalled:
    @pytest.fixture(autouse=True)
    def _installed(self) -> None:
        code = "from importlib.util import find_spec; print(find_spec('lit_merge') is not None)"
        if python(code, "-I", cwd=Path("/")) != "True":
            pytest.skip("lit-merge is not installed in this environment")

    @pytest.mark.parametrize("name", ["callbacks", "configs", "tests"])
    def test_no_stray_package(self, name: str) -> None:
        code = f"from importlib.util import find_spec; print(find_spec('{name}'))"
        assert python(code, "-I", cwd=Path("/")) == "None"

    def test_subpackages_are_found_from_anywhere(self) -> None:
        code = "from lit_merge.configs import find, names; print(find('adamerging').is_file(), len(names()) > 5)"
        assert python(code, "-I", cwd=Path("/")) == "True True"


def without_caches(folder: str, names: list[str]) -> list[str]:
    """What is not copied."""
    return [name for name in names if name.startswith(".") or name == "__pycache__" or name.endswith(".egg-info")]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a wheel and a source distribution of a copy of the checkout."""
    build = importlib.util.find_spec("build")
    setuptools = importlib.util.find_spec("setuptools")
    if build is None or setuptools is None or int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("needs build and setuptools >= 77")
    tree = tmp_path_factory.mktemp("copy") / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=without_caches)
    if not (tree / "README.md").is_file():  # pyproject.toml names it
        (tree / "README.md").write_text("# lit-merge\n")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", "."]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return tree / "dist"


class TestDistributions:
    def test_wheel(self, built: Path) -> None:
        (wheel,) = built.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            files = archive.namelist()
        info = f"lit_merge-{lit_merge.__version__}.dist-info"
        assert set(files) >= INSTALLED | {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"}
        assert {name.partition("/")[0] for name in files} == {"lit_merge", info}
        assert len(files) == len(set(files))
        in_tree = {str(path.relative_to(ROOT)) for path in (ROOT / "lit_merge").rglob("*.py")}
        in_tree |= {f"lit_merge/{path.relative_to(ROOT)}" for path in (ROOT / "callbacks").rglob("*.py")}
        in_tree |= {f"lit_merge/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
        assert in_tree <= set(files)

    def test_source_distribution(self, built: Path) -> None:
        (sdist,) = built.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            files = {name.partition("/")[2] for name in archive.getnames()}
        assert {"pyproject.toml", "README.md", "LICENSE", "callbacks/report.py", "configs/adamerging.yaml"} <= files
        assert "lit_merge/module.py" in files

    def test_metadata(self, built: Path) -> None:
        (wheel,) = built.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            info = f"lit_merge-{lit_merge.__version__}.dist-info"
            metadata = archive.read(f"{info}/METADATA").decode()
            entry = archive.read(f"{info}/entry_points.txt").decode()
        assert "License-Expression: Apache-2.0" in metadata
        extras = set(project()["project"]["optional-dependencies"])
        assert {line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")} == extras
        assert "lit-merge = lit_merge.__main__:main" in entry

    def test_the_wheel_works_on_its_own(self, built: Path, tmp_path: Path) -> None:
        (wheel,) = built.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "site")
        code = (
            "from lit_merge.__main__ import main; from lit_merge.configs import find; main(['--version']);"
            "print(find('adamerging'))"
        )
        version, config = python(code, cwd=tmp_path / "site").splitlines()
        assert version == f"lit-merge {lit_merge.__version__}"
        assert Path(config) == tmp_path / "site/lit_merge/configs/adamerging.yaml"
