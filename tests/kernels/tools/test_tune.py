"""The tuning command: its decisions, with a fake timer and fake gates; and its run, with a fake GPU."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from dpt.kernels import launch
from dpt.kernels.tools import compiler, timer, tune, workload

ROOT = Path(tune.__file__).parents[2]
WHEN = {"D_max": 64}
SHIPPED, QUICK, WRONG, SPILLING, BROKEN, LETHAL = ({"n": n} for n in range(6))


@pytest.fixture
def folder(tmp_path):
    """A table of one kernel, to be tuned."""
    entries = [
        {"when": {"dtype": "float32"}, "config": {"n": 8}, "provenance": "chosen by compiling, not measured"},
        {"when": WHEN, "config": SHIPPED, "provenance": "chosen by compiling, not measured"},
        {"when": {}, "config": {"n": 9}, "provenance": "chosen by compiling, not measured"},
    ]
    (tmp_path / "sm_90.json").write_text(json.dumps({"kernel": entries, "other": entries}))
    return tmp_path


def in_force():
    return launch.config("kernel", "sm_90", torch.float16)


class FakeTrial:
    """Of a workload whose name is a factor on its times."""

    workload = types.SimpleNamespace(precision="ieee")
    expected = None

    def __init__(self, factor=1.0):
        self.factor = factor

    def check(self):
        assert in_force() != WRONG, "off by 1"

    def run(self):
        if in_force() == BROKEN:
            raise RuntimeError("out of resources")
        if in_force() == LETHAL:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return in_force()["n"], self.factor


def bucket(candidates=(QUICK, WRONG, SPILLING, BROKEN), when=WHEN, parent=None, factors=(1.0,)):
    return workload.Bucket("kernel", when, when if parent is None else parent, factors, SHIPPED, (SHIPPED, *candidates))


class Timer:
    """Microseconds from a table {n: time, or a function of the repeats}; keeps what it was asked."""

    def __init__(self, times):
        self.times, self.asked = times, []

    def __call__(self, run, repeats):
        n, factor = run()
        self.asked.append((n, repeats))
        time = self.times[n]
        return factor * (time(repeats) if callable(time) else time)


def tuned(buckets, folder, timer, **kwargs):
    return list(
        tune.tune(
            buckets,
            "sm_90",
            trial=FakeTrial,
            timer=timer if isinstance(timer, Timer) else Timer(timer),
            gates=lambda bucket, candidate: ["spills: 8 bytes"] if candidate == SPILLING else [],
            provenance=lambda bucket, best: f"measured on a fake, {best.microseconds:.1f} us",
            folder=folder,
            **kwargs,
        )
    )


def entries_of(folder, kernel="kernel"):
    return json.loads((folder / "sm_90.json").read_text())[kernel]


def test_fastest_that_passes_wins(folder):
    """The gates, parity and the launch each refuse one candidate, faster than all, with the reason; the fastest of the rest is written."""
    [result] = tuned([bucket()], folder, {0: 10.0, 1: 5.0, 2: 1.0, 3: 1.0, 4: 1.0})
    assert result.best.config == QUICK
    refused = {o.config["n"]: o.refused for o in result.outcomes if o.refused}
    assert refused.pop(2).startswith("AssertionError: off by 1")
    assert refused == {3: "spills: 8 bytes", 4: "RuntimeError: out of resources"}
    assert entries_of(folder)[1] == {"when": WHEN, "config": QUICK, "provenance": "measured on a fake, 5.0 us"}
    assert entries_of(folder)[2]["config"] == {"n": 9}
    assert entries_of(folder, "other")[1]["config"] == SHIPPED


@pytest.mark.parametrize(("time", "winner"), [(9.9, SHIPPED), (9.7, QUICK)])
def test_noise_does_not_replace_the_shipped_configuration(folder, time, winner):
    """A gain of 1 % is noise, one of 3 % is not."""
    [result] = tuned([bucket([QUICK])], folder, {0: 10.0, 1: time})
    assert result.best.config == winner


def test_several_workloads_count_by_their_ratios(folder):
    """A gain of a half where calls are short outweighs a loss of a tenth where they are long: the geometric mean, not the sum."""

    class Uneven(Timer):
        def __call__(self, run, repeats):
            return {(0, "short"): 10.0, (0, "long"): 1000.0, (1, "short"): 5.0, (1, "long"): 1100.0}[run()]

    [result] = tuned([bucket([QUICK], factors=("short", "long"))], folder, Uneven({}))
    assert result.best.config == QUICK and result.best.times == (5.0, 1100.0)


def test_losers_are_timed_few_times(folder):
    """One candidate that is 1.6 times slower than the best so far gets no full measurement, one that is 1.4 times slower does."""
    timer = Timer({0: 10.0, 1: 14.0, 6: 16.0})
    tuned([bucket([QUICK, {"n": 6}])], folder, timer)
    full = [n for n, repeats in timer.asked if repeats == tune.REPEATS]
    assert (6, tune.FEW) in timer.asked and full.count(1) == 2 and full.count(6) == 1  # the last: as a finalist, of three


def test_the_finalists_are_timed_again(folder):
    """A clock that was low when the shipped configuration was timed first must not make the choice: the times at the end do."""
    times = iter([20.0, 20.0, 10.0])
    [result] = tuned([bucket([QUICK])], folder, {0: lambda repeats: next(times), 1: 12.0})
    assert result.best.config == SHIPPED and result.best.microseconds == pytest.approx(10.0)


def test_a_failure_among_the_finalists_costs_nothing(folder):
    """A launch that fails when it is timed for the last time does not take with it what was measured before."""
    calls = iter([5.0, 5.0])  # few and full; the third raises StopIteration
    [result] = tuned([bucket([QUICK])], folder, {0: 10.0, 1: lambda repeats: next(calls)})
    assert result.best.config == QUICK and entries_of(folder)[1]["config"] == QUICK


def test_nothing_passes(folder):
    """The table stays as it is."""
    before = (folder / "sm_90.json").read_text()
    found = workload.Bucket("kernel", {"D_max": 32}, WHEN, (1.0,), SPILLING, (SPILLING, BROKEN))
    [result] = tuned([found], folder, {})
    assert result.best is None and (folder / "sm_90.json").read_text() == before


def test_workloads_that_cannot_be_set_up(folder):
    """A reference that runs out of memory is told, nothing is written, and the next bucket has its turn."""

    class Impossible(FakeTrial):
        @property
        def expected(self):
            if self.factor > 1:
                raise RuntimeError("out of memory")

    results = list(
        tune.tune(
            [bucket([], factors=(2.0,)), bucket([QUICK])], "sm_90", trial=Impossible, timer=Timer({0: 10.0, 1: 5.0}),
            gates=lambda *_: [], provenance=lambda *_: "", folder=folder,
        )
    )  # fmt: skip
    assert "out of memory" in results[0].failed and results[0].best is None and results[1].best.config == QUICK


def test_a_new_bucket_comes_before_the_one_it_narrows(folder):
    """The first entry that holds counts: a new one stands before the more general one, and behind those that came first until now."""
    tuned([bucket([QUICK], when={"D_max": 64, "N_max": 100}, parent=WHEN)], folder, {0: 9.0, 1: 5.0})
    assert [entry["when"] for entry in entries_of(folder)] == [{"dtype": "float32"}, {"D_max": 64, "N_max": 100}, WHEN, {}]
    tuned([bucket([QUICK], when={"D_max": 64, "N_max": 100})], folder, {0: 5.0, 1: 6.0})
    assert [entry["config"] for entry in entries_of(folder)] == [{"n": 8}, SHIPPED, SHIPPED, {"n": 9}]


def test_budget(folder):
    """Over the budget no candidate is begun, and no bucket; what was found until then is written."""
    clock = iter([0.0, 1.0, 2.0, 3.0, 11.0, 12.0]).__next__  # start, bucket, two candidates in time, one not; no further bucket
    results = tuned([bucket([QUICK, {"n": 6}]), bucket([QUICK], when={})], folder, {0: 10.0, 1: 5.0, 6: 1.0}, budget=10.0, clock=clock)
    assert len(results) == 1 and [o.config for o in results[0].outcomes] == [SHIPPED, QUICK]
    assert [entry["config"] for entry in entries_of(folder)] == [{"n": 8}, QUICK, {"n": 9}]


def test_waiting_for_the_compiler_ends_with_the_budget():
    """A candidate that is still being compiled is not waited for beyond the budget; one that is ready is taken even then."""
    asked = []

    class Pending:
        def get(self, seconds):
            asked.append(seconds)
            raise tune.multiprocessing.TimeoutError

    pool = object.__new__(tune.CompilerPool)
    seconds = iter([200.0, 7.0, -1.0]).__next__
    pool._left, found = lambda: seconds(), bucket()
    refused = []
    for candidate in (QUICK, WRONG, BROKEN):
        pool._results = {pool._key(found, candidate): Pending()}
        refused += pool(found, candidate)
    assert asked == [tune.COMPILE_SECONDS, 7.0, 0.0] and refused[1] == "not compiled after 7 s of waiting"


def test_two_cores_are_left_free(monkeypatch):
    """The pool takes no core from the process that launches what is timed, and has one on the smallest machine."""
    counts = []
    for cores in (16, 3, 2, 1):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        counts.append(tune.processes())
    assert counts == [14, 1, 1, 1]


def test_without_git(monkeypatch, tmp_path):
    """A rented machine has no git, or the checkout no history: the run is not lost, its commit is unknown."""
    assert tune._commit() == "unknown" or len(tune._commit()) >= 7
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tune._commit() == "unknown"
    (tmp_path / "git").write_text("#!/bin/sh\necho fatal >&2; exit 128\n")
    (tmp_path / "git").chmod(0o755)
    assert tune._commit() == "unknown"


def test_each_candidate_is_launched_before_it_is_timed(folder):
    """The first launch of a signature builds a C function, for a second or so: it falls into the check, before the first timing."""
    log = []

    class Logged(FakeTrial):
        def check(self):
            log.append(("check", in_force()["n"]))

    def timer(run, repeats):
        log.append(("time", in_force()["n"]))
        return 10.0

    list(tune.tune([bucket([QUICK])], "sm_90", trial=Logged, timer=timer, gates=lambda *_: [], provenance=lambda *_: "", folder=folder))
    for n in (0, 1):
        assert log.index(("check", n)) < log.index(("time", n))


class FakeDevice:
    """A GPU that waits, and then runs what was queued: a call is in time if its wait is longer than the host needs."""

    def __init__(self, monkeypatch, needed):
        self.log, self.needed, self.slept = [], needed, 0
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: self)
        monkeypatch.setattr(tune, "_scratch", lambda: types.SimpleNamespace(zero_=lambda: self.log.append("flush")))

    def sleep(self, cycles):
        self.slept = cycles
        self.log.append(f"sleep {cycles}")

    def record(self):
        self.log.append("event")

    def query(self):
        return self.slept < self.needed

    def synchronize(self):
        self.log.append("wait")

    def elapsed_time(self, end):
        return self.slept


def test_the_device_waits_until_a_call_is_queued(monkeypatch):
    """The order of things: one call first, which may compile; then the flush, the wait, the first event, the call, the second event."""
    device = FakeDevice(monkeypatch, needed=0)
    assert tune.time_on_gpu(lambda: device.log.append("run"), 2) == 1000 * timer.SHORTEST
    one = ["flush", f"sleep {timer.SHORTEST}", "event", "run", "event"]
    assert device.log == ["run", *one, *one, "wait"]


@pytest.mark.parametrize(("needed", "last"), [(5, timer.SHORTEST), (timer.SHORTEST * 10, timer.SHORTEST * 16), (1e12, None)])
def test_calls_that_come_late_are_timed_again_behind_a_longer_wait(monkeypatch, needed, last):
    """A time with the host's gaps in it is not taken for the device's; a call that is late behind any wait ends the waiting."""
    FakeDevice(monkeypatch, needed)
    found = tune.time_on_gpu(lambda: None, 5) / 1000
    assert found == last if last else timer.LONGEST <= found < timer.LONGEST * timer.LONGER


def test_a_lost_gpu_ends_the_run(folder):
    """After an illegal access everything fails in the same process: what was measured before it is written, and nothing else judged."""
    results = tuned([bucket([QUICK, LETHAL, {"n": 6}]), bucket([QUICK], when={})], folder, {0: 10.0, 1: 5.0, 6: 1.0})
    assert len(results) == 1 and results[0].lost and [o.config for o in results[0].outcomes] == [SHIPPED, QUICK, LETHAL]
    assert entries_of(folder)[1]["config"] == QUICK


def test_write_entries(folder):
    """The whole list of one kernel, which must end with a default; no partial file is left."""
    with pytest.raises(ValueError, match="must end with one that has no conditions"):
        tune.write_entries("sm_90", "kernel", [{"when": WHEN, "config": {}, "provenance": ""}], folder)
    tune.write_entries("sm_90", "kernel", [{"when": {}, "config": QUICK, "provenance": "p"}], folder)
    assert entries_of(folder) == [{"when": {}, "config": QUICK, "provenance": "p"}]
    assert sorted(path.name for path in folder.iterdir()) == ["sm_90.json"]


def test_settle(folder):
    """A measured entry that another Triton compiles badly is replaced by the next best, one that has none is told, a good one stays."""
    tuned([bucket([QUICK, {"n": 6}, {"n": 7}])], folder, times := {0: 10.0, 1: 5.0, 6: 7.0, 7: 6.0})
    outcomes = [{"config": {"n": n}, "microseconds": time} for n, time in times.items()]
    outcomes.append({"config": SPILLING, "microseconds": None})
    found = {"kernel": "kernel", "when": WHEN, "chosen": QUICK, "outcomes": outcomes}
    record = {"family": "sm_90", "provenance": "measured on a fake", "buckets": [found, {**found, "chosen": None}]}

    def only(*good):
        return lambda kernel, when, family: [] if entries_of(folder)[1]["config"] in good else ["spills"]

    assert tune.settle(record, only(QUICK), folder) and entries_of(folder)[1]["config"] == QUICK
    assert tune.settle(record, only(SHIPPED, {"n": 6}), folder)
    assert entries_of(folder)[1]["config"] == {"n": 6} and entries_of(folder)[1]["provenance"].startswith("measured on a fake: 7.0 us")
    assert not tune.settle(record, only(SPILLING), folder)


def test_entry_problems_looks_at_the_entry_s_cases_only(monkeypatch):
    """What is compiled for an entry are the compile cases that it serves, of every op that launches the kernel."""
    monkeypatch.setattr(compiler, "measure", lambda case: types.SimpleNamespace(problems=[case.name]))
    partial, whole = (tune.entry_problems("upsample_bilinear_backward", when, "sm_90") for when in ({"partial": True}, {}))
    assert partial and whole and not {*partial} & {*whole}
    assert all("C=150" in problem or "C=32" in problem for problem in partial) and all("C=256" in problem for problem in whole)


# The command.


def run_command(*arguments):
    command = [sys.executable, "-m", "dpt.kernels.tools.tune", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def tables():
    return {path.name: path.read_text() for path in launch.CONFIGS.glob("*.json")}


def test_refuses_without_a_gpu(device):
    """Politely: a sentence and exit code 2, and nothing is written."""
    if device.type == "cuda":
        pytest.skip("there is a GPU")
    before = tables()
    done = run_command()
    assert done.returncode == 2 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr
    assert tables() == before


def test_dry_run(capsys):
    """Without a GPU: every entry with the number of its candidates; nothing is written."""
    before, declared = tables(), tune.workloads()
    assert tune.main(["--dry-run", "--arch", "sm_80", "--stage", "forward", "--dtype", "half"]) == 0
    assert f"{len(tune.chosen(workload.buckets(declared, 'sm_80'), 'forward', 'half'))} entries" in capsys.readouterr().out
    assert tune.main(["--dry-run", "--arch", "sm_80"]) == 0
    printed = capsys.readouterr().out
    found = workload.buckets(declared, "sm_80")
    assert f"{len(found)} entries, {sum(len(b.candidates) for b in found)} candidates" in printed
    assert "conv3x3 {'pixels_max': 32768} (new): " in printed and tables() == before


@pytest.fixture
def fake_gpu(folder, monkeypatch):
    """main() on a GPU that is not there: a compiler that compiles nothing, a timer that knows the times, calls of further processes."""

    class Pool:
        def __init__(self, found, family, processes, left):
            assert family == "sm_90" and processes == tune.processes() and left() <= 100

        def __call__(self, bucket, candidate):
            return ["spills"] if candidate == SPILLING else []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    named = types.SimpleNamespace(name="a workload")
    found = [
        workload.Bucket("kernel", WHEN, WHEN, (named,), SHIPPED, (SHIPPED, QUICK, SPILLING)),
        workload.Bucket("kernel", {"dtype": "float32"}, WHEN, (named,), SHIPPED, (SHIPPED, LETHAL)),
        workload.Bucket("kernel", {}, {}, (named,), SHIPPED, (SHIPPED, QUICK)),
    ]
    calls = []
    write = tune.write_config
    environment = dict.fromkeys(("device", "date", "commit", "torch", "triton", "cuda", "python"), "fake")
    monkeypatch.setattr(tune, "buckets", lambda *_: found)
    monkeypatch.setattr(tune, "CompilerPool", Pool)
    monkeypatch.setattr(tune, "Trial", lambda work, device: FakeTrial())
    monkeypatch.setattr(tune, "time_on_gpu", Timer({0: 10.0, 1: 5.0}))
    monkeypatch.setattr(tune, "_environment", lambda: environment)
    monkeypatch.setattr(tune, "write_config", lambda *args, before: write(*args[:5], folder, before))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launch, "device_family", lambda device: "sm_90")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 0)
    return calls


def test_main(fake_gpu, folder, tmp_path, capsys):
    """Everything around the GPU: the table, the record of every outcome, and a new process that goes on behind an illegal access."""
    file = tmp_path / "record.json"
    assert tune.main(["--budget", "100", "--json", str(file)]) == 0
    assert [entry["config"] for entry in entries_of(folder)] == [SHIPPED, QUICK, {"n": 9}]
    assert entries_of(folder)[1]["provenance"].startswith("measured on fake, fake, commit fake")
    [command] = fake_gpu
    assert command[1:4] == ["-m", "dpt.kernels.tools.tune", "--budget"] and command[-2:] == ["--skip", "2"]
    assert 90 <= float(command[command.index("--budget", 5) + 1]) <= 100
    record = json.loads(file.read_text())
    assert [b["chosen"] for b in record["buckets"]] == [QUICK, SHIPPED] and record["family"] == "sm_90"
    outcomes = {o["config"]["n"]: o for b in record["buckets"] for o in b["outcomes"]}
    assert outcomes[1]["microseconds"] == pytest.approx(5.0) and outcomes[3]["refused"] == "spills" and "illegal" in outcomes[5]["refused"]
    assert "5.0 us, shipped 10.0 us (3 of 3 candidates, 1 refused)" in capsys.readouterr().out
    assert tune.main(["--budget", "100", "--json", str(file), "--skip", "2"]) == 0
    assert len(json.loads(file.read_text())["buckets"]) == 3 and entries_of(folder)[2]["config"] == QUICK
    assert tune.main(["--budget", "-1", "--json", str(file)]) == 0
    assert "not reached: kernel" in capsys.readouterr().out


PROBE = """
import dataclasses, torch, triton
from dpt.kernels import launch
from dpt.kernels.tools import compiler, tune, workload
from triton.runtime import driver

