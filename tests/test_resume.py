"""A killed run goes on as if nothing had happened, and never against something else."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from testers import Permuted
from torch import Tensor, nn
from toys import Kind, ToySuite, expert_state

from lit_merge import AdaMerging, MergeTrainer, TaskDataModule, main
from lit_merge.callbacks import CollapseMonitor, Report, ResumePoint
from lit_merge.errors import MergeError
from lit_merge.objectives import Diversity, Entropy, ExpertAlignment, Objective, WeightedSum
from lit_merge.suites import NetworkSuite, Suite
from lit_merge.transforms import Ties

EPOCHS, STEPS = 3, 5
When = Literal["start", "end", "validation", "epoch_end", "before_save", "in_save", "after_save"]


@dataclass(frozen=True)
class Case:
    """What is trained."""

    kind: Kind = "cnn"
    workers: int = 0
    experts: bool = False
    scheduler: bool = False
    accumulate: int = 1
    protocol: Literal["transductive", "split", "online"] = "transductive"
    every: int = 2
    ties: bool = False

    def model(self, suite: Suite | None = None, **kwargs: Any) -> AdaMerging:
        objective: Objective = Entropy()
        if self.experts:
            objective = WeightedSum([Entropy(), ExpertAlignment("kl"), Diversity()], [0.5, 1.0, 0.1])
        options: dict[str, Any] = {
            "objective": objective,
            "optimizer": partial(torch.optim.Adam, lr=0.01),
            "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.7) if self.scheduler else None,
            "transforms": [Ties()] if self.ties else None,
        }
        return AdaMerging(suite=suite or ToySuite(self.kind), granularity="tensor", **{**options, **kwargs})

    def data(self, suite: Suite, **kwargs: Any) -> TaskDataModule:
        options: dict[str, Any] = {"steps_per_epoch": STEPS, "num_workers": self.workers, "protocol": self.protocol}
        return TaskDataModule(**{"suite": suite, "batch_size": 4, "seed": 1, **options, **kwargs})

    def trainer(self, root: Path, callbacks: list[L.Callback] | None = None, **kwargs: Any) -> MergeTrainer:
        options: dict[str, Any] = {
            "max_epochs": 1 if self.protocol == "online" else EPOCHS,
            "accumulate_grad_batches": self.accumulate,
            "limit_val_batches": 0 if self.workers else None,  # six more processes each time
            "callbacks": [Report(), CollapseMonitor(every_n_steps=3), ResumePoint(self.every), *(callbacks or [])],
            **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
        }
        return MergeTrainer(default_root_dir=root, **{**options, **kwargs})


class Kill(L.Callback):
    """Kills its own process at the n-th moment of a kind; there is no clean-up and no goodbye."""

    def __init__(self, when: When, number: int) -> None:
        self.when = when
        self.left = number

    def _now(self, when: When) -> None:
        self.left -= when == self.when
        if when == self.when and self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        save = trainer.save_checkpoint

        def watched(*args: Any, **kwargs: Any) -> None:
            self._now("before_save")
            if self.when == "in_save" and self.left == 1:
                self._tear()
            self.left -= self.when == "in_save"
            save(*args, **kwargs)

        trainer.save_checkpoint = watched  # type: ignore[method-assign]

    def _tear(self) -> None:
        """Let temporary files be on another disk, and die when half of the file is copied from there."""

        def rename(*_: Any) -> None:
            raise OSError(18, "Invalid cross-device link")

        def copy(source: str, target: str, **_: Any) -> None:
            content = Path(source).read_bytes()
            Path(target).write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        os.rename, shutil.copyfile = rename, copy  # type: ignore[assignment] # in a process that dies soon

    def on_train_batch_start(self, *_: Any) -> None:
        self._now("start")

    def on_train_batch_end(self, *_: Any) -> None:
        self._now("end")

    def on_validation_batch_end(self, *_: Any) -> None:
        self._now("validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        self._now("epoch_end")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        point = next(c for c in trainer.callbacks if isinstance(c, ResumePoint))  # type: ignore[attr-defined]
        save = point._save

        def watched(trainer: L.Trainer) -> None:
            save(trainer)
            self._now("after_save")

        point._save = watched  # type: ignore[method-assign]


def in_child(work: Callable[[], object], deadline: float | None = None) -> int:
    """Run something in a fork; returns 0 or 1, or minus the signal that ended it. ``deadline`` kills it in time."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    if deadline is not None:
        time.sleep(deadline)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fit(case: Case, root: Path, kill: Kill | None = None) -> None:
    """One run of the same command; the end of it is written to a file."""
    model = case.model()
    data = case.data(model.suite)
    trainer = case.trainer(root, [kill] if kill else [])
    trainer.fit(model, datamodule=data, ckpt_path="last")
    data.num_workers = 0
    trainer.test(model, datamodule=data, verbose=False)
    torch.save(
        {
            "coefficients": model.coefficients.detach(),
            "steps": trainer.global_step,
            "rate": trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None,
        },
        root / "final.pt",
    )


