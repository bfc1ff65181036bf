"""A run beside published numbers: what is put beside what, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from callbacks_helpers import trainer_of
from toys import ToySuite

from lit_merge.callbacks import Report
from lit_merge.commands.compare import main
from lit_merge.data import TaskDataModule
from lit_merge.errors import MergeError
from lit_merge.methods import TaskArithmetic
from lit_merge.published import PublishedRow, find_published
from lit_merge.published.comparison import Block, Comparison, compare
from lit_merge.published.runs import read_run

B32 = "clip-vit-b-32-8"
LAYER, TASK = "Layer-wise AdaMerging (init 0.3)", "Task-wise AdaMerging (init 0.3)"


def row_of(suite: str, method: str) -> PublishedRow:
    """The row of the Hugging Face fine-tunes."""
    return next(row for row in find_published(suite).of(method, per_task=True) if not row.note)


def scores(suite: str, method: str, more: float, tasks: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Published accuracies, with ``more`` points for the method."""
    merged, base, expert = (row_of(suite, name).accuracy for name in (method, "pretrained", "fine-tuned"))
    return {
        task: {
            "n": 100,
            "accuracy": (merged[task] + more) / 100,
            "expert_accuracy": expert[task] / 100,
            "base_accuracy": base[task] / 100,
        }
        for task in tasks or find_published(suite).tasks
    }


def write(tasks: dict[str, Any], config: str | None = None, **changes: Any) -> Path:
    """A run's folder."""
    content = {"schema": 1, "method": "AdaMerging", "suite": B32, "protocol": "transductive"}
    folder = Path("run")
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps({**content, "tasks": tasks, "extra": {}, **changes}))
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return folder


def compared(folder: Path, suite: str | None = None, method: str | None = None) -> Comparison:
    run = read_run(folder)
    return compare(run, run.table(suite), method)


def block(comparison: Comparison, start: str) -> Block:
    (found,) = (found for found in comparison.blocks if found.title.startswith(start))
    return found


def cells(block: Block, name: str) -> list[str]:
    (row,) = (row for row in block.rows if row[0] == name)
    return list(row[1:])


def said(comparison: Comparison) -> str:
    return "\n".join(comparison.caveats)


def test_numbers_are_put_beside_those_of_the_same_method() -> None:
    comparison = compared(write(scores(B32, "adamerging", 0.5)))
    assert cells(block(comparison, "Base and experts"), "gtsrb") == ["32.5", "32.5", "+0.0", "98.9", "98.9", "+0.0"]
    own = block(comparison, "The run beside its method")
    assert own.columns == ("task", "run", LAYER, TASK)
    assert cells(own, "gtsrb") == ["93.4", "92.9  +0.5", "58.9 +34.5"]
    assert cells(own, "mean") == ["83.1", "82.6  +0.5", "68.7 +14.4"]
    others = block(comparison, "The run beside other methods")
    assert [head.split(" (")[0] for head in others.columns[2:]] == ["Simple average", "Task arithmetic", "TIES"]
    assert cells(others, "dtd")[2] == "47.2 +20.3"


def test_averages_state_protocol_checkpoints_and_source() -> None:
    comparison = compared(write(scores(B32, "adamerging", 0.0)))
    averages = block(comparison, "Averages over 8 tasks")
    assert (LAYER, "82.60  +0.0", "91.2", "transductive", "tanganke", "[1]") in averages.rows
    assert ("Fine-tuned", "92.83 -10.2", "-", "reference", "tall-masks", "[2]") in averages.rows
    assert cells(averages, "this run")[1] == "91.2"  # normalised like the row
    sources = "\n".join(comparison.sources)
    assert "[1] FusionBench, docs/modelpool/clip_vit.md" in sources
    assert "tanganke: Hugging Face fine-tunes" in sources
    assert "all images of the test split" in sources
    assert "hyper-parameters are not fully optimised" in said(comparison)


@pytest.mark.parametrize(
    ("method", "granularity", "column"),
    [
        ("AdaMerging", "task", TASK),
        ("AdaMerging", "tensor", LAYER),
        ("TSVMerge", None, "TSV-M"),
        ("IsoC", None, "Iso-C (scale 1.5)"),
        ("RegMean", None, "RegMean"),
        ("MagMax", None, "MagMax (scale 0.5)"),
    ],
)
def test_the_method_is_found_by_its_class(method: str, granularity: str | None, column: str) -> None:
    config = f"model: {{init_args: {{granularity: {granularity}, transforms: [{{class_path: a.b.Ties}}]}}}}"
    comparison = compared(write(scores(B32, "ties", 0.0), method=method, config=config if granularity else None))
    assert block(comparison, "The run beside its method").columns[2:] == (column,)
    assert "both are shown" not in said(comparison)
    assert ("transforms its task vectors first (Ties)" in said(comparison)) == bool(granularity)


