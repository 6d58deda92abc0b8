"""One case, with made-up contenders: what is timed, what is refused, what the budget leaves out, and what the rows say."""

import pytest
import torch

from bench.harness import runner
from bench.harness.runner import Case, Prepared, Unavailable

EXACT = torch.linspace(1.0, 2.0, 100, dtype=torch.float64)


class Made:
    """An opened case whose contenders are functions: name -> (seconds of a run, output)."""

    flops, bytes, per_run, unit, rms = 1_000_000_000, None, 2.0, "images", False

    def __init__(self, contenders, clock, setup=None):
        self.contenders, self.clock, self.setup = contenders, clock, setup or {}
        self.runs = {name: 0 for name in contenders}

    def other_plain(self):
        return None

    def exact(self):
        return [EXACT]

    def prepare(self, contender):
        seconds, output = self.contenders[contender]
        if isinstance(output, Exception):
            raise output
        self.clock.advance(self.setup.get(contender, 0.0))

        def run(index):
            self.runs[contender] += 1
            self.clock.advance(seconds)
            return output

        return Prepared(run, held=lambda: 1000)


@pytest.fixture
def timer(monkeypatch, clock):
    """Times runs on the made-up clock, and the peak memory of a run is what it returns."""

    class Timer:
        how = "made-up clock"

        def __call__(self, run, index):
            started = clock.now
            run(index)
            return clock.now - started

    monkeypatch.setattr(runner.measure, "timer_of", lambda device, alone: Timer())
    monkeypatch.setattr(runner.measure, "peak_memory", lambda run, device: run() or 24)


def measured(contenders, context, clock, estimate=0.0, setup=None, names=None, **case):
    opened = Made(contenders, clock, setup)
    made = Case("models", "case", torch.float32, (1,), tuple(contenders), lambda c: opened, estimate=lambda: estimate, **case)
    rows, skips = runner.measure_case(made, names or contenders, context)
    return {row.contender: row for row in rows}, {skip.contender: skip.reason for skip in skips}, opened


RIGHT = EXACT.float()
WRONG = RIGHT + 1e-3


def test_a_wrong_contender_is_not_timed(context, clock, timer):
    """Blind spot: a number for something that computes something else; it is told, with how far it is off, and never run again."""
    rows, _, opened = measured({"plain": (1.0, RIGHT), "quick": (0.1, WRONG), "fast": (0.5, RIGHT)}, context, clock)
    assert rows["quick"].status == "failed" and rows["quick"].p50_ms is None and rows["quick"].durations_ms == []
    assert rows["quick"].problem.startswith("off by 5.00e-04") and rows["quick"].speedup is None
    assert opened.runs == {"plain": 5, "quick": 1, "fast": 5}
    assert rows["fast"].status == "ok" and rows["fast"].speedup == pytest.approx(2.0)


def test_what_a_row_says(context, clock, timer):
    """Blind spot: milliseconds for seconds, runs for images, a roofline upside down, memory without the parameters."""
    rows, _, _ = measured({"plain": (2.0, RIGHT), "fast": (0.5, RIGHT)}, context, clock)
    row = rows["fast"]
    assert (row.p20_ms, row.p50_ms, row.p80_ms) == (500.0, 500.0, 500.0) and row.durations_ms == [500.0] * 4
    assert row.per_second == pytest.approx(4.0)  # two images a run of half a second
    assert row.roofline_share == pytest.approx(2.0)  # 1 GFLOP at 1 GFLOP/s is a second
    assert row.peak_memory_bytes == 1024
    assert (row.speedup, row.speedup_low, row.speedup_high) == pytest.approx((4.0, 4.0 / 1.02, 4.0 * 1.02))
    assert row.timing == "made-up clock" and row.baseline == "plain" and row.difference == 0.0
    assert rows["plain"].speedup == 1.0


def test_each_contender_runs_before_it_is_timed(context, clock, monkeypatch):
    """Blind spot: the first launch of a kernel compiles it, and builds the C function that launches it: seconds in the first round."""
    judged, runs_before = [], {}

    class Timer:
        how = "made-up clock"

        def __call__(self, run, index):
            runs_before.setdefault(run, len(judged))
            return 1.0

    monkeypatch.setattr(runner.measure, "timer_of", lambda device, alone: Timer())
    monkeypatch.setattr(runner.measure, "peak_memory", lambda run, device: judged.append(run()) or 24)
    measured({"plain": (1.0, RIGHT), "fast": (0.5, RIGHT)}, context, clock)
    assert list(runs_before.values()) == [2, 2]


@pytest.mark.parametrize(
    ("suite", "alone"), [("kernels", True), *((suite, False) for suite in ("models", "transformers", "steps", "training", "pictures"))]
)
def test_whose_time_it_is(context, monkeypatch, suite, alone):
    """Blind spot: a model's host time hidden, or a kernel's time that is the host's. A session makes one timer of a kind."""
    asked = []
    monkeypatch.setattr(runner.measure, "timer_of", lambda device, alone: asked.append(alone) or object())
    case = Case(suite, "case", torch.float32, (1,), ("plain",), lambda c: None)
    timers = [runner._Measurement(case, ["plain"], context).timer for _ in range(2)]
    assert asked == [alone] and timers[0] is timers[1]


