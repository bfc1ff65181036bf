"""What the command line says when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import TINY, refused, run

from lit_merge import configs
from lit_merge.errors import MergeError
from lit_merge.expert import ExpertModule
from lit_merge.hints import class_names, hint

RUN = Path("runs/adamerging/version_0")


class TestHints:
    """Wrong names end with status 2, one suggestion and no page of usage."""

    def refused(self, capsys: pytest.CaptureFixture[str], *args: str, status: int = 2) -> str:
        said = refused(capsys, *args, status=status)
        assert "usage:" not in said
        assert len(said.splitlines()) < 25
        assert said.count("did you mean") <= 1
        return said

    def test_config(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = self.refused(capsys, "fit", "--config", "adamergin.yaml")
        assert "no file 'adamergin.yaml'" in said
        assert "did you mean adamerging" in said

    def test_config_like_no_other(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = self.refused(capsys, "fit", "--config", "xyz")
        assert all(name in said for name in configs.names())

    @pytest.mark.parametrize(
        ("args", "right"),
        [
            (("--model", "TaskArithmetc"), "TaskArithmetic"),
            (("--suite", "MiniSuit"), "MiniSuite"),
            (("--trainer.callbacks+=Reprt",), "Report"),
            (("--model.optimizer=SDG",), "SGD"),
            (("--model.granularty=task",), "granularity"),
            (("--model.granularity=taks",), "task"),
            (("--trainer.max_epoch=3",), "max_epochs"),
            (("--data.batchsize=3",), "batch_size"),
            (("--modle=AdaMerging",), "model"),
        ],
    )
    def test_command_line(self, args: tuple[str, ...], right: str, capsys: pytest.CaptureFixture[str]) -> None:
        said = self.refused(capsys, "fit", "--config", "adamerging", *args)
        assert f"did you mean {right}?" in said

    @pytest.mark.parametrize(
        ("text", "right"),
        [
            ("model: {class_path: AdaMergin}", "AdaMerging"),
            ("model: {class_path: lit_merge.methods.AdaMergin}", "AdaMerging"),
            ("model: {init_args: {granularty: task}}", "granularity"),
            ("model: {init_args: {objective: {class_path: Entropi}}}", "Entropy"),
            ("trainer: {max_step: 3}", "max_steps"),
            ("trainer: {callbacks: [{class_path: lit_merge.callbacks.Reprt}]}", "Report"),
            ("data: {init_args: {protokol: split}}", "protocol"),
            ("modle: {class_path: AdaMerging}", "model"),
        ],
    )
    def test_yaml(self, text: str, right: str, capsys: pytest.CaptureFixture[str]) -> None:
        Path("wrong.yaml").write_text(text + "\n")
        assert ExpertModule.__name__ in class_names()  # which is near to the word module in the parser's messages
        said = self.refused(capsys, "fit", "--config", "adamerging", "--config", "wrong.yaml")
        assert f"did you mean {right}?" in said

    def test_subcommand(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "did you mean fit?" in self.refused(capsys, "fitt")

    def test_options_are_not_abbreviated(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = self.refused(capsys, "fit", "--config", "adamerging", "--trainer.max_epoc=3")
        assert "unrecognized arguments: --trainer.max_epoc=3" in said

    def test_a_value_of_the_wrong_type_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = self.refused(capsys, "fit", "--config", "adamerging", "--trainer.max_epochs=abc")
        assert "trainer.max_epochs" in said
        assert "abc" in said

    def test_broken_yaml(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("broken.yaml").write_text("trainer: [\n")
        assert "line" in self.refused(capsys, "fit", "--config", "broken.yaml")

    def test_no_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "--config adamerging.yaml" in self.refused(capsys, "fit")

    def test_a_name_that_is_right_somewhere_gets_no_hint(self) -> None:
        assert hint("Option 'granularity' is not accepted") == ""
        assert hint("something else went wrong") == ""
        assert hint("Option 'granularty' is not accepted\n  did you mean granularity?") == ""


class TestErrors:
    """What goes wrong while running: status 1, one clear message."""

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("--data.batch_size=0",), "error: data.batch_size: expected at least 1, found 0"),
            (("--suite.tasks=0",), "error: toys.experts: expected at least one, found none"),
            (("--model.max_images=0",), "error: model.max_images: expected auto, null or at least 1, found 0"),
            (("--trainer.precision=bf16-true",), "error: trainer.precision: bf16-true would round the coefficients"),
            (("--ckpt_path=gone.ckpt",), "error: gone.ckpt: no such checkpoint"),
        ],
    )
    def test_bad_values(self, args: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        said = refused(capsys, "fit", "--config", "adamerging", *TINY, *args, status=1)
        assert message in said
        assert "--debug shows the traceback" in said
        assert "Traceback" not in said
        assert "Namespace(" not in said

    def test_debug_raises(self) -> None:
        with pytest.raises(MergeError, match="learns its merge"):
            run("merge", "adamerging", "--debug")

    def test_no_data(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = refused(capsys, "fit", "--config", "adamerging", *TINY[:-1], "--data=null", status=1)
        assert "train_dataloader" in said

    @pytest.mark.parametrize("subcommand", ["test", "validate", "predict", "export"])
    def test_last_without_a_run(self, subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
        said = refused(capsys, subcommand, "--config", "adamerging", *TINY, "--ckpt_path=last", status=1)
        assert "no last.ckpt below runs/adamerging" in said

    def test_merge_of_a_learnable_method(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = refused(capsys, "merge", "--config", "adamerging", *TINY, status=1)
        assert "AdaMerging learns its merge; use `fit`" in said
        assert not list(Path().rglob("*.safetensors"))

    def test_export_of_nothing_learned(self, capsys: pytest.CaptureFixture[str]) -> None:
        said = refused(capsys, "export", "--config", "adamerging", *TINY, status=1)
        assert "has not learned anything yet; give --ckpt_path" in said

    @pytest.mark.parametrize("subcommand", ["fit", "test", "export"])
    def test_checkpoint_with_code(self, subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save({"state_dict": {}, "x": Path("touched")}, "evil.ckpt")
        said = refused(capsys, subcommand, "--config", "adamerging", *TINY, "--ckpt_path=evil.ckpt", status=1)
        assert "evil.ckpt: it holds pickled objects" in said

    def test_checkpoint_of_other_experts(self, capsys: pytest.CaptureFixture[str]) -> None:
        run("fit", "adamerging")
        last = str(RUN / "last.ckpt")
        for subcommand in ("fit", "test", "export"):
            options = [*TINY, "--suite.changed=true", "--ckpt_path", last]
            said = refused(capsys, subcommand, "--config", "adamerging", *options, status=1)
            assert "checkpoint: its expert 'task.c' was sha256:" in said