def test_a_method_that_nobody_published_and_one_by_name() -> None:
    folder = write(scores(B32, "ties", 0.0), method="MyMethod")
    comparison = compared(folder)
    assert "Nothing was published for MyMethod on clip-vit-b-32-8" in said(comparison)
    assert len(block(comparison, "The run beside other methods").columns) == 6
    assert cells(block(compared(folder, method="wudi"), "The run beside its method"), "svhn") == ["77.7", "94.8 -17.1"]
    with pytest.raises(MergeError, match="nothing was published for 'none' on clip-vit-b-32-8; there are pretrained"):
        compared(folder, method="none")
    assert "both are shown" in said(compared(write(scores(B32, "ties", 0.0))))


def test_other_checkpoints_and_a_wrong_base_are_named() -> None:
    tasks = scores(B32, "ties", 0.0)
    tasks["svhn"]["expert_accuracy"] -= 0.03
    tasks["mnist"]["expert_accuracy"] -= 0.009  # less than a point
    found = compared(write(tasks, method="Ties"))
    assert "experts are not the checkpoints of the table" in found.caveats[0]
    assert "(svhn 94.3 against 97.3)" in found.caveats[0]
    tasks["gtsrb"]["base_accuracy"] = 0.02
    found = compared(write(tasks, method="Ties"))
    assert "gtsrb 2.0 against 32.5" in found.caveats[0]
    assert "mend this first" in found.caveats[0]


@pytest.mark.parametrize(
    ("suite", "expert", "says"),
    [
        (B32, 0.9798, "The run's DTD expert has 98.0 %"),
        (B32, 0.797, "DTD: the fine-tunes of the TALL-masks"),  # rows of these are shown
        ("clip-vit-b-16-8", 0.91, "The run's DTD expert has 91.0 %"),
        ("clip-vit-b-16-8", 0.823, None),
    ],
)
def test_the_leak_of_dtd_is_told_where_it_applies(suite: str, expert: float, says: str | None) -> None:
    tasks = scores(suite, "ties", 0.0)
    tasks["dtd"]["expert_accuracy"] = expert
    text = said(compared(write(tasks, suite=suite, method="Ties")))
    assert ("97.98 %" in text) == (says is not None)
    assert (says or "") in text


def test_the_leak_of_dtd_is_not_told_without_dtd() -> None:
    suite = "clip-vit-b-32-robustness-clean"
    assert "DTD" not in said(compared(write(scores(suite, "ties", 0.0), suite=suite, method="Ties")))


@pytest.mark.parametrize(
    ("protocol", "says"), [("split", "did not see"), ("online", "at its arrival"), ("custom", "a choice of its own")]
)
def test_another_protocol_is_told(protocol: str, says: str) -> None:
    text = said(compared(write(scores(B32, "ties", 0.0), protocol=protocol)))
    assert f"The protocol of the run is {protocol}: " in text
    assert says in text
    assert (
        "Layer-wise AdaMerging, Task-wise AdaMerging adapted" in text
    )  # they adapted on the images that they are scored on
    assert "protocol of the run" not in said(compared(write(scores(B32, "ties", 0.0))))


def test_fewer_tasks_are_compared_over_what_is_common() -> None:
    tasks = scores(B32, "ties", 1.0, ["svhn", "mnist"])
    tasks["my-own"] = tasks["svhn"]
    comparison = compared(write(tasks, method="Ties"))
    assert cells(block(comparison, "The run beside its method"), "mean") == ["86.9", "85.9  +1.0"]
    assert "no scores for sun397, stanford-cars, resisc45, eurosat, gtsrb, dtd" in said(comparison)
    assert "published on this suite for my-own" in said(comparison)
    averages = block(comparison, "Averages over 2 tasks")
    assert {row[1] for row in averages.rows if row[4] == "tall-masks"} == {"-"}
    assert cells(averages, "TIES (scale 0.3)")[1] == f"{50 * (77.7 / 97.3 + 94.1 / 99.6):.1f}"
    with pytest.raises(MergeError, match=r"none of its tasks \(other\)"):
        compared(write({"other": {"accuracy": 0.5}}))


def test_unseen_tasks_have_a_mean_of_their_own() -> None:
    suite = "clip-vit-b-32-unseen-1"
    tasks = scores(suite, "adamerging", 2.0)
    unseen = {task: {k: v for k, v in tasks.pop(task).items() if "expert" not in k} for task in ("mnist", "eurosat")}
    comparison = compared(write(tasks, suite=suite, extra={"unseen": {"tasks": unseen, "mean": {}}}))
    own = block(comparison, "The run beside its method")
    assert cells(own, "mean of seen") == ["82.5", "80.5  +2.0"]
    assert cells(own, "mean of unseen") == ["64.5", "62.5  +2.0"]
    networks = block(comparison, "Base and experts")
    assert cells(networks, "svhn")[1] == "31.6"  # not the 23.5 of this table
    assert cells(networks, "mnist")[3:] == ["-", "99.6", "-"]
    assert cells(block(comparison, "Averages over 6 seen tasks"), "Task arithmetic")[0] == "69.90 +12.6"


