"""Inputs of linear layers, RegMean, Fisher information and SVC against plain forms of the same formulas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as nnf
from toys import SIZE, network

from lit_merge import MergeError
from lit_merge import functional as F
from lit_merge.functional.linear_inputs import linear_weights


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attended(module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What enters the output projection, written out; batch first."""
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    heads = [
        nnf.linear(x, w, b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    ]
    scores = heads[0] @ heads[1].mT / heads[0].shape[-1] ** 0.5
    entered: Tensor = (scores.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
    return entered


@pytest.mark.parametrize("crossed", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_what_enters_the_projections_of_attention(crossed: bool, need_weights: bool) -> None:
    module = nn.MultiheadAttention(6, 2, batch_first=True, dtype=torch.float64).eval()
    nn.init.normal_(module.in_proj_bias)
    query, other = random(3, 4, 6), random(3, 5, 6, seed=1)
    key = value = other if crossed else query
    with torch.no_grad():
        before = module(query, key, value, need_weights=need_weights)[0]
        with F.LinearInputs(module) as seen:
            after = module(query, key, value, need_weights=need_weights)[0]
        entered = attended(module, query, key, value)
    torch.testing.assert_close(before, after, rtol=0, atol=0)  # watching changes nothing
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    expected = torch.stack([x.mT @ x for x in (flat if crossed else flat[:1])])
    torch.testing.assert_close(seen.grams["in_proj_weight"], expected)
    flat_entered = entered.flatten(0, 1)
    torch.testing.assert_close(seen.grams["out_proj.weight"], (flat_entered.mT @ flat_entered)[None])
    assert seen.rows == {"in_proj_weight": 12, "out_proj.weight": 12}


def test_every_linear_layer_of_a_transformer_is_seen_in_order_and_calls_add_up() -> None:
    vit = network("vit").eval()
    images = random(4, 3, SIZE, SIZE).float()
    with torch.no_grad():
        with F.LinearInputs(vit) as twice:
            vit(images[:2])
            vit(images[2:])
        with F.LinearInputs(vit) as once:
            functional_call(vit, dict(vit.state_dict()), (images,))
        with F.LinearInputs(vit, ["transformer.resblocks.0.mlp.c_fc.weight"], stop=True) as early:
            early.run(lambda: vit(images))
    names = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    assert list(once.grams) == [f"transformer.resblocks.{b}.{name}" for b in (0, 1) for name in names]
    assert set(once.grams) == linear_weights(vit)
    for name, gram in once.grams.items():
        torch.testing.assert_close(twice.grams[name], gram, rtol=1e-4, atol=1e-4)
    assert list(early.grams) == ["transformer.resblocks.0.mlp.c_fc.weight"]
    torch.testing.assert_close(early.grams["transformer.resblocks.0.mlp.c_fc.weight"],
                               once.grams["transformer.resblocks.0.mlp.c_fc.weight"])  # fmt: skip


def test_tied_layers_share_their_inputs() -> None:
    net = network("tied")
    with F.LinearInputs(net, tied={"second.weight": "first.weight"}) as seen:
        net(random(5, 3, SIZE, SIZE).float())
    assert seen.rows == {"stem.weight": 5, "first.weight": 10}


def test_regmean_is_least_squares_on_all_inputs() -> None:
    inputs, weights, base = [random(40, 5, seed=t) for t in range(3)], random(3, 4, 5, seed=9), random(4, 5, seed=8)
    grams = torch.stack([x.mT @ x for x in inputs])
    merged = base + F.regmean({"w": weights - base}, {"w": grams}, off_diagonal=1, ridge=0)["w"]
    answers = torch.cat([x @ w.mT for x, w in zip(inputs, weights, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(inputs), answers).solution.mT
    torch.testing.assert_close(merged, expected, rtol=1e-9, atol=1e-9)
    # three blocks of rows with inputs of their own are three layers
    packed = F.regmean(
        {"w": weights.repeat(1, 3, 1)}, {"w": torch.stack([grams, 2 * grams + 1, grams.roll(1, 0)], 1)}, 0.5, 0.1
    )["w"]
    for part, own in zip(packed.chunk(3), (grams, 2 * grams + 1, grams.roll(1, 0)), strict=True):
        torch.testing.assert_close(part, F.regmean({"w": weights}, {"w": own}, 0.5, 0.1)["w"], rtol=1e-9, atol=1e-9)


def test_single_precision_is_good_enough_for_shrunk_matrices_and_only_for_these() -> None:
    """A spectrum from 1 to 1e-7, which inner products in float32 do not resolve."""
    spectrum = torch.logspace(0, -7, 80, dtype=torch.float64)
    inputs = [random(200, 80, seed=t) * spectrum.sqrt() for t in range(3)]
    grams, deltas = torch.stack([x.mT @ x for x in inputs]).float(), random(3, 20, 80, seed=9).float()
    for off_diagonal, worst in ((0.95, 1e-5), (1.0, 1e-6)):
        layer = F.NormalEquations(off_diagonal)
        for gram, delta in zip(grams, deltas, strict=True):
            layer.add(gram, delta)
        assert layer.solve().dtype == (torch.float32 if off_diagonal < 1 else torch.float64)
        exact = F.regmean({"w": deltas.double()}, {"w": grams.double()}, off_diagonal)["w"]
        assert float((layer.solve() - exact).norm() / exact.norm()) < worst


def test_directions_without_inputs_take_the_mean() -> None:
    weights = random(2, 4, 3)
    grams = torch.zeros(2, 3, 3, dtype=torch.float64)
    grams[0, 0, 0] = 1.0
    merged = F.regmean({"w": weights}, {"w": grams})["w"]
    torch.testing.assert_close(merged[:, 1:], weights.mean(0)[:, 1:])
    torch.testing.assert_close(merged[:, 0], weights[0, :, 0], atol=1e-5, rtol=0)
    with pytest.raises(MergeError, match=r"not positive definite.*give more images, or a ridge above 0"):
        F.regmean({"w": weights}, {"w": grams}, ridge=0)
    torch.testing.assert_close(F.regmean({"w": weights}, {"w": 0 * grams})["w"], weights.mean(0))


def toy_logits(parameters: Mapping[str, Tensor], images: Tensor) -> Tensor:
    out: Tensor = functional_call(VIT, dict(parameters), (images,), tie_weights=False)
    return out


VIT = network("vit").double().eval()
IMAGES = random(3, 3, SIZE, SIZE)
PARAMETERS = {name: value.detach() for name, value in VIT.named_parameters()}


def plain_fisher(weights: Tensor) -> dict[str, Tensor]:
    """Σ_x Σ_r (∇ Σ_c w_r,c log p(c|x))², one gradient at a time; weights ``(R, B, C)``."""
    found = {name: torch.zeros_like(value) for name, value in PARAMETERS.items()}
    for round_ in weights:
        for image, weight in zip(IMAGES, round_, strict=True):
            VIT.zero_grad()
            (VIT(image[None]).log_softmax(-1)[0] * weight).sum().backward()
            for name, value in VIT.named_parameters():
                found[name] += torch.zeros(()) if value.grad is None else value.grad.square()
    VIT.zero_grad()
    return found


@pytest.mark.parametrize("target", ["expected", "labels", "root"])
@pytest.mark.parametrize("gradients", ["vmap", "loop"])
def test_fisher_information_of_single_images(target: Any, gradients: Any) -> None:
    labels = torch.tensor([1, 0, 3])
    found = F.diagonal_fisher(
        toy_logits, PARAMETERS, IMAGES, target=target, labels=labels, gradients=gradients, chunk_size=2
    )
    with torch.no_grad():
        p = VIT(IMAGES).softmax(-1)
    classes = torch.eye(p.shape[1], dtype=p.dtype)
    weights = {"expected": p.sqrt() * classes[:, None], "labels": classes[labels][None], "root": p.sqrt()[None]}
    for name, value in plain_fisher(weights[target]).items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-14)


def test_fisher_information_by_samples_and_by_batches() -> None:
    def options(seed: int) -> dict[str, Any]:
        return {"target": "sampled", "generator": torch.Generator().manual_seed(seed)}

    many = IMAGES[:1].expand(400, -1, -1, -1)
    sampled = F.diagonal_fisher(toy_logits, PARAMETERS, many, chunk_size=100, **options(0))["proj"] / 400
    expected = F.diagonal_fisher(toy_logits, PARAMETERS, IMAGES[:1])["proj"]
    assert float((sampled - expected).norm() / expected.norm()) < 0.15
    first, again = (F.diagonal_fisher(toy_logits, PARAMETERS, many[:5], **options(1))["proj"] for _ in range(2))
    assert torch.equal(first, again)
    pair = IMAGES[:1].expand(2, -1, -1, -1)
    both = F.diagonal_fisher(toy_logits, PARAMETERS, pair, target="root", squares="batch")["proj"]
    alone = F.diagonal_fisher(toy_logits, PARAMETERS, IMAGES[:1], target="root")["proj"]
    torch.testing.assert_close(both, 4 * alone)  # the square of a sum of two, not the sum of two squares


def test_fisher_average() -> None:
    deltas = {"w": random(3, 4, 5), "b": random(3, 4, seed=1)}
    fishers = {name: random(*value.shape, seed=2).square() for name, value in deltas.items()}
    lengths = torch.stack([torch.cat([f[t].flatten() for f in fishers.values()]).norm() for t in range(3)])
    shares = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64) / (lengths + 1e-6)
    merged = F.fisher_merge(deltas, fishers, [1.0, 2.0, 0.5])
    for name, value in deltas.items():
        weight = (fishers[name] + 1e-6) * shares.view(-1, *[1] * (value.ndim - 1))
        torch.testing.assert_close(merged[name], (weight * value).sum(0) / weight.sum(0))
    with pytest.raises(MergeError, match="weights: expected one for each of 3 tasks, found 1"):
        F.fisher_merge(deltas, fishers, [1.0])
    with pytest.raises(MergeError, match="differ in b"):
        F.fisher_merge(deltas, {"w": fishers["w"]})


def test_svc_by_the_formula() -> None:
    deltas, alpha = random(3, 4, 6), 0.1
    merged = 0.3 * deltas.sum(0)
    u, s, vh = torch.linalg.svd(merged, full_matrices=False)
    factors = []
    for r in range(len(s)):
        shares = [(u[:, r] @ merged) @ (u[:, r] @ d) / (u[:, r] @ d).square().sum() for d in deltas]
        factors.append(3 / sum(max(alpha, float(share)) for share in shares))
    expected = u @ torch.diag(torch.tensor(factors, dtype=s.dtype) * s) @ vh
    found = F.svc({"w": merged, "b": merged[0]}, {"w": deltas, "b": deltas[:, 0]}, alpha)
    torch.testing.assert_close(found["w"], expected)
    assert torch.equal(found["b"], merged[0])
    same = deltas[:1].expand(4, -1, -1)  # what four experts share is in their sum four times
    torch.testing.assert_close(F.svc({"w": same.sum(0)}, {"w": same})["w"], same[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: F.regmean(w, {"v": w["w"]}), "grams: v: expected the name of a tensor, such as w"),
        (lambda w: F.regmean(w, {"w": torch.eye(3)[None]}), "grams: w: expected one for each of 2 tasks, found 1"),
        (lambda w: F.regmean(w, {"w": torch.ones(2, 2, 2)}), r"expected \(n, n\).*found \(2, 2\) for \(4, 3\)"),
        (lambda w: F.regmean({}, {}, others=cast("Any", "all")), "others: expected base, mean or sum"),
        (lambda w: F.NormalEquations(2.0), r"off_diagonal: expected a factor in \[0, 1\], found 2.0"),
        (lambda w: F.NormalEquations().solve(-1), "ridge: expected at least 0, found -1"),
        (lambda w: F.svc({"w": w["w"][0]}, w, alpha=0), "alpha: expected a number above 0, found 0"),
        (lambda w: F.FisherAverage(floor=0), "floor: expected a number above 0, found 0"),
        (
            lambda w: F.diagonal_fisher(toy_logits, {}, IMAGES, target=cast("Any", "a")),
            "target: expected expected, sampled",
        ),
        (lambda w: F.diagonal_fisher(toy_logits, PARAMETERS, IMAGES, target="labels"), "labels: expected one per"),
    ],
)
def test_refuses(call: Any, message: str) -> None:
    with pytest.raises(MergeError, match=message):
        call({"w": random(2, 4, 3)})
