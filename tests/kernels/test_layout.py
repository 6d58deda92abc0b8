"""Who imports whom in kernels/, read off the sources: the walls between the ops, what they share, and the tools."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
FOLDERS = {  # of kernels/: what it may import of kernels/, by folder; "" are the ops
    "": {"", "launch", "parts"},
    "launch": {"launch"},
    "parts": {"launch", "parts"},
    "tools": {"", "launch", "parts", "tools"},
}
FILES = sorted(path.relative_to(KERNELS) for path in KERNELS.rglob("*.py"))


def folder(path: Path) -> str:
    """The folder of kernels/ that a file or an imported module is in."""
    return path.parts[0] if (KERNELS / path.parts[0]).is_dir() else ""


def imported(file: Path) -> set[Path]:
    """The modules of kernels/ that a file of it imports, anywhere in it, by their places."""
    found = set()
    for node in ast.walk(ast.parse((KERNELS / file).read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level:
            start = file.parents[node.level - 1]
            names = [(*start.parts, *node.module.split("."))] if node.module else [(*start.parts, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            dotted = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] in ("dpt", "kernels", "bench", "tests") for name in dotted), f"{file} imports {dotted}"
        found |= {Path(*name) for name in names}
    return found


def test_every_folder_has_a_rule():
    """Blind spot: a new folder that no rule holds, or a walk that finds no files."""
    assert {folder(file) for file in FILES} == set(FOLDERS)
    assert imported(Path("upsample.py")) >= {Path("launch"), Path("parts/bilinear")}
    assert Path("launch") in imported(Path("tools/spaces/upsample.py")) and Path("upsample") in imported(Path("tools/spaces/upsample.py"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_run_one_way(file):
    """Blind spot: an op that needs the tools, which no wheel holds; a part that is made of ops; a kernel that knows models."""
    assert {folder(module) for module in imported(file)} <= FOLDERS[folder(file)]


def test_a_file_is_an_op_or_has_a_folder():
    """Blind spot: what is no op among the ops, and tooling at an op's end."""
    for file in FILES:
        if folder(file) == "":
            functions = {
                node.name for node in ast.parse((KERNELS / file).read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)
            }
            assert any(name.endswith("_ref") for name in functions), f"{file} has no reference"
            assert not functions & {"compile_cases", "tuning_space"}, f"{file}: its space is kernels/tools/spaces/{file.name}"
