"""The GPU script's flow, with made-up steps: this machine has no GPU, and none of its real steps runs here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_session
from bench.gpu_session import Step

ROOT = Path(__file__).parents[2]


def step(name, code, limit=60.0, **options):
    """A step that runs this Python code; OUT and SECONDS are the folder and what it may use."""
    return Step(name, lambda out, seconds: [sys.executable, "-c", f"OUT, SECONDS = {str(out)!r}, {seconds}\n{code}"], limit, **options)


def result(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_failed_step_does_not_lose_the_others(tmp_path):
    """Blind spot: an exit at the first failure, or results that are written only at the end."""
    seen = f"import os; assert os.path.exists({str(tmp_path / 'one.json')!r}); print('after')"
    outcomes = gpu_session.session([step("one", "print('hello')"), step("two", "raise SystemExit(3)"), step("three", seen)], tmp_path, 60)
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "passed"]
    assert result(tmp_path, "two")["code"] == 3 and "hello" in result(tmp_path, "one")["tail"]
    assert (tmp_path / "three.log").read_text().strip() == "after"


def test_a_step_that_hangs_is_ended_with_all_it_started(tmp_path):
    """Blind spot: a compiler or worker that goes on holding the GPU."""
    code = "import subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    code += "open(OUT + '/child', 'w').write(str(child.pid))\nprint('begun', flush=True)\ntime.sleep(60)"
    started = time.monotonic()
    [outcome] = gpu_session.session([step("hangs", code, limit=3.0)], tmp_path, 60)
    assert outcome.status == "timeout" and outcome.code is None and "begun" in outcome.tail
    assert time.monotonic() - started < 20
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _lives(child):
        time.sleep(0.05)
    assert not _lives(child)


def _lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_does_not_fit_is_not_begun(tmp_path):
    """Blind spot: a machine that is taken away in the middle of a step that could not have ended in time."""
    outcomes = gpu_session.session([step("slow", "import time; time.sleep(60)"), step("late", "print('ran')")], tmp_path, 2.0)
    assert [outcome.status for outcome in outcomes] == ["timeout", "not begun"]
    assert result(tmp_path, "late")["status"] == "not begun" and not (tmp_path / "late.log").exists()


def test_steps_of_one_name_share_its_limit(tmp_path):
    """Blind spot: a first step that takes the minutes of all the others, or one that is paid for by the next."""
    slow = "import time; time.sleep(60)"
    chosen = [step("a-one", slow, limit=2.0), step("a-two", "pass", limit=2.0), step("b", "pass")]
    outcomes = gpu_session.session(chosen, tmp_path, 60)
    assert [outcome.status for outcome in outcomes] == ["timeout", "not begun", "passed"]


def test_files_of_parity_run_side_by_side(tmp_path):
    """Blind spot: nineteen processes that compile one after the other. Each of two waits for the other to begin."""
    code = "import os, time\nopen(f'{OUT}/ONE', 'w')\nwhile not os.path.exists(f'{OUT}/OTHER'): time.sleep(0.05)"
    chosen = [step(f"parity-{one}", code.replace("ONE", one).replace("OTHER", other)) for one, other in ("xy", "yx")]
    assert [outcome.status for outcome in gpu_session.session(chosen, tmp_path, 60)] == ["passed", "passed"]


def test_what_this_machine_lacks_is_no_failure(tmp_path):
    """Blind spot: a tool that is not installed reported as a failed check, or as a passed one."""
    [outcome] = gpu_session.session([step("sanitizer", "raise SystemExit(1)", missing="the tool is not installed")], tmp_path, 60)
    assert outcome.status == "skipped" and result(tmp_path, "sanitizer")["tail"] == "the tool is not installed"
    assert "the tool is not installed" in gpu_session.summary([outcome])


def test_what_has_passed_is_not_done_again(tmp_path):
    """Blind spot: a second call that spends its minutes on what the first has done, or that believes a failure."""
    counted = "open(OUT + '/' + 'count', 'a').write('x')"
    chosen = [step("good", counted), step("bad", counted + "; raise SystemExit(1)")]
    for _ in range(2):
        gpu_session.session(chosen, tmp_path, 60)
    assert (tmp_path / "count").read_text() == "xxx"
    gpu_session.session(chosen, tmp_path, 60, again=True)
    assert (tmp_path / "count").read_text() == "xxxxx"


def test_a_step_is_told_its_seconds(tmp_path):
    """Blind spot: a budget longer than the limit that ends it."""
    gpu_session.session([step("told", "print(SECONDS)", limit=100.0)], tmp_path, 60)
    assert 0 < float((tmp_path / "told.log").read_text()) <= 60 * gpu_session.SHARE


def test_what_a_step_changes_is_kept(tmp_path):
    """Blind spot: the tuned tables stay on a machine that is given back, also where the step failed."""
    root, out = tmp_path / "checkout", tmp_path / "out"
    (root / "configs").mkdir(parents=True)
    code = f"open({str(root / 'configs' / 'sm_90.json')!r}, 'w').write('tuned'); raise SystemExit(1)"
    [outcome] = gpu_session.session([step("tune", code, keeps="configs")], out, 60, root=root)
    assert outcome.status == "failed" and (out / "configs" / "sm_90.json").read_text() == "tuned"


def test_the_checkout_is_importable(tmp_path):
    """Blind spot: an uninstalled checkout, whose packages a process finds only through its path."""
    [outcome] = gpu_session.session([step("import", "import bench.records, sys; print(bench.records.__file__)")], tmp_path, 60)
    assert outcome.status == "passed" and str(ROOT) in (tmp_path / "import.log").read_text()


def test_the_real_steps():
    """Blind spot: a step that is forgotten, has ten minutes or more, or is not what the issue asks for."""
    found = gpu_session.steps()
    assert list(dict.fromkeys(s.group for s in found)) == list(gpu_session.LIMITS)
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "kernels").glob("test_*.py")}
    assert {s.name.removeprefix("parity-") for s in found if s.group == "parity"} == files
    assert max(gpu_session.LIMITS.values()) < 600 and sum(gpu_session.LIMITS.values()) <= 1800
    for s in found:
        target = next(part for part in s.command(Path("/out"), 100.0) if part.startswith(("tests/", "bench/", "bench.", "dpt.")))
        module = target.replace("dpt.kernels.", "kernels.").replace(".", "/") + ".py"
        assert (ROOT / target).exists() or (ROOT / module).exists(), target


def test_no_path_in_the_results(tmp_path):
    """Blind spot: the machine's paths in a file that is published."""
    [outcome] = gpu_session.session([step("one", "pass")], tmp_path, 60)
    assert outcome.command[0] == "python" and str(tmp_path) not in json.dumps(outcome.command)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--steps", "dance"], 2, "no step dance"),
        (["--help"], 0, "--again"),
        (["--out", "nothing"], 2, "no CUDA device\nEvery step here needs a CUDA device, and none was found: nothing was run"),
    ],
)
def test_as_a_script(arguments, code, message, tmp_path):
    """Blind spot: the script itself, from elsewhere, with nothing but the standard library; and where there is no GPU."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    script = [sys.executable, "-I", str(ROOT / "bench" / "gpu_session.py"), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == code and message in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_summary_shows_what_failed(tmp_path):
    """Blind spot: a summary that says no more than that something failed."""
    outcomes = gpu_session.session([step("good", "pass"), step("bad", "raise ValueError('the reason')")], tmp_path, 60)
    text = gpu_session.summary(outcomes)
    assert "good" in text and "ValueError: the reason" in text
