"""What ``adapter_config.json`` of PEFT says, and whether it is plain LoRA."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lit_merge.errors import MergeError

__all__ = ("CONFIG_NAME", "LoraConfig", "read_config")

CONFIG_NAME = "adapter_config.json"
# options that are read here, or that only say how the adapter was trained; any other one must be off
_USED = (
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("fan_in_fan_out", "bias", "lora_bias", "modules_to_save", "init_lora_weights", "peft_version"),
)
_HARMLESS = (
    *("auto_mapping", "corda_config", "eva_config", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "lora_dropout", "lora_ga_config", "megatron_core", "qalora_group_size", "revision"),
    *("target_modules", "task_type"),
)
# every other start (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA ...) subtracts something from the base before training
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_INSTEAD = "merge it with peft (merge_and_unload) and give the merged weights"
_MOST_PATTERNS, _LONGEST_PATTERN, _LONGEST_MODULE = 4096, 200, 500
# what patterns are made of; there is no token for repeated groups, counts, look-around and back-references
_TOKEN = re.compile(
    r"(?P<one>\[\^?(?:[^\[\]\\]|\\[.dw-])+\]|\\[.dDwW-]|[^\\()\[\]{}|*+?^$])(?P<times>[*+?]?\??)"
    r"|(?P<open>\((?:\?:)?)|(?P<close>\)(?P<optional>\??)\??)|(?P<either>\|)|(?P<place>[\^$])"
)


@dataclass(frozen=True)
class LoraConfig:
    """The options of plain LoRA.

    Attributes:
        path: The file.
        base: Name or path of the base, or empty.
        rank: Rank of modules that ``ranks`` does not name.
        alpha: Numerator of the scale of modules that ``alphas`` does not name.
        ranks: Rank per regular expression, matched at the end of a module's name.
        alphas: The same for alpha.
        stabilised: The scale is alpha / √r instead of alpha / r (arXiv 2312.03732).
        transposed: Weights of linear layers are ``(in, out)``.
        biases: Biases were trained along.
        saved: Ends of the names of whole modules that were trained along.
        version: Major and minor version of PEFT, or nothing.
    """

    path: Path
    base: str
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    stabilised: bool
    transposed: bool
    biases: bool
    saved: tuple[str, ...]
    version: tuple[int, ...]

    def rank_of(self, module: str) -> int:
        """Rank of a module."""
        return self.ranks[key] if (key := self._matching(self.ranks, module)) is not None else self.rank

    def scale_of(self, module: str) -> float:
        """Factor of B·A in a module."""
        key, rank = self._matching(self.alphas, module), self.rank_of(module)
        alpha = self.alpha if key is None else self.alphas[key]
        return alpha / (math.sqrt(rank) if self.stabilised else rank)

    def _matching(self, patterns: Mapping[str, object], module: str) -> str | None:
        """Return the first pattern that matches the end of a module's name, as PEFT does."""
        if patterns and len(module) > _LONGEST_MODULE:
            raise MergeError(
                f"{self.path}: a module's name of {len(module)} characters, {module[:40]}…; expected at most "
                f"{_LONGEST_MODULE} beside rank_pattern or alpha_pattern; {_INSTEAD}"
            )
        starts = {0, *(at + 1 for at, letter in enumerate(module) if letter == ".")}
        return next((key for key in patterns if len(module) in _matcher(key)(module, starts)), None)

    def check_base(self, base_names: Collection[str]) -> None:
        """Refuse an adapter that names another base.

        Raises:
            MergeError: Both sides have names, and their last parts differ.
        """
        known = {_last_part(name) for name in base_names if name}
        if self.base and known and _last_part(self.base) not in known:
            raise MergeError(
                f"{self.path}: an adapter of {self.base!r}, and the base here is {' or '.join(map(repr, base_names))}; "
                "give the adapter's own base, or, if both are the same network, correct base_model_name_or_path"
            )


