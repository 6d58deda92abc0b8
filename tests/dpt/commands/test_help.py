"""What the command line says of itself, and of mistakes."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest
import torch

import dpt
from dpt.commands import arguments, info, main
from dpt.data import targets
from dpt.evaluation.metrics import MAX_DEPTH
from dpt.inference import options
from dpt.inference.points import EDGE, FOV
from dpt.inference.stereo import DISPARITY
from dpt.training.recipes import RECIPES
from dpt.training.runs import PARALLEL
from dpt.zoo import CONFIGS

ROOT = Path(__file__).parents[3]
ACTIONS = [(name, action) for name in main.COMMANDS for action in main.parser_of(name)._actions]
METAVARS = set("SRC DST WHAT INPUT DIR FILE NAME DEVICE N PIXELS SCALE UNITS METRES RECIPE NAME=VALUE".split())
METAVARS |= set("PICTURE PNG DEGREES SHARE FX,FY,CX,CY NEAR,FAR ADDRESS PORT HEIGHT,WIDTH".split())
NO_VALUE = (argparse._HelpAction, argparse._VersionAction, argparse._StoreTrueAction, argparse._AppendConstAction)


def help_of(command: str, dest: str) -> str:
    """An action's help, as it is printed."""
    parser = main.parser_of(command)
    action = next(action for action in parser._actions if action.dest == dest)
    return parser._get_formatter()._expand_help(action)


def refused(*argv: str, capsys) -> str:
    """The one line that a mistake is answered with."""
    with pytest.raises(SystemExit) as ended:
        main.main(argv)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_everything_is_described():
    """Blind spot: an option without a word, or whose default is to be guessed; two names for one kind of value."""
    metavars: dict[str, set] = {}
    for command, action in ACTIONS:
        where = f"dpt {command} {action.option_strings or action.dest}"
        assert action.help and len(action.help) > 8, where
        optional = not action.required and (action.option_strings or action.nargs == "?")
        if optional and not isinstance(action, NO_VALUE):
            assert "default" in action.help and help_of(command, action.dest), where
        if action.nargs != 0 and action.choices is None:
            assert action.metavar, where
            names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
            assert METAVARS.issuperset(names), where
            metavars.setdefault(action.dest, set()).add(action.metavar)
    assert {dest: found for dest, found in metavars.items() if len(found) > 1} == {}
    for name in main.COMMANDS:
        assert main.parser_of(name).description
    assert all(name in main.overview().format_help() for name in main.COMMANDS)


def test_defaults_that_are_told_in_words_are_the_codes():
    """Blind spot: a default that was changed, and its description not."""
    assert set(arguments.CARRIED) == {name for name, config in CONFIGS.items() if str(config.source).startswith("weights/")}
    assert set(arguments.CARRIED) <= {recipe.model for recipe in RECIPES.values()} and all(
        name in help_of("train", "recipe") for name in RECIPES
    )
    for command in ("train", "evaluate"):
        assert f"or {targets.DEPTH_SCALE:g})" in help_of(command, "depth_scale")
    assert f"or {MAX_DEPTH:g})" in help_of("evaluate", "max_depth")
    (action,) = (action for action in main.parser_of("train")._actions if action.dest == "parallel")
    assert tuple(action.choices) == PARALLEL
    defaults = {(command, action.dest): action.default for command, action in ACTIONS}
    assert defaults["points", "threshold"] == EDGE and defaults["stereo", "disparity"] == DISPARITY
    assert f"or {FOV:g})" in help_of("points", "fov")
    assert len(options.TTA_SCALES) == 6 and "six scales" in help_of("predict", "tta")
    assert all(name in help_of("predict", "model") for name in arguments.CARRIED)
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in arguments.DTYPES)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["pedict"], "dpt: no command is named 'pedict' (did you mean 'predict'?); the commands are predict, points, stereo, "),
        ([], "dpt: the following arguments are required: COMMAND; see dpt --help"),
        (["xyzzy"], "dpt: no command is named 'xyzzy'; the commands are"),
        (["--bogus"], "dpt: no option is named '--bogus'; see dpt --help"),
        (["predict", "a", "--outt", "b"], "dpt predict: no option is named '--outt' (did you mean '--out'?); see dpt predict --help"),
        (["predict", "a", "-o", "b", "--devcie=cpu"], "no option is named '--devcie' (did you mean '--device'?)"),
        (["predict", "a", "-o", "b", "--over"], "no option is named '--over' (did you mean '--overwrite'?)"),  # no abbreviations
        (["train", "--no-fats"], "no option is named '--no-fats' (did you mean '--no-fast'?)"),
        (
            ["predict", "a", "-o", "b", "--model", "dpt-tiny-dept"],
            "no model is named 'dpt-tiny-dept' (did you mean 'dpt-tiny-depth'?)",
        ),
        (
            ["train", "ade20k-160", "--data", "a"],
            "dpt train: argument RECIPE: no recipe is named 'ade20k-160' (did you mean 'ade20k-160k'?)",
        ),
        (["evaluate", "dpt-base", "--data", "a"], "(did you mean 'dpt-base-ade20k'?)"),
        (["evaluate", "--data", "a"], "dpt evaluate: it needs NAME, a model, or --weights FILE"),
        (["predict", "a", "-o", "b", "--batch-size", "0"], "argument --batch-size: '0': it must be a whole number from 1"),
        (["train", "scenes", "--workers", "-1"], "argument --workers: '-1': it must be a whole number from 0"),
        (["evaluate", "--max-depth", "inf"], "argument --max-depth: 'inf': it must be a number above 0"),
        (["render", "-o", "a", "--size", "big"], "argument --size: 'big': it must be a whole number from 1"),
    ],
)
def test_mistakes_are_answered_in_a_line_that_helps(argv, said, capsys):
    """Blind spot: the usage and "invalid choice"; a required option that is missed, where it was mistyped; 0 divided by later."""
    assert said in refused(*argv, capsys=capsys)


