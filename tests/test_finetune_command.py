"""``lit-merge finetune``: experts from the command line, and what becomes of them."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from commands import refused, report
from kills import side_by_side
from safetensors.torch import load_file
from toys import ToyData, ToySuite

from lit_merge.checkpoints.digests import state_digest
from lit_merge.cli import main
from lit_merge.commands import COMMANDS
from lit_merge.errors import MergeError
from lit_merge.lora import LoraOptions
from lit_merge.suites import ClipSuite
from lit_merge.suites.linearized import LinearizedSuite

TASK = "task.b"


class TrainableToys(ToySuite):
    """Toys with training sets."""

    def __init__(self, kind: Any = "vit", seed: int = 0) -> None:
        super().__init__(kind, seed=seed)
        self._data["train"] = {name: ToyData(40, 3 + t, seed + t) for t, name in enumerate(self.tasks)}


NOISE = "test_finetune_command.Noise"
TINY = (
    "--suite=test_finetune_command.TrainableToys",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_steps=6",
    "--data.num_workers=0",
    "--data.batch_size=16",
    "--model.warmup_steps=1",
    "--model.learning_rate=0.01",
)


def finetune(*args: str, config: str = "finetune", task: str = TASK) -> Path:
    """Make an expert, and return its folder."""
    main(["finetune", "--config", config, *TINY, "--task", task, *args])
    return max(Path("runs", config).glob(f"{task}/*"), key=lambda path: path.stat().st_mtime_ns) / "expert"


class FromFiles(TrainableToys):
    """Toys whose experts are files."""

    def __init__(self, experts: dict[str, str]) -> None:
        super().__init__()
        self._experts = dict(experts)


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


class Noise(torch.nn.Module):
    """Random augmentation that draws from the global generator."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image + 0.1 * torch.randn_like(image)


