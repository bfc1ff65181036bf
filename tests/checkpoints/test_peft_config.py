"""Patterns in the options of an adapter mean what they mean in peft, and none of them takes for ever."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lit_merge.checkpoints._peft_config import LoraConfig, read_config
from lit_merge.errors import MergeError

LAYERS = ["layers.10.q_proj", "m.layers.3.q_proj", "m.layers.3.k_proj", "q_proj"]
NAMES = ["mlp.0", "a.mlp.0", "amlp.0", "mlpx0", *LAYERS, "xx", ""]


def config(folder: Path, option: str, *patterns: str) -> LoraConfig:
    """Read options with rank or alpha 3 for these patterns, and 2 for everything else."""
    options = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, option: dict.fromkeys(patterns, 3)}
    (folder / "adapter_config.json").write_text(json.dumps(options))
    return read_config(folder)


@pytest.mark.parametrize(
    "pattern",
    [
        *("mlp.0", r"mlp\.0", "0", "^mlp.0", "^m.layers.3.q_proj", r".*\.q_proj", r"layers\.\d+\..*proj", "[qk]_proj"),
        *(
            r"layers\.(3|1\d)\.(?:q|k)_proj",
            "a?mlp.0",
            "(a.)?mlp.0",
            "(m.)??layers.*",
            "[^m]+",
            "mlp.0$",
            "q|k_proj",
            "",
        ),
        *(r"x+", "x+?", r"[\d.]+", "(^m|a).*", "((q_|k_)(proj|x)|0)"),
    ],
)
def test_patterns_match_what_they_match_in_peft(tmp_path: Path, pattern: str) -> None:
    ranks, alphas = config(tmp_path, "rank_pattern", pattern), config(tmp_path, "alpha_pattern", pattern)
    for name in NAMES:
        matches = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert ranks.rank_of(name) == (3 if matches else 2), name
        assert alphas.scale_of(name) == (1.5 if matches else 1), name


def test_no_pattern_takes_for_ever(tmp_path: Path) -> None:
    found = config(tmp_path, "rank_pattern", ".*" * 90 + "X", "a?" * 90 + "X", "(a|a)" * 39 + "X", "(a|a)?" * 33 + "X")
    assert found.rank_of("a." * 100 + "a" * 300) == 2
    with pytest.raises(MergeError, match="a module's name of 501 characters"):
        found.rank_of("a" * 501)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["([a-z_.0-9]+)+X"], "found '([a-z_.0-9]+)+X': '+X' is not among what is known here; give the modules' names"),
        (["(a*)*b"], "'*b' is not"),
        (["(?=a)b"], "is not among"),
        (["a{1,9}"], r"'{1,9}' is not"),
        ([r"(a)\1"], "is not among"),
        (["a" * 201], "201 characters, more than 200"),
        (["("], "not a regular expression"),
        ([str(number) for number in range(4097)], "expected at most 4096 patterns, found 4097"),
    ],
)
def test_refuses_patterns_that_it_does_not_know(tmp_path: Path, option: str, patterns: list[str], says: str) -> None:
    with pytest.raises(MergeError, match=rf"adapter_config\.json: {option}: .*{re.escape(says)}"):
        config(tmp_path, option, *patterns)
