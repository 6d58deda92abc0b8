"""The GPU script's flow, with made-up steps, and the real plan with made-up durations: this machine has no GPU."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench import ROOT, gpu_session
from bench.card import gpu_steps, junit
from bench.card.gpu_steps import Step

SCRIPT = ROOT / "bench" / "gpu_session.py"
SLOW = "import time; time.sleep(60)"


def step(name, code, seconds=60.0, **options):
    """A step that runs this Python code; OUT and SECONDS are the folder of its files and what it may use."""
    return Step(name, seconds, lambda out, left: [sys.executable, "-c", f"OUT, SECONDS = {str(out)!r}, {left}\n{code}"], **options)


@pytest.fixture
def checkout(tmp_path):
    """A root with tables, which a step may change."""
    (tmp_path / "checkout" / gpu_session.TABLES).mkdir(parents=True)
    (tmp_path / "checkout" / gpu_session.TABLES / "sm_90.json").write_text("shipped")
    return tmp_path / "checkout"


def run(steps, out, seconds=60.0, root=ROOT, **options):
    return gpu_session.Session(steps, out, seconds, root=root, **options).run()


def unpacked(out):
    """Name -> content of everything in the archive; raises if it is not whole."""
    with tarfile.open(out / gpu_session.ARCHIVE) as tar:
        return {member.name: tar.extractfile(member).read().decode() for member in tar.getmembers()}


def test_a_failed_step_does_not_lose_the_others(tmp_path):
    """Blind spot: an exit at the first failure, or results that are there only at the end: the third step looks into the archive."""
    look = (
        "import tarfile; print([name for name in tarfile.open(OUT + '/../all.tar.xz').getnames() if name[-8:] in ('one.json', 'two.json')])"
    )
    outcomes = run([step("one", "print('hello')"), step("two", "raise SystemExit(3)"), step("three", look)], tmp_path)
    assert [outcome.status for outcome in outcomes] == ["passed", "failed", "passed"]
    assert outcomes[2].tail.strip() == "['files/one.json', 'files/two.json']"
    found = unpacked(tmp_path)
    assert json.loads(found["files/two.json"])["code"] == 3 and found["files/one.log"].strip() == "hello"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.tar.xz", "files", "summary.txt"]


def test_a_step_that_hangs_is_ended_with_all_it_started(tmp_path):
    """Blind spot: a compiler or worker that goes on holding the GPU."""
    code = "import subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    code += "open(OUT + '/child', 'w').write(str(child.pid))\nprint('begun', flush=True)\ntime.sleep(60)"
    started = time.monotonic()
    [outcome] = run([step("hangs", code, seconds=3.0)], tmp_path)
    assert outcome.status == "timeout" and outcome.code is None and "begun" in outcome.tail
    assert time.monotonic() - started < 20
    child = int((tmp_path / "files" / "child").read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and _lives(child):
        time.sleep(0.05)
    assert not _lives(child)


def _lives(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    """Blind spot: a machine that is taken away in the middle of a step that could not have ended in time."""
    monkeypatch.setattr(gpu_session, "SHORTEST", 0.5)
    outcomes = run([step("slow", SLOW), step("late", "print('ran')")], tmp_path, 1.5)
    assert [outcome.status for outcome in outcomes] == ["timeout", "not begun"]
    assert not (tmp_path / "files" / "late.log").exists() and "late           not begun" in (tmp_path / "summary.txt").read_text()


def test_a_step_has_its_own_seconds_and_what_was_left_over(tmp_path):
    """Blind spot: a step that takes the seconds of those after it; seconds that nobody uses. One has nothing to do, two may take both's."""
    one = step("one", "pass", 2.0, missing=lambda files: "nothing to do")
    outcomes = run([one, step("two", SLOW, 2.0), step("three", "print(SECONDS)", 8.0)], tmp_path)
    assert [outcome.status for outcome in outcomes] == ["skipped", "timeout", "passed"]
    assert 3.5 < outcomes[1].seconds < 8.0
    assert 0.5 * 8 * gpu_steps.SHARE < float(outcomes[2].tail) <= 8 * gpu_steps.SHARE


