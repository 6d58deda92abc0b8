"""Which part may import which: the arrows of the layout, held to what the files say. An import within a function counts like any other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Of each part the parts that it may import; those that stand before it are all that a part can name, so there is no way round in a circle.
DPT = {
    "config": "",
    "classes": "",
    "system": "",
    "zoo": "config classes",
    "nets": "config",
    "checkpoints": "config classes system zoo",
    "evaluation.alignment": "",
    "inference": "config system evaluation.alignment",
    "model": "nets inference",
    "fast": "nets kernels",
    "factory": "config zoo nets checkpoints model fast",
    "data": "config system inference",
    "evaluation": "config system inference data evaluation.alignment",
    "training": "config zoo system checkpoints evaluation.alignment model fast factory data evaluation",
    "scenes": "classes system",
    "commands": "config zoo system checkpoints inference model fast factory data evaluation training scenes __init__",
}
LIGHT = ("config", "classes", "zoo", "system")  # without PyTorch, NumPy or Pillow: what help, mistakes and the list of models need


def imported(path: Path, root: Path, package: str) -> set[str]:
    """The full names of the modules and of the names that a file below `root`, the folder of `package`, imports."""
    parts = [package, *path.relative_to(root).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = [*parts[: len(parts) - node.level]] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def part_of(name: str) -> str | None:
    """The part of dpt that a full name belongs to; None of other packages."""
    if name != "dpt" and not name.startswith("dpt."):
        return None
    below = name.removeprefix("dpt").lstrip(".")
    if below == "kernels" or below.startswith("kernels."):
        return "kernels"
    known = [part for part in DPT if below == part or below.startswith(f"{part}.")]
    return max(known, key=len, default="__init__")


def test_parts_come_after_what_they_import():
    """Blind spot: a circle in the table itself."""
    for place, (part, allowed) in enumerate(DPT.items()):
        assert set(allowed.split()) <= {*list(DPT)[:place], "kernels", "__init__"}, part


def test_dpt_imports_run_one_way():
    """Blind spot: an import against the arrows, at a file's head or within a function; a file that is of no part."""
    seen = set()
    for path in sorted((ROOT / "dpt").rglob("*.py")):
        own = part_of(".".join(["dpt", *path.relative_to(ROOT / "dpt").with_suffix("").parts]).removesuffix(".__init__"))
        if own == "__init__":
            assert path.parent == ROOT / "dpt" and path.stem in ("__init__", "__main__"), f"{path} is of no part"
            continue
        seen.add(own)
        used = {part_of(name) for name in imported(path, ROOT / "dpt", "dpt")} - {None, own}
        assert used <= set(DPT[own].split()), f"{path.relative_to(ROOT)} imports {used - set(DPT[own].split())}"
    assert seen == set(DPT)


def test_the_light_parts_import_no_package_but_ours():
    """Blind spot: PyTorch on the way to a list of names. (`tests/dpt/test_startup.py` counts what a process has loaded.)"""
    for path in (path for part in LIGHT for path in [*(ROOT / "dpt" / part).glob("*.py"), ROOT / "dpt" / f"{part}.py"] if path.exists()):
        tree = ast.parse(path.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)]
        names = {(getattr(node, "module", None) or node.names[0].name).partition(".")[0] for node in top}
        assert not names & {"torch", "numpy", "PIL", "safetensors", "huggingface_hub", "tqdm", "matplotlib"}, path


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from ..inference import images", {"dpt.inference.images"}),
        ("from .vit import ViT", {"dpt.nets.vit.ViT"}),
        ("def f():\n    from ..kernels.attention import attention", {"dpt.kernels.attention.attention"}),
        ("import dpt.kernels.attention", {"dpt.kernels.attention"}),
        ("from .. import checkpoints", {"dpt.checkpoints"}),
    ],
)
def test_every_form_of_an_import_is_read(source, names, tmp_path):
    """Blind spot: an import in a form that is passed over."""
    folder = tmp_path / "dpt" / "nets"
    folder.mkdir(parents=True)
    (folder / "made_up.py").write_text(source)
    assert imported(folder / "made_up.py", tmp_path / "dpt", "dpt") == names


def test_no_file_is_long():
    """Blind spot: a file that grew past what one reads at a sitting. At most 600 lines."""
    folders = ("dpt", "kernels", "bench", "tests")
    long = {str(path.relative_to(ROOT)): count for folder in folders for path in (ROOT / folder).rglob("*.py")
            if (count := len(path.read_text().splitlines())) > 600}  # fmt: skip
    assert not long
