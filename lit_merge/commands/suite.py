"""``lit-merge suite``: which suites there are, what one would download, and whether it holds together."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Column, Table

from lit_merge import configs
from lit_merge.errors import MergeError
from lit_merge.parsing import MergeParser, hint_config
from lit_merge.suites import Suite
from lit_merge.suites._mini_images import CLASSES
from lit_merge.suites.checking import Finding, check_suite

__all__ = ("load_suite", "main", "overlays", "show_size")

_HELP = """\
usage: lit-merge suite list
       lit-merge suite show  NAME [--suite.ARGUMENT VALUE ...]
       lit-merge suite check NAME [--suite.ARGUMENT VALUE ...] [--batch_size 32]

  list   the suites that come with lit-merge
  show   what a suite is made of: sources, sizes where known, licences, what is on this disk; fetches nothing
  check  everything loads, label counts agree with heads, one batch goes through every expert; fetches what is missing

NAME is that of a bundled suite (clip-vit-b-32-8), or a YAML file with a key `suite`. Arguments of the suite can be
given, such as --suite.root DIRECTORY for copies of the repositories on disk.
"""


def main(args: list[str]) -> None:
    """Run ``lit-merge suite``.

    Args:
        args: ``list``, or ``show`` or ``check`` with a name and arguments of the suite.

    Raises:
        MergeError: The check found something wrong.
        SystemExit: Status 2 for wrong usage, 0 for help.
    """
    action, *rest = args or ["--help"]
    if action in ("-h", "--help") or any(option in rest for option in ("-h", "--help")):
        sys.stdout.write(_HELP)
        raise SystemExit(0)
    if action == "list" and not rest:
        _list()
    elif action == "show" and rest:
        suite, _ = load_suite(rest[0], rest[1:], prog=f"lit-merge suite show {rest[0]}")
        _show(suite)
    elif action == "check" and rest:
        suite, batch_size = load_suite(rest[0], rest[1:], prog=f"lit-merge suite check {rest[0]}")
        _check(suite, batch_size)
    else:
        sys.stderr.write(f"{_HELP}error: expected list, show NAME or check NAME, found {' '.join(args)!r}\n")
        raise SystemExit(2)


def overlays() -> list[str]:
    """Return the names of the bundled suites.

    >>> "clip-vit-b-32-8" in overlays()
    True
    """
    found = (Path(name) for name in configs.names())
    return [path.stem for path in found if path.parent.name == "suites"]


def load_suite(name: str, args: list[str], prog: str) -> tuple[Suite, int]:
    """Make the suite of a config, with further arguments from the command line.

    Args:
        name: Bundled suite, or YAML file with a key ``suite``.
        args: Such as ``--suite.root DIRECTORY``.
        prog: What the user typed before them.

    Returns:
        The suite, which has read nothing yet, and the batch size of a check.

    Raises:
        MergeError: There is no such suite, or the file has no key ``suite``.
        SystemExit: Status 2 for a wrong argument.
    """
    content = _content(name)
    parser = MergeParser(prog=prog, allow_abbrev=False)
    parser.add_subclass_arguments(Suite, "suite", required=True, fail_untyped=False)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.set_defaults({"suite": content["suite"]})
    config = parser.parse_args(args)
    made: Suite = parser.instantiate_classes(config).suite
    return made, config.batch_size


def _content(name: str) -> dict[str, Any]:
    path = Path(name) if Path(name).is_file() else configs.find(f"suites/{name}") or configs.find(name)
    if path is None:
        raise MergeError(f"{name}: no such suite{hint_config(f'suites/{name}')}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MergeError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or "suite" not in content:
        raise MergeError(f"{path}: expected a config with a key suite, found {sorted(content or {})}")
    return content


def _list() -> None:
    table = Table("suite", "tasks", "what it is", box=None)
    for name in overlays():
        path = configs.find(f"suites/{name}")
        assert path is not None
        text = path.read_text()
        arguments = yaml.safe_load(text)["suite"]["init_args"]
        count = str(len(arguments.get("tasks", CLASSES))) + (
            f" + {len(arguments['unseen'])}" if "unseen" in arguments else ""
        )
        table.add_row(name, count, text.splitlines()[0].removeprefix("# "))
    table.add_row("(default)", "7", "The embedded suite MiniSuite: built on the spot, nothing is downloaded.")
    Console().print(table)


def _show(suite: Suite) -> None:
    Console().print(f"{suite.name}: {len(suite.tasks)} tasks: {', '.join(suite.tasks)}", highlight=False)
    if suite.unseen:
        Console().print(f"scored but not merged: {', '.join(suite.unseen)}", highlight=False)
    pieces = suite.inventory()
    if not pieces:
        Console().print("it says nothing about files: nothing is downloaded")
        return
    table = Table("what", "for", Column("where", overflow="fold"), "revision", "here", "size", "licence", box=None)
    for piece in pieces:
        table.add_row(
            piece.kind, piece.name, piece.where, (piece.revision or "")[:8], "yes" if piece.here else "no",
            show_size(piece.size), piece.licence,
        )  # fmt: skip
    Console().print(table)
    missing = [piece for piece in pieces if not piece.here]
    known = sum(piece.size or 0 for piece in missing)
    unknown = sum(piece.size is None for piece in missing)
    rest = f", and {unknown} of unknown size" if unknown else ""
    Console().print(
        f"to fetch: {len(missing)} of {len(pieces)}: {show_size(known)}{rest}" if missing else "everything is here",
        highlight=False,
    )
    for note in dict.fromkeys(piece.note for piece in pieces if piece.note):
        Console().print(note, highlight=False)


def show_size(size: int | None) -> str:
    """Write a number of bytes in decimal units.

    >>> show_size(349_825_024), show_size(0), show_size(None)
    ('350 MB', '0 B', 'unknown')
    """
    if size is None:
        return "unknown"
    value, units = float(size), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def _check(suite: Suite, batch_size: int) -> None:
    table = Table("task", "images", "classes", "expert", "base", "|τ|/|θ0|", "")
    findings = []
    for found in check_suite(suite, batch_size):
        findings.append(found)
        table.add_row(*_row(found))
    Console().print(table)
    wrong = [found for found in findings if found.error]
    if wrong:
        raise MergeError("\n       ".join([f"{suite.name}: {len(wrong)} of {len(findings)} do not hold:"]
                                           + [f"{found.task}: {found.error}" for found in wrong]))  # fmt: skip
    Console().print(f"{suite.name}: all {len(findings)} tasks hold; the shares are of one batch, no measurement")


def _row(found: Finding) -> list[str]:
    if found.error:
        return [found.task, "", "", "", "", "", "wrong"]
    shares = ["-" if share is None else f"{100 * share:.0f} %" for share in (found.expert_hits, found.base_hits)]
    distance = "-" if found.distance is None else f"{found.distance:.2g}"
    return [found.task, str(found.images), str(found.classes), *shares, distance, "ok"]
