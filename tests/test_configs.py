"""Every config that comes with the package runs, and leaves the same traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import TINY, report, wandb_mode

from lit_merge import configs
from lit_merge.cli import main
from lit_merge.methods import AdaMerging
from lit_merge.module import MergeModule


def content(name: str) -> dict[str, Any]:
    """A bundled config."""
    loaded: dict[str, Any] = yaml.safe_load((configs.find(name) or Path()).read_text())
    return loaded


OVERLAYS = [name for name in configs.names() if "model" not in content(name) and not name.startswith("suites/")]
SUITES = [name for name in configs.names() if name.startswith("suites/")]  # each is run in tests/suites/test_clip.py
FINETUNE = [name for name in configs.names() if name.startswith("finetune")]  # and in tests/test_finetune_command.py
METHODS = [name for name in configs.names() if name not in {*OVERLAYS, *SUITES, *FINETUNE}]
PAIRS = ("slerp.yaml", "nuslerp.yaml")  # they take two experts
IMAGES = ("fisher-merging.yaml", "regmean.yaml", "regmean-plus-plus.yaml")  # they look at training images
STREAMS = [name for name in METHODS if "SequentialMerging" in str(content(name))]  # they know how long they take
KEYS = {"schema", "method", "suite", "protocol", "seed", "versions", "seconds", "peak_memory_bytes", "tasks", "mean"}
SCORES = {"accuracy", "expert_accuracy", "base_accuracy", "normalized_accuracy"}


def ran(*args: str) -> tuple[MergeModule, Path]:
    """Run, and return the model and the one folder that the run left."""
    cli = main([*args])
    assert cli is not None
    assert isinstance(cli.model, MergeModule)
    (found,) = Path("runs").rglob("report.json")
    return cli.model, found.parent


def check_traces(model: MergeModule, folder: Path) -> None:
    """A complete config, and a report of the agreed schema."""
    found = report(folder)
    assert set(found) == KEYS | {"extra"}
    assert found["schema"] == 1
    assert found["method"] == type(model).__name__
    assert set(found["mean"]) == SCORES
    assert list(found["tasks"]) == list(model.suite.tasks)
    for row in found["tasks"].values():
        assert set(row) == SCORES | {"n"}
        assert all(0 <= row[key] <= 1 for key in SCORES - {"normalized_accuracy"})
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert set(config) == {"seed_everything", "trainer", "suite", "model", "data"}
    assert config["model"]["class_path"].endswith(f".{type(model).__name__}")


def test_there_are_methods_and_overlays() -> None:
    assert {"adamerging.yaml", "task-arithmetic.yaml"} <= set(METHODS)
    assert "wandb.yaml" in OVERLAYS
    assert len(SUITES) >= 9
    assert "finetune.yaml" in FINETUNE


@pytest.mark.parametrize("name", METHODS)
def test_method(name: str) -> None:
    attacked = content(name)["suite"]["class_path"].endswith(".BackdoorSuite")
    more = ["--suite=laboratory.TinyLaboratory"] if attacked else []
    more += ["--suite.kind=vit"] if name.startswith("doge") else []  # it learns matrices inside of numbered blocks
    more += ["--suite.tasks=2"] if name in PAIRS else []
    more += ["--suite.train=true"] if name in IMAGES else []
    more += ["--trainer.max_epochs=null"] if name in STREAMS else []
    model, folder = ran("fit", "--config", name, *TINY, *more)
    check_traces(model, folder)
    assert ("continual" in report(folder)["extra"]) == (name in STREAMS)
    assert ("backdoor" in report(folder)["extra"]) == attacked
    assert folder == Path("runs", name.removesuffix(".yaml"), "version_0")
    assert (folder / "export/merged.safetensors").is_file() == (model.learnable or name in STREAMS)
    assert (folder / "metrics.csv").is_file()


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("mode", ["disabled", "offline"])
def test_overlay(name: str, mode: str) -> None:
    with wandb_mode(mode):
        model, folder = ran("fit", "--config", "adamerging", "--config", name, *TINY)
    check_traces(model, folder)
    assert (folder / "export/merged.safetensors").is_file()


@pytest.mark.parametrize("name", configs.names())
def test_the_head_of_a_config_says_what_it_is_and_how_to_run_it(name: str) -> None:
    first, second, *_ = (configs.find(name) or Path()).read_text().splitlines()
    assert first.startswith("# ")
    assert second.startswith("#   lit-merge ")
    assert f"--config {name}" in second


def test_the_first_command_of_the_readme(mini_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlxtend")
    monkeypatch.setenv("LIT_MERGE_CACHE", str(mini_cache))
    model, folder = ran(
        "fit",
        "--config=adamerging.yaml",
        "--suite.pretrain_steps=2",
        "--suite.finetune_steps=2",
        "--trainer.max_epochs=1",
        "--data.steps_per_epoch=2",
        "--trainer.limit_test_batches=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    )
    check_traces(model, folder)
    assert isinstance(model, AdaMerging)
    assert len(report(folder)["tasks"]) >= 6
