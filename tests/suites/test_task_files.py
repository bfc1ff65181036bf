"""Task files: the bundled ones hold the published facts, and a user's own is read strictly."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_merge import MergeError
from lit_merge.suites import task_files
from lit_merge.suites.task_files import Task, load_task, parse_task, task_names

# classes, templates, dataset, test split, test images, of the published tables' code and the datasets' papers
FACTS = {
    "sun397": (397, 2, "tanganke/sun397", "test", 19850),
    "stanford-cars": (196, 8, "tanganke/stanford_cars", "test", 8041),
    "resisc45": (45, 18, "tanganke/resisc45", "test", 6300),
    "eurosat": (10, 3, "tanganke/eurosat", "test", 2700),
    "svhn": (10, 1, "ufldl-stanford/svhn", "test", 26032),
    "gtsrb": (43, 3, "tanganke/gtsrb", "test", 12630),
    "mnist": (10, 1, "ylecun/mnist", "test", 10000),
    "dtd": (47, 8, "tanganke/dtd", "test", 1880),
    "oxford_flowers102": (102, 1, "dpdl-benchmark/oxford_flowers102", "test", 6149),
    "pcam": (2, 1, "1aurent/PatchCamelyon", "test", 32768),
    "fer2013": (7, 6, "clip-benchmark/wds_fer2013", "test", 7178),
    "oxford-iiit-pet": (37, 1, "timm/oxford-iiit-pet", "test", 3669),
    "stl10": (10, 2, "tanganke/stl10", "test", 8000),
    "cifar100": (100, 18, "tanganke/cifar100", "test", 10000),
    "cifar10": (10, 18, "tanganke/cifar10", "test", 10000),
    "food101": (101, 1, "ethz/food101", "validation", 25250),
    "fashion_mnist": (10, 2, "zalando-datasets/fashion_mnist", "test", 10000),
    "emnist_letters": (26, 1, "tanganke/emnist_letters", "test", None),
    "kmnist": (10, 1, "tanganke/kmnist", "test", 10000),
    "rendered-sst2": (2, 1, "nateraw/rendered-sst2", "test", 1821),
}
CORRUPTED = ("contrast", "gaussian_noise", "impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "spatter")
# the same name in clip-benchmark, and what it has otherwise
CLIP_BENCHMARK = {
    "eurosat": "eurosat", "gtsrb": "gtsrb", "mnist": "mnist", "fer2013": "fer2013", "pcam": "pcam",
    "oxford_flowers102": "flowers", "svhn": "svhn", "oxford-iiit-pet": "pets", "sun397": "sun397",
    "stanford-cars": "cars", "dtd": "dtd", "stl10": "stl10", "cifar10": "cifar10", "cifar100": "cifar100",
    "food101": "food101", "rendered-sst2": "renderedsst2", "resisc45": "resisc45",
}  # fmt: skip
OTHER_TEMPLATES = {"svhn", "resisc45", "pcam"}


class TestBundled:
    def test_the_names_and_their_order(self) -> None:
        assert list(task_names()) == list(FACTS)
        folder = Path(task_files.__file__).parent / "tasks"
        assert {path.stem for path in folder.glob("*.yaml")} == set(FACTS)

    @pytest.mark.parametrize("name", FACTS)
    def test_facts(self, name: str) -> None:
        task = load_task(name)
        classes, templates, dataset, split, images = FACTS[name]
        assert task.classes is not None
        assert (len(task.classes), len(task.templates)) == (classes, templates)
        assert (task.name, task.dataset.id, task.dataset.splits["test"]) == (name, dataset, split)
        assert (task.test_images, task.dataset.revision) == (images, None)
        assert task.dataset.splits["train"] == "train"
        corrupted = name in ("stanford-cars", "eurosat", "resisc45", "gtsrb")
        assert set(task.dataset.splits) == {"train", "test", *(CORRUPTED if corrupted else ())}
        assert task.licence
        assert len(task.source) > 10
        assert all(text == text.strip() for text in (*task.classes, *task.templates))
        assert all(text.count("{c}") == 1 for text in task.templates)
        assert pickle.loads(pickle.dumps(task)) == task

    def test_not_a_letter_is_changed(self) -> None:
        """A zero-shot head moves by points with the spelling of its prompts."""
        texts = {name: [load_task(name).classes, load_task(name).templates] for name in task_names()}
        assert hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16] == "8aa14e357a6257d4"

    @pytest.mark.parametrize(
        ("name", "key", "value"),
        [("svhn", "config", "cropped_digits"), ("fer2013", "image", "jpg"), ("fer2013", "label", "cls")],
    )
    def test_what_is_peculiar(self, name: str, key: str, value: str) -> None:
        assert getattr(load_task(name).dataset, key) == value

    @pytest.mark.parametrize(
        ("name", "place", "expected"),
        [
            ("sun397", 396, "youth hostel"),
            ("stanford-cars", 195, "smart fortwo Convertible 2012"),
            ("resisc45", 44, "wetland"),
            ("eurosat", 2, "brushland or shrubland"),
            ("gtsrb", 14, "stop"),
            ("dtd", 46, "zigzagged"),
            ("pcam", 1, "lymph node containing metastatic tumor tissue"),
            ("cifar100", 26, "cra"),
            ("fashion_mnist", 0, "T - shirt / top"),
            ("kmnist", 0, "お"),
            ("emnist_letters", 25, "Z"),
        ],
    )
    def test_spelling(self, name: str, place: int, expected: str) -> None:
        assert load_task(name).class_names()[place] == expected

    @pytest.mark.parametrize("name", CLIP_BENCHMARK)
    def test_against_clip_benchmark(self, name: str) -> None:
        """An independent copy of the published prompts."""
        package = pytest.importorskip("clip_benchmark")
        folder = Path(package.__file__).parent / "datasets"
        names = json.loads((folder / "en_classnames.json").read_text()).get(CLIP_BENCHMARK[name])
        templates = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
        task = load_task(name)
        assert (list(task.templates) == templates[CLIP_BENCHMARK[name]]) == (name not in OTHER_TEMPLATES)
        if names is not None and name != "svhn":  # there: zero, one, ...
            ours = [text.lower().replace("_", " ") for text in task.class_names()]
            different = [i for i, (a, b) in enumerate(zip(ours, names, strict=True)) if a != b.lower()]
            assert different == ([15, 59, 92] if name == "oxford_flowers102" else [])


def content(**changes: Any) -> dict[str, Any]:
    """A right file with changes."""
    right = {"dataset": {"id": "me/cats"}, "classes": ["cat", "dog"], "templates": ["a {c}."]}
    return {key: value for key, value in (right | changes).items() if value is not None}


def write(folder: Path, **changes: Any) -> Path:
    """The same as a file."""
    path = folder / "pets.yaml"
    path.write_text(yaml.safe_dump(content(**changes), allow_unicode=True))
    return path


class TestOwn:
    def test_the_shortest(self, tmp_path: Path) -> None:
        task = load_task(write(tmp_path))
        assert (task.name, task.classes, task.templates) == ("pets", ("cat", "dog"), ("a {c}.",))
        assert task.dataset.splits == {"train": "train", "test": "test"}
        assert (task.dataset.image, task.dataset.label, task.dataset.label_offset) == ("image", "label", 0)

    def test_everything(self, tmp_path: Path) -> None:
        dataset = {
            "id": "me/cats", "config": "big", "revision": "abc", "splits": {"test": "valid"}, "image": "img",
            "label": "kind", "label_offset": 1,
        }  # fmt: skip
        more = {"name": "felines", "test_images": 7, "download_bytes": 8, "licence": "MIT", "source": "me"}
        task = load_task(write(tmp_path, dataset=dataset, **more))
        assert {key: getattr(task, key) for key in more} == more
        assert {key: getattr(task.dataset, key) for key in dataset} == dataset

    def test_paths_are_relative_to_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        for given, key in (({"folder": "pictures"}, "folder"), ({"id": "./pictures"}, "id")):
            task = load_task(write(tmp_path / "sub", dataset=given))
            assert Path(getattr(task.dataset, key)) == tmp_path / "sub/pictures"
        assert load_task(write(tmp_path / "sub", dataset={"folder": "/data"})).dataset.folder == "/data"

    def test_lists_of_clip_benchmark(self, tmp_path: Path) -> None:
        pytest.importorskip("clip_benchmark")
        taken = {"clip_benchmark": "gtsrb"}
        task = load_task(write(tmp_path, classes=taken, templates=taken))
        assert task.classes == load_task("gtsrb").classes
        assert task.templates == load_task("gtsrb").templates
        assert len(load_task(write(tmp_path, classes={"clip_benchmark": "imagenet1k"})).class_names()) == 1000
        with pytest.raises(MergeError, match=r"classes: clip-benchmark has none for 'cats'; it has .*gtsrb"):
            load_task(write(tmp_path, classes={"clip_benchmark": "cats"}))

    def test_names_of_the_dataset(self) -> None:
        task = parse_task(content(classes="dataset"), "cats")

        class Images:
            classes = ("tabby", "persian")

        assert task.classes is None
        assert task.class_names(Images()) == ("tabby", "persian")
        with pytest.raises(MergeError, match=r"me/cats does not name its classes; list them"):
            task.class_names(object())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"labels": []}, "unknown keys labels; expected dataset, classes"),
            ({"classes": None}, "classes missing"),
            ({"templates": None, "dataset": None}, "dataset, templates missing"),
            ({"classes": []}, "classes: expected a list of at least one text"),
            ({"classes": "cats"}, "classes: expected a list of at least one text, found 'cats'"),
            ({"classes": ["cat", "dog", "cat"]}, "classes: 'cat' is listed twice"),
            ({"classes": ["cat", 1]}, "classes: number 1: expected text, found 1; put it in quotes"),
            ({"classes": ["cat", True]}, "number 1: expected text, found True"),
            ({"classes": ["cat", " "]}, "number 1: it is empty"),
            ({"classes": {"clip_bench": "x"}}, r"classes: expected a list or \{clip_benchmark: NAME\}"),
            ({"templates": ["a {c}.", "a cat"]}, r"templates: 'a cat': expected \{c\} where"),
            ({"templates": ["a {}."]}, r"templates: 'a \{\}\.': expected \{c\}"),
            ({"templates": "a {c}."}, "templates: expected a list"),
            ({"test_images": -1}, "test_images: expected a positive integer or null, found -1"),
            ({"licence": 3}, "licence: expected text, found 3"),
            ({"dataset": "me/cats"}, "dataset: unknown 'me/cats'; expected keys"),
            ({"dataset": {"id": "me/cats", "split": "test"}}, "dataset: unknown split; expected keys"),
            ({"dataset": {"splits": {"test": "test"}}}, "dataset: expected id: ORG/NAME, or folder"),
            ({"dataset": {"id": "me/cats", "folder": "x"}}, "dataset: expected id: .* found id, folder"),
            ({"dataset": {"torchvision": "SVHN"}}, "dataset: expected id: .* found torchvision"),
            ({"dataset": {"id": "me/cats", "splits": {"train": "train"}}}, "splits: expected at least test"),
            ({"dataset": {"id": "me/cats", "splits": {"test": {"split": "x"}}}}, "splits: test: expected a name"),
            (
                {"dataset": {"torchvision": "SVHN", "folder": "x", "splits": {"test": "test"}}},
                "splits: test: expected the arguments of the class",
            ),
            ({"dataset": {"id": "me/cats", "label_offset": "1"}}, "label_offset: expected int, found '1'"),
            ({"dataset": {"id": 3}}, "dataset: id: expected str, found 3"),
        ],
    )
    def test_mistakes(self, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
        path = write(tmp_path, **changes)
        with pytest.raises(MergeError, match=message) as error:
            load_task(path)
        assert str(path) in str(error.value)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("classes: [a, b", "not a YAML file"),
            ("- a\n- b\n", "expected keys dataset, classes and templates, found list"),
            ("", "expected keys dataset, classes and templates, found NoneType"),
            ("classes: [a]\nclasses: [b]\n", "key classes is given twice"),
            ("dataset: {id: a/b, id: c/d}\n", "key id is given twice"),
            ("!!python/object/apply:os.system ['touch ran']", "not a YAML file"),
        ],
    )
    def test_files_that_are_none(self, tmp_path: Path, text: str, message: str) -> None:
        path = tmp_path / "own.yaml"
        path.write_text(text)
        with pytest.raises(MergeError, match=message):
            load_task(path)
        assert not Path("ran").exists()

    @pytest.mark.parametrize(
        ("name", "message"),
        [("stanford_cars", "did you mean stanford-cars"), ("zzz", "bundled are sun397"), ("no/such.yaml", "neither")],
    )
    def test_unknown(self, name: str, message: str) -> None:
        with pytest.raises(MergeError, match=message):
            load_task(name)


def test_a_task_is_plain_data() -> None:
    assert isinstance(load_task("mnist"), Task)
    with pytest.raises(AttributeError):
        load_task("mnist").name = "x"  # type: ignore[misc]
