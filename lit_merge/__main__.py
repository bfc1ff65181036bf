"""Entry point; what can be answered without importing torch is answered at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ("main",)

_HELP = """\
usage: lit-merge [-h] [--version] {{fit,validate,test,predict,merge,export,{names}}} ...

Merge fine-tuned networks at test time.

  fit       adapt a merge on unlabelled test images, evaluate and export it
  merge     merge with a data-free method, evaluate and export it
  test      evaluate a merge beside the base and the experts
  validate  the same through the validation hooks
  predict   predict with a merge
  export    write a learned merge as plain weights
{commands}

The first six take --config with a YAML file or the name of a bundled config, any number of times; later ones win:
  {configs}

Try   lit-merge fit --config adamerging.yaml
      lit-merge fit --help
      lit-merge fit --config adamerging.yaml --print_config=skip_default

Weights of any network, merged piece by piece without running it:
  lit-merge merge --base DIR --experts DIR DIR ... --method Ties --scale 1.0 --output DIR

Errors end with status 2 (usage) or 1 (run time); --debug shows the traceback.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments; by default those of the process.
    """
    given = list(sys.argv[1:] if args is None else args)
    if given in (["--version"], ["-V"]):
        from lit_merge import __version__

        sys.stdout.write(f"lit-merge {__version__}\n")
    elif not given or given in (["-h"], ["--help"]):
        from lit_merge.commands import COMMANDS
        from lit_merge.configs import names

        more = "\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items())
        sys.stdout.write(_HELP.format(configs=" ".join(names()), names=",".join(COMMANDS), commands=more))
    else:
        from lit_merge.cli import main as run

        run(args if args is None else given)


if __name__ == "__main__":
    main()
