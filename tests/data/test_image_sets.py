"""Labelled images from datasets on disk: what is read, what is refused, where they are looked for."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lit_merge import MergeError
from lit_merge.data.image_sets import (
    HubImages,
    ImageSource,
    dataset_status,
    open_images,
)
from lit_merge.suites.base import LabelledDataset

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def pictures(count: int, mode: str = "RGB") -> list[Image.Image]:
    """Small pictures that differ."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)).convert(mode) for _ in range(count)]


def made(labels: list[Any], feature: Any = None, mode: str = "RGB", image: str = "image", label: str = "label") -> Any:
    """A dataset in memory."""
    features = datasets.Features({image: datasets.Image(), label: feature or datasets.Value("int64")})
    return datasets.Dataset.from_dict({image: pictures(len(labels), mode), label: labels}, features=features)


def repository(folder: Path, **splits: Any) -> Path:
    """The layout of a repository of the hub: Parquet files named after their splits."""
    (folder / "data").mkdir(parents=True)
    for split, data in splits.items():
        data.to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    return folder


def saved(folder: Path, **splits: Any) -> Path:
    """What ``DatasetDict.save_to_disk`` writes."""
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def open_hub(folder: Path, split: str = "test", **arguments: Any) -> HubImages:
    """With a cache that the test owns."""
    return HubImages(folder, split, cache_dir=folder.parent / "cache", **arguments)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks the hub fails at once."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