def toys():
    for work in tune.workloads(["linear_residual", "argmax_upsample"]):
        if work.name.startswith(("linear residual rows=1025", "argmax batch=1 classes=9")) and work.dtype == torch.bfloat16:
            yield dataclasses.replace(work, sizes={**work.sizes, **work.small}, narrow={})

def compile_as_a_launch_does(kernel, grid, *args, **kwargs):
    kernel.warmup(*args, grid=grid, **kwargs)

if __name__ == "__main__":
    tune.COMPILE_SECONDS = 600
    found = [dataclasses.replace(b, candidates=b.candidates[:1]) for b in workload.buckets(toys(), "sm_90")]
    with tune.CompilerPool(found, "sm_90", 1, lambda: 600) as gates:
        problems = [gates(b, b.candidates[0]) for b in found]
    hits = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    driver.set_active(compiler._CompileOnly(90))
    launch.launch = compile_as_a_launch_does
    for b in found:
        for work in b.workloads:
            work.launcher(**work.build("cpu"))
    print(problems, hits)
"""


def test_launches_find_what_the_pool_compiled(tmp_path):
    """The pool compiles for tensors on the meta device, in another process: what a launch with memory behind its tensors looks up in
    Triton's cache is there, with and without descriptors, so that the measuring process compiles nothing."""
    script = tmp_path / "probe.py"
    script.write_text(PROBE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache"), "DPT_KERNELS_FAMILY": "sm_90"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[[], []] [True, True]", done.stdout + done.stderr
