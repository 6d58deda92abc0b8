"""The suite under pytest: its options, pytest-benchmark's file, exit codes and records, on made-up cases, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import ROOT
from bench.harness import records, session

REPLAY = session.Replay()
OURS = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")  # what this process is, and a run that measures is not

MADE_UP = """
import torch
from bench.harness.runner import Case, Prepared, Unavailable

RIGHT = torch.arange(1.0, 5.0)
RESULTS = {"plain": (1.0, RIGHT), "fast": (FAST, RIGHT), "absent": (1.0, None), **EXTRA}


class Made:
    flops, bytes, per_run, unit, rms = None, None, 1.0, "images", False

    def other_plain(self):
        return None

    def exact(self):
        return [RIGHT.double()]

    def prepare(self, contender):
        size, output = RESULTS[contender]
        if output is None:
            raise Unavailable("it is not here")
        work = torch.zeros(int(size * 4_000_000))

        def run(index):
            work.add_(1.0)
            return output

        return Prepared(run)


def cases(device_type, dtypes):
    return [Case("models", "made up, batch 1", torch.float32, (1,), tuple(RESULTS), lambda context: Made())]


def test_models(cell, measured):
    measured(cell)
"""


def run(folder, *arguments, fast=0.25, extra="{}", **environment):
    """pytest on the made-up cases, with the suite's own conftest as a plugin."""
    file = folder / "test_made_up.py"
    file.write_text(MADE_UP.replace("FAST", str(fast)).replace("EXTRA", extra))
    command = [sys.executable, "-m", "pytest", str(file), "-q", "-p", "bench.conftest", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    variables = {key: value for key, value in os.environ.items() if key not in OURS}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=folder, env=variables, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.benchmark(timer=REPLAY.clock)
def test_pytest_benchmark_sees_the_recorded_durations(benchmark):
    """Blind spot: pytest-benchmark's numbers are those of the replay's own function, or in another order."""
    durations = [0.5, 0.25, 1e-6, 3.0]
    REPLAY.feed(benchmark, durations)
    if benchmark.stats is None:
        pytest.skip("pytest-benchmark is switched off here (xdist)")
    assert benchmark.stats.stats.data == pytest.approx(durations, rel=1e-9)


def test_one_command_a_table_a_file(tmp_path):
    """Blind spot: what the command promises. Numbers in pytest-benchmark's file and in the record are the same; skips are told."""
    arguments = ("--benchmark", "--record-to", str(tmp_path / "results"), "--benchmark-json", str(tmp_path / "benchmark.json"))
    code, output = run(tmp_path, *arguments, extra='{"wrong": (0.1, RIGHT + 1)}')
    assert code == 1 and "wrong: off by" in output  # a gate that is not passed fails its test
    assert "FAILED: off by" in output and "it is not here:\n    made up, batch 1: absent" in output
    [path] = (tmp_path / "results").glob("*.json")
    record = records.read(path)
    assert {row.contender: row.status for row in record.rows} == {"plain": "ok", "fast": "ok", "wrong": "failed"}
    assert [(skip.contender, skip.reason) for skip in record.skipped] == [("absent", "it is not here")]
    fast = record.row(("made up, batch 1", "fast"))
    assert fast.speedup > 1.5 and fast.speedup_low <= fast.speedup <= fast.speedup_high
    found = {entry["name"]: entry for entry in json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]}
    assert set(found) == {"test_models[made-up-batch-1-plain]", "test_models[made-up-batch-1-fast]"}
    entry = found["test_models[made-up-batch-1-fast]"]
    assert entry["group"] == "made up, batch 1" and entry["extra_info"]["timing"] == "wall clock"
    assert [1000 * seconds for seconds in entry["stats"]["data"]] == pytest.approx(fast.durations_ms, abs=1e-5)


def test_against_a_recorded_run(tmp_path):
    """Blind spot: a regression that does not fail the command, or a repetition that does."""
    results = tmp_path / "results"
    assert run(tmp_path, "--benchmark", "--record-to", str(results))[0] == 0
    [path] = results.glob("*.json")
    code, output = run(tmp_path, "--benchmark", "--against", str(path), "--margin", "0.3")
    assert code == 0 and "1 ratios compared, 0 regressed" in output
    code, output = run(tmp_path, "--benchmark", "--against", str(path), "--margin", "0.3", fast=4.0)  # 16 times slower: no noise hides it
    assert code == 1 and "REGRESSED by more than 30%: made up, batch 1: fast" in output
    content = path.read_text().replace('"kind": "cpu"', '"kind": "cuda"')
    path.write_text(content)
    code, output = run(tmp_path, "--benchmark", "--against", str(path))
    assert code == 4 and "ratios of different devices do not compare" in output and "passed" not in output