def read_config(folder: Path) -> LoraConfig:
    """Read and check the options of an adapter.

    Args:
        folder: The folder with ``adapter_config.json``.

    Raises:
        MergeError: The file is missing or damaged, an option is not usable, or the adapter is not plain LoRA.
    """
    path = folder / CONFIG_NAME
    options = _read(path)
    _check_plain(path, options)
    saved = options.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) and name for name in saved):
        raise MergeError(f"{path}: modules_to_save: expected names of modules, found {saved!r}")
    if (bias := options.get("bias") or "none") not in ("none", "all", "lora_only"):
        raise MergeError(f"{path}: bias: expected none, all or lora_only, found {bias!r}")
    return LoraConfig(
        path=path,
        base=str(options.get("base_model_name_or_path") or ""),
        rank=_integer(path, "r", options.get("r")),
        alpha=_number(path, "lora_alpha", options.get("lora_alpha")),
        ranks={key: _integer(path, key, value) for key, value in _pattern(path, "rank_pattern", options).items()},
        alphas={key: _number(path, key, value) for key, value in _pattern(path, "alpha_pattern", options).items()},
        stabilised=bool(options.get("use_rslora")),
        transposed=bool(options.get("fan_in_fan_out")),
        biases=bias != "none",
        saved=tuple(saved),
        version=tuple(int(number) for number in re.findall(r"\d+", str(options.get("peft_version") or ""))[:2]),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MergeError(f"{path}: no such file; expected an adapter in PEFT's format") from error
    except (OSError, ValueError, RecursionError) as error:
        raise MergeError(f"{path}: not readable as JSON ({error}); fetch or save the adapter again") from error
    if not isinstance(options, dict):
        raise MergeError(f"{path}: expected an object with options, found {type(options).__name__}")
    return options


def _check_plain(path: Path, options: Mapping[str, Any]) -> None:
    if (kind := options.get("peft_type")) != "LORA":
        raise MergeError(f"{path}: peft_type: expected LORA, found {kind!r}; {_INSTEAD}")
    for option, value in options.items():
        if value and option not in (*_USED, *_HARMLESS):
            shown = json.dumps(value)[:60]
            raise MergeError(f"{path}: {option}: {shown}: more than plain LoRA, which is all that is known; {_INSTEAD}")
    if (start := options.get("init_lora_weights")) not in _STARTS:
        raise MergeError(
            f"{path}: init_lora_weights: {start!r} changes the base before training, so the adapter does not fit the "
            "base itself; convert it with peft (save_pretrained with path_initial_model_for_weight_conversion)"
        )


def _pattern(path: Path, option: str, options: Mapping[str, Any]) -> dict[str, Any]:
    pattern = options.get(option) or {}
    if not isinstance(pattern, dict):
        raise MergeError(f"{path}: {option}: expected values by module, found {type(pattern).__name__}")
    if len(pattern) > _MOST_PATTERNS:
        raise MergeError(
            f"{path}: {option}: expected at most {_MOST_PATTERNS} patterns, found {len(pattern)}; {_INSTEAD}"
        )
    for key in pattern:
        try:
            _matcher(key)
        except re.error as error:
            raise MergeError(f"{path}: {option}: not a regular expression ({error})") from error
        except ValueError as error:
            raise MergeError(
                f"{path}: {option}: expected names of modules or simple regular expressions, found {key[:60]!r}: "
                f"{error}; give the modules' names"
            ) from error
    return pattern


def _number(path: Path, option: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise MergeError(
            f"{path}: {option}: expected a positive number, found {value!r}; it gives the change its scale"
        )
    return float(value)


def _integer(path: Path, option: str, value: object) -> int:
    if (number := _number(path, option, value)) != int(number):
        raise MergeError(f"{path}: {option}: expected a whole number, found {value!r}; it is a rank")
    return int(number)


# from a text and the places where a match may start to the places where it may end
_Matcher = Callable[[str, set[int]], set[int]]


@lru_cache(maxsize=2 * _MOST_PATTERNS)
def _matcher(pattern: str) -> _Matcher:
    """Read a regular expression, in a form whose time is linear in the text: ``re`` can be made to run for ever.

    Raises:
        ValueError: It is too long or has parts that are not known here.
        re.error: It is not a regular expression.
    """
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(f"{len(pattern)} characters, more than {_LONGEST_PATTERN}")
    re.compile(pattern)  # only known to be one
    tokens, at = list[re.Match[str]](), 0
    while at < len(pattern):
        if (token := _TOKEN.match(pattern, at)) is None:
            raise ValueError(f"{pattern[at : at + 8]!r} is not among what is known here")
        tokens.append(token)
        at = token.end()
    return _alternatives(iter(tokens))


def _alternatives(tokens: Iterator[re.Match[str]]) -> _Matcher:
    """Read up to the end of the group, or of all."""
    branches, optional = list[list[_Matcher]]([[]]), False
    for token in tokens:
        if token["close"]:
            optional = bool(token["optional"])
            break
        if token["either"]:
            branches.append([])
        elif token["open"]:
            branches[-1].append(_alternatives(tokens))
        elif token["place"]:
            branches[-1].append(_start if token["place"] == "^" else _end)
        else:
            branches[-1].append(_letters(token["one"], token["times"][:1]))

    def matcher(text: str, starts: set[int]) -> set[int]:
        ends = set(starts) if optional else set()
        for branch in branches:
            places = starts
            for step in branch:
                places = step(text, places)
            ends |= places
        return ends

    return matcher


def _letters(one: str, times: str) -> _Matcher:
    """One letter, or with ``*``, ``+`` or ``?`` several."""
    fits = re.compile(one).fullmatch

    def matcher(text: str, starts: set[int]) -> set[int]:
        after = {at + 1 for at in starts if at < len(text) and fits(text[at])}
        if times in ("*", "+") and after:
            for at in range(min(after), len(text)):
                if at in after and fits(text[at]):
                    after.add(at + 1)
        return after | starts if times in ("*", "?") else after

    return matcher


def _start(text: str, starts: set[int]) -> set[int]:
    return starts & {0}


def _end(text: str, starts: set[int]) -> set[int]:
    return starts & {len(text)}


def _last_part(name: str) -> str:
    """Last part of an id or path; of a folder in the hub's cache, the name of its repository."""
    path = name.replace("\\", "/").rstrip("/")
    cached = re.search(r"models--[^/]+?--([^/]+)", path)
    return cached[1] if cached else path.rpartition("/")[2]
