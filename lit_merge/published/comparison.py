"""A run's report beside published numbers, as blocks of text that a terminal or a page can show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from lit_merge.errors import MergeError
from lit_merge.published.caveats import caveats
from lit_merge.published.facts import CHECKPOINTS, METHODS, PROTOCOLS, SOURCES
from lit_merge.published.runs import Run
from lit_merge.published.tables import PublishedRow, PublishedTable

__all__ = ("Block", "Comparison", "compare")

_REFERENCES = ("simple-average", "task-arithmetic", "ties", "adamerging")
_NETWORKS = {"pretrained": "base", "fine-tuned": "expert"}
_NOTHING = "-"


@dataclass(frozen=True)
class Block:
    """A table of text.

    Attributes:
        title: What it shows.
        columns: Heads; the first column has names.
        rows: Cells.
        text: Columns besides the first one that hold words and not numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A run beside published numbers.

    Attributes:
        title: Method, suite and protocol of the run.
        blocks: Tables.
        sources: Where the numbers come from, which networks were merged, and which images were seen.
        caveats: What keeps the numbers from being comparable.
    """

    title: str
    blocks: tuple[Block, ...]
    sources: tuple[str, ...]
    caveats: tuple[str, ...]


def compare(run: Run, table: PublishedTable, method: str | None = None) -> Comparison:
    """Put a run beside the rows of a table.

    Base and experts come first, since they tell whether loading, preprocessing and heads are right; then the run's own
    method, then methods that everybody compares with. Numbers are percent, differences are points, run − published.

    Args:
        run: The run.
        table: Published rows.
        method: Id of the method to compare with; by default that of the run.

    Raises:
        MergeError: Nothing was published for the method, or run and table have no task in common.
    """
    if not set(run.scores) & set(table.seen):
        raise MergeError(
            f"{run.path}: none of its tasks ({', '.join(run.scores)}) is one of {table.suite} ({', '.join(table.seen)})"
        )
    own = run.methods() if method is None else (_checked(method, table),)
    chosen = table.of(*own)
    others = tuple(row for row in table.of(*_REFERENCES) if row not in chosen)
    networks = table.of(*_NETWORKS)
    references = tuple(found[0] for name in _NETWORKS if (found := _plain(table, name)))
    listed = [row for row in table.rows if row in (*networks, *chosen, *others)]
    blocks = (
        _networks(run, table, references),
        _beside(run, table, chosen, "The run beside its method"),
        _beside(run, table, others, "The run beside other methods"),
        _averages(run, table, listed),
    )
    elsewhere = "" if table.suite == run.suite else f", beside {table.suite}"
    return Comparison(
        title=f"{run.method} on {run.suite} ({run.protocol}){elsewhere}",
        blocks=tuple(block for block in blocks if block is not None),
        sources=(*_sources(listed), "published accuracies: on all images of the test split"),
        caveats=caveats(run, table, chosen, others, references, guessed=method is None),
    )


def _checked(method: str, table: PublishedTable) -> str:
    if method not in table.methods:
        raise MergeError(
            f"--method: nothing was published for {method!r} on {table.suite}; there are {', '.join(table.methods)}"
        )
    return method


def _plain(table: PublishedTable, method: str) -> list[PublishedRow]:
    """Rows per task without a trap."""
    return [row for row in table.of(method, per_task=True) if not row.note]


def _networks(run: Run, table: PublishedTable, references: Sequence[PublishedRow]) -> Block | None:
    known = {score for scores in run.scores.values() for score in scores}
    rows = [row for row in references if f"{_NETWORKS[row.method]}_accuracy" in known]
    if not rows:
        return None  # nothing was published, or the run did not score them
    cells = []
    for label, tasks, key in _lines(run, table):
        line = [label]
        for row in rows:
            own, published = _own(run, tasks, f"{_NETWORKS[row.method]}_accuracy"), _mean(row, table, tasks, key)
            line += [_number(own), _number(published), _difference(own, published)]
        cells.append(tuple(line))
    columns = ("task", *(head for row in rows for head in (_NETWORKS[row.method], "published", "±")))
    return Block("Base and experts: are loading, preprocessing and heads right?", columns, tuple(cells))


def _beside(run: Run, table: PublishedTable, given: Sequence[PublishedRow], title: str) -> Block | None:
    rows = [row for row in given if row.accuracy]
    if not rows:
        return None
    cells = []
    for label, tasks, key in _lines(run, table):
        own = _own(run, tasks)
        cells.append((label, _number(own), *(_pair(own, _mean(row, table, tasks, key)) for row in rows)))
    columns = ("task", "run", *(row.label for row in rows))
    return Block(f"{title}: published, and how many points the run has more", columns, tuple(cells))


def _averages(run: Run, table: PublishedTable, rows: Sequence[PublishedRow]) -> Block:
    _, tasks, key = next(line for line in _lines(run, table) if line[2])
    own, numbers = _own(run, tasks), {source: f"[{i}]" for i, source in enumerate(_unique_sources(rows), 1)}
    cells = [("this run", _number(own, 2), _number(_ratio(run, tasks)), run.protocol, "its own", "")]
    for row in rows:
        ratio = row.normalized if _complete(table, tasks) else None
        cells.append(
            (
                row.label,
                _pair(own, _mean(row, table, tasks, key), digits=2),
                _number(_published_ratio(row, table, tasks) if ratio is None else ratio),
                METHODS[row.method].protocol,
                row.checkpoints,
                numbers[row.source],
            )
        )
    columns = ("method", "mean", "norm.", "protocol", "checkpoints", "from")
    title = f"Averages over {len(tasks)} {'seen ' if table.unseen else ''}tasks; norm. is accuracy / expert, in percent"
    return Block(title, columns, tuple(cells), text=("protocol", "checkpoints", "from"))


def _lines(run: Run, table: PublishedTable) -> list[tuple[str, list[str], str]]:
    """Label, tasks and, for means, the key of the published mean, of every line of a block."""
    parts = [("mean", "mean", table.tasks)]
    if table.unseen:
        parts = [("mean of seen", "seen_mean", table.seen), ("mean of unseen", "unseen_mean", table.unseen)]
    lines: list[tuple[str, list[str], str]] = []
    for label, key, tasks in parts:
        if common := [task for task in tasks if task in run.scores]:
            lines += [*((task, [task], "") for task in common), (label, common, key)]
    return lines


def _complete(table: PublishedTable, tasks: Sequence[str]) -> bool:
    return set(tasks) in (set(table.tasks), set(table.seen), set(table.unseen))


def _mean(row: PublishedRow, table: PublishedTable, tasks: Sequence[str], key: str) -> float | None:
    """The published mean if it is over the same tasks, else the mean over these tasks."""
    return row.means[key] if key in row.means and _complete(table, tasks) else row.mean_over(tasks)


def _own(run: Run, tasks: Iterable[str], score: str = "accuracy") -> float | None:
    values = [run.percent(task, score) for task in tasks]
    return None if None in values else fmean(value for value in values if value is not None)


def _ratio(run: Run, tasks: Sequence[str]) -> float | None:
    pairs = [(run.percent(task), run.percent(task, "expert_accuracy")) for task in tasks]
    ratios = [own / expert for own, expert in pairs if own is not None and expert]
    return 100 * fmean(ratios) if len(ratios) == len(pairs) else None


def _published_ratio(row: PublishedRow, table: PublishedTable, tasks: Sequence[str]) -> float | None:
    tuned = [other for other in _plain(table, "fine-tuned") if other.checkpoints == row.checkpoints]
    if not tuned or row.mean_over(tasks) is None or tuned[0].mean_over(tasks) is None:
        return None
    return 100 * fmean(row.accuracy[task] / tuned[0].accuracy[task] for task in tasks)


def _sources(rows: Sequence[PublishedRow]) -> Iterable[str]:
    for number, source in enumerate(_unique_sources(rows), 1):
        address = f", {SOURCES[source].address}" if SOURCES[source].address else ""
        yield f"[{number}] {SOURCES[source].title}{address}"
    for checkpoints in dict.fromkeys(row.checkpoints for row in rows):
        yield f"{checkpoints}: {CHECKPOINTS[checkpoints]}"
    for protocol in dict.fromkeys(METHODS[row.method].protocol for row in rows):
        yield f"{protocol}: {PROTOCOLS[protocol]}"


def _unique_sources(rows: Iterable[PublishedRow]) -> list[str]:
    return list(dict.fromkeys(row.source for row in rows))


def _number(value: float | None, digits: int = 1) -> str:
    return _NOTHING if value is None else f"{value:.{digits}f}"


def _difference(own: float | None, published: float | None) -> str:
    """Points with their sign; what rounds to zero has a plus."""
    return _NOTHING if own is None or published is None else f"{round(own - published, 1) + 0.0:+.1f}"


def _pair(own: float | None, published: float | None, digits: int = 1) -> str:
    return _NOTHING if published is None else f"{published:.{digits}f} {_difference(own, published):>5}"
