"""Labels are checked where they are used, and dropped where they must not be seen."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from toys import ToyData

from lit_merge.data import Indexed, TaskMixture, UnlabelledBatch
from lit_merge.errors import MergeError


class Broken(Dataset[tuple[Any, Any]]):
    """Two images, of which the second has something wrong."""

    def __init__(self, image: object = None, label: object = 0) -> None:
        self.items = [(torch.zeros(3, 2, 2), 0), (torch.zeros(3, 2, 2) if image is None else image, label)]

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.items[index]


def test_indexed_gives_image_label_and_position() -> None:
    data = ToyData(9, 3, seed=0)
    view = Indexed(data, [7, 2], "toys (test)", 3)
    assert len(view) == 2
    image, label, position = view[1]
    assert torch.equal(image, data.images[2])
    assert (label, position) == (2, 2)


@pytest.mark.parametrize("label", [3, -1, 255])
def test_a_label_out_of_range_names_task_image_and_range(label: int) -> None:
    view = Indexed(Broken(label=label), [0, 1], "svhn (test)", 3)
    assert view[0][1] == 0
    message = f"svhn (test): image 1: label {label} is out of range; the head has 3 classes, so labels must be 0 to 2"
    with pytest.raises(MergeError, match=re.escape(message)):
        view[1]


def test_an_image_that_is_no_tensor_is_refused_in_both_views() -> None:
    data = Broken(image="picture.png")
    with pytest.raises(MergeError, match=r"svhn \(test\): image 1: expected a float tensor \(C, H, W\), found str; "):
        Indexed(data, [1], "svhn (test)", 3)[0]
    with pytest.raises(MergeError, match=r"svhn: image 1: expected a float tensor .* give the dataset a transform"):
        TaskMixture({"svhn": data})[{"svhn": ([1], 1.0)}]


def test_a_mixture_has_images_positions_and_share_and_nothing_else() -> None:
    data = {"x": ToyData(9, 3, seed=0), "y": ToyData(4, 2, seed=1)}
    mixture = TaskMixture(data)
    assert len(mixture) == 13
    batch = mixture[{"x": ([5, 0], 1.0), "y": ([3], 0.5)}]
    assert list(batch) == ["x", "y"]
    assert UnlabelledBatch._fields == ("images", "index", "share", "positions")
    for task, positions in (("x", [5, 0]), ("y", [3])):
        images, index, share, numbers = batch[task]
        assert list(numbers) == positions
        assert torch.equal(images, data[task].images[positions])
        assert index.tolist() == positions
        assert share == (1.0 if task == "x" else 0.5)


def test_a_mixture_asks_for_no_label_it_could_keep() -> None:
    class Label:
        """A label that does not let itself be used."""

        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(f"label.{name} was looked at")

    class Secret(Broken):
        def __getitem__(self, index: int) -> tuple[Tensor, Any]:
            return torch.zeros(3, 2, 2), Label()

    batch = TaskMixture({"x": Secret()})[{"x": ([0, 1], 1.0)}]
    assert batch["x"].images.shape == (2, 3, 2, 2)
