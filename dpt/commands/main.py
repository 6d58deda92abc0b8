"""The command `dpt`: a table of subcommands. What one takes is in `arguments`; the module that does it is imported when it is to run."""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module

from .. import __version__
from ..rules import nearest
from ..system import endings
from . import arguments
from .arguments import Parser


@dataclass(frozen=True)
class Command:
    """The module of its name, beside this one, has `run(args) -> int`, the exit code.

    `environment` is set, where it is not, before PyTorch is loaded.
    """

    arguments: Callable[[Parser], None]
    summary: str
    environment: Mapping[str, str] = field(default_factory=dict)


COMMANDS = {
    "predict": Command(
        arguments.predict,
        "depth and label maps of pictures",
        {"OMP_WAIT_POLICY": "PASSIVE"},  # PyTorch's threads sleep while they wait, and those that decode and write have the cores
    ),
    "points": Command(arguments.points, "a picture as coloured points, or as a mesh"),
    "stereo": Command(arguments.stereo, "both eyes' views of a picture, or both in one for red and cyan glasses"),
    "serve": Command(arguments.serve, "a page and an HTTP endpoint that predict", {"OMP_WAIT_POLICY": "PASSIVE"}),
    "demo": Command(arguments.demo, "the same for the pictures that come with the package"),
    "info": Command(arguments.info, "the named models, or what a checkpoint file holds"),
    "convert": Command(arguments.convert, "a checkpoint in another layout"),
    "export": Command(arguments.export, "a model for other runtimes: ONNX, torch.export, AOTInductor"),
    "data": Command(arguments.data, "how data sets lie on the disk, and whether one does"),
    "render": Command(arguments.render, "the scenes that the carried models learn from"),
    "train": Command(arguments.train, "train a model by a recipe"),
    "evaluate": Command(arguments.evaluate, "measure a model on a data set"),
}


def overview() -> Parser:
    """The parser of `dpt` without a command, for --help and --version."""
    parser = Parser("dpt", description="Dense Prediction Transformers: depth and segmentation from one picture.")
    parser.add_argument("--version", action="version", version=f"dpt {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary)
    return parser


def parser_of(name: str) -> Parser:
    """The parser of a command's arguments."""
    command = COMMANDS[name]
    parser = Parser(f"dpt {name}", description=inspect.getdoc(command.arguments))
    command.arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dpt` with `argv` (default: the process's own); returns the exit code. argparse exits by itself on --help and bad usage.

    ValueError and OSError, whose messages name the value and the rule, end a subcommand like CommandError: `dpt.system.endings`.
    """
    given, argv = argv is not None, sys.argv[1:] if argv is None else list(argv)
    name = argv[0] if argv and argv[0] in COMMANDS else None
    return endings.run(f"dpt {name}" if name else "dpt", lambda: _run(argv), restore=given)


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else None
    if name not in COMMANDS:
        parser = overview()
        if name is not None and not name.startswith("-"):
            parser.error(f"no command is named {name!r}{nearest(name, COMMANDS)}; the commands are {', '.join(COMMANDS)}")
        parser.parse_args(argv)  # ends the program
        parser.error(f"the command comes first, not {name}")
    args = parser_of(name).parse_args(argv[1:])
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about damaged metadata, without the picture's name
    if "torch" not in sys.modules:
        os.environ.update({key: value for key, value in COMMANDS[name].environment.items() if key not in os.environ})
    code: int = import_module(f".{name}", __package__).run(args)
    return code
