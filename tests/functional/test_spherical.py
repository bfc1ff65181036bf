from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_merge import MergeError
from lit_merge.functional.model_stock import model_stock
from lit_merge.functional.scopes import gram
from lit_merge.functional.spherical import karcher_mean, slerp
from lit_merge.functional.weighted_average import weighted_average


def deltas(tasks: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"w": (4, 3, 2), "b": (5,), "s": (), "one": (1,)}
    return {
        name: torch.randn(tasks, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def circle(*degrees: float, lengths: float = 1.0) -> dict[str, Tensor]:
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return {"w": lengths * torch.stack([angles.cos(), angles.sin()], 1)}


@pytest.mark.parametrize(("t", "degrees"), [(0.0, 10.0), (0.25, 30.0), (0.5, 50.0), (1.0, 90.0)])
def test_slerp_turns_at_a_constant_rate(t: float, degrees: float) -> None:
    torch.testing.assert_close(slerp(circle(10, 90), t)["w"], circle(degrees)["w"][0])


def test_slerp_by_hand_with_unequal_lengths() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])
    root = 0.5**0.5  # sin 45° / sin 90°
    torch.testing.assert_close(slerp({"w": torch.stack([a, b])})["w"], root * (a + b))
    torch.testing.assert_close(slerp({"w": torch.stack([a, b])}, lengths="linear")["w"], torch.full((2,), 2.5 * root))


@pytest.mark.parametrize("angle", [0.0, 1.0, 180.0])
def test_slerp_without_an_arc_is_linear(angle: float) -> None:
    ends = circle(0, angle, lengths=3.0)
    torch.testing.assert_close(slerp(ends, 0.25)["w"], 0.75 * ends["w"][0] + 0.25 * ends["w"][1])
    exact = slerp(ends, 0.25, threshold=1.0)["w"]
    assert torch.isfinite(exact).all()
    assert float(exact.norm()) == pytest.approx(3.0 if angle == 1 else float(slerp(ends, 0.25)["w"].norm()))


@pytest.mark.parametrize("lengths", ["blend", "linear"])
def test_rounding_does_not_open_an_arc_between_opposite_vectors(lengths: Any) -> None:
    a = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    for vector in a:
        pair = torch.stack([vector, -0.7 * vector])  # the cosine is −1 + 1e-16 or so
        torch.testing.assert_close(slerp({"w": pair}, lengths=lengths, threshold=1.0)["w"], pair.mean(0))


def test_an_expert_without_weight_does_not_decide_on_the_direction() -> None:
    torch.testing.assert_close(karcher_mean(circle(0, 60, 180), [1, 1, 0])["w"], circle(30)["w"][0])


