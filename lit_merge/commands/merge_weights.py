"""``lit-merge merge --base … --experts …``: merge folders of safetensors, of any network and any size."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from jsonargparse.typing import restricted_string_type

from lit_merge.checkpoints.atomic import atomic_path
from lit_merge.checkpoints.export import write_card
from lit_merge.checkpoints.model_card import model_card
from lit_merge.checkpoints.reading import read_state
from lit_merge.encoders.json_files import read_json
from lit_merge.errors import MergeError
from lit_merge.module import MergeModule
from lit_merge.parsing import MergeParser
from lit_merge.provenance import described, versions
from lit_merge.streaming import PieceReader, check_weights_suffice, stream_merge, why_not_streamed
from lit_merge.suites.weights import WeightsSuite

__all__ = ("main",)

_OWN = ("base", "experts", "method", "output", "buffers", "shard_size", "overwrite", "progress", "config", "help",
        "print_config")  # fmt: skip
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB)?$", re.IGNORECASE)
_Size = restricted_string_type("Size", _SIZE, "A number of bytes such as 500MB or 5GB.")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# what goes with the weights: configs, tokenizer, templates; no code, no weights, nothing that is not a model's
_BESIDE = ("config.json", "*_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
           "merges.txt", "*.model", "*.tiktoken", "*.jinja", "chat_template*")  # fmt: skip
_NOT_BESIDE = ("*.py", "*.safetensors", "*.bin")
_STATISTICS = ("running_mean", "running_var")


def main(args: list[str]) -> None:
    """Merge base and experts into a folder.

    Arguments that are not of the command are those of the method: ``--scale 0.3`` is ``--method.scale 0.3``.

    Args:
        args: Arguments, without ``merge``.

    Raises:
        MergeError: Weights do not fit together, the method learns, or there are weights in the folder already.
        SystemExit: Status 2 for wrong usage, 0 for help.
    """
    parser = MergeParser(
        prog="lit-merge merge",
        allow_abbrev=False,
        description="Merge safetensors of any network, piece by piece where the method allows: no network is run, and "
        "none is whole in memory. Config and tokenizer of the base are copied beside the weights, so that transformers "
        "loads the folder. Other options are those of the method, which --method.help NAME lists. An example: "
        "lit-merge merge --base DIR --experts DIR code=DIR --method Ties --density 0.2 --output DIR",
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with these options.")
    parser.add_argument("--base", type=str, required=True, help="File, folder or repository ORG/NAME of the hub.")
    parser.add_argument("--experts", type=str, nargs="+", required=True, help="The same, as many as there are; "
                        "NAME=... gives one a name.")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, help="Folder for the merged weights.")
    parser.add_argument("--buffers", type=str, nargs="*", default=[], help="Names of running statistics, which are "
                        "averaged; those of batch normalisation are known.")  # fmt: skip
    parser.add_argument("--shard_size", type=_Size, default="5GB", help="Most bytes of a file, such as 500MB.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace weights in the folder.")
    parser.add_argument("--progress", type=bool, default=True, help="Show progress bars.")
    parser.add_subclass_arguments(MergeModule, "method", required=True, skip={"objective"}, fail_untyped=False)
    parser.link_arguments(("base", "experts"), "method.init_args.suite", compute_fn=_suite_config, apply_on="parse")
    config = parser.parse_args(_of_method(args))
    model: MergeModule = parser.instantiate_classes(config).method
    check_weights_suffice(model)
    suite = model.suite
    assert isinstance(suite, WeightsSuite)
    if (taken := next((name for name in suite.folders if _same(name, config.output)), None)) is not None:
        raise MergeError(f"output: {config.output} is the folder of {taken}, which is merged; give another one")
    if (reason := why_not_streamed(model)) is not None:
        sys.stderr.write(f"merging in memory, not piece by piece: {reason}\n")
    base = suite.base()
    reader = PieceReader(
        base,
        {task: suite.expert(task) for task in suite.tasks},
        buffers={*config.buffers, *(name for name in base if name.rpartition(".")[2] in _STATISTICS)},
        dtype=model.bank_dtype,
        progress=config.progress,
    )
    facts = {
        "schema": 1,
        "method": type(model).__name__,
        "suite": suite.name,
        **described(model),
        "sources": suite.sources(),
        "versions": versions(),
        "config": parser.dump(config, skip_link_targets=True),
    }
    path = stream_merge(
        model, reader, config.output, facts, shard_bytes=_bytes(config.shard_size), overwrite=config.overwrite
    )
    write_card(path.parent, model_card(read_json(path.parent / "merge.json")))
    copied = _copy_beside(suite.folder, Path(config.output), overwrite=config.overwrite)
    with_them = f", with {', '.join(copied)} of the base" if copied else ""
    sys.stdout.write(f"merged network: {path} ({len(read_state(path))} tensors{with_them})\n")


def _suite_config(base: str, experts: list[str]) -> dict[str, object]:
    return {"class_path": "lit_merge.suites.WeightsSuite", "init_args": {"base": base, "experts": experts}}


def _of_method(args: Sequence[str]) -> list[str]:
    """Say of options that are not the command's that they are the method's."""
    found = []
    for text in args:
        name = text[2:].partition("=")[0].partition(".")[0]
        mine = not text.startswith("--") or name.removesuffix("+") in _OWN
        found.append(text if mine else f"--method.{text[2:]}")
    return found


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text)
    assert found is not None  # as the parser has seen
    return int(float(found[1]) * _UNITS[(found[2] or "B").upper()])


def _same(folder: Path, other: Path) -> bool:
    return folder.resolve() == Path(other).resolve()


def _copy_beside(source: Path, target: Path, *, overwrite: bool) -> list[str]:
    """Copy configs and tokenizer of the base; a file that is there stays unless weights were replaced too."""
    copied = []
    for path in sorted(source.iterdir()):
        chosen = _fits(path.name, _BESIDE) and not _fits(path.name, _NOT_BESIDE)
        if chosen and path.is_file() and (overwrite or not (target / path.name).exists()):
            with atomic_path(target / path.name) as temporary:
                shutil.copyfile(path, temporary)
            copied.append(path.name)
    return copied


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
