"""What an installed package holds: a wheel is built, and looked into."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dpt

ROOT = Path(__file__).parents[2]
RUNTIME = ("dpt/kernels/launch/", "dpt/kernels/parts/", "dpt/kernels/configs/")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> set[str]:
    """The names of the files in a wheel of a copy of the checkout, in which nothing is left behind."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("bench/", "docs/")):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    subprocess.run(command, cwd=folder / "source", check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_holds_every_module_and_file_that_runs(wheel):
    """Blind spot: a folder that a checkout finds, and a wheel leaves out; weights, pictures, tables, the marker of type hints."""
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "dpt").rglob("*.py")}
    wanted |= {f"dpt/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py") if "tools" not in path.parts}
    wanted |= {f"dpt/{path.relative_to(ROOT)}" for path in (ROOT / "kernels" / "configs").glob("*.json")}
    wanted |= {
        str(path.relative_to(ROOT)) for folder in ("weights", "examples", "serving/page") for path in (ROOT / "dpt" / folder).iterdir()
    }
    assert wanted | {"dpt/py.typed"} <= wheel
    assert all(any(name.startswith(part) for name in wheel) for part in RUNTIME)


def test_the_wheel_holds_neither_tools_nor_tests(wheel):
    """Blind spot: what only a checkout needs, installed; a second top-level name beside dpt, which might shadow another's."""
    code = {name for name in wheel if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in code} == {"dpt"}
    assert not {name for name in code if "tools" in name or "test" in name or "compiled-code" in name}


def test_the_version_is_one():
    """Blind spot: a release whose `dpt --version` says another."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    setup = next(call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setup")
    assert ast.literal_eval(next(found.value for found in setup.keywords if found.arg == "version")) == dpt.__version__
