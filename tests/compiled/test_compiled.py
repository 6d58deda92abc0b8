"""What the shipped configurations and the named models' launches compile to, for five architectures, without a GPU; and that the gates on
it can fail.

What is recorded is not compiled again but for a few that are drawn at random, which have to come out as recorded. The compiler runs in a
process of its own without TRITON_INTERPRET, so these tests do not care how theirs was started.
"""

import dataclasses
import fcntl
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from dpt.kernels import launch
from dpt.kernels.tools import compiler, ledger, spaces

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from sharing import shared_folder, sharing_calls  # noqa: E402

MODELS = "bench.cases.launches"
# Another Triton than the record's compiles everything, so it is held to one architecture (kernels/README.md says what an older one spills).
FAMILIES = compiler.DEFAULT_FAMILIES if triton.__version__ == compiler.TABLE_TRITON else ("sm_90",)
DRAWN = 1  # of the recorded, a module
OPS = spaces.ops()
PROVENANCES = ("chosen by compiling, not measured", "chosen by the time model, not measured", "measured on ")


def run_compiler(*arguments, environment=os.environ):
    """``python -m dpt.kernels.tools.compiler`` in a fresh process."""
    environment = {key: value for key, value in environment.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "dpt.kernels.tools.compiler", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def reports(tmp_path_factory):
    """Op, and the models' launches -> reports of every case, made in one go, and once: one of xdist's processes makes them, others wait."""
    file = shared_folder(tmp_path_factory) / "reports.json"
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists():
            arch = [part for family in FAMILIES for part in ("--arch", family)]
            drawn = ["--draw", str(DRAWN), "--seed", str(random.randrange(2**32))]
            environment = sharing_calls(tmp_path_factory)
            done = run_compiler("--cases", MODELS, *arch, *drawn, "--json", str(file), environment=environment)
            assert file.exists(), done.stderr[-4000:]
    return {op: [compiler.Report(**report) for report in reports] for op, reports in json.loads(file.read_text()).items()}


@pytest.mark.parametrize("op", [*OPS, MODELS])
def test_every_configuration_passes(op, reports):
    """No spills, no serialised MMAs, within shared and tensor memory, tensor cores and asynchronous copies there, on every architecture;
    and what was drawn is as recorded."""
    assert {report.family for report in reports[op]} == set(FAMILIES)
    assert not [(report.family, report.name, report.problems) for report in reports[op] if report.problems]


@pytest.mark.parametrize("family", FAMILIES)
def test_record_is_current(family, reports):
    """The record holds what the ops' cases and the models' launches compile to now, each of them, and nothing else."""
    if triton.__version__ != compiler.TABLE_TRITON:
        pytest.skip(f"the record is of triton {compiler.TABLE_TRITON}; {triton.__version__} allocates registers differently")
    keys = {report.key for found in reports.values() for report in found if report.family == family}
    assert set(ledger.read(family)) == keys, "run `make compiled-code`"


@pytest.mark.parametrize("op", OPS)
def test_table_is_current(op, reports):
    """The table in the repository is what the code compiles to now."""
    if triton.__version__ != compiler.TABLE_TRITON:
        pytest.skip(f"the tables were made with triton {compiler.TABLE_TRITON}; {triton.__version__} allocates registers differently")
    committed = (ROOT / "kernels" / "compiled-code" / f"{op}.md").read_text()
    assert committed == compiler.table(op, reports[op]), "run `make compiled-code`"


def test_configurations_have_a_default_and_a_provenance():
    """Every list of every family ends without conditions, every entry says where it comes from, and no family lacks a kernel."""
    tables = {path.stem: json.loads(path.read_text()) for path in launch.CONFIGS.glob("*.json")}
    assert set(tables) == set(launch.TABLES.values())
    assert len({tuple(sorted(table)) for table in tables.values()}) == 1
    for table in tables.values():
        for entries in table.values():
            assert entries[-1]["when"] == {}
            assert all(entry["provenance"].startswith(PROVENANCES) for entry in entries)


GOOD = compiler.Report(
    name="x",
    family="sm_90",
    warps=8,
    stages=2,
    registers=128,
    stack=0,
    shared=100 * 1024,
    tensor_memory=0,
    serialised=False,
    instructions={**dict.fromkeys(compiler.INSTRUCTIONS, 0), "HGMMA": 4, "LDGSTS": 4},
)
CASE = launch.CompileCase("x", "sm_90", None, (), {})


def with_instructions(**counts):
    return {"instructions": {**GOOD.instructions, **counts}}


def test_gates_let_good_code_pass():
    """The case that the next test damages is itself without a problem."""
    assert list(compiler.problems(CASE, GOOD)) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"stack": 8}, "spills: 8 bytes"),
        (with_instructions(STL=1), "1 stores"),
        (with_instructions(LDL=2), "2 loads"),
        ({"serialised": True}, "serialised"),
        ({"shared": 228 * 1024}, "shared memory, the limit is 232448"),
        ({"tensor_memory": 1024}, "tensor memory"),
        (with_instructions(HGMMA=0, HMMA=9), "no HGMMA"),
        (with_instructions(LDGSTS=0), r"no asynchronous copies (LDGSTS)"),
    ],
)
def test_each_gate_fails(damage, says):
    """Every gate refuses what it is there for, by name."""
    found = list(compiler.problems(CASE, dataclasses.replace(GOOD, **damage)))
    assert len(found) == 1 and says in found[0]