class Crash(L.Callback):
    """Ends training in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


def facts(folder: Path) -> dict[str, Any]:
    """What an expert says of itself."""
    found: dict[str, Any] = json.loads((folder / "finetune.json").read_text())
    return found


class TestExperts:
    """Every method leaves an expert that merges like any other."""

    @pytest.mark.parametrize("method", ["full", "lora", "linearized", "lora-linearized"])
    def test_an_expert_alone_with_coefficient_one_is_that_expert(self, method: str) -> None:
        if method == "lora":
            pytest.importorskip("peft")
        config = f"finetune{'' if method == 'full' else '-' + method}"
        folder = finetune(config=config)
        said = facts(folder)
        assert said["accuracy"]["expert"] > said["accuracy"]["base"]
        assert said["method"] == method.replace("-", "_")
        assert said["base"] == state_digest(TrainableToys().base())
        assert said["weights"]["sha256"] == state_digest(load_file(folder / "model.safetensors"))
        experts = json.dumps({TASK: str(folder / "model.safetensors")})
        suite = ["--suite=test_finetune_command.FromFiles", f"--suite.experts={experts}"]
        if "linearized" in method:
            suite = ["--suite=LinearizedSuite", "--suite.suite=test_finetune_command.TrainableToys"]
            suite += [f"--suite.experts={experts}", *(["--suite.lora={rank: 16}"] if "lora" in method else [])]
        main(["merge", "--config", "task-arithmetic", *suite, "--model.scale=1.0", "--trainer.accelerator=cpu"])
        row = report("runs/task-arithmetic/version_0")["tasks"][TASK]
        assert row["accuracy"] == row["expert_accuracy"] == said["accuracy"]["expert"]
        assert row["base_accuracy"] == said["accuracy"]["base"]

    def test_an_adapter_comes_with_lora_and_is_the_same_change(self) -> None:
        pytest.importorskip("peft")
        from peft import PeftModel

        folder = finetune("--model.lora.rank=2", "--model.lora.targets=[attn, c_fc]", config="finetune-lora")
        network = TrainableToys().network()
        merged = PeftModel.from_pretrained(network, folder / "adapter").merge_and_unload().state_dict()
        expert, base = load_file(folder / "model.safetensors"), TrainableToys().base()
        for name, value in expert.items():
            torch.testing.assert_close(value, merged[name], rtol=0, atol=1e-6)
            assert torch.equal(value, base[name]) != name.endswith(("in_proj_weight", "c_fc.weight"))

    def test_experts_of_another_tangent_are_refused(self) -> None:
        folder = finetune("--evaluate=false", "--trainer.max_steps=1", config="finetune-lora-linearized")
        file, suite = folder / "model.safetensors", TrainableToys()
        others: list[tuple[TrainableToys, LoraOptions | None, str]] = [
            (suite, LoraOptions(rank=8), "lora"),
            (suite, LoraOptions(alpha=16), "lora"),
            (suite, None, "method"),
            (TrainableToys(seed=1), LoraOptions(), "base"),
        ]
        for toys, options, key in others:
            with pytest.raises(MergeError, match=rf"finetune\.json: expected {key} .* trained in"):
                LinearizedSuite(toys, {TASK: file}, options).expert(TASK)
        assert LinearizedSuite(suite, {TASK: file}, LoraOptions()).expert(TASK).keys() == load_file(file).keys()


def test_experts_of_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "datasets", "peft"):
        pytest.importorskip(package)
    from mirror import BASE, write_mirror

    monkeypatch.setenv("LIT_MERGE_CACHE", str(tmp_path / "cache"))
    root = write_mirror(tmp_path / "mirror", ["mnist"])
    overlay = ["--config=suites/clip-vit-b-32-8", f"--suite.root={root}", "--suite.tasks=[mnist]"]
    few = ["--data.batch_size=2", "--data.num_workers=0", "--trainer.max_steps=2", "--model.warmup_steps=0"]
    main(["finetune", "--config=finetune-lora", *overlay, *few, "--task=mnist", "--output=out"])
    expert = load_file("out/model.safetensors")
    named = json.loads(Path("out/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == BASE.partition("@")[0]
    for source in ("out", "out/adapter", "out/model.safetensors"):
        suite = ClipSuite(BASE, {"mnist": str(Path(source).resolve())}, ["mnist"], root=root)
        found, base = suite.expert("mnist"), suite.base()
        assert set(found) == set(expert)
        assert all(name.startswith("vision_model.") for name in found)
        assert any(not torch.equal(found[name], base[name]) for name in found)
        for name in found:
            torch.testing.assert_close(found[name], expert[name], rtol=1e-6, atol=1e-7)


class TestRuns:
    """Folders, resuming, evaluation."""

    def test_output_and_traces(self) -> None:
        finetune("--output=experts/b", "--trainer.max_steps=1")
        assert {path.name for path in Path("experts/b").iterdir()} == {"finetune.json", "model.safetensors"}
        run = Path("runs/finetune", TASK, "version_0")
        assert {path.name for path in run.iterdir()} == {"config.yaml", "last.ckpt", "metrics.csv"}
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["task"] == TASK
        assert config["trainer"]["logger"]["init_args"]["name"] == "finetune"
        again = yaml.safe_load(facts(Path("experts/b"))["config"])
        assert again == config

    def test_the_config_of_a_run_makes_the_same_expert(self) -> None:
        first = finetune("--evaluate=false")
        main(["finetune", "--config", str(first.parent / "config.yaml")])
        second = first.parent.with_name("version_1") / "expert"
        assert facts(first)["weights"] == facts(second)["weights"]
        assert facts(second)["accuracy"] is None

    def test_a_crashed_run_goes_on_exactly(self, tmp_path: Path) -> None:
        def job(number: int, step: int, more: list[str]) -> None:
            (root := tmp_path / str(number)).mkdir()
            os.chdir(root)
            same = ["--evaluate=false", "--trainer.callbacks.every_n_steps=2", "--data.augment", NOISE, *more]
            whole = facts(finetune(*same))["weights"]
            with pytest.raises(SystemExit):
                finetune(*same, "--trainer.callbacks+=test_finetune_command.Crash", f"--trainer.callbacks.step={step}")
            crashed = Path("runs/finetune", TASK, "version_1")
            assert not (crashed / "expert").exists()
            folder = finetune(*same, "--ckpt_path=last")
            assert folder == crashed / "expert"
            assert facts(folder)["weights"] == whole, more
            (folder / "model.safetensors").unlink()
            assert facts(finetune(*same, "--ckpt_path=last"))["weights"] == whole  # finished: only written once more

        crashes: list[tuple[int, list[str]]] = [
            (3, []),
            (2, ["--data.num_workers=1"]),
            (4, ["--trainer.accumulate_grad_batches=2", "--trainer.max_steps=5"]),
            (2, ["--trainer.max_steps=-1", "--trainer.max_epochs=2"]),  # in the middle of an epoch
            (3, ["--trainer.max_steps=-1", "--trainer.max_epochs=2"]),  # between two epochs
        ]
        side_by_side([partial(job, number, *crash) for number, crash in enumerate(crashes)])

    def test_last_is_that_of_the_task(self) -> None:
        finetune("--evaluate=false", "--trainer.max_steps=1")
        folder = finetune("--evaluate=false", "--trainer.max_steps=1", "--ckpt_path=last", task="task.a")
        assert folder == Path("runs/finetune/task.a/version_0/expert")

    def test_fast_dev_run_leaves_nothing(self) -> None:
        main(["finetune", "--config=finetune", *TINY, "--task", TASK, "--trainer.fast_dev_run=true"])
        assert not [path for path in Path().rglob("*") if path.is_file()]

    def test_mixed_precision(self) -> None:
        folder = finetune("--evaluate=false", "--trainer.precision=bf16-mixed", config="finetune-linearized")
        assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.float32}


class TestErrors:
    """Bad arguments are one line."""

    @pytest.mark.parametrize(
        ("args", "status", "message"),
        [
            (["--task=cars"], 1, "unknown task 'cars'; it has task.a, task.b, task.c"),
            (["--task=task.b", "--model.method=lor"], 2, "method"),
            (["--task=task.b", "--trainer.precision=bf16-true"], 1, "trainer.precision: bf16-true would round"),
            (["--task=task.b", "--ckpt_path=gone.ckpt"], 1, "gone.ckpt: no such checkpoint"),
            (
                ["--task=task.b", "--model.lora.targets=[q]", "--model.method=lora_linearized"],
                1,
                "called 'q'; there are",
            ),
            (["--task=task.b", "--suite=toys.ToySuite"], 1, "task 'task.b' has no train set"),
            ([], 2, "task"),
        ],
    )
    def test_refused(self, args: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
        said = refused(capsys, "finetune", "--config=finetune", *TINY, *args, status=status)
        assert message in said
        assert not list(Path().rglob("model.safetensors"))

    def test_a_foreign_checkpoint_and_a_bad_output_are_refused_first(self, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save({"state_dict": {}, "evil": Evil()}, "evil.ckpt")
        torch.save({"weights": torch.ones(2)}, "foreign.ckpt")
        torch.save({"state_dict": {}}, "other.ckpt")
        Path("file").touch()
        for argument, message in {
            "--ckpt_path=evil.ckpt": "error: evil.ckpt: ",
            "--ckpt_path=foreign.ckpt": "error: foreign.ckpt: expected a checkpoint of lit-merge",
            "--ckpt_path=other.ckpt": "error: other.ckpt: expected a checkpoint of lit-merge finetune",
            "--output=file/here": "error: output: file/here: expected a folder that can be made, found: Not a",
            "--output=file": "error: output: file: expected a folder that can be made, found: File exists",
        }.items():
            args = ["finetune", "--config=finetune", *TINY, "--task", TASK, argument]
            assert message in refused(capsys, *args, status=1)
            assert not Path("pwned").exists()
            assert not list(Path().rglob("last.ckpt"))

    def test_help_is_headed_by_what_it_does(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["finetune", "--help"])
        said = capsys.readouterr().out
        assert COMMANDS["finetune"] in said
        assert "Lightning Trainer command line tool" not in said

    def test_the_checkpoint_of_another_method_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        run = finetune("--evaluate=false", "--trainer.max_steps=1").parent
        args = ["finetune", "--config=finetune-linearized", *TINY, "--task", TASK, f"--ckpt_path={run / 'last.ckpt'}"]
        assert "checkpoint: its method is full, that of this run is linearized" in refused(capsys, *args, status=1)
