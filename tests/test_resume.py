"""A killed run goes on as if nothing had happened, and never against something else."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from kills import EPOCHS, STEPS, Case, Kill, When, check, fit, in_child, side_by_side, uninterrupted
from testers import Permuted
from torch import nn
from toys import ToySuite, expert_state

from lit_merge import AdaMerging
from lit_merge.errors import MergeError
from lit_merge.suites import NetworkSuite, Suite
from lit_merge.transforms import Ties

RICH = Case("vit", experts=True, scheduler=True)
SLOW_STEPS = Case(accumulate=2, every=1)
LIMITED = Case(steps=2 * STEPS + 3)
WORKERS = Case(workers=2)
KILLS: dict[str, list[tuple[Case, When, int]]] = {
    "steps": [
        (Case(), "start", 1),  # the first step
        (Case(), "end", 1),
        (Case(), "end", STEPS),  # the last batch of an epoch
        (Case(), "validation", 7),
        (Case(), "epoch_end", 1),
        (Case(), "start", STEPS + 1),  # the first batch of the next epoch
    ],
    "saves": [
        (Case(), "before_save", 1),
        (Case(), "in_save", 1),
        (Case(), "after_save", 1),
        (Case(), "in_save", 3),  # at the end of an epoch
        (Case(), "after_save", 3),
        (Case(every=1), "in_save", 7),
        (Case(every=1), "end", 13),
    ],
    "rich": [
        (RICH, "start", 9),
        (RICH, "end", 2 * STEPS),
        (RICH, "in_save", 2),
        (RICH, "after_save", 5),
        (RICH, "epoch_end", EPOCHS),  # the very end
    ],
    "accumulated": [
        (SLOW_STEPS, "start", 2),  # in the middle of accumulated gradients
        (SLOW_STEPS, "start", 4),
        (Case(accumulate=2, every=1, scheduler=True), "end", 8),
        (Case(accumulate=2, every=2), "in_save", 2),
    ],
    "split and limited": [
        (Case("tied", protocol="split", ties=True), "end", 8),
        (Case("mlp", protocol="split", experts=True, ties=True), "after_save", 2),
        (LIMITED, "start", STEPS + 1),  # from the end of an epoch, which Lightning takes for the middle
        (LIMITED, "in_save", 4),
        (Case(steps=2 * STEPS + 3, every=1), "end", 2 * STEPS + 2),
    ],
    "workers": [
        (WORKERS, "start", 1),
        (WORKERS, "end", STEPS),
        (WORKERS, "start", STEPS + 2),
        (WORKERS, "after_save", 3),  # goes on from the end of an epoch
        (WORKERS, "in_save", 4),
    ],
}
SEVERAL = [(Case(every=1), (0, 4)), (RICH, (1, 5)), (SLOW_STEPS, (2, 6)), (Case(every=3, experts=True), (3, 7))]


@pytest.mark.parametrize("group", KILLS)
def test_goes_on_to_the_same_bits_after_a_kill(tmp_path: Path, group: str) -> None:
    def job(number: int, case: Case, kill: Kill) -> None:
        (root := tmp_path / str(number)).mkdir()
        assert in_child(lambda: fit(case, root, kill)) == -signal.SIGKILL, (case, kill.when)
        assert not (root / "final.pt").exists()
        check(case, root)

    for case, _, _ in KILLS[group]:
        uninterrupted(case)
    side_by_side([partial(job, n, case, Kill(when, left)) for n, (case, when, left) in enumerate(KILLS[group])])


@pytest.mark.parametrize(("case", "seeds"), SEVERAL, ids=["plain", "rich", "accumulated", "experts"])
def test_survives_several_kills(tmp_path: Path, case: Case, seeds: tuple[int, int]) -> None:
    moments: tuple[When, ...] = ("start", "end", "epoch_end", "before_save", "in_save", "after_save")

    def job(seed: int) -> None:
        choice, kills = random.Random(seed), 0
        (root := tmp_path / str(seed)).mkdir()
        for _ in range(2 + seed % 2):
            when = choice.choice(moments)
            kill = Kill(when, choice.randint(1, 2 if when == "epoch_end" else 6))
            status = in_child(partial(fit, case, root, kill))
            assert status in (0, -signal.SIGKILL)
            kills += status != 0
        assert kills >= 1
        check(case, root)

    uninterrupted(case)
    side_by_side([partial(job, seed) for seed in seeds])


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
            status = in_child(lambda: fit(case, root), deadline=choice.uniform(0.1, 1.0) * length)  # noqa: B023
            killed += status != 0
            length *= 1.0 if status else 0.7  # it had ended before: the machine is less busy than it was
        check(case, root)
    assert killed >= 3


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
    "head": (partial(ToySuite, heads=7), {}, {}, f"head of 'task.a' was {SHA}, this run has {SHA}"),
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