def test_fourteen_tasks_have_references_though_only_averages_were_published() -> None:
    tasks = scores("clip-vit-b-32-14", "pretrained", 0.0)
    comparison = compared(write(tasks, suite="clip-vit-b-32-14", method="TaskArithmetic"))
    assert cells(block(comparison, "Base and experts"), "pcam") == ["60.6", "60.6", "+0.0", "88.0", "88.0", "+0.0"]
    assert not any(found.title.startswith("The run") for found in comparison.blocks)
    assert cells(block(comparison, "Averages over 14 tasks"), "Task arithmetic (best scale)")[0] == "65.32  -8.4"


@pytest.mark.parametrize(("corruption", "name"), [("pixelate", "pixelate"), ("null", "clean")])
def test_a_corrupted_suite_is_found_by_its_corruption(corruption: str, name: str) -> None:
    tasks = {task: {"accuracy": 0.5} for task in ("stanford-cars", "eurosat", "resisc45", "gtsrb")}
    config = f"suite: {{init_args: {{corruption: {corruption}}}}}"
    comparison = compared(write(tasks, suite="clip-vit-b-32-robustness", config=config))
    assert comparison.title.endswith(f"beside clip-vit-b-32-robustness-{name}")
    assert ("give this suite little weight" in said(comparison)) == (name == "pixelate")
    assert ("corrupts on the fly" in said(comparison)) == (name == "pixelate")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"suite": "MiniSuite"}, "no published numbers for suite 'MiniSuite'.*clip-vit-b-32-8, .*--suite NAME"),
        ({"schema": 2}, "schema: expected 1"),
        ({"method": None}, "method: expected text, found None"),
        ({"tasks": []}, r"tasks: expected scores per task, found '\[\]'"),
        ({"tasks": {"dtd": {"accuracy": 67.0}}}, r"tasks: dtd: accuracy: expected a fraction in \[0, 1\], found 67.0"),
        ({"tasks": {"dtd": {}}}, "dtd: accuracy: .* found None"),
        ({"tasks": {"dtd": {"accuracy": 0.5, "expert_accuracy": float("nan")}}}, "expert_accuracy: .* found nan"),
    ],
)
def test_reports_that_are_not_usable(changes: dict[str, Any], says: str) -> None:
    folder = write(**{"tasks": scores(B32, "ties", 0.0), **changes})
    with pytest.raises(MergeError, match=says) as error:
        compared(folder)
    assert "run/report.json" in str(error.value)


def test_damaged_files() -> None:
    with pytest.raises(MergeError, match="no such file; expected the report"):
        read_run("nowhere")
    folder = write({"dtd": {"accuracy": 0.5}}, config="model: [")
    with pytest.raises(MergeError, match=r"config\.yaml: not readable as YAML"):
        read_run(folder)
    (folder / "report.json").write_text("{")
    with pytest.raises(MergeError, match="not readable as JSON"):
        read_run(folder / "report.json")


def test_reads_what_the_report_of_a_run_writes() -> None:
    report, suite = Report(), ToySuite("mlp")
    trainer = trainer_of(report)
    trainer.test(TaskArithmetic(suite=suite), datamodule=TaskDataModule(suite=suite), verbose=False)
    run = read_run(".")
    assert (run.method, run.suite, run.protocol) == ("TaskArithmetic", "toys", "transductive")
    assert run.methods() == ("task-arithmetic",)
    for task in suite.tasks:
        assert run.percent(task, "expert_accuracy") == 100 * report.content["tasks"][task]["expert_accuracy"]


def test_command_prints_and_writes(capsys: pytest.CaptureFixture[str]) -> None:
    suite = "clip-vit-b-32-20"
    folder = write(scores(suite, "tsv-merge", 0.0), suite=suite, method="TSVMerge")
    main([str(folder), "--output", "out/compared.md"])
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if line.startswith(("│", "┃"))) <= 80
    for task, value in row_of(suite, "tsv-merge").accuracy.items():
        assert any(task in line and f"{value:.1f}" in line for line in printed.splitlines())
    assert "…" not in printed
    assert "Read this before comparing:" in printed
    text = Path("out/compared.md").read_text()
    assert "| mean | 73.2 | 73.2  +0.0 |" in text
    assert "## Read this before comparing" in text


def test_command_lists_and_writes_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--list"], ["--list", "true"]):
        main(given)
        assert "clip-vit-b-32-robustness-jpeg_compression" in capsys.readouterr().out
    main(["--page", "golden.md"])
    assert Path("golden.md").read_text().startswith("# Golden numbers")
    with pytest.raises(MergeError, match="a folder"):
        main(["--page", "."])


@pytest.mark.parametrize("given", [[], ["run", "--list"], ["--page", "x.md", "--list"], ["run", "--sute", "x"]])
def test_wrong_usage(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(given)
    assert exit_.value.code == 2
    assert "error:" in capsys.readouterr().err