class TestHubImages:
    @pytest.mark.parametrize("write", [repository, saved])
    def test_pictures_labels_and_names(self, tmp_path: Path, write: Callable[..., Path]) -> None:
        names = datasets.ClassLabel(names=["cat", "dog"])
        data = open_hub(write(tmp_path / "set", train=made([1, 1], names), test=made([0, 1, 1], names)))
        assert isinstance(data, LabelledDataset)
        assert (len(data), data.classes) == (3, ("cat", "dog"))
        for index, picture in enumerate(pictures(3)):
            image, label = data[index]
            assert torch.equal(image, torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255)
            assert label == [0, 1, 1][index]
        assert len(list(iter(data))) == 3  # it ends

    @pytest.mark.parametrize("split", ["test", None])
    def test_one_split_saved_alone(self, tmp_path: Path, split: str | None) -> None:
        data = made([3, 4])
        data.info.splits = None
        if split is not None:
            data = datasets.Dataset(data.data, data.info, split=split)
        data.save_to_disk(tmp_path / "one")
        assert [label for _, label in open_hub(tmp_path / "one")] == [3, 4]  # type: ignore[attr-defined]
        if split is not None:
            with pytest.raises(MergeError, match="no split 'train'; it has test"):
                open_hub(tmp_path / "one", "train")

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
    def test_every_picture_becomes_rgb(self, tmp_path: Path, mode: str) -> None:
        data = made([0], mode="RGB")
        if mode in ("CMYK",):  # not a mode of PNG
            file = io.BytesIO()
            pictures(1, mode)[0].save(file, "TIFF")
            data = datasets.Dataset.from_dict(
                {"image": [{"bytes": file.getvalue(), "path": None}], "label": [0]}, features=data.features
            )
        else:
            data = made([0], mode=mode)
        image, _ = open_hub(saved(tmp_path / "set", test=data))[0]
        expected = torch.from_numpy(np.array(pictures(1, mode)[0].convert("RGB"))).permute(2, 0, 1) / 255
        assert torch.equal(image, expected)

    @pytest.mark.parametrize(
        ("labels", "kind", "offset", "expected"),
        [
            ([False, True], "bool", 0, [0, 1]),
            ([1, 26], "int64", 1, [0, 25]),
            ([7, 0], "uint8", 0, [7, 0]),
        ],
    )
    def test_labels(self, tmp_path: Path, labels: list[Any], kind: str, offset: int, expected: list[int]) -> None:
        folder = saved(tmp_path / "set", test=made(labels, datasets.Value(kind)))
        data = open_hub(folder, label_offset=offset)
        found = [data[index][1] for index in range(2)]
        assert found == expected
        assert all(type(label) is int for label in found)

    def test_names_start_with_the_offset(self, tmp_path: Path) -> None:
        names = datasets.ClassLabel(names=["N/A", "a", "b"])
        data = open_hub(saved(tmp_path / "set", test=made([1, 2], names)), label_offset=1)
        assert data.classes == ("a", "b")

    def test_other_columns(self, tmp_path: Path) -> None:
        folder = repository(tmp_path / "set", test=made([5], image="jpg", label="cls"))
        data = open_hub(
            folder, image="jpg", label="cls", transform=lambda picture: torch.full((3, 1, 1), picture.width)
        )
        assert data[0][1] == 5
        assert data[0][0].tolist() == [[[4]]] * 3

    def test_bytes_without_a_feature(self, tmp_path: Path) -> None:
        """Parquet files that something else than ``datasets`` wrote."""
        file = io.BytesIO()
        pictures(1)[0].save(file, "PNG")
        plain = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": "x.png"}], "label": [2]})
        image, label = open_hub(saved(tmp_path / "set", test=plain))[0]
        assert (tuple(image.shape), label) == ((3, 5, 4), 2)

    def test_a_webdataset(self, tmp_path: Path) -> None:
        """As ``clip-benchmark/wds_fer2013``: tar files, columns named after suffixes."""
        import tarfile

        (tmp_path / "set/test").mkdir(parents=True)
        with tarfile.open(tmp_path / "set/test/0.tar", "w") as archive:
            for number, picture in enumerate(pictures(2)):
                file = io.BytesIO()
                picture.save(file, "JPEG")
                for suffix, content in (("jpg", file.getvalue()), ("cls", str(5 - number).encode())):
                    entry = tarfile.TarInfo(f"s{number:03}.{suffix}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        data = open_hub(tmp_path / "set", image="jpg", label="cls")
        assert [label for _, label in data] == [5, 4]  # type: ignore[attr-defined]

    def test_it_goes_to_workers(self, tmp_path: Path) -> None:
        data = open_hub(repository(tmp_path / "set", test=made([0, 1, 2])))
        assert len(pickle.dumps(data)) < 20_000
        loader: DataLoader[Any] = DataLoader(data, batch_size=3, num_workers=1, multiprocessing_context="fork")
        ((images, labels),) = list(loader)
        assert labels.tolist() == [0, 1, 2]
        assert torch.equal(images[2], data[2][0])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"split": "val"}, r"set: no split 'val'; it has train, test"),
            ({"image": "img"}, r"set \(test\): no column 'img' for the images; it has image, label"),
            ({"label": "kind"}, r"set \(test\): no column 'kind' for the labels; it has image, label"),
            ({"image": "label"}, r"column 'label': expected images, found int64"),
            ({"config": "big"}, r"set: cannot be opened \(ValueError: BuilderConfig 'big' not found"),
        ],
    )
    def test_wrong_arguments(self, tmp_path: Path, arguments: dict[str, str], message: str) -> None:
        folder = repository(tmp_path / "set", train=made([0]), test=made([0]))
        with pytest.raises(MergeError, match=message):
            open_hub(folder, **arguments)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (lambda: made(["cat"], datasets.Value("string")), r"'label': expected integers, .* found string"),
            (lambda: made([0.5], datasets.Value("float32")), r"'label': expected integers, .* found float32"),
        ],
    )
    def test_wrong_data(self, tmp_path: Path, data: Callable[[], Any], message: str) -> None:
        with pytest.raises(MergeError, match=message):
            open_hub(saved(tmp_path / "set", test=data()))

    def test_a_copy_of_one_configuration_need_not_know_its_name(self, tmp_path: Path) -> None:
        repository(tmp_path / "org/set", test=made([3]))
        source = ImageSource(id="org/set", config="cropped_digits")
        data = open_images(source, root=tmp_path, cache_dir=tmp_path / "cache")
        assert data[0][1] == 3

    def test_an_empty_split(self, tmp_path: Path) -> None:
        with pytest.raises(MergeError, match=r"\(test\): the split is empty; expected images"):
            open_hub(repository(tmp_path / "set", train=made([0]), test=made([0]).select([])))

    def test_addresses_are_not_fetched(self, tmp_path: Path) -> None:
        links = datasets.Dataset.from_dict({"image": ["https://example.org/x.png"], "label": [0]})
        with pytest.raises(MergeError, match="column 'image': expected images, found string"):
            open_hub(saved(tmp_path / "set", test=links))

    @pytest.mark.parametrize("broken", [b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(20), None])
    def test_a_broken_picture(self, tmp_path: Path, broken: bytes | None) -> None:
        file = io.BytesIO()
        pictures(1)[0].save(file, "PNG")
        content = [{"bytes": value, "path": None} for value in (file.getvalue(), broken)]
        if broken is None:
            content[1] = None  # type: ignore[call-overload]
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
        data = datasets.Dataset.from_dict({"image": content, "label": [0, 1]}, features=features)
        images = open_hub(saved(tmp_path / "set", test=data))
        assert images[0][1] == 0
        with pytest.raises(MergeError, match=r"set \(test\): image 1: (cannot be decoded|expected a picture)"):
            images[1]

    @pytest.mark.parametrize(
        ("label", "offset", "message"),
        [
            (None, 0, "image 0: expected an integer label, found None"),
            (0, 1, "image 0: label 0 is below the first one"),
        ],
    )
    def test_a_wrong_label(self, tmp_path: Path, label: int | None, offset: int, message: str) -> None:
        images = open_hub(saved(tmp_path / "set", test=made([label])), label_offset=offset)
        with pytest.raises(MergeError, match=message):
            images[0]

    def test_no_such_place(self, tmp_path: Path) -> None:
        for place in (tmp_path / "none", "./none", "none"):
            with pytest.raises(MergeError, match=r"no such folder; expected one with a dataset, or ORG/NAME"):
                HubImages(place, "test")
        with pytest.raises(MergeError, match=r"me/none: cannot be opened .*; check its name, .* copy in ROOT/me/none"):
            HubImages("me/none", "test")
        (tmp_path / "empty").mkdir()
        with pytest.raises(MergeError, match=r"empty: cannot be opened .*; expected Parquet files"):
            open_hub(tmp_path / "empty")

    def test_a_damaged_file(self, tmp_path: Path) -> None:
        folder = repository(tmp_path / "set", test=made([0, 1]))
        (file,) = folder.glob("data/*")
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(MergeError, match="set: cannot be opened"):
            open_hub(folder)