def test_gates_follow_the_case():
    """A float32 kernel needs no tensor cores, a small dot may use HMMA, and descriptors must become UTMALDG."""
    bare = dataclasses.replace(GOOD, **with_instructions(HGMMA=0, LDGSTS=0, HMMA=1))
    assert not list(compiler.problems(dataclasses.replace(CASE, tensor_cores=False, async_copies=False), bare))
    assert not list(compiler.problems(dataclasses.replace(CASE, tensor_cores="HMMA", async_copies=False), bare))
    described = dataclasses.replace(CASE, args=(TensorDescriptor.from_tensor(torch.empty(16, 16, device="meta"), [16, 16]),))
    assert list(compiler.problems(described, GOOD)) == ["no asynchronous copies (UTMALDG)"]


def test_ctas_per_sm():
    """By hand: 8 warps of 128 registers are 32768 registers, two to an SM; 100 KB and the reserved 1 KB fit twice into 228 KB."""
    assert GOOD.ctas_per_sm == 2
    assert dataclasses.replace(GOOD, registers=129).ctas_per_sm == 1  # allocated as 136
    assert dataclasses.replace(GOOD, shared=114 * 1024).ctas_per_sm == 1
    assert dataclasses.replace(GOOD, registers=16, shared=0).ctas_per_sm == 8  # 64 warps


PROBE = """
import torch, triton, triton.language as tl
from dpt.kernels import launch
from dpt.kernels.tools import compiler

@triton.jit
def spilling(a_ptr, out_ptr):
    rows, columns = tl.arange(0, 128), tl.arange(0, 128)
    tile = tl.load(a_ptr + rows[:, None] * 128 + columns[None, :])
    tl.store(out_ptr + rows[:, None] * 128 + columns[None, :], tl.exp2(tile) / tl.sum(tile, 0)[None, :] + tl.sum(tile, 1)[:, None])

@triton.jit
def serialised(a_ptr, out_ptr, K):
    rows, columns = tl.arange(0, 64), tl.arange(0, 64)
    tile = tl.load(a_ptr + rows[:, None] * 64 + columns[None, :])
    acc = tl.zeros([64, 64], tl.float32)
    for start in tl.range(0, K, 64):
        b = tl.load(a_ptr + (start + rows)[:, None] * 64 + columns[None, :])
        acc = tl.dot(tl.dot(tile, tl.trans(b)).to(b.dtype), b, acc)
    last = tl.load(a_ptr + (K + tl.arange(0, 16))[:, None] * 64 + columns[None, :])
    acc = tl.dot(tl.dot(tile, tl.trans(last)).to(last.dtype), last, acc * 0.5)
    tl.store(out_ptr + rows[:, None] * 64 + columns[None, :], acc)

def run(kernel, *args):
    launch.launch(kernel, (1,), *args, num_warps=4 if kernel is serialised else 1, num_stages=2)

a = torch.empty(128, 128, device="meta")
cases = launch.record("sm_80", "x", run, spilling, a, a, tensor_cores=False, async_copies=False)
cases += launch.record("sm_90", "x", run, serialised, a.half(), a, 1024)
for case in cases:
    print(compiler.measure(case).problems)
    print(compiler.measure(case).problems)  # from the cache
"""


def test_real_faults_are_seen(tmp_path):
    """From Triton through ptxas, cuobjdump and nvdisasm: a tile of 512 values a thread spills, a dot after the loop serialises it; and
    both are still reported when they come from the cache."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    first, again, serialised, serialised_again = done.stdout.splitlines()
    assert "spills: " in first and first == again
    assert "serialised" in serialised and serialised == serialised_again


RELU = """
import torch, triton, triton.language as tl
from dpt.kernels import launch
from dpt.kernels.parts.activations import relu
from dpt.kernels.tools import compiler