def test_what_this_machine_lacks_is_no_failure(tmp_path):
    """Blind spot: a tool that is not installed reported as a failed check, or as a passed one."""
    [outcome] = run([step("sanitizer", "raise SystemExit(1)", missing=lambda files: "the tool is not installed")], tmp_path)
    assert outcome.status == "skipped" and outcome.tail == "the tool is not installed"
    assert "the tool is not installed" in (tmp_path / "summary.txt").read_text()


@pytest.mark.parametrize("after", ["same folder", "archive", "other folder"])
def test_what_has_passed_is_not_done_again(tmp_path, after):
    """Blind spot: a second call, perhaps on another machine, that spends its minutes on what is done, or that believes a failure."""
    counted = f"open({str(tmp_path / 'count')!r}, 'a').write('NAME')"
    chosen = [step("good", counted.replace("NAME", "g")), step("bad", counted.replace("NAME", "b") + "; raise SystemExit(1)")]
    chosen.append(step("versions", counted.replace("NAME", "v"), always=True))
    first = second = tmp_path / "first"
    run(chosen, first)
    if after != "same folder":
        second = tmp_path / "second"
        gpu_session.unpack(first / "all.tar.xz" if after == "archive" else first, second / "files")
    run(chosen, second)
    assert (tmp_path / "count").read_text() == "gbvbv" and "files/good.log" in unpacked(second)
    run(chosen, second, again=True)
    assert (tmp_path / "count").read_text() == "gbvbvgbv"


@pytest.mark.parametrize("content", [None, b"not an archive"])
def test_an_archive_that_is_none(tmp_path, content):
    """Blind spot: a command that begins, and then has nothing to go on from."""
    if content:
        (tmp_path / "all.tar.xz").write_bytes(content)
    with pytest.raises(ValueError, match="--after .*all.tar.xz"):
        gpu_session.unpack(tmp_path / "all.tar.xz", tmp_path / "out")


def test_nothing_leaves_the_folder(tmp_path):
    """Blind spot: an archive, which comes from elsewhere, that writes anywhere."""
    with tarfile.open(tmp_path / "all.tar.xz", "w:xz") as tar:
        info = tarfile.TarInfo("files/../../escaped")
        tar.addfile(info)
    files = tmp_path / "out" / "files"
    files.mkdir(parents=True)
    with pytest.raises(ValueError, match="outside"):
        gpu_session.unpack(tmp_path / "all.tar.xz", files)
    assert not (tmp_path / "escaped").exists()


def test_a_rehearsal_is_no_pass(tmp_path):
    """Blind spot: a step that never met a card, in a summary as passed, or passed over when the card is there."""
    chosen = [step("one", "print('ran')")]
    [outcome] = run(chosen, tmp_path, passed="rehearsed")
    assert outcome.status == "rehearsed" and "passed" not in (tmp_path / "summary.txt").read_text()
    assert [outcome.status for outcome in run(chosen, tmp_path)] == ["passed"]


def test_files_elsewhere(tmp_path):
    """Blind spot: a way back that takes the first few files of the folder, and leaves the archive out: there are two."""
    run([step("one", "open(OUT + '/deep.txt', 'w').write('here')")], tmp_path / "out", files=tmp_path / "elsewhere")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["all.tar.xz", "summary.txt"]
    assert unpacked(tmp_path / "out")["files/deep.txt"] == "here"


def test_what_a_step_changes_is_kept(tmp_path, checkout):
    """Blind spot: tuned tables that stay on a machine that is given back, also where the step failed."""
    code = f"open({str(checkout / gpu_session.TABLES / 'sm_90.json')!r}, 'w').write('tuned'); raise SystemExit(1)"
    run([step("tune", code)], tmp_path / "out", root=checkout)
    assert unpacked(tmp_path / "out")["files/kernels/configs/sm_90.json"] == "tuned"


