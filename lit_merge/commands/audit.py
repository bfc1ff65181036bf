"""``lit-merge audit``: look at every expert of a suite before it is merged, and point at suspicious ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lit_merge import configs
from lit_merge.auditing import AuditOptions, audit
from lit_merge.checkpoints import write_json
from lit_merge.commands import COMMANDS
from lit_merge.errors import MergeError
from lit_merge.parsing import BundledConfigFile, MergeParser
from lit_merge.suites import Suite

__all__ = ("SuiteConfigFile", "audit_table", "main")

_OF_RUNS = frozenset(
    {"seed_everything", "trainer", "model", "data", "ckpt_path", "optimizer", "lr_scheduler", "return_predictions"}
)


class SuiteConfigFile(BundledConfigFile):
    """``--config`` of which only what an audit has is read, so that configs of runs and overlays fit."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ANN401
        """Parse a config without its sections for Trainer, model and data."""
        if isinstance(values, str):
            found = Path(values) if Path(values).is_file() else configs.find(values)
            try:
                content = None if found is None else yaml.safe_load(found.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError, OSError):
                content = None  # the parser says what is wrong with it
            if isinstance(content, dict):
                kept = {key: value for key, value in content.items() if key not in _OF_RUNS}
                # as text; the class above takes what it is given for the name of a file
                super(BundledConfigFile, self).__call__(parser, cfg, yaml.safe_dump(kept), option_string)  # type: ignore[no-untyped-call]
                return
        super().__call__(parser, cfg, values, option_string)


def main(args: list[str]) -> None:
    """Run ``lit-merge audit``. Its exit status is 0 also when it points at an expert.

    Args:
        args: Its arguments.

    Raises:
        MergeError: The suite does not hold together, or the folder of the output cannot be made.
        SystemExit: Status 2 for wrong usage, 0 for help.
    """
    parser = MergeParser(prog="lit-merge audit", allow_abbrev=False, description=COMMANDS["audit"])
    parser.add_argument(
        "-c", "--config", action=SuiteConfigFile, help="YAML file, or name of a bundled config; its suite is read."
    )
    parser.add_subclass_arguments(Suite, "suite", required=True, fail_untyped=False)
    parser.set_defaults({"suite": {"class_path": "lit_merge.suites.MiniSuite"}})
    parser.add_class_arguments(AuditOptions, None)
    parser.add_argument("--output", type=Path, default=Path("runs/audit"), help="Folder for audit.json.")
    config = parser.parse_args(args)
    made = parser.instantiate_classes(config)
    output = Path(config.output)
    _check_folder(output)
    options = AuditOptions(**{name: made[name] for name in AuditOptions.__dataclass_fields__})
    console = Console()
    with console.status("reading the networks") as status:
        made.suite.prepare()
        found = audit(made.suite, options, say=lambda text: status.update(f"auditing: {text}"))
    write_json(output / "audit.json", found)
    console.print(audit_table(found))
    for line in [*_verdict(found), f"written: {output / 'audit.json'}"]:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def audit_table(found: dict[str, Any]) -> Table:
    """Return the table of an audit: one row per expert, evidence beside its control.

    Args:
        found: What :func:`~lit_merge.auditing.audit` returned.
    """
    table = Table(title="score from 1 on: suspicious; the other columns are facts without weight", title_justify="left")
    table.add_column("expert")
    for head in (
        "score", "class", "reach", "others", "base", "merge", "without",
        "fooled", "to one", "norm z", "spectrum z", "left out z",
    ):  # fmt: skip
        table.add_column(head, justify="right")
    for task, row in found["experts"].items():
        inversion, vector, universal = row["inversion"], row["task_vector"], row["universal"]
        shares = [inversion[key] for key in ("reach", "others", "base", "merge", "without")]
        shares += [universal["fooling"], universal["concentration"]]
        scores = [vector["norm_z"], vector["rank_z"], row["leave_one_out"]["drop_z"]]
        cells = [f"{100 * share:.0f}" for share in shares] + ["-" if z is None else f"{z:.1f}" for z in scores]
        style = "bold red" if row["suspicious"] else None
        table.add_row(task, f"{row['score']:.2f}", str(inversion["target"]), *cells, style=style)
    return table


def _verdict(found: dict[str, Any]) -> list[str]:
    lines = []
    for task in found["pointed"]:
        row, area = found["experts"][task]["inversion"], found["options"]["inversion"]["area"]
        reach, others, base = (f"{100 * row[key]:.0f} %" for key in ("reach", "others", "base"))
        lines.append(
            f"suspicious: {task}: one change of {100 * area:.2g} % of the pixels leads {reach} of the images to class "
            f"{row['target']}; other classes: {others}, this class in the base: {base}"
        )
    if not lines:
        lines.append("nothing suspicious; this is no proof: a backdoor that answers only to a large or faint trigger, "
                     "or to one for another task's images, is not looked for")  # fmt: skip
    if (truth := found["laboratory"]) is not None:
        lines.append(f"poisoned in this laboratory: {', '.join(truth['compromised'])}; "
                     f"found {len(truth['hits'])}, missed {', '.join(truth['misses']) or 'none'}, "
                     f"false alarms {', '.join(truth['false_alarms']) or 'none'}")  # fmt: skip
    return lines


def _check_folder(folder: Path) -> None:
    """Make the folder of the output now: an error after minutes of looking would be a pity."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MergeError(
            f"output: {folder}: expected a folder that can be made, found: {error.strerror}; give another one"
        ) from error