def final(root: Path) -> dict[str, Any]:
    return {**torch.load(root / "final.pt"), "report": report(root)}


def report(root: Path) -> dict[str, Any]:
    content = json.loads((root / "report.json").read_text())
    return {key: content[key] for key in ("method", "protocol", "tasks", "mean")}


@cache
def uninterrupted(case: Case) -> dict[str, Any]:
    root = Path(mkdtemp())
    fit(case, root)  # in this process: it warms up what the forks inherit
    return final(root)


def check(case: Case, root: Path) -> None:
    """Run to the end and compare every bit."""
    expected = uninterrupted(case)
    assert in_child(lambda: fit(case, root)) == 0
    got = final(root)
    assert torch.equal(got["coefficients"], expected["coefficients"])
    assert (got["steps"], got["report"]) == (expected["steps"], expected["report"])
    assert not torch.equal(got["coefficients"], torch.full_like(got["coefficients"], 0.3))


RICH = Case("vit", experts=True, scheduler=True)
KILLS: list[tuple[Case, When, int]] = [
    (Case(), "start", 1),  # the first step
    (Case(), "end", 1),
    (Case(), "end", STEPS),  # the last batch of an epoch
    (Case(), "validation", 7),
    (Case(), "epoch_end", 1),
    (Case(), "start", STEPS + 1),  # the first batch of the next epoch
    (Case(), "before_save", 1),
    (Case(), "in_save", 1),
    (Case(), "after_save", 1),
    (Case(), "in_save", 3),  # at the end of an epoch
    (Case(), "after_save", 3),
    (Case(every=1), "in_save", 7),
    (Case(every=1), "end", 13),
    (RICH, "start", 9),
    (RICH, "end", 2 * STEPS),
    (RICH, "in_save", 2),
    (RICH, "after_save", 5),
    (RICH, "epoch_end", EPOCHS),  # the very end
    (Case(accumulate=2, every=1), "start", 2),  # in the middle of accumulated gradients
    (Case(accumulate=2, every=1), "start", 4),
    (Case(accumulate=2, every=1, scheduler=True), "end", 8),
    (Case(accumulate=2, every=2), "in_save", 2),
    (Case("tied", protocol="split", ties=True), "end", 8),
    (Case("mlp", protocol="split", experts=True, ties=True), "after_save", 2),
    (Case(workers=2), "start", 1),
    (Case(workers=2), "end", STEPS),
    (Case(workers=2), "start", STEPS + 2),
    (Case(workers=2), "after_save", 3),  # goes on from the end of an epoch
    (Case(workers=2), "in_save", 4),
]


@pytest.mark.parametrize(("case", "when", "number"), KILLS)
def test_goes_on_to_the_same_bits_after_a_kill(tmp_path: Path, case: Case, when: When, number: int) -> None:
    uninterrupted(case)
    assert in_child(lambda: fit(case, tmp_path, Kill(when, number))) == -signal.SIGKILL
    assert not (tmp_path / "final.pt").exists()
    check(case, tmp_path)


