"""A suite of one's own networks and datasets, from Python and from YAML."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import refused, report
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from toys import SIZE, ConvNet, expert_state, network

from lit_merge.cli import main
from lit_merge.data import TaskDataModule
from lit_merge.encoders.heads import LinearHead
from lit_merge.errors import MergeError
from lit_merge.methods import SimpleAverage
from lit_merge.suites import NetworkSuite
from lit_merge.trainer import MergeTrainer

QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


class Labels(Dataset[tuple[Any, int]]):
    """Black images with given labels."""

    def __init__(self, *labels: int, image: Any = None) -> None:
        self.labels = labels
        self.image = torch.zeros(3, SIZE, SIZE) if image is None else image

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.image, self.labels[index]


class Stream(IterableDataset[Tensor]):
    """Something without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(1)


def suite(**changes: Any) -> NetworkSuite:
    """Two experts of a network with five outputs."""
    net = network("cnn")
    arguments: dict[str, Any] = {
        "network": net,
        "experts": {"b": expert_state(net, 1), "a": expert_state(net, 2)},
        "test": {"a": Labels(0, 1, 2), "b": Labels(0, 1)},
        "num_classes": {"a": 5, "b": 5},
    }
    return NetworkSuite(**(arguments | changes))


def evaluated(given: NetworkSuite) -> dict[str, Any]:
    """Evaluate the average of the experts."""
    trainer = MergeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    model = SimpleAverage(suite=given)
    trainer.test(model, datamodule=TaskDataModule(suite=given), verbose=False)
    return model.results


def files(folder: Path) -> NetworkSuite:
    """Write the networks of the suite into a folder, as users have them."""
    given = suite()
    save_file(dict(given.base()), folder / "base.safetensors")
    torch.save(dict(given.expert("a")), folder / "a.pt")
    save_file(dict(given.expert("b")), folder / "b.safetensors")
    save_file({"weight": torch.randn(4, 5), "bias": torch.randn(4)}, folder / "head.safetensors")
    return given


