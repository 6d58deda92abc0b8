"""What is imported when: nothing heavy for help, mistakes and the list of models; the public names all the same.

Modules are counted, and seconds are not: these depend on the machine and what else it does.
"""

import ast
import json
import os
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import dpt
from dpt.commands.main import COMMANDS

ROOT = Path(__file__).parents[2]


def fresh(code: str, *arguments: str) -> str:
    """What a process that has imported nothing prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout


LIGHT = [
    ["--help"],
    ["--version"],
    [],
    ["pedict"],
    ["info"],
    *([name, "--help"] for name in COMMANDS),
    ["predict"],
    ["predict", "a.jpg", "--outt", "out"],
    ["predict", "a.jpg", "-o", "out", "--model", "dpt-tiny-dept"],
    ["predict", "a.jpg", "-o", "out", "--dtype", "int8"],
    ["predict", "a.jpg", "-o", "out", "--model", "dpt-tiny-depth", "--model", "dpt-tiny-scenes", "--weights", "file"],
    ["train", "ade20k-160", "--data", "data"],
    ["evaluate", "--data", "data"],
]


def test_help_mistakes_and_the_list_of_models_import_nothing_of_others():
    """Blind spot: PyTorch, NumPy, Pillow, matplotlib or any other package back at the top of a module on the way to an answer."""
    code = """
import contextlib, io, json, sys
before = set(sys.modules)
import dpt
from dpt.commands.main import main
dpt.models(), dpt.DPTConfig, dir(dpt)
codes = []
for argv in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            codes.append(main(argv))
        except SystemExit as ended:
            codes.append(ended.code)
loaded = {name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names
print(json.dumps([codes, sorted(loaded)]))
"""
    codes, loaded = json.loads(fresh(code, json.dumps(LIGHT)))
    assert loaded == ["dpt"]
    assert codes == [0 if argv == ["info"] or argv[-1:] in (["--help"], ["--version"]) else 2 for argv in LIGHT]


def test_public_names_are_where_they_were():
    """Blind spot: a name in one of the three lists that say it (for `import *`, for the interpreter, for editors) and not in the others; a
    name that is a module's too, so that importing the module changes what the name means."""
    tree = ast.parse(Path(dpt.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING")
    for_editors = {alias.name: node.module for node in block.body for alias in node.names}
    assert for_editors == dpt._HOME and sorted(dpt._HOME) == sorted(dpt.__all__) and set(dpt.__all__) <= set(dir(dpt))
    for name, module in dpt._HOME.items():
        assert getattr(dpt, name) is getattr(import_module(f"dpt.{module}"), name)
    assert not set(dpt.__all__) & dpt._modules()
    names = {}
    exec("from dpt import *", names)
    assert set(dpt.__all__) <= set(names)
    with pytest.raises(AttributeError, match="module 'dpt' has no attribute 'biuld'"):
        dpt.biuld  # noqa: B018
    assert not hasattr(dpt, "setup") and not hasattr(dpt, "weights")  # of the checkout, and a folder of files
    assert pickle.loads(pickle.dumps(dpt.DPT)) is dpt.DPT and dpt.DPT.__module__ == "dpt.model"


def test_modules_need_not_be_imported_by_name():
    """Blind spot: `import dpt; dpt.checkpoints.read`, which worked while everything was imported at once; Triton loaded unasked."""
    code = """
import sys
import dpt
print(dpt.checkpoints.read.__name__, dpt.factory.build is dpt.build, dpt.zoo.models is dpt.models, "triton" in sys.modules)
from dpt import DPT, accelerate
from dpt.kernels import attention
import dpt.inference.prediction
print(dpt.kernels.attention is attention, DPT.__name__, accelerate is dpt.fast.acceleration.accelerate)
"""
    assert fresh(code).split() == "read True True False True DPT True".split()


@pytest.mark.parametrize(("given", "wanted"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_predictions_threads_sleep_while_they_wait(given, wanted):
    """Blind spot: a setting that comes after PyTorch, which reads it once, or that overrules the user's; the environment of a program that
    has loaded PyTorch itself changed for nothing. PyTorch itself is not asked."""
    code = f"""
import os, sys, types
from dpt.commands import main
os.environ.pop("OMP_WAIT_POLICY", None)
if {given!r}: os.environ["OMP_WAIT_POLICY"] = {given!r}
def stub(name, package):
    assert "torch" not in sys.modules
    return types.SimpleNamespace(run=lambda args: print(os.environ.get("OMP_WAIT_POLICY")) or 0)
main.import_module = stub
main.main(["info"])
main.main(["predict", "a.png", "-o", "out"])
del os.environ["OMP_WAIT_POLICY"]
main.import_module = lambda name, package: types.SimpleNamespace(run=lambda args: print(os.environ.get("OMP_WAIT_POLICY")) or 0)
sys.modules["torch"] = types.ModuleType("torch")
main.main(["predict", "a.png", "-o", "out"])
"""
    assert fresh(code).split() == [str(given), wanted, "None"]