@triton.jit
def rectified(a_ptr, out_ptr):
    place = tl.arange(0, 128)
    tl.store(out_ptr + place, relu(tl.load(a_ptr + place)))

for family in compiler.DEFAULT_FAMILIES:
    for dtype in launch.DTYPES:
        a = torch.empty(128, dtype=dtype, device="meta")
        (case,) = launch.record(family, "x", lambda a: launch.launch(rectified, (1,), a, a, num_warps=4, num_stages=1), a)
        found = [line for line in compiler.compiled(case)[0].asm["ptx"].splitlines() if "max." in line]
        print(bool(found) and all("max.NaN" in line for line in found))
"""


def test_relu_keeps_nan(tmp_path):
    """In machine code, where the maximum that loses NaN is another instruction; the interpreter's keeps it whatever it is told."""
    script = tmp_path / "relu.py"
    script.write_text(RELU)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * len(compiler.DEFAULT_FAMILIES) * len(launch.DTYPES)


RECORDED = """
from dpt.kernels.tools import compiler, ledger

def measured(change):
    ledger.read = lambda family: {key: change(dict(facts)) for key, facts in recorded.items()}
    _, reports, _ = compiler._measure_all(compiler._Work("upsample", "sm_80", draw, 0))
    return [report.problems for report in reports]

recorded, draw = {}, 0
_, reports, recorded = compiler._measure_all(compiler._Work("upsample", "sm_80", 0, 0))
assert recorded and {report.key for report in reports} == set(recorded)
compiler.facts, facts = None, compiler.facts  # nothing is compiled
assert not any(measured(lambda known: known))
print(measured(lambda known: {**known, "stack": 8})[0])
compiler.facts, draw = facts, 1
print(sum(map(len, measured(lambda known: {**known, "registers": known["registers"] + 1}))))
"""


def run_script(code, *arguments):
    """What a script prints that compiles."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_what_is_recorded_is_believed_and_checked():
    """A recorded case is not compiled, and is held to the gates as it is recorded; one that is drawn has to come out as recorded."""
    spills, wrong = run_script(RECORDED)
    assert "spills: 8 bytes of stack" in spills
    assert wrong == "1"


def test_what_is_drawn_is_shared_out():
    """So many a source, whichever family they fall to, each of them with some seed; all of everything where none is named."""
    fell = set()
    for seed in range(40):
        work = compiler._shared_out(("a", "b"), ("sm_80", "sm_90", "sm_120"), 2, seed)
        assert [sum(each.draw for each in work if each.source == source) for source in ("a", "b")] == [2, 2]
        fell |= {(each.source, each.family) for each in work if each.draw}
    assert len(fell) == 6
    assert {each.draw for each in compiler._shared_out(("a",), ("sm_80", "sm_90"), None, 0)} == {None}


KERNEL = """
import triton
import triton.language as tl

FACTOR = tl.constexpr(2.0)

@triton.jit
def helper(x):
    return x * FACTOR

@triton.jit
def kernel(a_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(a_ptr + i, helper(tl.load(a_ptr + i, mask=i < n, other=0.0)), mask=i < n)
"""
KEY = """
import importlib.util, sys
import torch
from dpt.kernels import launch
from dpt.kernels.tools import compiler

spec = importlib.util.spec_from_file_location("made_up", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
a = torch.empty(64, device="meta", dtype=torch.bfloat16)

def key(tensor=a, n=64, warps=4, family="sm_90", block=64):
    return compiler.key_of(launch.CompileCase("x", family, module.kernel, (tensor, n), {"BLOCK": block, "num_warps": warps}))

print(key(), key(a[8:]), key(n=48), key(a.float()), key(a[1:]), key(n=63), key(warps=8), key(family="sm_80"), key(block=128))
"""


def test_key_is_of_all_that_the_code_depends_on(tmp_path):
    """The same key wherever the code stands and however it is commented; another for another type, alignment, constant, option,
    architecture, and for a change of the kernel, of what it calls or of a constant that it reads."""

    def keys(source):
        path = tmp_path / "made_up.py"
        path.write_text(source)
        return run_script(KEY, path)[0].split()

    first, *others = keys(KERNEL)
    same, different = others[:2], others[2:]
    assert set(same) == {first} and first not in different and len(set(different)) == len(different)
    assert keys("# moved\n\n" + KERNEL.replace("    i = tl", "    # a comment\n    i = tl"))[0] == first
    for before, after in (("tl.constexpr(2.0)", "tl.constexpr(3.0)"), ("x * FACTOR", "x + FACTOR"), ("mask=i < n)\n", "mask=i <= n)\n")):
        assert before in KERNEL and keys(KERNEL.replace(before, after))[0] != first
