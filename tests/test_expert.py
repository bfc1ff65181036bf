"""Experts from Python: one process or two, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from test_finetune_command import TASK, TrainableToys
from torch import Tensor

from lit_merge.data.finetune_data import FineTuneDataModule
from lit_merge.errors import MergeError, MissingExtraError
from lit_merge.expert import ExpertModule, Method, _base_name, tuned_form, write_expert
from lit_merge.linearized import LinearizedNetwork
from lit_merge.lora import LoraNetwork, LoraOptions

METHODS: tuple[Method, ...] = ("full", "lora", "linearized", "lora_linearized")


def trainer(**options: Any) -> L.Trainer:
    silent: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    return L.Trainer(
        accelerator="cpu", max_steps=4, limit_val_batches=0, enable_model_summary=False, **silent, **options
    )


def fitted(method: Method, **options: Any) -> tuple[L.Trainer, ExpertModule]:
    suite = TrainableToys()
    if method == "lora":
        pytest.importorskip("peft")
    module, fit = ExpertModule(suite, TASK, method, learning_rate=0.01, warmup_steps=1), trainer(**options)
    fit.fit(module, datamodule=FineTuneDataModule(suite, TASK, batch_size=16, num_workers=0))
    return fit, module


@pytest.mark.parametrize("method", METHODS)
def test_every_form_starts_as_the_base(method: Method) -> None:
    suite = TrainableToys()
    network, base = suite.network(), dict(suite.expert("task.a"))  # not the values that the network happens to have
    form = tuned_form(network, base, method, LoraOptions(rank=2)).eval()
    images = torch.stack([suite.dataset(TASK, "test")[i][0] for i in range(4)])
    network.load_state_dict(base)
    torch.testing.assert_close(form(images), network(images), rtol=1e-5, atol=1e-5)
    assert isinstance(form, LinearizedNetwork) == ("linearized" in method)
    assert isinstance(form, LoraNetwork) == (method == "lora")
    trained = sum(parameter.numel() for parameter in form.parameters() if parameter.requires_grad)
    assert (trained == sum(value.numel() for value in base.values())) == ("lora" not in method)


@pytest.mark.parametrize("method", ["full", "lora_linearized"])
def test_two_processes_make_the_expert_of_one(method: Method) -> None:
    def features(expert: ExpertModule) -> Tensor:
        data = expert.suite.dataset(TASK, "test")
        with torch.no_grad():
            result: Tensor = expert.network.eval()(torch.stack([data[i][0] for i in range(8)]))
        return result

    # features, since Adam follows the sign of rounding noise where a gradient is zero (the biases of keys)
    one = features(fitted(method, devices=1)[1])
    two = features(fitted(method, devices=2, strategy="ddp_fork")[1])
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-3)


def test_nothing_is_read_before_the_trainer_starts() -> None:
    class Closed(TrainableToys):
        def base(self) -> Any:
            raise AssertionError

    ExpertModule(Closed(), TASK)
    FineTuneDataModule(Closed(), TASK)


def test_values_that_are_not_finite_are_not_written() -> None:
    fit, module = fitted("full")
    with torch.no_grad():
        next(module.network.parameters())[0] = float("nan")
    with pytest.raises(MergeError, match=r"expert of 'task\.b': .* NaN or infinite"):
        write_expert("out", fit, module)
    assert not Path("out").exists()


def test_a_missing_package_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"lit-merge\[hf\]"):
        ExpertModule(TrainableToys(), TASK, "lora")
    ExpertModule(TrainableToys(), TASK, "lora_linearized")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("org/clip@3d74acf", "org/clip"),
        ("weights/base.safetensors", "weights/base.safetensors"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        (None, None),
    ],
)
def test_the_name_of_a_base(spec: str | None, name: str | None) -> None:
    class Named(TrainableToys):
        def sources(self) -> dict[str, Any]:
            return {"base": {"source": spec, "revision": None}} if spec else {}

    assert _base_name(Named()) == name


def test_unknown_method() -> None:
    with pytest.raises(MergeError, match=r"model\.method: expected full, lora, linearized, lora_linearized, found 'x'"):
        ExpertModule(TrainableToys(), TASK, "x")  # type: ignore[arg-type]


def test_the_networks_of_the_suite_are_left_alone() -> None:
    suite = TrainableToys()
    before = {name: value.clone() for name, value in suite.base().items()}
    module = ExpertModule(suite, TASK, learning_rate=0.1, warmup_steps=0)
    trainer().fit(module, datamodule=FineTuneDataModule(suite, TASK, batch_size=16, num_workers=0))
    assert all(torch.equal(value, before[name]) for name, value in suite.base().items())
    assert not any(parameter.requires_grad for parameter in suite.head(TASK).parameters())
