"""The bundled CLIP suites on a local mirror of tiny twins, through the configs with only path overrides."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import refused, report
from fake_hub import fake_hub
from safetensors.torch import load_file, save_file

from lit_merge import configs
from lit_merge.cli import main
from lit_merge.commands.suite import overlays, show_size
from lit_merge.errors import MergeError
from lit_merge.suites import ClipSuite
from lit_merge.suites.checking import check_suite
from lit_merge.suites.task_files import load_task

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from mirror import BASE, EXPERT, VISION, write_images, write_mirror

EIGHT = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, eight experts and eight image sets under the names of the hub."""
    return write_mirror(tmp_path_factory.mktemp("mirror"), EIGHT)


@pytest.fixture(autouse=True)
def _cache(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are made once for the whole module."""
    monkeypatch.setenv("LIT_MERGE_CACHE", str(mirror / "cache"))


def suite(mirror: Path, **changes: Any) -> ClipSuite:
    """Two tasks of the mirror."""
    given: dict[str, Any] = {"base": BASE, "experts": EXPERT, "tasks": ["mnist", "eurosat"], "root": mirror}
    return ClipSuite(**(given | changes))


def pictures(seed: int = 0) -> torch.Tensor:
    """Noise of the twins' size."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


class TestTheBundledConfigs:
    @pytest.fixture(scope="class")
    @classmethod
    def run(cls, mirror: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The folder of a fit with nothing but the root overridden, and fewer steps."""
        where = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(where)
            patch.setenv("LIT_MERGE_CACHE", str(mirror / "cache"))
            overlay = ["--config", "suites/clip-vit-b-32-8.yaml", f"--suite.root={mirror}"]
            few = ["--trainer.max_epochs=1", "--data.steps_per_epoch=3", "--data.batch_size=2"]
            main(["fit", "--config", "adamerging.yaml", *overlay, *few, *QUIET])
            main(["export", "--config", "adamerging.yaml", *overlay, *few, *QUIET, "--ckpt_path=last",
                  "--format=hugging_face", "--output=hf"])  # fmt: skip
        return where

    def test_end_to_end(self, run: Path, mirror: Path) -> None:
        found = report(run / "runs/adamerging/version_0")
        assert found["suite"] == "clip-vit-b-32-8"
        assert list(found["tasks"]) == list(EIGHT)
        assert found["extra"]["steps"] == 3
        assert {row["n"] for row in found["tasks"].values()} == {6}
        facts = json.loads((run / "runs/adamerging/version_0/export/merge.json").read_text())
        assert facts["sources"]["svhn"]["source"] == "tanganke/clip-vit-base-patch32_svhn"
        card = (run / "runs/adamerging/version_0/export/README.md").read_text()
        assert "tanganke/clip-vit-base-patch32_svhn" in card
        assert "| sun397" in card

    def test_transformers_loads_the_export(self, run: Path) -> None:
        from transformers import CLIPVisionModel

        model, info = CLIPVisionModel.from_pretrained(run / "hf", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        merged = load_file(run / "runs/adamerging/version_0/export/merged.safetensors")
        ours = {name.removeprefix("vision_model."): value for name, value in merged.items()}
        theirs = {name.removeprefix("vision_model."): value for name, value in model.state_dict().items()}
        assert set(ours) == set(theirs)
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())

    @pytest.mark.parametrize("name", [name for name in overlays() if name.startswith("clip")])
    def test_every_overlay_is_complete(self, name: str) -> None:
        path = configs.find(f"suites/{name}")
        assert path is not None
        content = yaml.safe_load(path.read_text())
        assert set(content) == {"suite"}
        made = ClipSuite(**content["suite"]["init_args"])
        assert content["suite"]["init_args"]["name"] == name
        if count := re.fullmatch(r"clip-vit-[bl]-\d\d-(\d+)", name):
            assert len(made.tasks) == int(count[1])
        assert re.search(r"@[0-9a-f]{40}$", content["suite"]["init_args"]["base"])
        assert all(made.expert_source(task).spec.endswith(f"_{task}") for task in made.scored)
        assert all(made.num_classes(task) == len(load_task(task).classes or ()) for task in made.scored)

    def test_unseen_tasks_are_scored_and_never_adapted_on(self, mirror: Path) -> None:
        args = ["--config", "suites/clip-vit-b-32-unseen-1", f"--suite.root={mirror}", *QUIET]
        few = ["--trainer.max_epochs=1", "--data.steps_per_epoch=1", "--data.batch_size=2"]
        cli = main(["fit", "--config", "adamerging-task", *args, *few])
        assert cli is not None
        found = report("runs/adamerging-task/version_0")
        assert set(found["extra"]["unseen"]["tasks"]) == {"mnist", "eurosat"}
        assert "expert_accuracy" in found["extra"]["unseen"]["mean"]
        assert not {"mnist", "eurosat"} & set(found["tasks"])
        seen = set(EIGHT) - {"mnist", "eurosat"}
        assert set(next(iter(cli.datamodule.train_dataloader()))) == seen
        assert cli.model.coefficients.shape == (6, 1)

    def test_robustness(self, mirror: Path) -> None:
        args = ["--config", "suites/clip-vit-b-32-robustness", f"--suite.root={mirror}", "--suite.severity=5", *QUIET]
        main(["merge", "--config", "simple-average", *args])
        assert report("runs/simple-average/version_0")["suite"] == "clip-vit-b-32-robustness-gaussian_noise"


class TestCommand:
    def test_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(["suite", "list"])
        said = capsys.readouterr().out
        assert all(name in said for name in overlays())

    def test_show_and_check(self, mirror: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main(["suite", "show", "clip-vit-b-32-8", f"--suite.root={mirror}"])
        assert "everything is here" in capsys.readouterr().out
        main(["suite", "check", "clip-vit-b-32-8", f"--suite.root={mirror}"])
        assert "all 8 tasks hold" in capsys.readouterr().out

    def test_show_fetches_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main(["suite", "show", "clip-vit-b-32-8", f"--suite.root={tmp_path}"])
        said = " ".join(capsys.readouterr().out.split())
        assert "to fetch: 17 of 17" in said
        assert list(tmp_path.iterdir()) == []

    def test_show_asks_the_hub_for_sizes(
        self, mirror: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path("nothing").absolute()))
        monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", Path("nothing").absolute())
        args = ["suite", "show", "clip-vit-b-32-8", f"--suite.base={BASE}", "--suite.tasks=[mnist]"]
        with fake_hub(mirror) as hub:
            monkeypatch.setattr(constants, "ENDPOINT", hub.url)
            main(args)
            assert hub.fetched == []
        said = " ".join(capsys.readouterr().out.split())
        expert = show_size((mirror / EXPERT.format(task="mnist") / "model.safetensors").stat().st_size)
        assert re.search(rf"expert mnist tanganke/clip-vit-base-patch32_mnist newest no {expert}", said)
        assert "to fetch: 3 of 3" in said
        assert "of unknown size" not in said
        main(args)  # nobody answers any more
        assert "3 of unknown size" in " ".join(capsys.readouterr().out.split())

    def test_a_check_names_everything_that_is_wrong(self, mirror: Path, capsys: pytest.CaptureFixture[str]) -> None:
        broken = Path("broken")
        for repo in (BASE, *(EXPERT.format(task=task) for task in ("mnist", "svhn")), "ylecun/mnist"):
            shutil.copytree(mirror / repo, broken / repo)
        write_images(broken / "ufldl-stanford/svhn", "gtsrb")  # 43 classes
        Path("mine.yaml").write_text(
            yaml.safe_dump({"suite": {"class_path": "ClipSuite", "init_args": {
                "base": BASE, "experts": EXPERT, "tasks": ["mnist", "svhn", "dtd"], "root": str(broken)}}})
        )  # fmt: skip
        weights = broken / EXPERT.format(task="mnist") / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-5])
        said = refused(capsys, "suite", "check", "mine.yaml", status=1)
        assert "3 of 3 do not hold" in said
        assert re.search(r"mnist: .*model\.safetensors: .*complete", said)
        assert re.search(r"svhn: .*43 classes.*head has 10", said)
        assert re.search(r"dtd: .*tanganke/dtd: no such folder", said)

    @pytest.mark.parametrize(
        ("args", "status", "message"),
        [
            (("nonsense",), 2, "expected list, show NAME or check NAME"),
            (("show", "clip-vit-b-32-9"), 1, "no such suite; did you mean suites/clip-vit-b-32"),
            (("show", "clip-vit-b-32-8", "--suite.limits=3"), 2, "did you mean limit?"),
            (("show", "wandb.yaml"), 1, "expected a config with a key suite"),
        ],
    )
    def test_wrong_usage(
        self, args: tuple[str, ...], status: int, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert message in refused(capsys, "suite", *args, status=status)


class TestOnesOwnFiles:
    def test_paths_instead_of_repositories(self, mirror: Path) -> None:
        one = suite(mirror)
        two = suite(
            mirror,
            root=None,
            base=str(mirror / BASE),
            experts=str(mirror / EXPERT),
            data={"mnist": str(mirror / "ylecun/mnist"), "eurosat": str(mirror / "tanganke/eurosat")},
        )
        for task in one.tasks:
            assert all(torch.equal(value, two.expert(task)[name]) for name, value in one.expert(task).items())
            assert torch.equal(one.dataset(task, "test")[1][0], two.dataset(task, "train")[1][0]) is False
            assert torch.equal(one.dataset(task, "test")[1][0], two.dataset(task, "test")[1][0])
            assert torch.equal(one.head(task)(torch.ones(1, 16)), two.head(task)(torch.ones(1, 16)))

    def test_an_adapter_is_an_expert(self, mirror: Path) -> None:
        peft = pytest.importorskip("peft")
        from transformers import CLIPVisionModel

        base = CLIPVisionModel.from_pretrained(mirror / BASE)
        base.config._name_or_path = BASE
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = peft.get_peft_model(base, config)
        model.peft_config["default"].base_model_name_or_path = BASE
        model.save_pretrained("adapter")
        merged = model.merge_and_unload().state_dict()
        made = suite(mirror, experts={"mnist": "adapter", "eurosat": EXPERT.format(task="eurosat")})
        for name, value in made.expert("mnist").items():
            torch.testing.assert_close(value, merged[name.removeprefix("vision_model.")], rtol=1e-5, atol=1e-6)
        config_file = Path("adapter/adapter_config.json")
        config_file.write_text(config_file.read_text().replace(BASE, "openai/clip-vit-large-patch14"))
        with pytest.raises(MergeError, match="clip-vit-large-patch14"):
            dict(made.expert("mnist"))

    def test_both_libraries_see_the_same(self, mirror: Path) -> None:
        import open_clip

        arch = {
            "embed_dim": 16, "quick_gelu": True,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16,
                           "mlp_ratio": 2.0},
            "text_cfg": {"context_length": 77, "vocab_size": 514, "width": 32, "heads": 2, "layers": 1},
        }  # fmt: skip
        for name, quick in (("tiny-twin-quickgelu", True), ("tiny-twin", False)):
            Path(f"{name}.json").write_text(json.dumps(arch | {"quick_gelu": quick}))
            open_clip.add_model_config(Path(f"{name}.json"))
        hugging_face, other = suite(mirror), suite(mirror, encoder="open_clip:tiny-twin-quickgelu")
        assert "visual.proj" in other.base()
        for expert in (None, "mnist"):
            features = []
            for made in (hugging_face, other):
                network = made.network().eval()
                network.load_state_dict(dict(made.base() if expert is None else made.expert(expert)))
                features.append(network(pictures()))
            torch.testing.assert_close(features[0], features[1], rtol=1e-5, atol=1e-5)
        with pytest.raises(MergeError, match=r"quick_gelu.*use tiny-twin-quickgelu"):
            suite(mirror, encoder="open_clip:tiny-twin").network()

    def test_a_limit_spreads_evenly(self, mirror: Path) -> None:
        few, all_ = (suite(mirror, limit=limit).dataset("mnist", "test") for limit in (3, None))
        assert [few[i][1] for i in range(len(few))] == [all_[i][1] for i in (0, 2, 4)]

    def test_corruption_changes_the_test_images_only(self, mirror: Path) -> None:
        clean, hurt = suite(mirror), suite(mirror, corruption="contrast", severity=5)
        assert hurt.name == "ClipSuite-contrast"
        assert not torch.equal(clean.dataset("mnist", "test")[0][0], hurt.dataset("mnist", "test")[0][0])
        assert torch.equal(clean.dataset("mnist", "train")[0][0], hurt.dataset("mnist", "train")[0][0])


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tasks": ["mnist", "mnist"]}, "named twice"),
            ({"tasks": []}, "expected at least one"),
            ({"tasks": ["mnst"]}, "did you mean mnist"),
            ({"experts": "one/name"}, r"expected \{task\} in 'one/name'"),
            ({"experts": {"mnist": "a/b"}}, "no expert for eurosat"),
            ({"experts": {"mnist": "a/b", "eurosat": "a/c", "dtd": "a/d"}}, r"unknown tasks \['dtd'\]"),
            ({"unseen": ["mnist"]}, "named twice"),
            ({"limit": 0}, "limit: expected at least 1"),
            ({"root": "absent"}, "absent: no such folder"),
            ({"corruption": "rain"}, "corruption: expected one of"),
        ],
    )
    def test_arguments(self, changes: dict[str, Any], message: str, mirror: Path) -> None:
        with pytest.raises(MergeError, match=message):
            suite(mirror, **changes)

    def test_a_wrong_hash(self, mirror: Path) -> None:
        with pytest.raises(MergeError, match="sha256"):
            suite(mirror, sha256={"mnist": "sha256:" + "0" * 64}).expert("mnist")

    def test_networks_of_another_size(self, mirror: Path) -> None:
        from transformers import CLIPVisionConfig, CLIPVisionModel

        CLIPVisionModel(CLIPVisionConfig(**{**VISION, "hidden_size": 64})).save_pretrained("wide")
        CLIPVisionModel(CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3})).save_pretrained("deep")
        made = suite(mirror, experts={"mnist": "wide", "eurosat": "deep"})
        errors = {found.task: found.error for found in check_suite(made)}
        assert "expected shape" in errors["mnist"]
        assert "extra" in errors["eurosat"]

    def test_an_expert_that_is_the_base(self, mirror: Path) -> None:
        made = suite(mirror, experts={"mnist": BASE, "eurosat": EXPERT.format(task="eurosat")})
        errors = {found.task: found.error for found in check_suite(made)}
        assert "is equal to the base" in errors["mnist"]
        assert errors["eurosat"] == ""

    def test_a_text_tower_that_would_be_lost(self, mirror: Path) -> None:
        state = load_file(mirror / BASE / "model.safetensors")
        save_file(state | {"text_projection.weight": state["text_projection.weight"] + 1}, "full.safetensors")
        made = suite(mirror, experts={"mnist": "full.safetensors", "eurosat": EXPERT.format(task="eurosat")})
        with pytest.raises(MergeError, match=r"full\.safetensors.*text_projection\.weight: its text tower differs"):
            made.expert("mnist")
        save_file(state | {"visual_projection.weight": state["visual_projection.weight"] + 1}, "full.safetensors")
        with pytest.raises(MergeError, match="its projection differs"):
            made.expert("mnist")