def test_without_the_option_nothing_is_measured(tmp_path):
    """Blind spot: toy timings that pass for measurements; a toy run that does not hold the cases to the gate."""
    code, output = run(tmp_path, "--benchmark-json", str(tmp_path / "benchmark.json"), extra='{"wrong": (0.1, RIGHT + 1)}')
    assert code == 1 and "wrong: off by" in output
    assert "p50" not in output and "images/s" not in output
    assert not (tmp_path / "benchmark.json").exists() or not (tmp_path / "benchmark.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--record",), {}, "need --benchmark"),
        (("--benchmark", "--without", "fsat"), {}, "--without fsat: no contender here has that in its name; there are absent, fast, plain"),
        (("--benchmark", "-n", "2"), {}, "one process"),
        (("--benchmark",), {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET"),
        (("--benchmark", "--dtypes", "float8"), {}, "no dtype 'float8'"),
        (("--benchmark", "--device", "cuda"), {"CUDA_VISIBLE_DEVICES": ""}, "there is no CUDA device"),
        (("--benchmark", "--against", "none.json"), {}, "none.json"),
    ],
)
def test_refusals(tmp_path, arguments, environment, message):
    """Blind spot: options that are taken and do nothing, or spoil what they are to measure."""
    code, output = run(tmp_path, *arguments, **environment)
    assert code == 4 and message in output and "passed" not in output


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_option_does_not_collide_with_pytest_benchmark(place):
    """Blind spot: `--benchmark` read as an abbreviation of `--benchmark-...`, on either side of the folder. The real suite, collected."""
    words = ["--benchmark", "bench/"] if place == "before" else ["bench/", "--benchmark"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        *words,
        "--only",
        "tiny",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "--device",
        "cpu",
    ]
    variables = {key: value for key, value in os.environ.items() if key not in OURS}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_models[dpt-tiny-depth-192x192-batch-1-float32-plain]" in done.stdout
    assert "ambiguous" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "contenders", "part"),
    [
        ((), {"plain", "fast", "fast twice"}, ""),
        (("--without", "twice", "--without", "absent"), {"plain", "fast"}, "2 of 4 rows, without twice, without absent"),
        (("--without", "plain"), {"plain", "fast", "fast twice"}, "3 of 4 rows, without plain"),  # the baseline takes part all the same
        (("--only", "not twice"), {"plain", "fast"}, "3 of 4 rows, only `not twice`"),
        (("--deselect", "test_made_up.py::test_models[made-up-batch-1-fast]"), {"plain", "fast twice"}, "3 of 4 rows"),
    ],
)
def test_a_record_says_what_was_asked_for(tmp_path, arguments, contenders, part):
    """Blind spot: a part of a suite that passes for the whole, however it was chosen; contenders that run though they were left out."""
    extra = '{"fast twice": (0.1, RIGHT)}'
    code, output = run(tmp_path, "--benchmark", "--record-to", str(tmp_path / "results"), *arguments, extra=extra)
    assert code == 0, output
    [path] = (tmp_path / "results").glob("*.json")
    record = records.read(path)
    assert {row.contender for row in record.rows} == contenders and record.part == part


@pytest.mark.parametrize("toy", [True, False])
def test_only_what_is_measured_has_cudnn_try_its_algorithms(monkeypatch, toy):
    """Blind spot: a toy run, as under the sanitizer, that spends its minutes on cuDNN's choice of algorithms."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(session.environment, "state", lambda device: {})
    session.Bench(torch.device("cuda"), (torch.bfloat16,), session.measure.Budget(1.0), toy=toy)
    assert torch.backends.cudnn.benchmark is not toy


def test_sums_to_ten_minutes():
    """Blind spot: a default budget that is more than what the README promises."""
    assert session.DEFAULT_BUDGET["cpu"] < 600 and session.DEFAULT_BUDGET["cuda"] < 480


@pytest.mark.parametrize("asked", [True, False])
def test_freed_memory_is_kept_where_that_is_asked(monkeypatch, asked):
    """Blind spot: plain PyTorch measured otherwise than in a user's process, and a record that does not say so."""
    monkeypatch.setattr(session.measure, "keep_freed_memory", lambda: True)
    monkeypatch.setattr(session.environment, "state", lambda device: {})
    for toy in (False, True):
        bench = session.Bench(torch.device("cpu"), (torch.float32,), session.measure.Budget(1.0), toy=toy, keep_freed_memory=asked)
        assert bench.memory_kept is asked
