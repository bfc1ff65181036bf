"""The merged network loads into the plain network, without lit-merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from callbacks_helpers import trainer_of
from safetensors.torch import load_file
from toys import SIZE, Kind, ToySuite, network

from lit_merge.callbacks import ExportMerge, Report
from lit_merge.checkpoints import state_digest
from lit_merge.data import TaskDataModule
from lit_merge.errors import MergeError
from lit_merge.methods import AdaMerging
from lit_merge.transforms import Ties


def fitted(suite: ToySuite, export: ExportMerge, **options: object) -> AdaMerging:
    """Adapt for two steps."""
    model = AdaMerging(suite=suite, **options)  # type: ignore[arg-type]
    trainer_of(export).fit(model, datamodule=TaskDataModule(suite=suite, steps_per_epoch=2))
    return model


@pytest.mark.parametrize("kind", ["vit", "cnn", "tied", "mlp"])
@pytest.mark.parametrize("buffers", ["average", "recalibrate"])
def test_the_plain_network_has_the_same_outputs(kind: Kind, buffers: str) -> None:
    suite = ToySuite(kind)
    model = fitted(suite, ExportMerge("out"), buffers=buffers)
    plain = network(kind, seed=9).eval()
    plain.load_state_dict(load_file("out/merged.safetensors"), strict=True)
    images = torch.randn(4, 3, SIZE, SIZE)
    with torch.no_grad():
        for task in suite.tasks:
            torch.testing.assert_close(suite.head(task)(plain(images)), model(images, task), rtol=1e-5, atol=1e-5)


def test_recalibrated_statistics_are_exported() -> None:
    suite = ToySuite("cnn")
    fitted(suite, ExportMerge("average"))
    fitted(suite, ExportMerge("measured"), buffers="recalibrate")
    one, other = (load_file(f"{folder}/merged.safetensors") for folder in ("average", "measured"))
    assert torch.equal(one["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(one["bn1.running_mean"], other["bn1.running_mean"])


def test_provenance() -> None:
    suite = ToySuite("tied")
    model = fitted(suite, ExportMerge("out"), transforms=[Ties(density=0.5)])
    said = json.loads(Path("out/merge.json").read_text())
    assert (said["schema"], said["method"], said["suite"], said["steps"]) == (1, "AdaMerging", "toys", 2)
    assert said["tasks"] == list(suite.tasks)
    assert said["base"] == state_digest(suite.base())
    assert said["experts"] == {task: state_digest(suite.expert(task)) for task in suite.tasks}
    assert said["transforms"] == [repr(Ties(density=0.5))]
    assert said["weights"]["sha256"] == state_digest(load_file("out/merged.safetensors"))
    assert said["weights"]["sha256"] == state_digest(model.merged_state())
    assert set(said["versions"]) == {"lit-merge", "lightning", "torch", "python"}
    assert said["hyperparameters"]["granularity"] == "tensor"
    assert said["config"] is None  # this run has no command line


def test_by_default_into_the_folder_of_the_run() -> None:
    fitted(ToySuite("mlp"), ExportMerge())
    assert sorted(path.name for path in Path("export").iterdir()) == ["README.md", "merge.json", "merged.safetensors"]


def test_a_dry_run_exports_nothing() -> None:
    suite = ToySuite("mlp")
    trainer_of(ExportMerge(), fast_dev_run=True).fit(AdaMerging(suite=suite), datamodule=TaskDataModule(suite=suite))
    assert not list(Path().rglob("*.safetensors"))


def test_the_card_gets_its_scores_when_the_merge_is_evaluated() -> None:
    suite = ToySuite("mlp")
    trainer = trainer_of(Report(), ExportMerge("out"))
    model, data = AdaMerging(suite=suite), TaskDataModule(suite=suite, steps_per_epoch=2)
    trainer.fit(model, datamodule=data)
    before = Path("out/README.md").read_text()
    assert "It has not been scored" in before
    trainer.test(model, datamodule=data, verbose=False)
    after = Path("out/README.md").read_text()
    assert "It has not been scored" not in after
    assert all(f"| {task} | {row['n']}" in after for task, row in model.results["tasks"].items())


@pytest.mark.parametrize("form", ["hugging_face", "open_clip"])
def test_a_format_that_cannot_hold_the_network_is_refused(form: Any) -> None:
    with pytest.raises(MergeError, match=rf"{form} holds image towers of CLIP, .* is a ConvNet"):
        fitted(ToySuite("cnn"), ExportMerge("out", format=form))
    assert not Path("out").exists()