class TestOpenImages:
    def test_a_mirror_instead_of_the_hub(self, tmp_path: Path) -> None:
        saved(tmp_path / "root/me/cats", test=made([1]))
        source = ImageSource(id="me/cats", revision="abc")
        data = open_images(source, root=tmp_path / "root")
        assert (data[0][1], len(data)) == (1, 1)
        with pytest.raises(MergeError, match=r"root/me/dogs: no such folder; with a root nothing is fetched"):
            open_images(ImageSource(id="me/dogs"), root=tmp_path / "root")

    def test_a_folder_of_datasets(self, tmp_path: Path) -> None:
        repository(tmp_path / "cats", test=made([1]), train=made([0, 0]))
        source = ImageSource.parse({"id": "./cats"}, folder=tmp_path)
        for root in (None, tmp_path / "elsewhere"):
            assert len(open_images(source, "train", root=root, cache_dir=tmp_path / "cache")) == 2


class TestDatasetStatus:
    def test_folders(self, tmp_path: Path) -> None:
        (tmp_path / "me/cats").mkdir(parents=True)
        for source, root, state in (
            (ImageSource(folder=str(tmp_path)), None, "here"),
            (ImageSource(folder=str(tmp_path / "none")), None, "missing"),
            (ImageSource(id="me/cats"), tmp_path, "here"),
            (ImageSource(id="me/dogs"), tmp_path, "missing"),
        ):
            assert dataset_status(source, root).state == state

    def test_what_datasets_has_converted(self, tmp_path: Path) -> None:
        """The folder is the one that ``datasets`` itself would use."""
        source = ImageSource(id="1aurent/PatchCamelyon")
        assert dataset_status(source, cache_dir=tmp_path).state == "missing"
        builder = datasets.load_dataset_builder(
            str(repository(tmp_path / "PatchCamelyon", test=made([1]))), cache_dir=str(tmp_path)
        )
        builder.repo_id = source.id
        folder = tmp_path / builder._relative_data_dir()
        folder.mkdir(parents=True)
        assert dataset_status(source, cache_dir=tmp_path).state == "missing"
        (folder / "dataset_info.json").write_text("{}")
        assert dataset_status(source, cache_dir=tmp_path) == ("cached", folder.parents[2])
