"""The tuning command's decisions, with a fake timer and fake gates: what is refused, what wins, what is written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dpt.kernels import launch, tune

WHEN = {"D_max": 64}
SHIPPED, QUICK, WRONG, SPILLING, BROKEN = ({"n": n} for n in range(5))


@pytest.fixture
def folder(tmp_path):
    """A table of one kernel, to be tuned."""
    entries = [
        {"when": WHEN, "config": SHIPPED, "provenance": "chosen by compiling, not measured"},
        {"when": {}, "config": {"n": 9}, "provenance": "chosen by compiling, not measured"},
    ]
    (tmp_path / "sm_90.json").write_text(json.dumps({"kernel": entries, "other": entries}))
    return tmp_path


def in_force():
    return launch.config("kernel", "sm_90", torch.float16)


def bucket(candidates=(QUICK, WRONG, SPILLING, BROKEN), when=WHEN):
    def check():
        assert in_force() != WRONG, "off by 1"

    def run():
        if in_force() == BROKEN:
            raise RuntimeError("out of resources")
        return in_force()

    return tune.Bucket("kernel", when, candidates, run, check, cases=lambda: [in_force()])


def tuned(buckets, folder, times, **kwargs):
    """Run the tuning with the fake times {n: microseconds}."""
    return list(
        tune.tune(
            buckets,
            "sm_90",
            timer=lambda run: times[run()["n"]],
            gates=lambda case: ["spills: 8 bytes"] if case == SPILLING else [],
            provenance=lambda microseconds: f"measured on a fake, {microseconds} us",
            folder=folder,
            **kwargs,
        )
    )


def entries_of(folder, kernel="kernel"):
    return json.loads((folder / "sm_90.json").read_text())[kernel]


def test_fastest_that_passes_wins(folder):
    """The gates, parity and the launch each refuse one candidate, faster than all, with the reason; the fastest of the rest is written."""
    [(_, outcomes, best)] = tuned([bucket()], folder, {0: 10.0, 1: 5.0, 2: 1.0, 3: 1.0, 4: 1.0})
    assert best.config == QUICK
    refused = {o.config["n"]: o.refused for o in outcomes if o.refused}
    assert refused.pop(2).startswith("AssertionError: off by 1")
    assert refused == {3: "spills: 8 bytes", 4: "RuntimeError: out of resources"}
    assert entries_of(folder)[0] == {"when": WHEN, "config": QUICK, "provenance": "measured on a fake, 5.0 us"}
    assert entries_of(folder)[1]["config"] == {"n": 9}
    assert entries_of(folder, "other")[0]["config"] == SHIPPED


@pytest.mark.parametrize(("time", "winner"), [(9.9, SHIPPED), (9.7, QUICK)])
def test_noise_does_not_replace_the_shipped_configuration(folder, time, winner):
    """A gain of 1 % is noise, one of 3 % is not."""
    [(_, _, best)] = tuned([bucket([QUICK])], folder, {0: 10.0, 1: time})
    assert best.config == winner


def test_nothing_passes(folder):
    """The table stays as it is."""
    before = (folder / "sm_90.json").read_text()
    [(_, _, best)] = tuned([bucket([SPILLING, BROKEN], when={"D_max": 32})], folder, {})
    assert best is None and (folder / "sm_90.json").read_text() == before


def test_a_new_bucket_comes_before_the_others(folder):
    """The first entry that holds counts: a bucket that is not in the table yet must not stand behind a more general one."""
    tuned([bucket([QUICK], when={"D_max": 64, "N_max": 100})], folder, {1: 5.0})
    assert [entry["when"] for entry in entries_of(folder)] == [{"D_max": 64, "N_max": 100}, WHEN, {}]


def test_budget(folder):
    """Over the budget no bucket is begun; what was done before is written."""
    clock = iter([0.0, 1.0, 11.0]).__next__
    done = tuned([bucket([QUICK]), bucket([QUICK], when={})], folder, {0: 10.0, 1: 5.0}, budget=10.0, clock=clock)
    assert len(done) == 1 and entries_of(folder)[0]["config"] == QUICK and entries_of(folder)[1]["config"] == {"n": 9}


def test_write_entries(folder):
    """The whole list of one kernel, which must end with a default; no partial file is left."""
    with pytest.raises(ValueError, match="must end with one that has no conditions"):
        tune.write_entries("sm_90", "kernel", [{"when": WHEN, "config": {}, "provenance": ""}], folder)
    tune.write_entries("sm_90", "kernel", [{"when": {}, "config": QUICK, "provenance": "p"}], folder)
    assert entries_of(folder) == [{"when": {}, "config": QUICK, "provenance": "p"}]
    assert sorted(path.name for path in folder.iterdir()) == ["sm_90.json"]


def test_refuses_without_a_gpu(device):
    """Politely: a sentence and exit code 2, and nothing is written."""
    if device.type == "cuda":
        pytest.skip("there is a GPU")
    before = {path.name: path.read_text() for path in launch.CONFIGS.glob("*.json")}
    command = [sys.executable, "-m", "dpt.kernels.tune"]
    done = subprocess.run(command, cwd=Path(tune.__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no CUDA device" in done.stderr and "Traceback" not in done.stderr
    assert {path.name: path.read_text() for path in launch.CONFIGS.glob("*.json")} == before