@pytest.mark.parametrize("seed", range(8))
def test_survives_several_kills(tmp_path: Path, seed: int) -> None:
    choice = random.Random(seed)
    case = (Case(every=1), RICH, Case(accumulate=2, every=1), Case(every=3, experts=True))[seed % 4]
    uninterrupted(case)
    moments: tuple[When, ...] = ("start", "end", "epoch_end", "before_save", "in_save", "after_save")
    kills = 0
    for _ in range(2 + seed % 2):
        when = choice.choice(moments)
        kill = Kill(when, choice.randint(1, 2 if when == "epoch_end" else 6))
        status = in_child(partial(fit, case, tmp_path, kill))
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
    assert kills >= 1
    check(case, tmp_path)


@pytest.mark.slow
def test_survives_kills_at_random_times(tmp_path: Path) -> None:
    case = Case(experts=True, every=1)
    began = time.monotonic()
    uninterrupted(case)
    length = time.monotonic() - began
    choice, killed = random.Random(0), 0
    for number in range(6):
        root = tmp_path / str(number)
        root.mkdir()
        for _ in range(choice.randint(1, 2)):
            killed += in_child(lambda: fit(case, root), deadline=choice.uniform(0.1, 1.0) * length) != 0  # noqa: B023
        check(case, root)
    assert killed >= 3  # the others had ended before


