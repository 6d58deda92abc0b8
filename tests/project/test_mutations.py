"""`make mutate` runs tests for each mutation; that all of them still fit the code is seen in a moment."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import mutate  # noqa: E402

FILES = sorted(mutate.MUTATIONS.glob("*.toml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_mutation_fits_the_code(file):
    """Blind spot: code that was rewritten, and a mutation that is never made any more."""
    mutations = mutate.read(file)
    assert len(mutations) >= 3 and len({mutation["name"] for mutation in mutations}) == len(mutations)
    for mutation in mutations:
        mutate.mutated((mutate.ROOT / mutation["file"]).read_text(), mutation)
        assert mutation["tests"] and (mutate.ROOT / mutation["tests"][0].split("::")[0]).is_file()


def test_every_op_is_broken():
    """Blind spot: a kernel that nobody breaks. Modules with jit functions of their own, by the files that mutations change."""
    changed = {mutation["file"] for file in FILES for mutation in mutate.read(file)}
    kernels = {path for path in (mutate.ROOT / "kernels").rglob("*.py") if "@triton.jit" in path.read_text()}
    assert kernels and {path.relative_to(mutate.ROOT).as_posix() for path in kernels} <= changed


def test_the_tests_of_every_mutation_exist():
    """Blind spot: a test with another name or other parameters, and a mutation that nothing is run for."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/kernels"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    lines = subprocess.run(command, cwd=mutate.ROOT, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    collected = {name for line in lines for name in (line, line.split("[")[0])}
    named = {test for file in FILES for mutation in mutate.read(file) for test in mutation["tests"] if "::" in test}
    assert named and not named - collected
