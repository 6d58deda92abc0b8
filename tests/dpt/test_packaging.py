"""What an installed package holds."""

import ast
from pathlib import Path

import dpt

ROOT = Path(__file__).parents[2]


def stated(keyword: str):
    """An argument of `setup` in setup.py."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    setup = next(call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setup")
    return ast.literal_eval(next(found.value for found in setup.keywords if found.arg == keyword))


def test_every_folder_of_modules_is_a_package():
    """Blind spot: a folder that a checkout finds, and a wheel leaves out."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "dpt").rglob("*.py")}
    assert set(stated("packages")) == {".".join(folder.parts) for folder in folders} | {"dpt.kernels"}


def test_the_version_is_one():
    """Blind spot: a release whose `dpt --version` says another."""
    assert stated("version") == dpt.__version__