@pytest.mark.parametrize("per", ["row", "tensor", "network"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_karcher_mean_of_two_is_slerp(per: Any, weighted: bool) -> None:
    pair, base = deltas(2), {name: value[0] for name, value in deltas(1, seed=9).items()}
    for anchor in (None, base):
        ours = karcher_mean(pair, [0.7, 0.3] if weighted else None, base=anchor, per=per)
        arc = slerp(pair, 0.3 if weighted else 0.5, base=anchor, per=per, lengths="linear", threshold=1.0)
        for name in pair:
            torch.testing.assert_close(ours[name], arc[name], rtol=1e-7, atol=1e-7)


def test_the_karcher_mean_balances_the_pulls_and_keeps_the_length() -> None:
    torch.testing.assert_close(karcher_mean(circle(0, 20, 100))["w"], circle(40)["w"][0])  # the mean angle
    torch.testing.assert_close(karcher_mean(circle(0, 20, 100), [1, 2, 1])["w"], circle(35)["w"][0])
    some = {"w": deltas(5)["w"].abs()}  # in one orthant
    mean = karcher_mean(some)["w"].flatten()
    rows = some["w"].flatten(1)
    units, lengths = rows / rows.norm(dim=1, keepdim=True), rows.norm(dim=1)
    torch.testing.assert_close(mean.norm(), lengths.mean())
    u = mean / mean.norm()
    angles = (units @ u).acos()
    pulls = (angles / angles.sin())[:, None] * (units - (units @ u)[:, None] * u)
    assert float(pulls.mean(0).norm()) < 1e-8


def test_weights_are_merged_around_the_base() -> None:
    pair, base = deltas(2), {name: value[0] for name, value in deltas(1, seed=9).items()}
    whole = {name: base[name] + value for name, value in pair.items()}
    for rule in (slerp, karcher_mean, partial(karcher_mean, per="network")):
        merged, plain = rule(pair, base=base), rule(whole)
        for name in pair:
            torch.testing.assert_close(merged[name] + base[name], plain[name])


@pytest.mark.parametrize("per", ["row", "tensor", "network"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_breaks_at_the_edges(per: Any, dtype: torch.dtype) -> None:
    vector = {name: value[0].float() for name, value in deltas(1, dtype=dtype).items()}
    same = {name: torch.stack([value, value]).to(dtype) for name, value in vector.items()}
    none = {name: torch.zeros_like(value) for name, value in same.items()}
    opposite = {name: torch.stack([value, -value]).to(dtype) for name, value in vector.items()}
    for rule in (slerp, karcher_mean, model_stock):
        assert all(not value.any() for value in rule(none, per=per).values())
        assert all(not value.any() for value in rule(opposite, per=per).values())
        for name, value in rule(same, per=per).items():
            torch.testing.assert_close(value, vector[name])
    half = {name: torch.stack([torch.zeros_like(value), 2 * value]).to(dtype) for name, value in vector.items()}
    for rule in (slerp, karcher_mean):
        for name, value in rule(half, per=per).items():
            torch.testing.assert_close(value, vector[name])
    for name, value in karcher_mean({n: v[None].to(dtype) for n, v in vector.items()}, per=per).items():
        torch.testing.assert_close(value, vector[name])


def test_gram_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    some = deltas(3)
    plain = {per: gram(some, per) for per in ("row", "tensor", "network")}
    rows = some["w"].reshape(3, 4, 6)
    torch.testing.assert_close(plain["row"]["w"], torch.einsum("srn,trn->rst", rows, rows))
    flat = torch.cat([value.reshape(3, -1) for value in some.values()], 1)
    torch.testing.assert_close(plain["network"]["b"][0], flat @ flat.T)
    monkeypatch.setattr("lit_merge.functional.scopes._PIECE", 4)
    for per, found in plain.items():
        for name, value in gram(some, per).items():  # type: ignore[arg-type]
            torch.testing.assert_close(value, found[name])


def test_model_stock_by_hand() -> None:
    ends = circle(0, 60, lengths=2.0)
    centre = ends["w"].mean(0)
    torch.testing.assert_close(model_stock(ends)["w"], 2 / 3 * centre)  # 2 · ½ / (1 + ½)
    assert float(model_stock(circle(0, 90))["w"].norm()) < 1e-12  # orthogonal: the base
    three = circle(0, 30, 90)  # cosines of 30°, 60°, 90° and their mean; 60° is the mean angle
    for average, cosine in (("cosine", (0.75**0.5 + 0.5) / 3), ("angle", 0.5)):
        expected = 3 * cosine / (1 + 2 * cosine) * three["w"].mean(0)
        torch.testing.assert_close(model_stock(three, average=average)["w"], expected)  # type: ignore[arg-type]
    wide = circle(0, 100)
    assert not model_stock(wide)["w"].any()
    cosine = float(torch.tensor(100.0).deg2rad().cos())
    expected = 2 * cosine / (1 + cosine) * wide["w"].mean(0)
    torch.testing.assert_close(model_stock(wide, clamp=False)["w"], expected, rtol=1e-6, atol=1e-6)


def test_weighted_average() -> None:
    some = deltas(3)
    for name, value in weighted_average(some, [1, 0, 3]).items():
        torch.testing.assert_close(value, 0.25 * some[name][0] + 0.75 * some[name][2])
    for name, value in weighted_average(some, [1, 1, 1], normalize=False).items():
        torch.testing.assert_close(value, some[name].sum(0))


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        (slerp, {}, "expected two experts, found 3; karcher_mean takes any number"),
        (slerp, {"t": 1.5}, r"t: expected a number in \[0, 1\], found 1.5"),
        (slerp, {"lengths": "unit"}, "lengths: expected blend or linear, found 'unit'"),
        (slerp, {"per": "block"}, "per: expected row or tensor or network, found 'block'"),
        (karcher_mean, {"weights": [1, 2]}, "weights: expected 3 numbers, at least 0"),
        (karcher_mean, {"weights": [1, 2, -1]}, "weights: expected at least 0, found -1"),
        (karcher_mean, {"tolerance": 0.0}, "expected tolerance > 0"),
        (model_stock, {"average": "median"}, "average: expected cosine or angle"),
        (weighted_average, {"weights": [1, -1, 0]}, "whose sum is not 0"),
        (weighted_average, {"weights": [1, 1]}, "one for each of 3 tasks, found 2"),
    ],
)
def test_bad_arguments(rule: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(MergeError, match=words):
        rule(deltas(3), **options)
    with pytest.raises(MergeError, match="expected at least two experts, found 1"):
        model_stock(deltas(1))
