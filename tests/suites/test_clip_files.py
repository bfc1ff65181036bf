"""What users' own files get wrong or do differently: heads, labels, half precision, configs, exports of checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, refused, report
from mirror import BASE, EXPERT, write_mirror
from safetensors.torch import load_file, save_file

from lit_merge.cli import main
from lit_merge.errors import MergeError
from lit_merge.suites import ClipSuite
from lit_merge.suites.checking import check_suite

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, two experts and two image sets."""
    return write_mirror(tmp_path_factory.mktemp("mirror"), ("mnist", "svhn"))


@pytest.fixture(autouse=True)
def _cache(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_MERGE_CACHE", str(mirror / "cache"))


def suite(mirror: Path, **changes: Any) -> ClipSuite:
    given: dict[str, Any] = {"base": BASE, "experts": EXPERT, "tasks": ["mnist", "svhn"], "root": mirror}
    return ClipSuite(**(given | changes))


@pytest.mark.parametrize("shape", [(9, 16), (10, 17)])
def test_a_head_of_another_task_or_encoder_is_refused(shape: tuple[int, int], mirror: Path) -> None:
    save_file({"weight": torch.randn(shape)}, "head.safetensors")
    with pytest.raises(MergeError, match=r"head\.safetensors: head of 'mnist': .*\(10, 16\), found \("):
        suite(mirror, heads={"mnist": "head.safetensors"}).head("mnist")


def test_a_head_from_a_file(mirror: Path) -> None:
    save_file({"weight": torch.randn(10, 16)}, "head.safetensors")
    made = suite(mirror, heads={"mnist": "head.safetensors"})
    assert made.head("mnist")(torch.ones(2, 16)).shape == (2, 10)
    assert [found.error for found in check_suite(made)] == ["", ""]


def test_the_same_classes_in_another_order_are_refused(mirror: Path) -> None:
    data = datasets.load_from_disk(mirror / "ylecun/mnist")
    names = list(reversed(data["test"].features["label"].names))
    data.cast_column("label", datasets.ClassLabel(names=names)).save_to_disk("turned")
    with pytest.raises(MergeError, match=r"another order than those of task 'mnist': label 0 is '9' there and '0'"):
        suite(mirror, data={"mnist": "turned"}).dataset("mnist", "test")


def halve(source: Path, target: Path) -> None:
    save_file({name: value.to(torch.bfloat16) for name, value in load_file(source).items()}, target)


@pytest.mark.parametrize("whole", [False, True])
def test_half_precision_is_read_as_float32(whole: bool, mirror: Path) -> None:
    changes: dict[str, Any] = {"experts": {"mnist": "mnist.safetensors", "svhn": EXPERT.format(task="svhn")}}
    halve(mirror / EXPERT.format(task="mnist") / "model.safetensors", Path("mnist.safetensors"))
    if whole:
        shutil.copytree(mirror / BASE, "half")
        halve(mirror / BASE / "model.safetensors", Path("half/model.safetensors"))
        changes["base"] = "half"
    made = suite(mirror, **changes)
    exact = load_file(mirror / EXPERT.format(task="mnist") / "model.safetensors")
    for name, value in made.expert("mnist").items():
        assert value.dtype == torch.float32
        known = exact.get(name, exact.get(name.removeprefix("vision_model.")))
        assert known is not None
        assert torch.equal(value, known.to(torch.bfloat16).float())
    assert [found.error for found in check_suite(made)] == ["", ""]


def test_an_export_of_a_checkpoint_tells_of_the_run_that_left_it() -> None:
    main(["fit", "--config", "adamerging", *TINY])
    main(["export", "--config", "adamerging", "--suite=toys.ToySuite", "--trainer.accelerator=cpu", "--ckpt_path=last",
          "--output=out"])  # fmt: skip
    own = Path("runs/adamerging/version_0/export")
    facts, again = (json.loads((folder / "merge.json").read_text()) for folder in (own, Path("out")))
    assert (facts["steps"], again["steps"]) == (3, 3)
    assert "steps_per_epoch: 3" in again["config"]
    assert not any(key.startswith("_") for key in again["hyperparameters"])
    card = Path("out/README.md").read_text()
    row = report("runs/adamerging/version_0")["tasks"]["task.a"]
    assert f"| task.a | {row['n']}" in card
    assert "It has not been scored" not in card


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 2_000_000), ("hidden_size", 10**9), ("hidden_size", "x")]
)
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_configuration_that_lies_costs_no_memory(part: str, key: str, value: object, mirror: Path) -> None:
    shutil.copytree(mirror / BASE, "liar")
    config = json.loads(Path("liar/config.json").read_text())
    config[part][key] = value
    Path("liar/config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="liar"):
        suite(mirror, base="liar", cache_dir=Path("cache")).prepare()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"suite: [1, 2"])
def test_a_damaged_config_is_named(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_bytes(content)
    assert "mine.yaml: not a YAML file" in refused(capsys, "suite", "check", "mine.yaml", status=1)
    assert "mine.yaml: not a YAML file" in refused(capsys, "fit", "--config", "mine.yaml", status=2)