def test_the_score_of_a_stream_survives_a_kill(tmp_path: Path) -> None:
    case = Case(protocol="online")
    tasks = uninterrupted(case)["report"]["tasks"]
    assert all("final_accuracy" in row for row in tasks.values())
    assert in_child(lambda: fit(case, tmp_path, Kill("start", 6))) == -signal.SIGKILL
    check(case, tmp_path)


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    case = Case()
    fit(case, tmp_path)
    before = (tmp_path / "last.ckpt").read_bytes()
    check(case, tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_accumulated_gradients_are_never_cut(tmp_path: Path) -> None:
    saved = []

    class Watch(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
            saved.append((trainer.fit_loop.batch_idx, trainer.global_step))

    case = Case(accumulate=2, every=1)
    trainer = case.trainer(tmp_path, [Watch()], max_epochs=1)
    model = case.model()
    trainer.fit(model, datamodule=case.data(model.suite))
    assert saved == [(1, 1), (3, 2), (4, 3)]


# What is in a checkpoint ---------------------------------------------------------------------------------------------


class Renamed(NetworkSuite):
    """The same networks under other names."""

    def __init__(self, suite: ToySuite) -> None:
        names = dict(zip(suite.tasks, ("x", "y", "z"), strict=True))
        super().__init__(
            network=suite.network(),
            experts={new: dict(suite.expert(old)) for old, new in names.items()},
            heads={new: suite.head(old) for old, new in names.items()},
            test={new: suite.dataset(old, "test") for old, new in names.items()},  # type: ignore[misc]
            name=suite.name,
        )


@pytest.fixture(scope="module")
def point(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in the middle of a run with the default toys."""
    root = tmp_path_factory.mktemp("point")
    case = Case()
    model = case.model()
    case.trainer(root, max_epochs=2).fit(model, datamodule=case.data(model.suite))
    return root / "last.ckpt"


SHA = "sha256:[0-9a-f]{12}"
ORDER = r"\['task.a', 'task.b', 'task.c'\]"
OTHERS: dict[str, tuple[Callable[[], Suite], dict[str, Any], dict[str, Any], str]] = {
    "expert": (partial(ToySuite, changed=True), {}, {}, f"expert 'task.c' was {SHA}, this run has {SHA}"),
    "base": (partial(ToySuite, seed=5), {}, {}, f"base network was {SHA}, this run has {SHA}"),
    "network": (partial(ToySuite, "mlp"), {}, {}, f"base network was {SHA}, this run has {SHA}"),
    "transforms": (ToySuite, {"transforms": [Ties()]}, {}, r"transforms was \[\], this run has \[.*Ties.*\]"),
    "order": (lambda: Permuted(ToySuite()), {}, {}, rf"tasks was {ORDER}, this run has \['task.c', 'task.b', 'task.a'"),
    "names": (lambda: Renamed(ToySuite()), {}, {}, rf"tasks was {ORDER}, this run has \['x', 'y', 'z'\]"),
    "number": (partial(ToySuite, tasks=2), {}, {}, rf"tasks was {ORDER}, this run has \['task.a', 'task.b'\]"),
    "seed": (ToySuite, {}, {"seed": 2}, "its data had seed 1, this run has 2"),
    "protocol": (ToySuite, {}, {"protocol": "split"}, "its data had protocol transductive, this run has split"),
    "batch": (ToySuite, {}, {"batch_size": 8}, "its data had images per task and step 4, this run has 8"),
    "steps": (ToySuite, {}, {"steps_per_epoch": 7}, "its data had steps_per_epoch 5, this run has 7"),
    "granularity": (ToySuite, {"granularity": "task"}, {}, r"size mismatch for coefficients.*\[3, 10\].*\[3, 1\]"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_refuses_to_go_on_with_something_else(tmp_path: Path, point: Path, other: str) -> None:
    make, model_options, data_options, message = OTHERS[other]
    suite, case = make(), Case()
    model = AdaMerging(**{"suite": suite, **model_options})
    kind = RuntimeError if other == "granularity" else MergeError
    with pytest.raises(kind, match=f"(?s){message}"):
        case.trainer(tmp_path).fit(model, datamodule=case.data(suite, **data_options), ckpt_path=point)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["test", "validate", "export", "load_from_checkpoint"])
def test_refuses_to_evaluate_or_export_with_another_expert(tmp_path: Path, point: Path, how: str) -> None:
    suite, case = ToySuite(changed=True), Case()
    model, trainer = case.model(suite), case.trainer(tmp_path)
    evaluate: Callable[[], object]
    if how == "load_from_checkpoint":
        evaluate = partial(AdaMerging.load_from_checkpoint, point, suite=suite)
    elif how == "export":
        evaluate = partial(trainer.export, model, ckpt_path=point)
    else:
        evaluate = partial(getattr(trainer, how), model, datamodule=case.data(suite), ckpt_path=point)
    with pytest.raises(MergeError, match=f"expert 'task.c' was {SHA}, this run has {SHA}; .*give the suite"):
        evaluate()
    assert not list(tmp_path.iterdir())


def test_a_split_is_never_scored_on_what_it_adapted_on(tmp_path: Path) -> None:
    case = Case(protocol="split")
    model = case.model()
    case.trainer(tmp_path, max_epochs=1).fit(model, datamodule=case.data(model.suite))
    point = tmp_path / "last.ckpt"
    for options, message in (
        ({"seed": 3}, "its data had seed 1, this run has 3"),
        ({"adapt_fraction": 0.3}, "its data had adapt_fraction 0.5, this run has 0.3"),
    ):
        with pytest.raises(MergeError, match=message):
            case.trainer(tmp_path).test(model, datamodule=case.data(model.suite, **options), ckpt_path=point)
    case.trainer(tmp_path).test(model, datamodule=case.data(model.suite, batch_size=7), ckpt_path=point, verbose=False)
    assert model.results["tasks"]["task.a"]["n"] == 11


def test_refuses_a_foreign_checkpoint(tmp_path: Path) -> None:
    other = L.Trainer(logger=False, barebones=True)
    other.strategy.connect(L.LightningModule())
    other.save_checkpoint(tmp_path / "other.ckpt", weights_only=True)
    case, model = Case(), Case().model()
    with pytest.raises(MergeError, match="not one of lit-merge: it does not say which experts"):
        case.trainer(tmp_path).fit(model, datamodule=case.data(model.suite), ckpt_path=tmp_path / "other.ckpt")


def wide() -> NetworkSuite:
    """A network of 5 million parameters, 20 MB."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4000), nn.BatchNorm1d(4000), nn.Linear(4000, 1000)).eval()
    toys = ToySuite(tasks=2)
    experts = {task: expert_state(network, number) for number, task in enumerate(toys.tasks)}
    return NetworkSuite(
        network=network,
        experts=experts,  # type: ignore[arg-type]
        test={task: toys.dataset(task, "test") for task in toys.tasks},  # type: ignore[misc]
        num_classes=dict.fromkeys(toys.tasks, 1000),
    )


@pytest.mark.parametrize("make", [wide, *(partial(ToySuite, kind) for kind in ("vit", "cnn", "tied"))])
def test_a_checkpoint_is_small_and_holds_only_what_was_learned(tmp_path: Path, make: Callable[[], Suite]) -> None:
    case = Case(experts=True)
    model = case.model(make(), buffers="recalibrate")
    case.trainer(tmp_path, max_epochs=1).fit(model, datamodule=case.data(model.suite))
    path = tmp_path / "last.ckpt"
    assert path.stat().st_size < 100_000
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"].keys() == {"coefficients"}
    assert torch.equal(checkpoint["state_dict"]["coefficients"], model.coefficients)


def test_load_from_checkpoint_gives_the_same_merge(tmp_path: Path) -> None:
    suite = ToySuite("vit")
    case = Case(ties=True)
    model = case.model(suite, bounds=(0.0, 0.31))
    case.trainer(tmp_path, max_epochs=1).fit(model, datamodule=case.data(suite))
    loaded = AdaMerging.load_from_checkpoint(tmp_path / "last.ckpt", suite=suite, transforms=[Ties()])
    assert torch.equal(loaded.coefficients, model.coefficients)
    assert (loaded.granularity, loaded.bounds) == ("tensor", (0.0, 0.31))
    expected = model.merged_state()
    for name, value in loaded.merged_state().items():
        assert torch.equal(value, expected[name])


# The command line ----------------------------------------------------------------------------------------------------


def command(*arguments: str) -> list[str]:
    """The same command every time."""
    return [
        *("fit", "--config", "adamerging.yaml", "--suite", "toys.ToySuite", "--trainer.accelerator", "cpu"),
        *("--trainer.max_epochs", "2", "--data.steps_per_epoch", "4", "--data.batch_size", "4"),
        *("--trainer.enable_progress_bar", "false", "--ckpt_path", "last"),
        *("--trainer.callbacks+", "ResumePoint", "--trainer.callbacks.every_n_steps", "1"),
        *arguments,
    ]


def killed(arguments: list[str], step: int) -> None:
    """Run the command and die in a step."""
    adapt, taken = AdaMerging.training_step, 0

    def training_step(self: AdaMerging, *args: Any) -> dict[str, Any]:
        nonlocal taken
        taken += 1
        if taken == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return adapt(self, *args)

    AdaMerging.training_step = training_step  # type: ignore[method-assign, assignment]
    main(arguments)


LOGGERS: dict[str, tuple[list[str], str]] = {
    "csv": ([], "runs/adamerging/version_0"),
    "csv version 0": (["--trainer.logger.version", "0"], "runs/adamerging/version_0"),
    "csv by name": (["--trainer.logger.version", "mine"], "runs/adamerging/mine"),
    "csv without a name": (["--trainer.logger.name", "null"], "runs/version_0"),
    "tensorboard": (["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "tb"],
                    "tb/adamerging/version_0"),
    "none": (["--trainer.logger", "false", "--trainer.default_root_dir", "here"], "here"),
    "wandb": (["--config", "wandb.yaml"], ""),
}  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the command without a kill."""
    folder = tmp_path_factory.mktemp("straight")

    def work() -> None:
        os.chdir(folder)
        main(command())

    assert in_child(work) == 0
    return folder / "runs/adamerging/version_0"


def learned(folder: Path) -> Tensor:
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    coefficients: Tensor = checkpoint["state_dict"]["coefficients"]
    return coefficients


@pytest.mark.slow
@pytest.mark.parametrize("logger", LOGGERS)
def test_one_command_starts_resumes_and_finishes(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options, place = LOGGERS[logger]
    arguments = command(*options)
    assert in_child(lambda: killed(arguments, 7)) == -signal.SIGKILL
    points = list(tmp_path.rglob("last.ckpt"))
    assert len(points) == 1
    folder = points[0].parent
    assert folder == tmp_path / place or logger == "wandb"
    assert in_child(lambda: main(arguments)) == 0
    assert list(tmp_path.rglob("last.ckpt")) == points  # resumed in the same folder, under the same W&B id
    assert torch.equal(learned(folder), learned(straight))
    assert report(folder) == report(straight)
    before = points[0].read_bytes()
    (folder / "report.json").unlink()
    assert in_child(lambda: main(arguments)) == 0
    assert points[0].read_bytes() == before
    assert report(folder) == report(straight)
    assert json.loads((folder / "report.json").read_text())["extra"]["steps"] == 8
    assert [path.parent for path in tmp_path.rglob("report.json")] == [folder]


def test_the_default_logger_of_lightning_is_found_again(tmp_path: Path, straight: Path) -> None:
    arguments = command("--trainer.logger", "true")
    assert in_child(lambda: killed(arguments, 7)) == -signal.SIGKILL
    assert in_child(lambda: main(arguments)) == 0
    folders = sorted(path.parent for path in tmp_path.rglob("last.ckpt"))  # it cannot be told its version
    assert [folder.name for folder in folders] == ["version_0", "version_1"]
    assert torch.equal(learned(folders[1]), learned(straight))


def test_a_fixed_version_is_not_mixed_up_with_a_newer_one(tmp_path: Path) -> None:
    for version in ("0", "1"):
        assert in_child(lambda: killed(command("--trainer.logger.version", version), 3)) == -signal.SIGKILL  # noqa: B023
    assert in_child(lambda: main(command("--trainer.logger.version", "0"))) == 0
    runs = tmp_path / "runs" / "adamerging"
    assert learned(runs / "version_0").shape == (3, 10)
    assert torch.load(runs / "version_1" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_without_a_logger_other_folders_are_not_taken_for_the_run(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "last.ckpt").write_bytes(b"not a checkpoint")
    assert in_child(lambda: main(command("--trainer.logger", "false"))) == 0
    assert len(learned(tmp_path)) == 3


def test_last_without_a_run_is_an_error_for_what_needs_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["test", *command()[1:]])
    assert exit_.value.code == 1
    assert "ckpt_path: last: no last.ckpt below runs/adamerging; run fit first" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found|no such|not exist"),
        (b"", "no data|empty|Ran out|EOF"),
        (b"not a checkpoint", "invalid|pickle|Unpickl"),
    ],
)
def test_an_unusable_checkpoint_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    path = tmp_path / "broken.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        main([*command(), "--ckpt_path", str(path)])
    assert exit_.value.code == 1
    text = capsys.readouterr().err
    assert "broken.ckpt" in text
    assert "Traceback" not in text


def test_python_resumes_from_a_fixed_version(tmp_path: Path) -> None:
    case = Case()
    for epochs in (1, 2):
        model = case.model()
        trainer = case.trainer(tmp_path, logger=CSVLogger(tmp_path, "runs", version=3), max_epochs=epochs)
        trainer.fit(model, datamodule=case.data(model.suite), ckpt_path="last")
        assert trainer.global_step == epochs * STEPS
    assert [path.parent.name for path in tmp_path.rglob("last.ckpt")] == ["version_3"]
