"""The time model on compiled code: the committed predictions are current, what is published comes out, every kernel's loops can be read.

The compiler runs in a process of its own without TRITON_INTERPRET, so these tests do not care how theirs was started.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from dpt.kernels.tools import compiler, spaces

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_committed_predictions_are_current():
    """The record holds the specialisations that the forwards launch now, the table is what the model makes of it, and what is drawn has the
    loops that it is recorded with."""
    if triton.__version__ != compiler.TABLE_TRITON:
        pytest.skip(f"the record is of triton {compiler.TABLE_TRITON}; {triton.__version__} compiles other loops")
    run("-m", "dpt.kernels.tools.predict", "--check", "--draw", "2", "--seed", str(random.randrange(2**32)))


PUBLISHED = """
import json
import torch
from dpt.kernels import launch
from dpt.kernels.attention import _forward
from dpt.kernels.tools import loops, predicted
from dpt.kernels.tools.cards import CARDS

found, known = {}, {}
for tokens in (1024, 2048, 4096):
    batch, heads, width = 16384 // tokens, 16, 64
    qkv = torch.empty(batch, tokens, 3, heads, width, dtype=torch.bfloat16, device="meta")
    counts = predicted.counted(launch.record("sm_90", "x", _forward, qkv, None, None, width**-0.5, "ieee"), known)
    time = predicted.forward(counts, known, CARDS["sm_90"]).microseconds
    found[tokens] = 4 * batch * heads * tokens**2 * width / time / 1e6
print(json.dumps(found))
"""


def test_what_is_published_comes_out():
    """Triton's attention, D=64, forward, on an H100: 382, 396 and 400 TFLOP/s are published. Held to the model's own word, +-25 %: our
    kernel is another, and becomes faster; the figures of the day that the model was calibrated were within 4 %."""
    found = json.loads(run("-c", PUBLISHED))
    for tokens, published in (("1024", 382), ("2048", 396), ("4096", 400)):
        assert found[tokens] == pytest.approx(published, rel=0.25)


READ = """
import random, sys
from dpt.kernels.tools import loops, spaces, time_model
from dpt.kernels.tools.cards import CARDS

op, family, seed = sys.argv[1:]
cases = {}
for case in spaces.space(op).compile_cases(family):
    cases.setdefault(case.function.__name__, []).append(case)
choice = random.Random(int(seed))
for case in (choice.choice(of_kernel) for of_kernel in cases.values()):
    facts = loops.facts(case)
    made = time_model.predict(time_model.launch_of(case, "key"), {"key": facts}, CARDS[family])
    assert made.microseconds > time_model.LAUNCH and 0 <= made.idle <= 1, (case.name, made)
    assert case.tensor_cores is False or family == "sm_100" or any(region["flops"] for region in facts["regions"]), case.name
    print(case.name)
"""


@pytest.mark.parametrize("op", spaces.ops())
def test_every_kernels_loops_can_be_read(op):
    """A launch of each of the op's kernels, drawn at random, on a family drawn at random: its loops are found in Triton's code, and their
    bounds follow from its arguments."""
    family = random.choice(compiler.DEFAULT_FAMILIES)
    assert run("-c", READ, op, family, str(random.randrange(2**32)))
