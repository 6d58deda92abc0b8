"""The host path of every launch, on a stub of libcuda for five families: what a GPU would refuse is refused here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import triton  # noqa: E402
from sharing import sharing_calls  # noqa: E402

from dpt.kernels import launch  # noqa: E402
from dpt.kernels.tools import compiler, ledger  # noqa: E402

pytestmark = pytest.mark.skipif(
    triton.__version__ != compiler.TABLE_TRITON,
    reason=f"the record, by which no launch needs a compiler, is of triton {compiler.TABLE_TRITON}",
)

NO_COMPILER = 3
COMPILES_AT_MOST = 3  # times a launch of an op, a dtype, over all sizes


def on_stub(what, folder, *options, environment=None):
    """Family -> what `run.py` saw."""
    file = folder / "seen.json"
    command = [sys.executable, ROOT / "tests" / "host" / "run.py", "--what", what, *options, "--json", file]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode == NO_COMPILER:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = json.loads(file.read_text())
    assert set(found) == set(launch.TABLES.values())
    return found


def test_models(tmp_path, tmp_path_factory):
    """Launches of every named model, drawn at random: tensor maps, grids, shared memory, parameters; and nothing is asked for that the gate
    on compiled code does not hold."""
    for family, seen in on_stub("models", tmp_path, "--one-in", "4", environment=sharing_calls(tmp_path_factory)).items():
        assert seen["launches"] > 3000
        missing = {key: seen["keys"][key] for key in set(seen["keys"]) - set(ledger.read(family))}
        assert not missing, "what runs is not in the gate: run `make compiled-code`, or give bench/cases/launches.py what is missing"


def test_shapes_of_the_parity_tests(tmp_path):
    """Odd shapes, strides and addresses, forward and backward, in every dtype."""
    for seen in on_stub("parity", tmp_path).values():
        assert seen["launches"] > 1500 and not seen["errors"]


def test_sizes_do_not_recompile(tmp_path):
    """Models at other sizes run what the gate holds; over thirty sizes of pictures each launch of an op is compiled at most three times."""
    for family, seen in on_stub("sizes", tmp_path).items():
        first = {where.removesuffix(", first"): kernels for where, kernels in seen["each"].items() if where.endswith(", first")}
        assert len(first) == 13 * len(launch.DTYPES)
        for where, kernels in first.items():
            others = seen["each"].get(f"{where}, others", {})
            for kernel in kernels.keys() | others.keys():
                launches, more = (len(found.get(kernel, [])) for found in (kernels, others))  # an op may launch a kernel in several forms
                assert launches + more <= COMPILES_AT_MOST * max(launches, 1), (where, kernel, launches, more)
        of_models = {key for where, kernels in seen["each"].items() if " of " in where for keys in kernels.values() for key in keys}
        assert of_models and of_models <= set(ledger.read(family))


def test_plans_launch_what_their_ops_do(tmp_path):
    """Kernel, grid, stream, tensor maps and every parameter, addresses by the memory that they lie in, in every dtype."""
    for seen in on_stub("replays", tmp_path).values():
        assert seen["launches"] > 100 and not seen["errors"]


BROKEN = """
import sys, tempfile
from pathlib import Path
sys.path[:0] = [{root!r}]
import torch
from bench.harness import stub
from dpt.kernels import attention, launch
from dpt.kernels.tools import ledger

gpu = stub.Stub(Path(sys.argv[1]))
recorded = stub.Compiler.__call__

def tampered(change):
    def call(self, *args, **kwargs):
        facts = self.recorded[self.asked]
        self.recorded = {{**self.recorded, self.asked: {{**facts, **change(facts)}}}}
        return recorded(self, *args, **kwargs)
    stub.Compiler.__call__ = call

def boxes(side):
    return lambda facts: {{"descriptors": [{{**d, "block_size": [1, 1, side, 64]}} for d in facts["descriptors"]]}}

def forward(tokens=1025, width=3 * 12 * 64):
    qkv = torch.empty(1, tokens, width, dtype=torch.bfloat16)
    torch.ops.dpt.attention(qkv[..., : 3 * 12 * 64].unflatten(2, (3, 12, 64)), None, None, 0.125, None, None)

def unaligned():
    made = attention._Plan.describe
    def describe(plan, tensor, rows):
        found = made(plan, tensor, rows)
        found.strides = [found.strides[0], found.strides[1], found.strides[2] + 1, 1]
        return found
    attention._Plan.describe = describe
    forward()

def grid(*sides):
    launched = launch.launch
    launch.launch = lambda kernel, _, *args, **kwargs: launched(kernel, sides, *args, **kwargs)
    forward()

{what}
"""


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("forward()", None),
        ("tampered(boxes(512)); forward()", "side of the box over 256 (1, 512)"),
        ("tampered(boxes(256)); forward()", None),
        ("unaligned()", "stride in bytes not a multiple of 16"),
        ("grid(1, 70000)", "grid y over 65535 (70000, 65535)"),
        ("grid(1, 1, 70000)", "grid z over 65535"),
        ("tampered(lambda facts: {'shared': 228 * 1024}); forward()", "out of resource: shared memory"),
        ("tampered(lambda facts: {'parameters': facts['parameters'] + 1}); forward()", "the launcher passes"),
    ],
)
def test_what_is_broken_is_refused(what, says, tmp_path):
    """Each rule by a launch that breaks it; the same launch as it is passes."""
    code = BROKEN.format(root=str(ROOT), what=what)
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    if "NoCompiler" in done.stderr:
        pytest.skip("there is no C compiler here")
    if says is None:
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        assert done.returncode == 1 and says in done.stderr, done.stderr[-2000:]
