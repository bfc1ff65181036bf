"""Labelled images from folders of pictures and from torchvision."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lit_merge import MergeError
from lit_merge.data.image_sets import FolderImages, TorchvisionImages, open_images


def folders(root: Path, names: list[str]) -> Path:
    """One picture per class folder, whose red is the number of the folder."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(root / name / "x.png")
    return root


class TestFolderImages:
    @pytest.mark.parametrize(
        ("names", "classes", "expected", "found"),
        [
            (["dog", "cat"], None, [1, 0], ("cat", "dog")),
            (["dog", "cat"], ["dog", "cat"], [0, 1], ("dog", "cat")),  # by name, not by alphabet
            (["d", "c"], ["dog", "cat"], [1, 0], ("dog", "cat")),  # by alphabet
            ([str(n) for n in range(11)], None, list(range(11)), tuple(str(n) for n in range(11))),  # 10 after 2
            (["02", "00", "01"], ["x", "y", "z"], [2, 0, 1], ("x", "y", "z")),
        ],
    )
    def test_which_folder_is_which_class(
        self, tmp_path: Path, names: list[str], classes: list[str] | None, expected: list[int], found: tuple[str, ...]
    ) -> None:
        data = FolderImages(folders(tmp_path / "set", names), classes)
        labels = {round(float(image[0, 0, 0]) * 255): label for image, label in data}  # type: ignore[attr-defined]
        assert [labels[number] for number in range(len(names))] == expected
        assert data.classes == found

    def test_numbers_that_start_at_one(self, tmp_path: Path) -> None:
        data = FolderImages(folders(tmp_path / "set", ["1", "2"]), label_offset=1)
        assert sorted(label for _, label in data) == [0, 1]  # type: ignore[attr-defined]

    def test_wrong_folders(self, tmp_path: Path) -> None:
        folder = folders(tmp_path / "sets/test", ["a", "b"])
        with pytest.raises(MergeError, match=r"found 2 class folders \(a, b, …\), expected 3: x, y, z"):
            FolderImages(folder, ["x", "y", "z"])
        with pytest.raises(MergeError, match=r"val: no such folder; .*sets has test"):
            FolderImages(folder.parent / "val")
        (folder / "c").mkdir()
        with pytest.raises(MergeError, match=r"cannot be opened .*expected one folder per class"):
            FolderImages(folder)
        (folder / "c/x.png").write_bytes(b"no picture")
        with pytest.raises(MergeError, match="test: image 2: cannot be decoded"):
            FolderImages(folder)[2]


def mnist(root: Path) -> Path:
    """Three images in MNIST's own format."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for kind in ("train", "t10k"):
        (raw / f"{kind}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, 3, 28, 28) + bytes(range(3)) * 784)
        (raw / f"{kind}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 3) + bytes([4, 0, 9]))
    return root


class TestTorchvisionImages:
    def test_a_dataset(self, tmp_path: Path) -> None:
        data = TorchvisionImages("MNIST", mnist(tmp_path), {"train": False})
        assert [label for _, label in data] == [4, 0, 9]  # type: ignore[attr-defined]
        assert data[0][0].shape == (3, 28, 28)
        assert data.classes is not None
        assert len(data.classes) == 10

    @pytest.mark.parametrize(
        ("name", "arguments", "message"),
        [
            ("Cats", {}, r"torchvision Cats \(\): torchvision.datasets has no image dataset of this name"),
            ("wrap_dataset_for_transforms_v2", {}, "has no image dataset of this name"),
            ("CIFAR10", {"train": False}, r"torchvision CIFAR10 \(train=False\): cannot be opened"),
            ("MNIST", {"split": "test"}, "cannot be opened .*unexpected keyword argument 'split'"),
            ("MNIST", {"download": True}, "download: nothing is downloaded here"),
        ],
    )
    def test_wrong_arguments(self, tmp_path: Path, name: str, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(MergeError, match=message):
            TorchvisionImages(name, mnist(tmp_path), arguments)


class TestOpenImages:
    def test_folders_of_pictures(self, tmp_path: Path) -> None:
        folders(tmp_path / "pets/valid", ["cat", "dog"])
        source = {"folder": str(tmp_path / "pets"), "splits": {"test": "valid"}}
        data = open_images(source, classes=["dog", "cat"], transform=lambda picture: torch.zeros(3, 1, 1))
        assert isinstance(data, FolderImages)
        assert [label for _, label in data] == [1, 0]  # type: ignore[attr-defined]
        with pytest.raises(MergeError, match="pets: no split 'train'; the task has test"):
            open_images(source, "train")

    def test_torchvision(self, tmp_path: Path) -> None:
        source = {"torchvision": "MNIST", "folder": str(mnist(tmp_path)), "splits": {"test": {"train": False}}}
        data = open_images(source)
        assert isinstance(data, TorchvisionImages)
        assert len(data) == 3