def test_the_archive_is_kept_up_while_a_step_runs(tmp_path):
    """Blind spot: the minutes of a long step, lost with it: the step finds its own first lines in the archive."""
    code = """
import tarfile, time
print("first words", flush=True)
for _ in range(100):
    time.sleep(0.1)
    tar = tarfile.open(OUT + "/../all.tar.xz")
    if "files/long.log" in tar.getnames() and b"first words" in tar.extractfile("files/long.log").read():
        raise SystemExit(0)
raise SystemExit(1)
"""
    [outcome] = run([step("long", code)], tmp_path, every=0.2)
    assert outcome.status == "passed" and outcome.seconds < 8


def test_a_folder_that_cannot_be_kept_costs_no_step(tmp_path, monkeypatch, capsys):
    """Blind spot: a disk that is full for a moment, and an hour's rent gone."""
    broken = iter([True, False, True, False, True, False])

    def write(path, content, write=gpu_session.write):
        if path.name == gpu_session.ARCHIVE and next(broken, False):
            raise OSError("no space left on device")
        write(path, content)

    monkeypatch.setattr(gpu_session, "write", write)
    assert [o.status for o in run([step("one", "pass"), step("two", "pass")], tmp_path)] == ["passed", "passed"]
    assert "nothing new was kept: no space left" in capsys.readouterr().out and "files/two.json" in unpacked(tmp_path)


def test_what_is_replaced_is_never_half_there(tmp_path, monkeypatch):
    """Blind spot: an archive that is cut off while it is written over the one before. Here the machine is gone after half of it."""
    path = tmp_path / "all.tar.xz"
    gpu_session.write(path, b"whole")

    def half(self, content, write_bytes=Path.write_bytes):
        write_bytes(self, content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        gpu_session.write(path, b"another")
    assert path.read_bytes() == b"whole"


def test_a_file_that_changes_while_it_is_archived(tmp_path):
    """Blind spot: a log that grows or a record that is replaced under the archive's hands; unfinished files; endless logs."""
    (tmp_path / "files").mkdir()
    (tmp_path / "summary.txt").write_text("s")
    (tmp_path / "files" / "a.json.partial").write_text("half")
    (tmp_path / "files" / "a.log").write_bytes(b"x" * (gpu_session.LARGEST + 10) + b"end")
    (tmp_path / "files" / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "all.tar.xz").write_bytes(gpu_session.archive(tmp_path / "summary.txt", tmp_path / "files"))
    found = unpacked(tmp_path)
    assert set(found) == {"summary.txt", "files/a.log"} and found["files/a.log"].endswith("end")
    assert len(found["files/a.log"]) == gpu_session.LARGEST


# The script itself.


def script(*arguments, cwd, **options):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-I", str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


ENDED = re.compile(r"^(\S+): (rehearsed|failed|timeout|skipped|not begun) in [\d.]+ s$", re.MULTILINE)


@pytest.mark.parametrize("ends", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.8, 1.1, 1.4, 1.7])
def test_cut_off_at_any_second(tmp_path, ends, seconds):
    """Blind spot: an archive or summary that is half written, or lacks a step that has been told to have ended. The real plan with made-up
    durations, its whole process session ended at some moment."""
    names = [step.name for step in gpu_steps.plan()["first"]]
    (tmp_path / "durations.json").write_text(json.dumps(dict.fromkeys(names, 0.2)))
    process = script("first", "--out", "out", "--durations", "durations.json", "--every", "0.05", cwd=tmp_path, start_new_session=True)
    time.sleep(seconds)
    process.send_signal(ends)
    output, _ = process.communicate(timeout=30)
    told = [name for name, _ in ENDED.findall(output)]
    out = tmp_path / "out"
    if not told and not (out / "all.tar.xz").exists():
        return  # ended before anything began
    assert told == names[: len(told)]
    found, summary = unpacked(out), (out / "summary.txt").read_text()
    assert found["summary.txt"].count("\n") >= len(names) and found["files/kernels/configs/sm_90.json"]
    for name in told:
        assert json.loads(found[f"files/{name}.json"])["status"] == "rehearsed" and found[f"files/{name}.txt"] == "made up"
        assert re.search(rf"^{name} +rehearsed", summary, re.MULTILINE)
    if ends == signal.SIGTERM and len(told) < len(names):
        assert "cut off" in summary or "to come" in summary


