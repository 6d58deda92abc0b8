"""Which part may import which: the arrows of the layout, held to what the files say. An import within a function counts like any other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Of each part the parts that it may import; those that stand before it are all that a part can name, so there is no way round in a circle.
# "." is what lies in the folder itself, where a line of its own does not name it.
DPT = {
    "rules": "",
    "config": "rules",
    "classes": "",
    "system": "",
    "zoo": "config rules classes",
    "spanning": "",
    "nets": "config",
    "checkpoints": "config system zoo spanning",
    "evaluation.alignment": "",
    "distributed": "system",
    "inference": "config system evaluation.alignment",
    "model": "system nets inference",
    "fast": "nets spanning kernels",
    "devices": "fast",
    "factory": "config classes system zoo nets checkpoints model fast",
    "inference.predictor": "config rules checkpoints inference devices factory",
    "exchange": "config zoo system checkpoints model factory",
    "exporting": "config system inference model fast",
    "data": "config rules classes system inference",
    "evaluation": "config rules system inference distributed data evaluation.alignment",
    "scenes": "classes system",
    ".": "config zoo checkpoints inference inference.predictor model fast factory exchange exporting",
    "serving": "config rules system inference .",
    "training": (
        "config rules zoo nets system distributed checkpoints inference evaluation.alignment model fast factory data evaluation ."
    ),
    "commands": (
        "config rules classes zoo system distributed checkpoints inference model fast devices factory exchange exporting data evaluation "
        "training scenes serving ."
    ),
    "__main__": "commands",
}
KERNELS = {  # "." are the ops
    "launch": "",
    "parts": "launch",
    "cpu": "launch parts",
    ".": "launch parts cpu",
    "tools": "launch parts cpu .",
}
BENCH = {  # "." is what one runs
    "__init__": "",
    "harness": "__init__",
    "cases": "__init__ harness",
    "reporting": "__init__ harness",
    "card": "__init__ harness cases",
    ".": "__init__ harness cases reporting card",
}
HOUSES = {"dpt": (ROOT / "dpt", DPT), "dpt.kernels": (ROOT / "kernels", KERNELS), "bench": (ROOT / "bench", BENCH)}
OUTSIDE = {"dpt": {"dpt.kernels"}, "dpt.kernels": set(), "bench": {"dpt", "dpt.kernels"}}  # of the other houses, which each may know
LIGHT = ("rules", "config", "classes", "zoo", "system")  # without PyTorch, NumPy or Pillow: for help, mistakes and the list of models


def imported(path: Path, root: Path, package: str) -> set[str]:
    """The full names of the modules, and of the names in them, that a file below `root`, the folder of `package`, imports."""
    parts = [*package.split("."), *path.relative_to(root).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = parts[: len(parts) - node.level] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def house_of(name: str) -> str | None:
    """The house that a full name belongs to: the longest that fits; None of other packages."""
    fitting = [house for house in HOUSES if name == house or name.startswith(f"{house}.")]
    return max(fitting, key=len, default=None)


def part_of(name: str, house: str) -> str:
    """The part of its house that a full name belongs to."""
    root, parts = HOUSES[house]
    below = name.removeprefix(house).lstrip(".")
    fitting = [part for part in parts if below == part or below.startswith(f"{part}.")]
    first = root / below.partition(".")[0]
    of_init = "__init__" in parts and not first.exists() and not first.with_suffix(".py").exists()  # a name, not a module
    return max(fitting, key=len, default="__init__" if of_init else ".")


@pytest.mark.parametrize("house", HOUSES)
def test_parts_come_after_what_they_import(house):
    """Blind spot: a circle in the table itself."""
    known = {"kernels"} if house == "dpt" else set()
    for part, allowed in HOUSES[house][1].items():
        assert set(allowed.split()) <= known, part
        known.add(part)


@pytest.mark.parametrize("house", HOUSES)
def test_imports_run_one_way(house):
    """Blind spot: an import against the arrows, at a file's head or within a function; a part that the table has and the house has not."""
    root, parts = HOUSES[house]
    seen = set()
    for path in sorted(root.rglob("*.py")):
        own = part_of(".".join([house, *path.relative_to(root).with_suffix("").parts]).removesuffix(".__init__"), house)
        seen.add(own)
        names = imported(path, root, house)
        known = {name for name in names if house_of(name) == house}
        used = {part_of(name, house) for name in known} - {own}
        others = {house_of(name) for name in names} - {house, None}
        assert others <= OUTSIDE[house], f"{path.relative_to(ROOT)} imports {others}"
        used |= {"kernels"} if house == "dpt" and others else set()
        assert used <= set(parts[own].split()), f"{path.relative_to(ROOT)} imports {used - set(parts[own].split())}"
    assert seen | {"__init__"} == set(parts) | {"__init__"}


def test_the_kernels_are_imported_by_no_other_name():
    """Blind spot: `import kernels`, which may be another's, or a test's way to the tests of another part."""
    for folder in ("dpt", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            tops = {name.partition(".")[0] for name in imported(path, ROOT / folder, "x")}
            assert not tops & {"kernels", "tests"}, path


def test_an_op_is_a_file_with_its_reference_and_no_tooling():
    """Blind spot: what is no op among the ops, and tooling at an op's end."""
    for path in (ROOT / "kernels").glob("[!_]*.py"):
        functions = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}
        assert any(name.endswith("_ref") for name in functions), f"{path.name} has no reference"
        assert not functions & {"compile_cases", "tuning_space"}, f"{path.name}: its space is kernels/tools/spaces/{path.name}"


def test_kernels_take_few_arguments():
    """Blind spot: a kernel whose call nobody can read. Fewer than 20: what belongs together comes as a tuple."""
    counts = {}
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                counts[f"{path.name}: {node.name}"] = len(node.args.args)
    assert len(counts) > 20 and not {name: count for name, count in counts.items() if count >= 20}


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
