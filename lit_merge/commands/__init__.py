"""Commands besides those of the Trainer: each module has ``main(args)`` and is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

__all__ = ("COMMANDS", "run_command", "run_functions")

COMMANDS = {
    "finetune": "fine-tune an expert on one task of a suite",
    "audit": "look for backdoors in the experts of a suite before they are merged",
    "suite": "list, show and check the suites that come with lit-merge",
    "convert": "turn a pickled checkpoint into safetensors without executing it",
    "compare": "put the report of a run beside published numbers",
}
"""What each command is for; its code is the module of its name."""


def run_command(name: str, args: Sequence[str]) -> None:
    """Run one of :data:`COMMANDS`.

    Args:
        name: Its name.
        args: Its own arguments, without the name.
    """
    import_module(f"lit_merge.commands.{name}").main(list(args))


def run_functions(functions: Callable[..., Any] | dict[str, Callable[..., Any]], args: Sequence[str], prog: str) -> Any:  # noqa: ANN401 - what the function returns
    """Make a command line of annotated functions with Google-style docstrings, and run it.

    Args:
        functions: One function, or one per subcommand.
        args: Arguments of the command.
        prog: What the user types before them, such as ``lit-merge convert``.

    Returns:
        What the function returned.

    Raises:
        SystemExit: Status 2 for wrong usage.

    >>> def double(number: int) -> int:
    ...     return 2 * number
    >>> run_functions(double, ["21"], "double")
    42
    """
    from jsonargparse import auto_cli

    from lit_merge.parsing import MergeParser

    about = COMMANDS.get(prog.split()[-1], "")
    components: Any = functions  # jsonargparse's own type is recursive
    return auto_cli(
        components, args=list(args), parser_class=MergeParser, prog=prog, allow_abbrev=False, description=about
    )
