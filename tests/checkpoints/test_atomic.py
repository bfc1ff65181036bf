"""A file is there whole, or as it was before."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lit_merge.checkpoints import atomic_path, cache_root, write_json


def write(path: Path, text: str) -> None:
    """Write at once."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def test_missing_folders_are_made() -> None:
    write(Path("a/b/c.txt"), "1")
    assert Path("a/b/c.txt").read_text() == "1"
    assert [p.name for p in Path("a/b").iterdir()] == ["c.txt"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_the_old_file_and_nothing_else(error: type[BaseException]) -> None:
    path = Path("c.txt")
    write(path, "old")

    def half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("ne")
            raise error("stop")

    with pytest.raises(error):
        half()
    assert path.read_text() == "old"
    assert list(Path().iterdir()) == [path]


def test_until_the_end_there_is_the_old_file() -> None:
    path = Path("c.txt")
    write(path, "old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent
    assert path.read_text() == "new"


def test_a_block_that_writes_nothing() -> None:
    with pytest.raises(FileNotFoundError), atomic_path("c.txt"):
        pass
    assert list(Path().iterdir()) == []


def test_writers_at_the_same_time() -> None:
    path = Path("c.txt")
    texts = [str(n) * 50_000 for n in range(8)]
    threads = [threading.Thread(target=write, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert list(Path().iterdir()) == [path]


def test_json_that_is_not_finite_leaves_the_old_file() -> None:
    path = Path("report.json")
    write_json(path, {"accuracy": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"accuracy": float("nan")})
    assert path.read_text() == '{\n  "accuracy": 0.5\n}\n'
    assert list(Path().iterdir()) == [path]


class TestCacheRoot:
    def test_order(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("LIT_MERGE_CACHE", "/from-variable")
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        assert cache_root("/given") == Path("/given")
        assert cache_root() == Path("/from-variable")
        monkeypatch.delenv("LIT_MERGE_CACHE")
        assert cache_root() == Path("/xdg/lit-merge")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_root() == Path.home() / ".cache/lit-merge"

    def test_home_is_expanded(self) -> None:
        assert cache_root("~/here") == Path.home() / "here"