def test_what_cannot_run_is_told(context, clock, timer):
    """Blind spot: a peer that is missing, breaks or needs too much memory takes the others with it, or vanishes."""
    broken = {
        "plain": (1.0, RIGHT),
        "missing": (1.0, Unavailable("it is not installed")),
        "large": (1.0, torch.OutOfMemoryError("CUDA out of memory")),
        "broken": (1.0, KeyError("graph")),
        "fast": (0.5, RIGHT),
    }
    rows, skips, _ = measured(broken, context, clock)
    assert skips == {"missing": "it is not installed", "large": "out of memory"}
    assert rows["broken"].status == "error" and rows["broken"].problem.startswith("KeyError: 'graph'")
    assert rows["fast"].status == "ok"


def test_without_its_baseline_a_case_is_skipped(context, clock, timer):
    """Blind spot: ratios to nothing, and a gate without what it allows by."""
    rows, skips, _ = measured({"plain": (1.0, Unavailable("no")), "fast": (0.5, RIGHT)}, context, clock)
    assert not rows and skips == {"plain": "no", "": "its baseline, plain, did not run"}


def test_a_case_that_does_not_fit_is_not_begun(context, clock, timer):
    """Blind spot: the budget looked at only when it is over. 100 GFLOP at half of 1 GFLOP/s, 8 runs: 1600 s of 1000."""
    rows, skips, opened = measured({"plain": (1.0, RIGHT)}, context, clock, estimate=1e11)
    assert not rows and skips[""].startswith("does not fit: needs about 1600 s, 1000 s are left")
    assert opened.runs == {"plain": 0}


def test_contenders_that_do_not_fit_are_left_out_last_first(context, clock, timer):
    """Blind spot: a budget spent on the least important contender. Runs of 88 s, 4 rounds and 2 more of each."""
    contenders = {"plain": (88.0, RIGHT), "fast": (10.0, RIGHT), "third": (10.0, RIGHT), "last": (10.0, RIGHT)}
    rows, skips, _ = measured(contenders, context, clock)
    assert set(rows) == {"plain", "fast"} and set(skips) == {"third", "last"}
    assert skips["third"].startswith("does not fit: needs about 920 s, 902 s are left")


def test_a_contender_that_took_too_long_to_get_ready_is_dropped(context, clock, timer):
    """Blind spot: compiling takes what the rounds of all others need. It took 994 of 1000 s, where 60 were expected."""
    contenders = {"plain": (1.0, RIGHT), "plain, torch.compile": (0.5, RIGHT)}
    rows, skips, _ = measured(contenders, context, clock, setup={"plain, torch.compile": 994.0})
    assert set(rows) == {"plain"} and "took so long to get ready" in skips["plain, torch.compile"]
    assert context.setup_seconds("models", "plain, torch.compile") == 994.0  # and is expected to the next time
    assert len(rows["plain"].durations_ms) == 4


def test_only_the_named_and_the_baseline(context, clock, timer):
    """Blind spot: a name filter that leaves out what the ratios are of."""
    rows, _, opened = measured({"plain": (1.0, RIGHT), "fast": (0.5, RIGHT), "peer": (1.0, RIGHT)}, context, clock, names=["fast"])
    assert set(rows) == {"plain", "fast"} and opened.runs["peer"] == 0


def test_a_case_that_is_not_there_yet(context, clock, timer):
    """Blind spot: a listed case without a model, opened."""
    rows, skips, _ = measured({"plain": (1.0, RIGHT)}, context, clock, unavailable="dpt.models() has no such model yet")
    assert not rows and skips == {"": "dpt.models() has no such model yet"}


def test_each_dtype_is_allowed_what_plain_loses_in_it(context, clock, timer):
    """Blind spot: a bfloat16 step judged by float32's loss, or a float32 one by bfloat16's."""
    half = EXACT.bfloat16()
    outputs = {"plain": RIGHT, "half": half, "half and fast": half, "single and wrong": WRONG}

    class Mixed(Made):
        def prepare(self, contender):
            prepared = super().prepare(contender)
            prepared.dtype = torch.bfloat16 if contender.startswith("half") else torch.float32
            return prepared

    opened = Mixed({name: (1.0, output) for name, output in outputs.items()}, clock)
    case = Case("steps", "case", torch.bfloat16, (1,), tuple(outputs), lambda c: opened)
    context.ceilings["gemm_bfloat16_flop_per_second"] = 1e9
    rows, _ = runner.measure_case(case, outputs, context)
    found = {row.contender: (row.status, row.dtype) for row in rows}
    assert found == {
        "plain": ("ok", "float32"),
        "half": ("ok", "bfloat16"),
        "half and fast": ("ok", "bfloat16"),
        "single and wrong": ("failed", "float32"),
    }
