"""What an installed package holds."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_folder_of_modules_is_a_package():
    """Blind spot: a folder that a checkout finds, and a wheel leaves out."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    setup = next(call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "setup")
    packages = ast.literal_eval(next(keyword.value for keyword in setup.keywords if keyword.arg == "packages"))
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "dpt").rglob("*.py")}
    assert set(packages) == {".".join(folder.parts) for folder in folders} | {"dpt.kernels"}
