"""A suite of nothing but weights: what a data-free merge of any network needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn

from lit_merge.checkpoints.adapters import is_adapter
from lit_merge.checkpoints.sources import Source, weights_file
from lit_merge.errors import MergeError
from lit_merge.suites.base import LabelledDataset, Split, Suite

__all__ = ("WeightsSuite",)


class WeightsSuite(Suite):
    """Base and experts as safetensors, of any architecture: no network, no heads, no images.

    It can be merged by data-free methods, tensor by tensor where the rule allows, but neither run nor scored.

    Args:
        base: File, folder, repository of the hub, see :class:`~lit_merge.checkpoints.sources.Source`.
        experts: The same per task; or a list, whose names are those of the folders. An adapter of PEFT is merged into
            the base.

    Raises:
        MergeError: There is no expert, or two have one name; later, a file is not safetensors or not usable.

    >>> WeightsSuite("base", ["models/maths", "code=models/starcoder"]).tasks
    ('maths', 'code')
    """

    def __init__(self, base: str, experts: dict[str, str] | list[str]) -> None:
        self._base = Source(base)
        self._experts = {task: Source(spec) for task, spec in _named(experts).items()}
        self._opened: Mapping[str, Tensor] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(self._experts)

    def sources(self) -> dict[str, Any]:
        """Where base and experts come from, and which revisions of the hub they are."""
        every = {"base": self._base, **self._experts}
        return {name: {"source": source.spec, "revision": source.revision()} for name, source in every.items()}

    @property
    def folder(self) -> Path:
        """Folder of the base, with its config and tokenizer."""
        return self.folders[0]

    @property
    def folders(self) -> list[Path]:
        """Folders of base and experts."""
        paths = [source.path() for source in (self._base, *self._experts.values())]
        return [path if path.is_dir() else path.parent for path in paths]

    def base(self) -> Mapping[str, Tensor]:
        """Open the base; tensors are read when they are asked for."""
        if self._opened is None:
            self._opened = self._open(self._base)
        return self._opened

    def expert(self, task: str) -> Mapping[str, Tensor]:
        """Open an expert."""
        source = self._experts[self.check_task(task)]
        if is_adapter(source.path()):
            return source.state(self.base(), self._base.names)
        return self._open(source)

    def _open(self, source: Source) -> Mapping[str, Tensor]:
        path = weights_file(source.path())
        if path.suffix != ".safetensors" and not path.name.endswith(".safetensors.index.json"):
            raise MergeError(f"{path}: expected safetensors, found a torch file; `lit-merge convert {path} "
                             "NEW.safetensors` turns it into one, without running it")  # fmt: skip
        return source.state()

    def network(self) -> nn.Module:
        """Refuse: weights alone cannot be run."""
        self._refuse()

    def head(self, task: str) -> nn.Module:
        """Refuse: there are none."""
        self._refuse()

    def num_classes(self, task: str) -> int:
        """Refuse: there are none."""
        self._refuse()

    def dataset(self, task: str, split: Split) -> LabelledDataset:
        """Refuse: there are none."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise MergeError("these are weights without a network, heads and images: they can be merged, but not run; give "
                         "a suite that has them, such as NetworkSuite")  # fmt: skip


def _named(experts: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    if isinstance(experts, Mapping):
        pairs = list(experts.items())
    else:
        pairs = []
        for text in experts:
            name, given, spec = text.partition("=")
            pairs.append((name, spec) if given else (_name_of(text), text))
    if not pairs:
        raise MergeError("experts: expected at least one, found none")
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise MergeError(f"experts: two are called {twice!r}; give names, as in maths=models/v2/maths")
    return dict(pairs)


def _name_of(spec: str) -> str:
    path = Path(spec.partition("@")[0])
    return path.name.removesuffix(".safetensors.index.json").removesuffix(".safetensors") or spec
