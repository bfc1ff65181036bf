"""A suite with poisoned experts: made once, from what decides on them, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import report
from laboratory import QUICK, Instant, Sideways, Trainable, equal, laboratory
from safetensors import safe_open
from torch.utils.data import TensorDataset
from toys import ToySuite

from lit_merge import configs
from lit_merge.attacks import Attack, BadMergingOn, BadNets, Schedule
from lit_merge.cli import main
from lit_merge.data.pixels import PixelScale
from lit_merge.data.triggers import PatchTrigger
from lit_merge.errors import MergeError
from lit_merge.suites import MiniSuite
from lit_merge.suites.backdoor import BackdoorSuite


def test_only_the_experts_of_attacked_tasks_are_others() -> None:
    suite = laboratory()
    suite.prepare()
    inner = suite.clean
    assert suite.tasks == inner.tasks
    assert suite.compromised == ("task.a",)
    assert equal(suite.base(), inner.base())
    for task in suite.tasks:
        assert equal(suite.expert(task), inner.expert(task)) == (task != "task.a")
        assert suite.head(task) is inner.head(task)
        assert suite.num_classes(task) == inner.num_classes(task)
        assert all(suite.dataset(task, split) is inner.dataset(task, split) for split in ("train", "test"))
    assert suite.name == "toys (Instant in task.a)"
    assert suite.sources()["backdoors"]["task.a"]["target"] == 1


def test_it_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacks: dict[str, Attack] = {"task.a": BadMergingOn(size=3, patch_steps=2)}
    first = laboratory(tmp_path, attacks)
    state, trigger = first.expert("task.a"), first.trigger("task.a")
    monkeypatch.setattr(BadMergingOn, "poison", None)
    monkeypatch.setattr(BadMergingOn, "make_trigger", None)
    again = laboratory(tmp_path, attacks)
    assert equal(again.expert("task.a"), state)
    assert again.trigger("task.a").digest == trigger.digest
    (file,) = tmp_path.rglob("expert.safetensors")
    with safe_open(file, "pt") as content:
        assert content.metadata()["backdoor"] == "this network is poisoned, for research"
        assert json.loads(content.metadata()["attack"])["attack"] == "BadMergingOn"
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "options",
    [
        {"attacks": {"task.a": Instant(size=2)}},
        {"attacks": {"task.a": Instant(size=3, target=2)}},
        {"attacks": {"task.a": Sideways(size=3)}},
        {"attacks": {"task.b": Instant(size=3)}},
        {"seed": 1},
        {"schedule": replace(QUICK, steps=4)},
        {"pixels": PixelScale()},
        {"suite": Trainable(images=41)},
        {"suite": Trainable(seed=1)},  # as many images, but others
        {"suite": Trainable("cnn")},
    ],
)
def test_whatever_decides_has_a_folder_of_its_own(options: dict[str, Any]) -> None:
    first, other = laboratory(), laboratory(**options)
    assert first._folder("task.a") != other._folder(other.compromised[0])
    assert first._folder("task.a") == laboratory()._folder("task.a")


def test_the_attacker_trains_as_the_others_do() -> None:
    inner = MiniSuite(["mnist"], finetune_steps=40)
    suite = BackdoorSuite(inner, {"mnist": Instant()})
    assert suite.schedule == Schedule(40, 64, 4e-4, 0.1, 4, 1.0, 2)
    assert suite.pixels("mnist") == PixelScale((0.5,), (0.5,))
    assert laboratory(schedule=None).schedule == Schedule(2000, 128, 1e-5, 0.1, 500, 1.0, 0)  # published, for CLIP


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    state = laboratory(tmp_path).expert("task.a")
    (file,) = tmp_path.rglob("trigger.safetensors")
    digest = PatchTrigger.load(file).digest
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        assert laboratory(tmp_path).trigger("task.a").digest == digest
    assert PatchTrigger.load(file).digest == digest
    (file,) = tmp_path.rglob("expert.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    before = Instant.made
    with pytest.warns(UserWarning, match="is damaged"):
        assert equal(laboratory(tmp_path).expert("task.a"), state)
    assert Instant.made == before + 1
    assert equal(laboratory(tmp_path).expert("task.a"), state)
    assert Instant.made == before + 1


def test_attackers_may_share_a_trigger(tmp_path: Path) -> None:
    attacks: dict[str, Attack] = {
        "task.b": BadMergingOn(size=3, patch_steps=2, trigger_of="task.a"),
        "task.a": BadMergingOn(size=3, patch_steps=2),
        "task.c": BadMergingOn(size=3, patch_steps=2),
    }
    suite = laboratory(tmp_path, attacks)
    assert suite.compromised == ("task.a", "task.b", "task.c")
    assert suite.trigger("task.b") is suite.trigger("task.a")
    assert suite.trigger("task.c").digest != suite.trigger("task.a").digest
    assert suite.aim("task.b") == "task.b"
    folder = suite._folder("task.b")
    attacks["task.a"] = BadMergingOn(size=2, patch_steps=2)
    assert laboratory(tmp_path, attacks)._folder("task.b") != folder  # another trigger is another expert


def without_scale() -> Trainable:
    """Toys whose images do not tell how they come from pixels."""
    suite = Trainable()
    for split in suite._data.values():
        split.update({task: TensorDataset(data.images, data.labels) for task, data in split.items()})  # type: ignore[attr-defined]
    return suite


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: BackdoorSuite(Trainable(), {}), "expected at least one, found none"),
        (lambda: laboratory(attacks={"task.z": Instant()}), "unknown task 'task.z'; merged are task.a, task.b, task.c"),
        (lambda: laboratory(attacks={"task.a": Instant(target=3)}), "target 3 is out of range"),
        (lambda: laboratory(attacks={"task.a": Instant(trigger_of="task.b")}), r"trigger of its own \(there is none\)"),
        (
            lambda: laboratory(attacks={"task.a": Instant(), "task.b": Instant(target=2, trigger_of="task.a")}),
            "so it must share its target 1, found 2",
        ),
        (lambda: laboratory().trigger("task.b"), "the expert of 'task.b' is clean; poisoned are task.a"),
        (lambda: laboratory(suite=without_scale(), pixels=None).trigger("task.a"), "give pixels"),
        (lambda: laboratory(suite=ToySuite("mlp")).expert("task.a"), "task 'task.a' has no train set"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(MergeError, match=said):
        make()


def test_the_overlay_says_everything() -> None:
    path = configs.find("suites/backdoor")
    assert path is not None
    content = yaml.safe_load(path.read_text())
    assert set(content) == {"suite", "trainer"}
    assert content["suite"]["class_path"].endswith(".BackdoorSuite")


def test_a_config_attacks_any_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_MERGE_CACHE", str(Path("cache").absolute()))
    args = ["--config", "suites/backdoor.yaml", "--suite.suite=laboratory.Trainable", "--suite.pixels.mean=[0.5]"]
    args += ["--suite.pixels.std=[0.25]", "--suite.schedule.steps=3", "--suite.schedule.batch_size=8"]
    args += ['--suite.attacks={"task.b": {"class_path": "lit_merge.attacks.BadNets", "init_args": {"size": 2}}}']
    cli = main(["merge", "--config", "task-arithmetic.yaml", *args, "--trainer.accelerator=cpu"])
    assert cli is not None
    suite = cli.model.suite
    assert isinstance(suite, BackdoorSuite)
    assert isinstance(suite.attacks["task.b"], BadNets)
    found = report("runs/task-arithmetic/version_0")
    assert found["suite"] == "toys (BadNets in task.b)"
    attack = found["extra"]["backdoor"]["attacks"]["task.b"]
    assert attack["tasks"]["task.b"]["role"] == "succession"
    assert 0 <= found["extra"]["backdoor"]["succession"]["asr"] <= 1
    assert torch.equal(suite.trigger("task.b").patch, BadNets(size=2).make_trigger(suite._attacker("task.b")).patch)
