"""CONTRIBUTING.md, held to what it says of an op: one is added to a copy of the repository by that page, and its commands are run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OP = "channel_scale"
MADE_UP = Path(__file__).parent / "made_up_op"
PLACES = {  # the page's places -> what is put there
    "kernels/OP.py": "op.py",
    "kernels/tools/spaces/OP.py": "space.py",
    "tests/kernels/test_OP.py": "parity.py",
    "tests/mutations/kernels/OP.toml": "mutations.toml",
    "bench/cases/ops/OP.py": "case.py",
}
COPIED = ("dpt", "kernels", "bench", "tests", "pyproject.toml", ".gitignore")
FAST_FORM = '''

class FastLayerScale(LayerScale):
    """`LayerScale` as one launch."""

    def forward(self, x: Tensor) -> Tensor:
        return channel_scale(x, self.gamma)
'''
GUESS = {"BLOCK_M": 16, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1}


def section() -> str:
    """What the page says of an op."""
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## An op\n")[1].split("\n## ")[0]


def commands() -> list[str]:
    """The commands of the page, for the made-up op."""
    lines = re.search(r"```sh\n(.*?)```", section(), re.DOTALL)[1].splitlines()
    return [line.partition("#")[0].strip().replace("OP", OP) for line in lines]


def insert(file: Path, after: str, text: str) -> None:
    source = file.read_text(encoding="utf-8")
    assert source.count(after) == 1, f"{file}: {after!r}"
    file.write_text(source.replace(after, after + text), encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The repository with one more op."""
    root = tmp_path_factory.mktemp("repository")
    for name in COPIED:
        unwanted = shutil.ignore_patterns("__pycache__", "results", "compiled-code")
        (shutil.copytree(ROOT / name, root / name, ignore=unwanted) if (ROOT / name).is_dir() else shutil.copy(ROOT / name, root / name))
    for place, content in PLACES.items():
        target = root / place.replace("OP", OP)
        assert not target.exists()
        shutil.copy(MADE_UP / content, target)
    entries = [{"when": {}, "config": GUESS, "provenance": "a guess"}]
    families = sorted(path.stem for path in (root / "kernels" / "configs").glob("*.json"))
    write = f"from dpt.kernels.tools import tune; [tune.write_entries(family, {OP!r}, {entries}) for family in {families}]"
    result = run(root, f'python -c "{write}"')
    assert result.returncode == 0, result.stderr
    fast = root / "dpt" / "fast"
    insert(fast / "modules.py", "from ..kernels.attention import attention\n", f"from ..kernels.{OP} import {OP}\n")
    (fast / "modules.py").write_text((fast / "modules.py").read_text(encoding="utf-8") + FAST_FORM, encoding="utf-8")
    insert(fast / "rules.py", "from .modules import (\n", "    FastLayerScale,\n")
    insert(fast / "rules.py", "FAST: dict[type[nn.Module], Replacement] = {\n", "    LayerScale: Replacement(FastLayerScale, reads={}),\n")
    return root


def run(root: Path, command: str, **more: str) -> subprocess.CompletedProcess:
    """A command as it stands on the page, in the copy; the variables before it included."""
    python = f'"{sys.executable}"'
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **more}
    command = re.sub(r"(^|\s)python ", lambda match: f"{match[1]}{python} ", command)
    return subprocess.run(command, shell=True, cwd=root, env=environment, capture_output=True, text=True, check=False)


def of_page(part: str) -> str:
    """The one command of the page that has this in it."""
    found = [command for command in commands() if part in command]
    assert len(found) == 1, f"the page has {len(found)} commands with {part}"
    return found[0]


def test_the_page_names_every_place():
    """Blind spot: a place that the page forgets; one that it names and that this test does not fill."""
    places = {place for place in re.findall(r"`([\w/]*OP\.\w+)`", section())}
    assert places == set(PLACES) and {"dpt/fast/modules.py", "dpt/fast/rules.py"} <= set(re.findall(r"`([\w/.]+)`", section()))
    assert len(commands()) == 5


def test_its_numbers(copy):
    """Blind spot: a page after which the interpreter's tests do not find the op; tests that pass with a broken one."""
    result = run(copy, of_page("pytest"))
    assert result.returncode == 0 and re.search(r"\b6 passed", result.stdout), result.stdout + result.stderr
    result = run(copy, of_page("mutate"))
    assert result.returncode == 0 and re.search(r"\bcaught", result.stdout) and "not caught" not in result.stdout.lower(), result.stdout


def test_its_compiled_code(copy):
    """Blind spot: an op of which nothing is compiled."""
    result = run(copy, of_page("compiler") + " --arch sm_90 --json reports.json")
    assert result.returncode == 0, result.stdout + result.stderr
    reports = json.loads((copy / "reports.json").read_text())
    assert list(reports) == [OP] and [report["registers"] > 0 for report in reports[OP]] == [True] * 3


def test_it_is_tuned(copy):
    """Blind spot: a space that the tuning command does not list, by name or among all."""
    assert "1 entries, 8 candidates" in run(copy, of_page("tune")).stdout
    assert f"{OP} {{}}" in run(copy, of_page("tune").replace(f"--kernel {OP}", "")).stdout


def test_it_is_measured(copy):
    """Blind spot: a benchmark case that nobody lists, or that runs no kernel of the op."""
    result = run(copy, of_page("every_op"))
    assert result.returncode == 0 and "1 ops, all agree with PyTorch" in result.stdout, result.stdout + result.stderr
    result = run(copy, of_page("every_op"), TRITON_INTERPRET="1")
    lines = [line for line in result.stdout.splitlines() if line.startswith(OP)]
    assert len(lines) == 2 and all("ok, off by" in line and "no kernel on this device" not in line for line in lines), result.stdout


def test_it_is_reported(copy):
    """Blind spot: a row of the seam that no report shows, or whose module runs something else."""
    code = """
import torch, dpt
from dpt.nets.encoders.vit import LayerScale
model = torch.nn.Sequential(LayerScale(8))
plain, x = model[0], torch.randn(3, 8)
torch.nn.init.normal_(plain.gamma)
expected = model(x)
dpt.accelerate(model, strict=True)
assert torch.allclose(model(x), expected)
print(dpt.fast_report(model))
"""
    (copy / "report.py").write_text(code)
    result = run(copy, "python report.py", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^0 +fused +kernels$", result.stdout, re.MULTILINE) and "1 of 1 run fused" in result.stdout, result.stdout