@pytest.mark.parametrize("ends_in", ["summary", "archive", "_end", "_wait", "_write"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_signal_anywhere(tmp_path, monkeypatch, ends_in, call):
    """Blind spot: a summary that says that a step is running when the script was ended just before the step began, or just after it."""
    owner = next(owner for owner in (gpu_session.Session, gpu_session) if hasattr(owner, ends_in))
    real, calls = getattr(owner, ends_in), []

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise SystemExit(143)
        return real(*arguments)

    monkeypatch.setattr(owner, ends_in, signalled)
    with pytest.raises(SystemExit):
        run([step(name, "print('hello')") for name in ("one", "two", "three")], tmp_path)
    found, summary = unpacked(tmp_path), (tmp_path / "summary.txt").read_text()
    assert "running" not in summary and ("cut off" in summary or "to come" in summary or call == 3)
    for name in ("one", "two", "three"):
        if f"files/{name}.json" in found:
            assert re.search(rf"^{name} +{json.loads(found[f'files/{name}.json'])['status']}", summary, re.MULTILINE)


def test_goes_on_where_it_was_cut_off(tmp_path):
    """Blind spot: the seconds of a command that was cut off, spent a second time."""
    names = [step.name for step in gpu_steps.plan()["first"]]
    (tmp_path / "durations.json").write_text(json.dumps({names[2]: 60.0}))
    process = script("first", "--out", "out", "--durations", "durations.json", cwd=tmp_path, start_new_session=True)
    while f"{names[1]}: rehearsed" not in process.stdout.readline():
        pass
    process.terminate()
    process.communicate(timeout=30)
    (tmp_path / "durations.json").write_text("{}")
    again = script("first", "--out", "new", "--after", "out/all.tar.xz", "--durations", "durations.json", cwd=tmp_path)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0 and [name for name, _ in ENDED.findall(output)] == names
    assert (
        not (tmp_path / "new" / "files" / f"{names[1]}.json").stat().st_mtime
        > (tmp_path / "new" / "files" / f"{names[2]}.json").stat().st_mtime
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["first", "--steps", "dance"], 2, "first has no step dance"),
        ([], 2, "which command: first or second"),
        (["--help"], 0, "--again"),
        (["--plan"], 0, "together 7"),
        (["first", "--out", "nothing"], 2, "there is no CUDA device: nothing was run, nothing was written"),
        (["second", "--out", "nothing", "--after", "none.tar.xz", "--rehearse"], 2, "none.tar.xz"),
    ],
)
def test_as_a_script(arguments, code, message, tmp_path):
    """Blind spot: the script itself, from elsewhere, with nothing but the standard library; and where there is no GPU."""
    process = script(*arguments, cwd=tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code and message in output and not list(tmp_path.iterdir())


# The real plan.


def test_the_plan_fits():
    """Blind spot: steps that cannot all end in a quarter of an hour, with the machine's start; a command of ten minutes or more."""
    plan = gpu_steps.plan()
    for name, steps in plan.items():
        assert sum(step.seconds for step in steps) <= gpu_steps.SECONDS[name] and len({step.name for step in steps}) == len(steps)
    assert sum(gpu_steps.SECONDS.values()) <= gpu_steps.MOST == 780 and gpu_steps.SECONDS["first"] <= 555
    printed = gpu_session.describe(plan)
    seconds = [float(value) for value in re.findall(r"^    \S+ +(\d+) s$", printed, re.MULTILINE)]
    assert len(seconds) == sum(map(len, plan.values())) and f"together {sum(seconds):.0f} s" in printed


def test_what_the_plan_asks():
    """Blind spot: a step that is forgotten, runs beside others, times something it must not, or names what does not exist."""
    plan = gpu_steps.plan()
    steps = {step.name: step for steps in plan.values() for step in steps}
    command = {name: step.command(Path("/out"), 100.0) for name, step in steps.items()}
    assert [step.name for step in plan["first"]] == ["versions", "ops", "parity", "far", "models", "tune"]
    second = ["versions", "failed", "failed-far", "models-tuned", "steps", "kernels", "warm", "sanitizer", "profile"]
    assert [step.name for step in plan["second"]] == second
    for name, parts in command.items():
        target = next(part for part in parts if part.startswith(("tests/", "bench/", "dpt.", "bench.")) and part != "bench.card.junit")
        module = target.replace("dpt.kernels.", "kernels.").replace(".", "/") + ".py"
        assert (ROOT / target).exists() or (ROOT / module).exists(), (name, target)
        if "--benchmark" in parts:
            assert {"--dtypes", "bfloat16", "torch.compile", "--record-to", "no:xdist"} - {"torch.compile"} <= set(parts), name
            assert float(parts[parts.index("--budget") + 1]) <= 100.0
    assert command["tune"][1:8] == ["-m", "dpt.kernels.tools.tune", "--stage", "forward", "--dtype", "half", "--budget"]
    assert command["sanitizer"][1:4] == ["-m", "bench.card.every_op", "--toy"] and "--benchmark" not in command["sanitizer"]
    assert command["far"][-2:] == command["failed-far"][-2:] == ["-n", "0"]
    assert {"--not-passed-in", "/out/parity.xml", "/out/failed.xml"} <= set(command["failed"])
    assert (
        len({name for name in command if "/out/results" in " ".join(command[name])}) == 6
    )  # records of both commands, tuning, the profile
    assert "untuned" in command["models"] and "untuned" not in command["models-tuned"]
    assert all(step.rehearsal for step in steps.values())
    page = (ROOT / "bench" / "GPU.md").read_text()
    assert all(f"`{name}`" in page for name in steps) and "555 s" in page and "225 s" in page


def test_what_had_failed_is_read_from_the_first_command(tmp_path):
    """Blind spot: a second command that runs everything again, or passes since it knows of no failure."""
    failed = next(step for step in gpu_steps.plan()["second"] if step.name == "failed")
    assert "--after" in failed.missing(tmp_path)
    file = junit.Junit(tmp_path / "parity.xml")
    file.collected(["tests/kernels/test_upsample.py::test_one"])
    file.write()
    assert failed.missing(tmp_path) is None
    file.add("tests/kernels/test_upsample.py::test_one", 0.1, "passed", "", "")
    file.write()
    assert failed.missing(tmp_path) == "in parity nothing failed, and all was run"


def test_no_path_in_the_results(tmp_path):
    """Blind spot: the machine's paths in a file that is published."""

    def harmless(step):
        """Python that does nothing with the step's own arguments."""
        return lambda files, seconds: [sys.executable, "-c", "pass", *step.command(files, seconds)]

    steps = [dataclasses.replace(step, command=harmless(step)) for steps in gpu_steps.plan().values() for step in steps]
    for outcome in run([dataclasses.replace(step, missing=lambda files: None) for step in steps], tmp_path, 600):
        assert outcome.command[0] == "python"
        assert str(tmp_path) not in json.dumps(outcome.command) and str(ROOT) not in json.dumps(outcome.command)


def test_summary_shows_what_failed(tmp_path):
    """Blind spot: a summary that says no more than that something failed; one without the numbers of what passed."""
    bad = "raise ValueError('the reason')"
    run([step("slow", SLOW, 1.0), step("good", "print('1320 passed')"), step("bad", bad)], tmp_path)
    text = (tmp_path / "summary.txt").read_text()
    assert re.search(r"good +passed .*1320 passed", text) and "ValueError: the reason" in text and "slow           timeout" in text
