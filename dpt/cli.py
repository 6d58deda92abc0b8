"""The command `dpt`: a table of subcommands, each in a module of its own that is imported when it is asked for."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

USAGE, INTERRUPTED = 2, 130  # exit codes; a subcommand's own are 0, all done, and 1, something failed


class CommandError(Exception):
    """Ends a subcommand with a message, no traceback, and an exit code."""

    def __init__(self, message: str, code: int = USAGE):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Command:
    """`module`, beside this one, has `add_arguments(parser)` and `run(args) -> int`, the exit code."""

    module: str
    summary: str


COMMANDS = {
    "predict": Command("predict_command", "depth and label maps of pictures"),
    "demo": Command("demo", "the same for the pictures that come with the package"),
    "info": Command("info", "the named models, or what a checkpoint file holds"),
    "render": Command("render_command", "the scenes that the carried models learn from"),
    "train": Command("train", "train a model on a folder of pictures"),
    "evaluate": Command("evaluate", "measure a model on a folder of pictures"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dpt` with `argv` (default: the process's own); returns the exit code. argparse exits by itself on --help and bad usage.

    ValueError and OSError, whose messages name the value and the rule, end a subcommand like CommandError.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="dpt", description="Dense Prediction Transformers: depth and segmentation from one picture.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {name: subparsers.add_parser(name, help=command.summary) for name, command in COMMANDS.items()}
    name = argv[0] if argv and argv[0] in COMMANDS else None
    if name is None:
        parser.parse_args(argv)  # only ends the program: --help, or the names there are
        return USAGE
    module = import_module(f".{COMMANDS[name].module}", __package__)
    parsers[name].description = module.__doc__
    parsers[name].formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parsers[name])
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about damaged metadata, without the picture's name
    try:
        return module.run(args)
    except (CommandError, ValueError, OSError) as error:
        print(f"dpt {name}: {error}", file=sys.stderr)
        return error.code if isinstance(error, CommandError) else USAGE
    except KeyboardInterrupt:
        print(f"dpt {name}: interrupted", file=sys.stderr)
        return INTERRUPTED
