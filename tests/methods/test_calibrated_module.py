"""Which images merges are calibrated with, and that they do with them what the formulas say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from testers import TINY
from torch import Tensor
from toys import ToySuite

from lit_merge import MergeError, MergeModule, MergeTrainer, TaskDataModule
from lit_merge import functional as F
from lit_merge.calibrated_module import CalibratedModule
from lit_merge.callbacks import Report
from lit_merge.checkpoints.reading import read_state
from lit_merge.methods import FisherMerging, RegMean, RegMeanPlusPlus, Svc, TaskArithmetic
from lit_merge.streaming import why_not_streamed
from lit_merge.suites import Suite


def images(suite: Suite, task: str, split: Any = "train") -> Tensor:
    data = suite.dataset(task, split)
    return torch.stack([data[place][0] for place in range(len(data))]).double()


def made(kind: type[MergeModule], suite: Suite, **kwargs: Any) -> Any:
    module = kind(suite=suite, **kwargs)
    module.configure_model()
    return module


def gram(inputs: Tensor) -> Tensor:
    return inputs.mT @ inputs / len(inputs)


def test_regmean_takes_inputs_from_the_experts_and_its_successor_from_the_merge() -> None:
    suite = ToySuite("mlp", dtype="float64", train=True)
    experts = [suite.expert(task) for task in suite.tasks]
    shown = [images(suite, task).flatten(1) for task in suite.tasks]
    mean = {name: torch.stack([e[name] for e in experts]).mean(0) for name in suite.base()}

    def solved(name: str, inputs: list[Tensor]) -> Tensor:
        weights = torch.stack([e[name] for e in experts])
        found: Tensor = F.regmean({"w": weights}, {"w": torch.stack([gram(x) for x in inputs])}, 0.95, 0)["w"]
        return found

    def hidden(state: Any, x: Tensor) -> Tensor:
        found: Tensor = (x @ state["1.weight"].mT + state["1.bias"]).tanh()
        return found

    first = solved("1.weight", shown)
    expected: dict[type[RegMean], Tensor] = {
        RegMean: solved("3.weight", [hidden(e, x) for e, x in zip(experts, shown, strict=True)]),
        RegMeanPlusPlus: solved("3.weight", [hidden({**mean, "1.weight": first}, x) for x in shown]),
    }
    assert float((expected[RegMean] - expected[RegMeanPlusPlus]).abs().max()) > 1e-3
    for kind, last in expected.items():
        state = made(kind, suite, ridge=0, image_batch=4).merged_state()
        torch.testing.assert_close(state["1.weight"], first, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(state["3.weight"], last, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(state["3.bias"], mean["3.bias"])


def test_the_blocks_of_an_expert_see_the_merge_below() -> None:
    suite = ToySuite("vit", train=True)
    first, second = (made(kind, suite).merged_state() for kind in (RegMean, RegMeanPlusPlus))
    for name in first:
        same = torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-4)
        # what enters attention is normalised by the expert's block: the mean of embeddings is new in both blocks
        assert same is not (name.startswith("transformer") and name.endswith("weight") and first[name].ndim == 2), name


def test_fisher_merging_weighs_the_experts() -> None:
    suite = ToySuite("mlp", dtype="float64", train=True)
    module = made(FisherMerging, suite, image_batch=4, chunk_size=3, floor=1e-9)
    fishers = []
    for task in suite.tasks:
        state = suite.expert(task)

        def logits(parameters: Any, x: Tensor, task: str = task) -> Tensor:
            hidden = (x.flatten(1) @ parameters["1.weight"].mT + parameters["1.bias"]).tanh()
            found: Tensor = suite.head(task)(hidden @ parameters["3.weight"].mT + parameters["3.bias"])
            return found

        shown = images(suite, task)
        found = F.diagonal_fisher(logits, state, shown, gradients="loop")
        fishers.append({name: value / len(shown) for name, value in found.items()})
    stacked = {name: torch.stack([f[name] for f in fishers]) for name in fishers[0]}
    expected = module.bank.offset(F.fisher_merge(module.bank.deltas, stacked, floor=1e-9))
    for name, value in module.merged_state().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", [FisherMerging, RegMean, RegMeanPlusPlus])
def test_a_run_makes_the_merge_once_reports_and_exports_it(kind: type[CalibratedModule], tmp_path: Path) -> None:
    suite = ToySuite("vit", train=True)
    module, alone = kind(suite=suite, images=6), made(kind, suite, images=6)
    trainer = MergeTrainer(**TINY | {"default_root_dir": tmp_path, "callbacks": [Report()]})
    data = TaskDataModule(suite, protocol="split")
    trainer.merge(module, datamodule=data, output=tmp_path / "export")
    kept = module._made
    assert module.positions("task.a") == alone.positions("task.a")
    for name, value in module.merged_state().items():
        torch.testing.assert_close(value, alone.merged_state()[name])
    assert module._made is kept
    (report,) = tmp_path.rglob("report.json")
    found = json.loads(report.read_text())["extra"]["calibration"]
    assert found["images"] == dict.fromkeys(suite.tasks, 6)
    assert found["source"] == "train"
    if kind is not FisherMerging:
        assert found["other_matrices"] == ["positional_embedding", "proj", "conv1.weight"]
        assert found["layers"] == 8


def test_only_images_that_may_be_adapted_on() -> None:
    suite = ToySuite("mlp")
    module = RegMean(suite=suite, image_source="adapt", ridge=0.1)
    data = TaskDataModule(suite, protocol="split", seed=3)
    MergeTrainer(**TINY).test(module, datamodule=data, verbose=False)
    for task, places in data.positions("adapt").items():
        assert sorted(module.positions(task)) == places
        assert all(bool((batch.labels == -1).all()) for _, batch in module.batches(task))
    with pytest.raises(MergeError, match="adapt needs a TaskDataModule to say which test images"):
        made(RegMean, suite, image_source="adapt").merged_state()
    online = TaskDataModule(suite, protocol="online")
    with pytest.raises(MergeError, match="online scores each image before it is used, and RegMean would look"):
        MergeTrainer(**TINY).test(RegMean(suite=suite, image_source="adapt"), datamodule=online)


def test_ranks_share_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value)  # each keeps its own part
    module = made(RegMean, ToySuite("mlp", train=True), image_batch=4, per_row=False)
    state = module.bank.expert("task.a")

    def part(rank: int, world: int) -> Tensor:
        module._place = (rank, world)
        found: Tensor = module.inputs(state, "task.a", ["3.weight"])["3.weight"]
        return found

    whole = part(0, 1)  # 11 images, 3 batches
    torch.testing.assert_close(part(0, 2) + part(1, 2), whole)
    for rank in range(4):  # too few batches to go round: everyone does all
        torch.testing.assert_close(part(rank, 4), whole)


def test_which_images() -> None:
    suite = ToySuite("mlp", train=True)
    first = made(RegMean, suite, images=5, image_order="first").positions("task.b")
    drawn = [made(RegMean, suite, images=5, image_seed=seed).positions("task.b") for seed in (0, 0, 1)]
    assert first == [0, 1, 2, 3, 4]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5
    assert len(made(RegMean, suite).positions("task.b")) == 13


def test_svc_of_any_merge(tmp_path: Path) -> None:
    suite = ToySuite("cnn")
    merge = TaskArithmetic(0.4, suite=suite)
    path = MergeTrainer(**TINY).merge(merge, output=tmp_path)
    direct = Svc(scale=0.4, suite=suite)
    direct.configure_model()
    for source in (path, str(tmp_path), merge.merged_state()):
        again = Svc(merged=source, suite=suite)
        again.configure_model()
        for name, value in direct.merged_state().items():
            torch.testing.assert_close(again.merged_state()[name], value, rtol=1e-4, atol=1e-5)
    average, base = ({**made(Svc, suite, merged=path, buffers=b).merged_state()} for b in ("average", "base"))
    name = "bn1.running_mean"
    assert torch.equal(average[name], merge.merged_state()[name])
    assert torch.equal(base[name], suite.base()[name])
    with pytest.raises(MergeError, match=r"Svc\.merged: a merge that is given needs a suite"):
        Svc(merged=path, suite=suite).merge(direct.bank)
    other = Svc(merged=dict(ToySuite("mlp").base()), suite=suite)
    other.configure_model()
    with pytest.raises(MergeError, match=r"Svc\.merged: its tensors are not those of the network"):
        other.merged_state()


def test_without_images_there_is_no_merge_of_weights_alone(tmp_path: Path) -> None:
    suite = ToySuite("mlp", train=True)
    assert why_not_streamed(RegMean(suite=suite)) == "RegMean is calibrated with images"
    path = MergeTrainer(**TINY).merge(RegMean(suite=suite), output=tmp_path / "regmean")  # in memory
    expected = made(RegMean, suite).merged_state()
    assert all(torch.equal(value, expected[name]) for name, value in read_state(path).items())
    merge = Svc(suite=suite)
    assert why_not_streamed(merge) is None
    path = MergeTrainer(**TINY).merge(merge, output=tmp_path / "svc")  # piece by piece
    expected = merge.merged_state()
    assert all(torch.equal(value, expected[name]) for name, value in read_state(path).items())


@pytest.mark.parametrize(
    ("kind", "kwargs", "message"),
    [
        (RegMean, {"images": 0}, r"RegMean\.images: expected at least 1, found 0"),
        (RegMean, {"image_source": "test"}, r"RegMean\.image_source: expected train or adapt, found 'test'"),
        (RegMean, {"at_base": "proj"}, r"RegMean\.at_base: expected a list"),
        (RegMeanPlusPlus, {"off_diagonal": 2}, r"RegMeanPlusPlus\.off_diagonal: expected \[0, 1\], found 2"),
        (RegMean, {"ridge": -1}, r"RegMean\.ridge: expected at least 0, found -1"),
        (FisherMerging, {"target": "true"}, r"FisherMerging\.target: expected expected, sampled, labels or root"),
        (FisherMerging, {"floor": 0.0}, r"FisherMerging\.floor: expected a number above 0, found 0"),
        (FisherMerging, {"weights": [1.0, 0.0, 2.0]}, r"FisherMerging\.weights: .* above 0, found 0"),
        (FisherMerging, {"target": "labels", "image_source": "adapt"}, "labels are those of images that are scored"),
        (Svc, {"alpha": 0}, r"Svc\.alpha: expected a number above 0, found 0"),
    ],
)
def test_refuses(kind: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        kind(suite=ToySuite("mlp"), **kwargs)


def test_refuses_a_suite_without_training_images() -> None:
    with pytest.raises(MergeError, match=r"task 'task\.a' has no train set"):
        made(RegMean, ToySuite("mlp")).merged_state()


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    suite = ToySuite("vit", train=True)
    with pytest.raises(MergeError, match=r"RegMean\.at_base: '\*post_layernorm\*' fits no tensor"):
        made(RegMean, suite, at_base=["*post_layernorm*"]).merged_state()
    stays = made(RegMean, suite, at_base=["ln_post*"]).merged_state()
    assert all(torch.equal(stays[name], value) for name, value in suite.base().items() if name.startswith("ln_post"))