def image_folder(root: Path, classes: tuple[str, ...], each: int) -> None:
    """Noise in folders of classes, as ``ImageFolder`` reads it."""
    random = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(each):
            pixels = random.integers(0, 256, (SIZE + 2, SIZE + 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


YAML = """\
suite:
  class_path: lit_merge.suites.NetworkSuite
  init_args:
    name: mine
    network: {class_path: toys.ConvNet, init_args: {width: 6, features: 5}}
    base: base.safetensors
    experts: {folder: a.pt, toys: b.safetensors}
    heads:
      folder: head.safetensors
      toys: {class_path: torch.nn.Linear, init_args: {in_features: 5, out_features: 3}}
    test:
      folder:
        class_path: torchvision.datasets.ImageFolder
        init_args:
          root: images
          transform:
            class_path: torchvision.transforms.Compose
            init_args:
              transforms:
                - {class_path: torchvision.transforms.Resize, init_args: {size: [8, 8]}}
                - class_path: torchvision.transforms.ToTensor
      toys: {class_path: toys.ToyData, init_args: {size: 9, classes: 3, seed: 0}}
"""


class TestFromYaml:
    @pytest.fixture(autouse=True)
    def _written(self, tmp_path: Path) -> None:
        files(tmp_path)
        image_folder(tmp_path / "images", ("cat", "dog", "emu", "fox"), 3)
        Path("mine.yaml").write_text(YAML)

    def test_an_overlay_replaces_the_suite(self) -> None:
        main(["merge", "--config", "simple-average", "--config", "mine.yaml", *QUIET, "--output=out"])
        content = report("runs/simple-average/version_0")
        assert content["suite"] == "mine"
        assert {task: row["n"] for task, row in content["tasks"].items()} == {"folder": 12, "toys": 9}
        ConvNet().load_state_dict(load_file("out/merged.safetensors"), strict=True)
        merged = load_file("out/merged.safetensors")
        both = [torch.load("a.pt", weights_only=True), load_file("b.safetensors")]
        torch.testing.assert_close(merged["conv1.weight"], (both[0]["conv1.weight"] + both[1]["conv1.weight"]) / 2)

    def test_adapted(self) -> None:
        args = ["--trainer.max_epochs=1", "--data.steps_per_epoch=2", "--data.batch_size=4"]
        cli = main(["fit", "--config", "adamerging", "--config", "mine.yaml", *QUIET, *args])
        assert cli is not None
        assert cli.trainer.global_step == 2
        assert set(report("runs/adamerging/version_0")["tasks"]) == {"folder", "toys"}

    def test_a_missing_file_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("a.pt").unlink()
        said = refused(capsys, "merge", "--config", "simple-average", "--config", "mine.yaml", *QUIET, status=1)
        assert "error: a.pt: no such file; expected a state dict" in said

    def test_no_transform(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = YAML[: YAML.index("          transform:")] + YAML[YAML.index("      toys: {class_path: toys.ToyData") :]
        Path("mine.yaml").write_text(text)
        said = refused(capsys, "merge", "--config", "simple-average", "--config", "mine.yaml", *QUIET, status=1)
        assert "folder (test): image 0: expected a float tensor (C, H, W), found Image" in said
        assert "give the dataset a transform that ends in one" in said


class TestFromPython:
    def test_order_name_and_base(self) -> None:
        given = suite(name="two")
        assert given.tasks == ("b", "a")
        assert given.name == "two"
        assert given.base().keys() == given.network().state_dict().keys()
        assert evaluated(given)["tasks"].keys() == {"a", "b"}

    def test_files(self, tmp_path: Path) -> None:
        given = files(tmp_path)
        other = suite(base="base.safetensors", experts={"a": Path("a.pt"), "b": "b.safetensors"})
        for task in ("a", "b"):
            pairs = [(value, other.expert(task)[name]) for name, value in given.expert(task).items()]
            assert all(torch.equal(*pair) for pair in pairs)
        assert all(torch.equal(value, other.base()[name]) for name, value in given.base().items())

    def test_heads(self, tmp_path: Path) -> None:
        files(tmp_path)
        given = suite(heads={"a": "head.safetensors"}, num_classes=None)
        head = given.head("a")
        assert isinstance(head, LinearHead)
        assert head is given.head("a")
        assert (given.num_classes("a"), head.weight.shape[1]) == (4, 5)
        assert isinstance(given.head("b"), nn.Identity)

    def test_head_without_bias(self) -> None:
        save_file({"weight": torch.ones(2, 5)}, "head.safetensors")
        head = suite(heads={"a": "head.safetensors"}).head("a")
        assert torch.equal(head(torch.ones(1, 5)), torch.tensor([[5.0, 5.0]]))

    def test_num_classes_comes_from_argument_head_or_dataset(self) -> None:
        data = Labels(0, 1)
        data.classes = ["cat", "dog", "emu"]  # type: ignore[attr-defined]
        given = suite(num_classes={"a": 7}, heads={"a": nn.Linear(5, 4)}, test={"a": Labels(0), "b": data})
        assert (given.num_classes("a"), given.num_classes("b")) == (7, 3)

    def test_train_sets(self) -> None:
        given = suite(train={"a": Labels(1, 1, 1, 1)})
        assert len(given.dataset("a", "train")) == 4
        assert len(given.dataset("a", "test")) == 3
        with pytest.raises(MergeError, match="task 'b' has no train set; give train"):
            given.dataset("b", "train")

    def test_nothing_that_was_passed_in_is_changed(self) -> None:
        experts = {"a": expert_state(network("cnn"), 1)}
        before = {name: value.clone() for name, value in experts["a"].items()}
        head, net = nn.Linear(5, 3), network("cnn")
        given = suite(network=net, experts=experts, test={"a": Labels(0, 1)}, heads={"a": head}, num_classes=None)
        evaluated(given)
        assert all(torch.equal(value, before[name]) for name, value in experts["a"].items())
        assert all(parameter.requires_grad for module in (head, net) for parameter in module.parameters())
        assert net.state_dict().keys() == before.keys()


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"experts": {}}, "experts: expected at least one, found none"),
            ({"test": {"a": Labels(0)}}, r"experts are for \['a', 'b'\], test sets for \['a'\]; they must agree"),
            ({"heads": {"c": nn.Identity()}}, r"heads: unknown tasks \['c'\]; the experts are for \['a', 'b'\]"),
            ({"train": {"c": Labels(0)}}, r"train: unknown tasks \['c'\]"),
            ({"num_classes": {"c": 1}}, r"num_classes: unknown tasks \['c'\]"),
        ],
    )
    def test_tasks_disagree(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(MergeError, match=message):
            suite(**changes)

    @pytest.mark.parametrize("ask", ["expert", "head", "num_classes"])
    def test_unknown_task(self, ask: str) -> None:
        with pytest.raises(MergeError, match="unknown task 'zebra'; it has b, a"):
            getattr(suite(), ask)("zebra")

    def test_no_classes_known(self) -> None:
        with pytest.raises(MergeError, match=r"task 'a': number of classes unknown; give num_classes: \{a: ...\}"):
            suite(num_classes=None).num_classes("a")

    def test_base_of_another_network(self) -> None:
        with pytest.raises(MergeError, match=r"base and network have different tensors: 1\.bias, 1.weight"):
            evaluated(suite(base=network("mlp").state_dict()))

    def test_expert_of_another_network(self) -> None:
        with pytest.raises(MergeError, match="expert 'a': its tensors are not those of the base: "):
            evaluated(suite(experts={"a": network("mlp").state_dict(), "b": expert_state(network("cnn"), 1)}))

    def test_base_of_another_shape(self) -> None:
        with pytest.raises(MergeError, match=r"base: conv1.weight: the network expects shape \(6, .*, found \(8, "):
            suite(base=ConvNet(width=8).state_dict()).base()

    @pytest.mark.parametrize("label", [5, -1])
    def test_label_out_of_range(self, label: int) -> None:
        message = rf"a \(test\): image 1: label {label} is out of range; .* 5 classes, so labels must be 0 to 4"
        with pytest.raises(MergeError, match=message):
            evaluated(suite(test={"a": Labels(0, label), "b": Labels(0)}))

    def test_empty_dataset(self) -> None:
        with pytest.raises(MergeError, match="task 'a': its test set is empty; expected images"):
            evaluated(suite(test={"a": Labels(), "b": Labels(0)}))

    def test_dataset_without_a_length(self) -> None:
        with pytest.raises(MergeError, match="task 'a': expected a dataset with a length, found Stream"):
            evaluated(suite(test={"a": Stream(), "b": Labels(0)}))

    def test_images_that_are_not_tensors(self) -> None:
        image = Image.new("RGB", (SIZE, SIZE))
        with pytest.raises(MergeError, match=r"a \(test\): image 0: expected a float tensor \(C, H, W\), found Image"):
            evaluated(suite(test={"a": Labels(0, image=image), "b": Labels(0)}))

    def test_images_of_integers(self) -> None:
        image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
        with pytest.raises(MergeError, match=r"a \(test\): image 0: expected a float tensor .* found torch.uint8"):
            evaluated(suite(test={"a": Labels(0, image=image), "b": Labels(0)}))

    @pytest.mark.parametrize(
        "state", [{"bias": torch.ones(2)}, {"weight": torch.ones(2)}, {"weight": torch.ones(2, 5), "x": torch.ones(1)}]
    )
    def test_a_file_that_is_no_head(self, state: dict[str, Tensor]) -> None:
        save_file(state, "head.safetensors")
        with pytest.raises(MergeError, match=r"head.safetensors: expected a linear head with weight \(C, D\)"):
            suite(heads={"a": "head.safetensors"}).head("a")
