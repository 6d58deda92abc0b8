"""The benchmarks' own parts, on made-up numbers: nothing here measures anything. One thread a test, for the machines with two cores."""

import gc
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]  # for `from made_up import ...`, whatever the import mode
torch.set_num_threads(1)

from bench.harness import measure, runner  # noqa: E402


@pytest.fixture(autouse=True)
def nothing_old() -> Iterator[None]:
    """What other tests left is not looked through for garbage, which takes longer than most tests; a case that is measured collects it."""
    gc.freeze()
    yield
    gc.unfreeze()


class Clock:
    """A clock that moves only by `advance`."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def context(clock) -> runner.Context:
    """A session with a thousand seconds on a clock that stands still."""
    found = runner.Context(torch.device("cpu"), measure.Budget(1000.0, clock), measure.Rounds(4, 4, 0.0), clock=clock)
    found.ceilings = {"gemm_float32_flop_per_second": 1e9, "copy_byte_per_second": 1e9}
    return found
