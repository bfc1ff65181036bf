"""Where networks come from: disk, a mirror, the hub, open_clip's tags."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_hub import COMMIT, Hub, fake_hub
from safetensors.torch import save_file
from torch import Tensor

from lit_merge.checkpoints._peft_config import LoraConfig
from lit_merge.checkpoints.hub import hub_sizes
from lit_merge.checkpoints.sources import Source, parse_hub_id, weights_file
from lit_merge.errors import MergeError

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}


def same(found: Source) -> bool:
    """Whether the weights are those of ``STATE``."""
    state = found.state()
    return set(state) == set(STATE) and all(torch.equal(state[name], value) for name, value in STATE.items())


def folder(path: Path, weights: str = "model.safetensors", state: dict[str, Tensor] = STATE) -> Path:
    """A folder in Hugging Face's format."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text("{}")
    save_file(state, path / weights) if weights.endswith(".safetensors") else torch.save(state, path / weights)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with one repository in two formats."""
    constants = pytest.importorskip("huggingface_hub.constants")
    repo = folder(tmp_path / "hub/org/name")
    for spare in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"):
        (repo / spare).write_bytes(b"much")
    with fake_hub(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield server


class TestOnDisk:
    @pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors"])
    def test_a_folder(self, weights: str, tmp_path: Path) -> None:
        assert same(Source(str(folder(tmp_path / "net", weights))))

    @pytest.mark.parametrize("name", ["net.safetensors", "net.pt"])
    def test_a_file(self, name: str, tmp_path: Path) -> None:
        folder(tmp_path, name)
        assert same(Source(str(tmp_path / name)))
        assert same(Source(name, root=tmp_path))

    def test_safetensors_win_over_pickles(self, tmp_path: Path) -> None:
        here = folder(folder(tmp_path / "net"), "pytorch_model.bin", {"other": torch.zeros(1)})
        assert same(Source(str(here)))

    def test_of_both_kinds_in_a_repository_of_timm_a_tag_means_that_of_open_clip(self, tmp_path: Path) -> None:
        here = folder(folder(tmp_path / "net"), "open_clip_model.safetensors")
        assert weights_file(here).name == "model.safetensors"
        assert weights_file(here, open_clip=True).name == "open_clip_model.safetensors"

    def test_a_mirror_stands_for_the_hub_whatever_the_revision(self, tmp_path: Path) -> None:
        folder(tmp_path / "org/name")
        for spec in ("org/name", f"org/name@{COMMIT}"):
            found = Source(spec, root=tmp_path)
            assert same(found)
            assert found.names == ("name", str(tmp_path.resolve() / "org/name"))

    def test_a_path_into_the_hubs_cache_tells_the_repository(self, tmp_path: Path) -> None:
        here = folder(tmp_path / "models--openai--clip-vit-base-patch32/snapshots/0123abc")
        (tmp_path / "link").symlink_to(here)
        config = LoraConfig(tmp_path, "openai/clip-vit-base-patch32", 1, 1.0, {}, {}, False, False, False, (), ())
        for spec in (here, here / "model.safetensors", tmp_path / "link"):
            config.check_base(Source(str(spec)).names)
        with pytest.raises(MergeError, match="give the adapter's own base"):
            replace(config, base="openai/clip-vit-base-patch16").check_base(Source(str(here)).names)

    def test_a_mirror_stands_for_a_tag_of_open_clip(self, tmp_path: Path) -> None:
        folder(tmp_path / "timm/vit_base_patch32_clip_224.openai", "open_clip_model.safetensors")
        assert same(Source("open_clip:ViT-B-32-quickgelu/openai", root=tmp_path))

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("org/absent", r"org/absent: no such folder; with a root nothing is fetched"),
            ("absent.safetensors", r"absent\.safetensors: no such file or folder here or below"),
            ("./absent", "no such file or folder"),
            ("empty", "a folder without weights; expected one of model.safetensors"),
            ("open_clip:ViT-B-32/nonsense", "open_clip has no such weights; for ViT-B-32 it has openai"),
            ("open_clip:nonsense/openai", "it knows none for nonsense"),
        ],
    )
    def test_what_is_not_there_is_named(self, spec: str, message: str, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(MergeError, match=message):
            Source(spec, root=tmp_path).state()

    def test_a_hash_is_checked(self, tmp_path: Path) -> None:
        here = folder(tmp_path / "net")
        with pytest.raises(MergeError, match="sha256"):
            Source(str(here), sha256="sha256:" + "0" * 64).state()


class TestHub:
    def test_one_format_is_fetched_and_found_again_without_a_network(self, hub: Hub, tmp_path: Path) -> None:
        source = Source("org/name", cache_dir=tmp_path / "cache")
        assert source.local() is None
        assert same(source)
        assert sorted(hub.fetched) == ["config.json", "model.safetensors"]
        assert source.revision() == COMMIT
        shutil.rmtree(hub.folder / "org")
        hub.shutdown()
        hub.server_close()
        assert same(Source("org/name", cache_dir=tmp_path / "cache"))
        assert source.local() == tmp_path / f"cache/models--org--name/snapshots/{COMMIT}"

    def test_a_pinned_revision(self, hub: Hub, tmp_path: Path) -> None:
        assert same(Source(f"org/name@{COMMIT}", cache_dir=tmp_path))
        with pytest.raises(MergeError, match=r"org/name@1234567: the Hugging Face hub has no such model or revision"):
            Source("org/name@1234567", cache_dir=tmp_path).state()

    def test_sizes(self, hub: Hub) -> None:
        assert hub_sizes("org/name") == {p.name: p.stat().st_size for p in (hub.folder / "org/name").iterdir()}
        assert hub_sizes("org/none") is None

    def test_no_network_and_no_copy(self, hub: Hub, tmp_path: Path) -> None:
        hub.shutdown()
        hub.server_close()
        with pytest.raises(MergeError, match=r"org/name: the Hugging Face hub cannot be reached .* no copy"):
            Source("org/name", cache_dir=tmp_path).state()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("openai/clip-vit-base-patch32", ("openai/clip-vit-base-patch32", None)),
        ("timm/vit_base.openai@v1.0", ("timm/vit_base.openai", "v1.0")),
        ("one", None),
        ("a/b/c", None),
        ("../weights", None),
        ("weights/net.pt", None),
    ],
)
def test_what_is_a_repository(spec: str, expected: tuple[str, str | None] | None) -> None:
    assert parse_hub_id(spec) == expected
