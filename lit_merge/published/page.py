"""The golden-numbers page: all published tables with their sources and traps, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lit_merge.published.comparison import Block, Comparison
from lit_merge.published.facts import CHECKPOINTS, METHODS, NOTES, PROTOCOLS, SOURCES
from lit_merge.published.tables import PublishedRow, PublishedTable, published_tables

__all__ = ("comparison_page", "markdown_table", "page")

_INTRODUCTION = """\
# Golden numbers

What was published for merged CLIP image towers, in percent of all images of the test split. A run is put beside them by

    lit-merge compare runs/adamerging/version_0

Look at base and experts first: if those agree, then weights, activation, preprocessing, class names and prompts are
right, and only then does the average of a merge mean anything. Numbers of different checkpoints are not comparable;
normalised accuracy (accuracy / accuracy of the expert) is the next best thing.
"""


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], text: Iterable[str] = ()) -> str:
    """Return a Markdown table; the first column and those of ``text`` are left-aligned.

    >>> print(markdown_table(["task", "run"], [["mnist", "98.2"]]))
    | task | run |
    |---|--:|
    | mnist | 98.2 |
    """
    left = {columns[0], *text}
    rule = "|".join("---" if name in left else "--:" for name in columns)
    lines = [columns, *rows]
    cells = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([cells[0], f"|{rule}|", *cells[1:]])


def page() -> str:
    """Return the page."""
    tables = published_tables()
    used = [row for table in tables for row in table.rows]
    return "\n".join(
        [
            _INTRODUCTION,
            *(_section(table) for table in tables),
            "## Checkpoints\n",
            *(f"- **{key}**: {CHECKPOINTS[key]}" for key in CHECKPOINTS if key in {row.checkpoints for row in used}),
            "\n## Sources\n",
            *(
                f"- **{key}**: {source.title}"
                + (f", <{source.address}>" if source.address else "")
                + (f". {source.caveat[0].upper()}{source.caveat[1:]}" if source.caveat else "")
                for key, source in SOURCES.items()
            ),
            "\n## Methods\n",
            markdown_table(
                ("id", "name", "protocol", "paper"),
                [(m.id, m.name, m.protocol, f"arXiv {m.paper}" if m.paper else "") for m in METHODS.values()],
                ("name", "protocol", "paper"),
            ),
            "",
            *(f"- *{key}*: {meaning}" for key, meaning in PROTOCOLS.items()),
            "",
        ]
    )


def comparison_page(comparison: Comparison) -> str:
    """Return a comparison in Markdown."""
    parts = [f"# {comparison.title}\n"]
    parts += [f"## {block.title}\n\n{_block(block)}\n" for block in comparison.blocks]
    parts += ["## Sources\n", *(f"- {line}" for line in comparison.sources)]
    if comparison.caveats:
        parts += ["\n## Read this before comparing\n", *(f"- {line}." for line in comparison.caveats)]
    return "\n".join(parts) + "\n"


def _block(block: Block) -> str:
    return markdown_table(block.columns, block.rows, block.text)


def _section(table: PublishedTable) -> str:
    means = [key for key in ("mean", "seen_mean", "unseen_mean") if any(key in row.means for row in table.rows)]
    tasks = [task for task in table.tasks if any(task in row.accuracy for row in table.rows)]
    heads = [f"{task} (unseen)" if task in table.unseen else task for task in tasks]
    normalized = any(row.normalized for row in table.rows)
    columns = ["method", *heads, *(key.replace("_", " ") for key in means), *(["normalised"] if normalized else [])]
    rows = []
    for row in table.rows:
        values = [*(row.accuracy.get(task) for task in tasks), *(row.means.get(key) for key in means)]
        values += [row.normalized] if normalized else []
        rows.append([row.label, *_cells(values), row.checkpoints, row.source])
    parts = [f"## {table.suite}\n", markdown_table([*columns, *_ORIGIN], rows, _ORIGIN), *_notes(table.rows)]
    return "\n".join(parts) + "\n"


_ORIGIN = ("checkpoints", "source")


def _notes(rows: Iterable[PublishedRow]) -> list[str]:
    notes = dict.fromkeys(row.note for row in rows if row.note)
    return ["", *(f"> {NOTES[note][0].upper()}{NOTES[note][1:]}." for note in notes)] if notes else []


def _cells(values: Sequence[float | None]) -> list[str]:
    """With as many digits as the row was published with."""
    digits = 2 if any(value is not None and round(value, 1) != value for value in values) else 1
    return ["" if value is None else f"{value:.{digits}f}" for value in values]
