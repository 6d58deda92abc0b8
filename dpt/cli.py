"""The command `dpt`: a table of subcommands, each in a module of its own that is imported when it is asked for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import NoReturn

from . import endings
from .endings import USAGE, CommandError

__all__ = ["COMMANDS", "Command", "CommandError", "main"]


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


class _Parser(argparse.ArgumentParser):
    """Shows arguments, which a shell's pattern may have made of any file name, as it shows names."""

    def error(self, message: str) -> NoReturn:
        super().error(endings.printable(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dpt` with `argv` (default: the process's own); returns the exit code. argparse exits by itself on --help and bad usage.

    ValueError and OSError, whose messages name the value and the rule, end a subcommand like CommandError; `dpt.endings` has the rest.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    name = arguments[0] if arguments and arguments[0] in COMMANDS else None
    return endings.run(f"dpt {name}" if name else "dpt", lambda: _run(name, arguments), restore=argv is not None)


def _run(name: str | None, argv: list[str]) -> int:
    parser = _Parser(prog="dpt", description="Dense Prediction Transformers: depth and segmentation from one picture.")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers = {name: subparsers.add_parser(name, help=command.summary) for name, command in COMMANDS.items()}
    if name is None:
        parser.parse_args(argv)  # only ends the program: --help, or the names there are
        return USAGE
    module = import_module(f".{COMMANDS[name].module}", __package__)
    parsers[name].description = module.__doc__
    parsers[name].formatter_class = argparse.RawDescriptionHelpFormatter
    module.add_arguments(parsers[name])
    return module.run(parser.parse_args(argv))