def test_an_unknown_model_is_told_alike_everywhere(capsys):
    """Blind spot: a second table of names, without the hint."""
    with pytest.raises(ValueError) as caught:
        dpt.zoo.config_of("dpt-tiny-dept")
    said = str(caught.value)
    assert "did you mean 'dpt-tiny-depth'" in said
    with pytest.raises(ValueError, match=re.escape(said)):
        dpt.build("dpt-tiny-dept")
    assert said in refused("predict", "a", "-o", "b", "--model", "dpt-tiny-dept", capsys=capsys)
    assert said in refused("evaluate", "dpt-tiny-dept", "--data", "a", capsys=capsys)


def test_what_looks_like_an_option_and_is_none():
    """Blind spot: file names refused. argparse takes a name with a space for one, and all that stands behind --."""
    for argv in (["--my picture.jpg", "-o", "out"], ["-o", "out", "--", "--my picture.jpg"], ["-o", "out", "--", "--picture.jpg"]):
        assert main.parser_of("predict").parse_args(argv).inputs == [argv[0] if argv[0] != "-o" else argv[-1]]


def commands_of(file: str) -> list[str]:
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ").replace("$(RUN) -m dpt ", "dpt ")
    return re.findall(r"^\s*(dpt [a-z].*)$", text, re.MULTILINE)


@pytest.mark.parametrize(("file", "least"), [("README.md", 6), ("Makefile", 5)])
def test_commands_that_are_written_down_parse(file, least):
    """Blind spot: a line of the README, or of the Makefile, with an option that was renamed."""
    found = commands_of(file)
    assert len(found) >= least
    for line in found:
        name, *argv = shlex.split(line, comments=True)[1:]
        main.parser_of(name).parse_args(argv)


def test_the_list_of_models(capsys):
    """Blind spot: a model that is not listed, or a number of parameters that is not the model's: it is stated, so that PyTorch need not
    be loaded to count."""
    with torch.device("meta"):
        counted = {name: sum(parameter.numel() for parameter in dpt.DPT(config).parameters()) for name, config in CONFIGS.items()}
    assert counted == info.PARAMETERS
    assert main.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == dpt.models()
    for line, (name, config) in zip(lines, CONFIGS.items(), strict=True):
        assert f" {counted[name] / 1e6:.1f} M " in line and config.licence in line
        assert all(address in line for address in config.addresses or (config.source,))


def test_the_version(capsys):
    """Blind spot: no way to tell what is installed."""
    with pytest.raises(SystemExit) as ended:
        main.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"dpt {dpt.__version__}\n"
