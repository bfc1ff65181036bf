"""The parser of all commands: bundled configs by bare name, and errors of one line with a suggestion."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser

from lit_merge import configs
from lit_merge.hints import hint, shortened

__all__ = ("BundledConfigFile", "MergeParser", "hint_config")


class BundledConfigFile(ActionConfigFile):
    """``--config`` that falls back to the configs that come with the package."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:  # noqa: ANN401
        """Parse a config; a file in the current folder wins over a bundled one."""
        if isinstance(values, str) and not _exists(values):
            found = configs.find(values)
            if found is None and "\n" not in values and "{" not in values:
                parser.error(f"--config: no file {values!r}, and no bundled config of that name{hint_config(values)}")
            values = values if found is None else str(found)
        elif isinstance(values, str):
            try:
                yaml.safe_load(Path(values).read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
                parser.error(f"--config: {values}: not a YAML file ({' '.join(str(error).split())})")
        super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # a config that is given in place is too long for a name
        return False


def hint_config(name: str) -> str:
    """Suggest bundled configs of a similar name, or list them."""
    from difflib import get_close_matches

    close = get_close_matches(name.removesuffix(".yaml"), [n.removesuffix(".yaml") for n in configs.names()], n=3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; there are {', '.join(configs.names())}"


class MergeParser(LightningArgumentParser):
    """A parser whose errors are one line with a suggestion."""

    def print_usage(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Print nothing: a Trainer's usage is sixty lines, and the error would drown in it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2, and with a suggestion where one can be found."""
        message = shortened(message)
        super().error(message + hint(message), ex)
        raise SystemExit(2)
