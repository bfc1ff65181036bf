"""``lit-merge compare``: a run's report beside published numbers."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_merge.checkpoints.atomic import atomic_path
from lit_merge.errors import MergeError
from lit_merge.parsing import MergeParser
from lit_merge.published.comparison import Block, compare
from lit_merge.published.page import comparison_page, page
from lit_merge.published.runs import read_run
from lit_merge.published.tables import published_tables

__all__ = ("main",)

_DESCRIPTION = """\
Put the report of a run beside published numbers: base and experts first, then its own method, then the methods that
everybody compares with. It says which checkpoints, which protocol and which images the published numbers are of, and
what keeps them from being comparable.
"""


def main(args: list[str]) -> None:
    """Run ``lit-merge compare``.

    Args:
        args: The report and options.

    Raises:
        MergeError: The report is not usable, or nothing was published for its suite.
        SystemExit: Status 2 for wrong usage, 0 for help.
    """
    parser = MergeParser(prog="lit-merge compare", allow_abbrev=False, description=_DESCRIPTION)
    parser.add_argument("report", type=Path, nargs="?", help="report.json of a run, or the folder of the run.")
    parser.add_argument("--suite", type=str | None, help="Compare with this suite instead of the one in the report.")
    parser.add_argument("--method", type=str | None, help="Compare with this method instead of the run's own.")
    parser.add_argument("--output", type=Path | None, help="Write the comparison to this Markdown file, too.")
    parser.add_argument("--list", type=bool, nargs="?", const=True, default=False, help="List what there is instead.")
    parser.add_argument("--page", type=Path | None, help="Write all published tables to this Markdown file instead.")
    given = parser.parse_args(args)
    asked = [name for name in ("report", "list", "page") if given[name]]
    if len(asked) != 1:
        parser.error(f"expected one of REPORT, --list and --page FILE, found {' and '.join(asked) or 'none of them'}")
    if given.list:
        _list()
    elif given.page:
        _write(given.page, page())
    else:
        run = read_run(given.report)
        comparison = compare(run, run.table(given.suite), given.method)
        _say(comparison.title)
        for block in comparison.blocks:
            Console().print(_table(block))
        _say("\n".join(comparison.sources))
        if comparison.caveats:
            _say("Read this before comparing:\n" + "\n".join(f"- {caveat}." for caveat in comparison.caveats))
        if given.output:
            _write(given.output, comparison_page(comparison))


def _list() -> None:
    tables = published_tables()
    shown = Table(title="Published numbers", title_justify="left")
    shown.add_column("suite", min_width=max(len(table.suite) for table in tables))
    shown.add_column("tasks", justify="right")
    shown.add_column("methods")
    for table in tables:
        shown.add_row(table.suite, str(len(table.tasks)), ", ".join(table.methods))
    Console().print(shown)


def _table(block: Block) -> Table:
    table = Table(title=escape(block.title), title_justify="left")
    for index, column in enumerate(block.columns):
        words = index == 0 or column in block.text
        # a long head or name of a method may take several lines, a number may not
        width = max(len(row[index]) for row in block.rows) if index or column == "task" else None
        table.add_column(escape(column), justify="left" if words else "right", min_width=width)
    for row in block.rows:
        if row[0].startswith("mean"):
            table.add_section()
        table.add_row(*(escape(cell) for cell in row), end_section=row[0].startswith(("mean", "this run")))
    return table


def _say(text: str) -> None:
    Console().print(text, soft_wrap=True, highlight=False, markup=False)


def _write(path: Path, text: str) -> None:
    if path.is_dir():
        raise MergeError(f"{path}: a folder; expected the name of a Markdown file")
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    _say(f"written: {path}")
