"""The command line: configs, errors, subcommands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import TINY, report, run
from lightning.pytorch.callbacks import LearningRateMonitor
from safetensors.torch import load_file
from toys import SIZE, ToySuite

import lit_merge
from lit_merge import configs
from lit_merge.__main__ import main as entry
from lit_merge.callbacks import Report
from lit_merge.cli import MergeCLI, main
from lit_merge.methods import AdaMerging, SimpleAverage, TaskArithmetic

ROOT = Path(__file__).parents[1]
RUN = Path("runs/adamerging/version_0")


def parsed(*args: str) -> MergeCLI:
    """Parse and instantiate, without running anything."""
    cli = main([*args, *TINY], run=False)
    assert cli is not None
    return cli


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What ``--print_config=skip_default`` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *args, "--print_config=skip_default"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


class TestConfigs:
    @pytest.mark.parametrize("name", ["task-arithmetic", "task-arithmetic.yaml"])
    def test_bundled_configs_are_found_by_bare_name(self, name: str) -> None:
        cli = parsed("--config", name)
        assert isinstance(cli.model, TaskArithmetic)
        assert not Path("task-arithmetic.yaml").exists()

    def test_a_local_file_of_the_same_name_wins(self) -> None:
        Path("task-arithmetic.yaml").write_text("model: {class_path: TaskArithmetic, init_args: {scale: 0.7}}\n")
        cli = parsed("--config", "task-arithmetic.yaml")
        assert isinstance(cli.model, TaskArithmetic)
        assert cli.model.scale == 0.7

    def test_of_several_configs_the_later_one_wins(self) -> None:
        Path("a.yaml").write_text("model: {init_args: {init: 0.5, granularity: task}}\n")
        Path("b.yaml").write_text("model: {init_args: {init: 0.6}}\ntrainer: {log_every_n_steps: 7}\n")
        cli = parsed("--config", "adamerging", "--config", "a.yaml", "--config", "b.yaml")
        assert isinstance(cli.model, AdaMerging)
        assert (cli.model.init, cli.model.granularity) == (0.6, "task")
        assert cli.trainer.log_every_n_steps == 7  # type: ignore[attr-defined]

    def test_another_method_on_top_of_a_config(self) -> None:
        cli = parsed("--config", "adamerging", "--model", "TaskArithmetic", "--model.scale", "0.4")
        assert isinstance(cli.model, TaskArithmetic)
        assert cli.model.scale == 0.4

    def test_short_class_names_in_yaml(self) -> None:
        Path("short.yaml").write_text(
            "model: {class_path: AdaMerging, init_args: {objective: {class_path: Diversity}, "
            "transforms: [{class_path: Ties, init_args: {density: 0.3}}], optimizer: {class_path: SGD}}}\n"
            "trainer: {callbacks: [{class_path: Report}], logger: {class_path: RunLogger}}\n"
            "data: {class_path: TaskDataModule}\n"
        )
        cli = parsed("--config", "short.yaml")
        assert isinstance(cli.model, AdaMerging)
        assert type(cli.model.objective).__name__ == "Diversity"
        assert repr(cli.model.transforms[0]) == repr(lit_merge.transforms.Ties(density=0.3))
        assert [type(c) for c in cli.trainer.callbacks].count(Report) == 1  # type: ignore[attr-defined]

    def test_the_suite_feeds_model_and_data(self) -> None:
        cli = parsed("--config", "adamerging")
        assert isinstance(cli.model.suite, ToySuite)
        assert cli.model.suite is cli.datamodule.suite

    @pytest.mark.parametrize("name", [name for name in configs.names() if name.startswith("ada")])
    def test_what_is_printed_parses_to_the_same(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        first = printed(capsys, "--config", name, "--trainer.max_epochs=2")
        Path("again.yaml").write_text(first)
        assert printed(capsys, "--config", "again.yaml") == first
        assert yaml.safe_load(first)["trainer"]["max_epochs"] == 2

    def test_the_config_of_a_run_runs_again(self) -> None:
        run("fit", "adamerging", "--model.init=0.25")
        assert yaml.safe_load((RUN / "config.yaml").read_text())["model"]["init_args"]["init"] == 0.25
        main(["fit", "--config", str(RUN / "config.yaml")])
        second = RUN.with_name("version_1")
        assert (second / "config.yaml").read_text() == (RUN / "config.yaml").read_text()
        same = [load_file(folder / "export/merged.safetensors") for folder in (RUN, second)]
        assert all(torch.equal(value, same[1][name]) for name, value in same[0].items())
        main(["test", "--config", str(RUN / "config.yaml"), "--ckpt_path", str(RUN / "last.ckpt")])
        assert report(RUN.with_name("version_2"))["tasks"] == report(RUN)["tasks"]


class TestCommands:
    def test_fit_evaluates_and_exports(self) -> None:
        cli = run("fit", "adamerging")
        assert cli.trainer.global_step == 3
        assert sorted(report(RUN)["tasks"]) == ["task.a", "task.b", "task.c"]
        assert (RUN / "export/merged.safetensors").is_file()
        assert (RUN / "last.ckpt").stat().st_size < 2**20

    def test_fit_of_a_data_free_method_says_so_and_evaluates(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level("INFO"):
            run("fit", "task-arithmetic")
        assert "TaskArithmetic has nothing to learn" in caplog.text
        assert report("runs/task-arithmetic/version_0")["method"] == "TaskArithmetic"

    def test_merge_evaluates_and_exports(self) -> None:
        cli = run("merge", "simple-average", "--output=out")
        assert isinstance(cli.model, SimpleAverage)
        assert report("runs/simple-average/version_0")["mean"].keys() >= {"accuracy", "normalized_accuracy"}
        suite = ToySuite()
        mean = torch.stack([suite.expert(task)["out.weight"] for task in suite.tasks]).mean(0)
        torch.testing.assert_close(load_file("out/merged.safetensors")["out.weight"], mean)
        assert json.loads(Path("out/merge.json").read_text())["method"] == "SimpleAverage"

    def test_merge_without_data_only_exports(self) -> None:
        main(["merge", "--config", "simple-average", "--suite=toys.ToySuite", "--data=null", "--output=out"])
        assert load_file("out/merged.safetensors").keys() == ToySuite().base().keys()
        assert not list(Path("runs").rglob("report.json"))

    def test_everything_from_a_checkpoint(self) -> None:
        cli = run("fit", "adamerging", "--model.init=0.5", "--model.optimizer.lr=0.1")
        fitted, learned = report(RUN), cli.model.merged_state()
        config = (RUN / "config.yaml").read_text()
        for subcommand in ("test", "validate"):
            # the command line, not the checkpoint, has the last word on hyper-parameters; the weights are restored
            run(subcommand, "adamerging", "--ckpt_path=last")
            again = report(RUN)
            assert again["tasks"] == fitted["tasks"]
            assert again["extra"]["steps"] == 3
        assert (RUN / "config.yaml").read_text() == config
        run("export", "adamerging", f"--ckpt_path={RUN / 'last.ckpt'}", "--output=out")
        exported = load_file("out/merged.safetensors")
        assert all(torch.equal(value, exported[name]) for name, value in learned.items())
        provenance = json.loads(Path("out/merge.json").read_text())
        assert len(provenance["experts"]) == 3

    def test_predict_writes_predictions(self) -> None:
        cli = run("fit", "adamerging")
        run("predict", "adamerging", "--ckpt_path=last")
        header, *lines = (RUN / "predictions.csv").read_text().splitlines()
        assert header == "task,index,prediction"
        rows = [line.split(",") for line in lines]
        suite, model = ToySuite(), cli.model.cpu()
        assert len(rows) == sum(len(suite.dataset(task, "test")) for task in suite.tasks)
        for task, index, prediction in rows[::7]:
            image = suite.dataset(task, "test")[int(index)][0].reshape(1, 3, SIZE, SIZE)
            assert int(model(image, task).argmax()) == int(prediction)

    def test_predict_of_one_task(self) -> None:
        run("predict", "task-arithmetic", "--suite.tasks=1")
        lines = Path("runs/task-arithmetic/version_0/predictions.csv").read_text().splitlines()
        assert len(lines) == 1 + 21
        assert [line.split(",")[1] for line in lines[1:]] == [str(i) for i in range(21)]

    def test_evaluating_starting_values_is_said(self) -> None:
        with pytest.warns(UserWarning, match="AdaMerging learns its merge, and these are its starting values"):
            run("test", "adamerging")

    def test_fast_dev_run_leaves_nothing(self) -> None:
        run("fit", "adamerging", "--trainer.fast_dev_run=true")
        assert not [path for path in Path().rglob("*") if path.is_file()]

    def test_no_advice_that_does_not_apply(
        self, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
    ) -> None:
        with caplog.at_level("INFO"):
            run("fit", "adamerging")
        assert "Seed set to 0" in caplog.text  # what does apply is still there
        assert "Tip:" not in caplog.text
        assert "weights_only" not in caplog.text
        assert not [str(w.message) for w in recwarn if "eval mode" in str(w.message) or "LeafSpec" in str(w.message)]


class TestInjection:
    def test_optimizer(self) -> None:
        cli = run("fit", "adamerging", "--model.optimizer", "SGD", "--model.optimizer.lr", "0.1")
        optimizer = cli.trainer.optimizers[0]
        assert type(optimizer) is torch.optim.SGD
        assert optimizer.param_groups[0]["lr"] == 0.1

    def test_scheduler_is_stepped_every_step(self) -> None:
        schedule = ["--model.scheduler", "StepLR", "--model.scheduler.step_size", "1", "--model.scheduler.gamma", "0.5"]
        cli = run("fit", "adamerging", *schedule)
        assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.5**3)

    def test_scheduler_that_watches_a_metric(self) -> None:
        schedule = ["--model.scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.scheduler.monitor"]
        cli = run("fit", "adamerging", *schedule, "train/loss", "--model.scheduler.patience", "0")
        assert cli.trainer.lr_scheduler_configs[0].monitor == "train/loss"
        assert cli.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3

    def test_callback_appended(self) -> None:
        cli = parsed("--config", "adamerging", "--trainer.callbacks+=LearningRateMonitor")
        kinds = [type(callback) for callback in cli.trainer.callbacks]  # type: ignore[attr-defined]
        assert {Report, LearningRateMonitor} <= set(kinds)


class TestFastPath:
    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        entry(["--version"])
        assert capsys.readouterr().out == f"lit-merge {lit_merge.__version__}\n"

    @pytest.mark.parametrize("args", [[], ["-h"], ["--help"]])
    def test_help_lists_commands_and_configs(self, args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        entry(args)
        said = capsys.readouterr().out
        assert all(word in said for word in ("fit", "merge", "export", *configs.names()))

    def test_everything_else_is_run(self) -> None:
        entry(["merge", "--config", "simple-average", *TINY])
        assert report("runs/simple-average/version_0")["method"] == "SimpleAverage"

    @pytest.mark.parametrize("flag", ["--version", "--help"])
    def test_without_torch(self, flag: str) -> None:
        code = (
            "import sys; sys.argv = ['lit-merge', sys.argv[1]]; from lit_merge.__main__ import main; main();"
            "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code, flag], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "lit-merge" in done.stdout

    def test_help_of_a_subcommand(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_:
            entry(["fit", "--help"])
        assert exit_.value.code == 0
        said = capsys.readouterr().out
        assert said.startswith("usage: lit-merge")
        assert all(option in said for option in ("--config", "--model", "--suite", "--trainer.max_epochs"))
