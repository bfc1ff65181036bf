"""What our own modules import, seen without the seconds that a new interpreter needs for torch and Lightning."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from kills import in_child


class Watch(MetaPathFinder):
    """Notes which packages are asked for, and says that they are missing."""

    def __init__(self, packages: Collection[str]) -> None:
        self.packages = packages
        self.asked: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if (package := fullname.partition(".")[0]) in self.packages:
            self.asked.add(package)
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return None


def asked_for(work: Callable[[], object], packages: Collection[str], folder: Path) -> set[str]:
    """Run ``work`` in a fork that has forgotten lit_merge and ``packages``; return those that it asks for."""

    def watched() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in {"lit_merge", *packages}]:
            del sys.modules[name]
        watch = Watch(packages)
        sys.meta_path.insert(0, watch)
        work()
        (folder / "asked").write_text(" ".join(watch.asked))

    assert in_child(watched) == 0
    return set((folder / "asked").read_text().split())
