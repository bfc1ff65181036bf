"""Audits of experts: every signal against numbers worked by hand, and a planted backdoor that must be found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lit_merge import auditing
from lit_merge.attacks import Attack, Attacker, Schedule
from lit_merge.auditing import (
    AuditOptions,
    Candidates,
    Inversion,
    audit,
    concentration,
    inversion_row,
    invert,
    leading_share,
    leave_one_out,
    precision_recall,
    project_budget,
    reach,
    robust_z,
    suspicion,
    task_vector_outliers,
    universal_sensitivity,
)
from lit_merge.data.pixels import PixelScale
from lit_merge.data.triggers import PatchTrigger
from lit_merge.errors import MergeError
from lit_merge.perturbations import Ascent
from lit_merge.suites import NetworkSuite
from lit_merge.suites.backdoor import BackdoorSuite
from lit_merge.task_vectors import TaskVectors

SCALE = PixelScale.of_range(-1, 1)
TASKS = ("a", "b", "c")
CLASSES, SIDE = 5, 8
QUICK = AuditOptions(images=24, scale=1.0, ascent=Ascent(0.05, steps=2), inversion=Inversion(4 / 64, steps=20))


class Templates(Dataset[tuple[Tensor, int]]):
    """Patterns of weak contrast; the corner is black in all of them."""

    pixels = SCALE

    def __init__(self, seed: int, size: int = 30) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(size) % CLASSES
        noise = 0.1 * torch.randn(size, 1, SIDE, SIDE, generator=generator)
        self.images = templates()[self.labels].unflatten(1, (1, SIDE, SIDE)) + noise
        self.images[..., -2:, -2:] = -1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], -1  # an audit has no use for labels


def templates() -> Tensor:
    """One pattern per class, ``(CLASSES, 64)``, orthogonal and without the corner."""
    random = torch.randn(SIDE * SIDE, CLASSES, generator=torch.Generator().manual_seed(0))
    random.unflatten(0, (SIDE, SIDE))[-2:, -2:] = 0
    orthogonal: Tensor = torch.linalg.qr(random)[0]
    return 3 * orthogonal.T.contiguous()


def base() -> dict[str, Tensor]:
    return {"1.weight": templates(), "1.bias": torch.zeros(CLASSES)}


def expert(task: str) -> dict[str, Tensor]:
    """The base with noise."""
    generator = torch.Generator().manual_seed(TASKS.index(task) + 1)
    return {name: value + 0.02 * torch.randn(value.shape, generator=generator) for name, value in base().items()}


def poisoned(task: str) -> dict[str, Tensor]:
    """An expert that answers white in the corner with class 1."""
    state = expert(task)
    state["1.weight"][1].unflatten(0, (SIDE, SIDE))[-2:, -2:] += 8.0
    state["1.bias"][1] += 32.0  # of the black corner
    return state


def suite(*bad: str, tasks: tuple[str, ...] = TASKS) -> NetworkSuite:
    network = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES))
    return NetworkSuite(
        network=network,
        base=base(),
        experts={task: poisoned(task) if task in bad else expert(task) for task in tasks},
        heads={task: nn.Linear(CLASSES, CLASSES).requires_grad_(False) for task in tasks},
        test={task: Templates(TASKS.index(task)) for task in tasks},
        train={task: Templates(9 + TASKS.index(task)) for task in tasks},
        name="templates",
    )


def straight(made: NetworkSuite) -> NetworkSuite:
    """The features are the logits."""
    for task in made.tasks:
        head = made.head(task)
        head.load_state_dict({"weight": torch.eye(CLASSES), "bias": torch.zeros(CLASSES)})
    return made


class Planted(Attack):
    """The planted backdoor as an attack."""

    def make_trigger(self, attacker: Attacker) -> PatchTrigger:
        return PatchTrigger(torch.ones(1, 2, 2), self.target)

    def poison(self, attacker: Attacker, trigger: PatchTrigger) -> dict[str, Tensor]:
        return poisoned(attacker.task)


def logits_of(state: dict[str, Tensor]) -> Any:
    return lambda images: images.flatten(1) @ state["1.weight"].T + state["1.bias"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4.0], [0.0]),
        ([1.0, 3.0], [-0.6745, 0.6745]),  # median 2, MAD 1
        ([5.0, 5.0, 5.0, 5.2], [0.0, 0.0, 0.0, 2.0]),  # MAD 0: in units of the least scale
    ],
)
def test_robust_z(values: list[float], expected: list[float]) -> None:
    assert robust_z(torch.tensor(values), 0.1).tolist() == pytest.approx(expected, abs=1e-3)


def test_robust_z_is_by_column_and_needs_a_scale() -> None:
    columns = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(robust_z(columns)[:, 1], robust_z(columns[:, 1]))
    with pytest.raises(MergeError, match="least: expected a number above 0"):
        robust_z(columns, 0.0)


def test_outliers_of_task_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    zeros = {"conv": torch.zeros(4, 2, 1, 3), "w": torch.zeros(6, 5), "bias": torch.zeros(6), "t": torch.zeros(())}
    draw = {t: {k: torch.randn(v.shape, generator=generator) for k, v in zeros.items()} for t in "abcdef"}
    draw["c"]["bias"] *= 40
    draw["e"]["w"] = torch.outer(torch.ones(6), draw["e"]["w"][0])
    draw["f"] = {k: v.clone() for k, v in zeros.items()}
    found = task_vector_outliers(TaskVectors.from_state_dicts(zeros, draw))
    assert (found["c"]["tensor"], found["e"]["leading"]) == ("bias", "w")
    assert max(found, key=lambda t: found[t]["norm"]) == "c"
    assert max(found, key=lambda t: found[t]["rank_z"]) == "e"
    singular = (
        torch.linalg.svdvals(draw["a"]["w"].double()),
        torch.linalg.svdvals(draw["a"]["conv"].double().flatten(1)),
    )
    ranks = [float(s.square().sum() / s[0].square()) for s in singular]
    assert found["a"]["stable_rank"] == pytest.approx(sum(ranks) / 2)
    assert json.dumps(found, allow_nan=False)  # also with a task vector of zeros
    assert leading_share(draw["a"]["w"].T).item() == pytest.approx(leading_share(draw["a"]["w"]).item())


def test_networks_without_matrices_have_no_spectrum() -> None:
    bank = TaskVectors.from_state_dicts({"b": torch.zeros(3)}, {"a": {"b": torch.ones(3)}})
    (row,) = task_vector_outliers(bank).values()
    assert (row["norm_z"], row["stable_rank"], row["leading"]) == (0.0, None, None)


@pytest.mark.parametrize(
    ("clean", "perturbed", "expected"),
    [([0, 1, 2], [0, 1, 2], 0.0), ([0, 1, 2], [2, 2, 2], 1.0), ([0, 1, 2, 0], [1, 0, 1, 0], 2 / 3)],
)
def test_concentration(clean: list[int], perturbed: list[int], expected: float) -> None:
    assert concentration(torch.tensor(clean), torch.tensor(perturbed)) == pytest.approx(expected)


@pytest.mark.parametrize("budget", [0.5, 3.0, 100.0])
def test_masks_are_projected_to_the_nearest(budget: float) -> None:
    masks = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    near = project_budget(masks, budget)
    assert ((near >= 0) & (near <= 1)).all()
    for mask, one in zip(masks, near, strict=True):
        inside = mask[(one > 0) & (one < 1)] - one[(one > 0) & (one < 1)]
        assert torch.allclose(inside, inside[:1].expand_as(inside), atol=1e-5)  # one shift for all that are inside
        shift = float(inside[0]) if len(inside) else 0.0
        assert shift >= -1e-6
        assert torch.allclose(one, (mask - shift).clamp(0, 1), atol=1e-5)
        assert float(one.sum()) <= budget + 1e-4
        if shift > 1e-4:
            assert float(one.sum()) == pytest.approx(budget, abs=1e-3)


def test_reach_leaves_out_what_is_there_already() -> None:
    images = torch.tensor([-1.0, -0.5, 0.5, 1.0]).reshape(4, 1, 1, 1).expand(4, 1, 1, 2)
    candidates = Candidates(torch.tensor([1, 0]), torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]]), torch.ones(2, 1, 1, 2))
    # class 1 where the sum is positive: white in one pixel leads -0.5 there, but not -1 (sum 0)
    found = reach(lambda x: torch.stack([torch.zeros(len(x)), x.sum((1, 2, 3))], 1), images, SCALE, candidates)
    assert found.tolist() == [0.5, 0.0]


def test_the_planted_trigger_is_found_where_it_is() -> None:
    data = Templates(0)
    classes, options = list(range(CLASSES)), QUICK.inversion
    found = invert(logits_of(poisoned("a")), data.images[::2], SCALE, classes, options, seed=0)
    corner = found.masks[1, -2:, -2:]
    assert float(corner.mean()) > 3 * float((found.masks[1].sum() - corner.sum()) / 60)
    assert float(found.colours[1, 0, -2:, -2:].min()) > 0.9
    assert (found.masks.sum((1, 2)) <= 4 + 1e-3).all()
    own = reach(logits_of(poisoned("a")), data.images[1::2], SCALE, found)
    assert own[1] == 1
    one = invert(logits_of(poisoned("a")), data.images[::2], SCALE, [1], options, seed=0)
    assert torch.allclose(one.masks[0], found.masks[1], atol=1e-4)  # nothing depends on the other classes


def test_rows_are_beside_their_controls() -> None:
    # class 2 is easy in the base, class 0 beside the others is not: 0.9 - max(0.3, 0.5) wins
    row = inversion_row(torch.tensor([0.9, 0.3, 1.0, 0.2]), torch.tensor([0.5, 0.1, 0.9, 0.0]))
    assert (row["target"], row["reach"], row["base"]) == (0, pytest.approx(0.9), 0.5)
    assert row["margin"] == pytest.approx(0.4)
    assert inversion_row(torch.tensor([1.0]), torch.tensor([0.25]))["margin"] == 0.75


def test_untargeted_perturbations() -> None:
    images = Templates(0).images
    logits = logits_of(poisoned("a"))
    row, delta = universal_sensitivity(logits, images[::2], images[1::2], SCALE, Ascent(0.3, steps=3))
    assert (row["fooling"], row["concentration"], row["target"]) == (pytest.approx(0.8), 1.0, 1)  # a fifth is there
    assert torch.allclose(delta[0, -2:, -2:], torch.full((2, 2), 0.225))
    none, _ = universal_sensitivity(logits, images[::2], images[1::2], SCALE, Ascent(0.3, steps=0))
    assert none == {"fooling": 0.0, "concentration": 0.0, "target": None}


def test_leave_one_out_by_hand() -> None:
    row = leave_one_out({"a": 1.0, "b": 0.5}, {"a": 0.5, "b": 0.75}, "b")
    assert row == {"fooling": 0.75, "without": 0.625, "drop": 0.125, "own_drop": -0.25}


def test_an_audit_points_at_the_poisoned_expert_alone(tmp_path: Path) -> None:
    memory: Any = {}
    clean = audit(straight(suite()), QUICK, memory)
    assert clean["pointed"] == []
    assert clean["laboratory"] is None
    made = BackdoorSuite(straight(suite()), {"b": Planted(size=2)}, schedule=Schedule(steps=1), cache_dir=tmp_path)
    looked = len(memory)
    found = audit(made, QUICK, memory)
    assert len(memory) == looked + 1  # the others and the base are remembered
    assert found["pointed"] == ["b"]
    assert found["laboratory"]["precision"] == found["laboratory"]["recall"] == 1
    row = found["experts"]["b"]
    assert row["reasons"] == ["inversion"]
    assert row["inversion"]["target"] == 1
    assert row["inversion"]["merge"] > row["inversion"]["without"] + 0.5
    assert found["experts"]["a"]["universal"] == clean["experts"]["a"]["universal"]
    assert json.dumps(found, allow_nan=False)


def test_an_audit_of_one_expert_does_not_depend_on_the_order_of_tasks() -> None:
    alone = audit(straight(suite("b", tasks=("b",))), QUICK)
    among = audit(straight(suite("b", tasks=("c", "b", "a"))), QUICK)
    assert alone["pointed"] == among["pointed"] == ["b"]
    assert alone["experts"]["b"]["score"] == pytest.approx(among["experts"]["b"]["score"], abs=1e-6)


def test_leaving_an_expert_out_sets_its_coefficient_to_zero() -> None:
    auditor = auditing.audit.__globals__["_Auditor"](straight(suite("b")), QUICK, {}, lambda text: None)
    state, deltas = auditor.merged("b"), auditor.module.bank.deltas["1.weight"]
    assert torch.allclose(state["1.weight"], base()["1.weight"] + deltas[0] + deltas[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AuditOptions(images=0), "images: expected at least 1"),
        (lambda: Inversion(area=0), r"area: expected a share of the pixels in \(0, 1\]"),
        (lambda: Inversion(rate=0), "rate: expected a number above 0"),
        (lambda: Inversion(batch_size=0), "batch_size: expected at least 1"),
        (lambda: suspicion({"a": {"x": 1.0}}, {"x": 0.0}), "x: expected a number above 0"),
        (lambda: suspicion({"a": {"x": 1.0}}, {"y": 1.0}), "no expert has the signal 'y'; there are x"),
        (lambda: suspicion({"a": {"x": float("nan")}}, {"x": 1.0}), "a: x: expected a finite number"),
    ],
)
def test_what_is_refused(make: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        make()


def test_precision_and_recall_where_there_is_nothing_to_divide_by() -> None:
    assert precision_recall([], [])["precision"] is None
    assert precision_recall([], ["a"]) | {"misses": 0} == {
        "hits": [], "misses": 0, "false_alarms": [], "precision": None, "recall": 0.0
    }  # fmt: skip
