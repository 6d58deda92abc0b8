"""What the GPU script starts, on a CPU and with made-up tools: every op once, the profile, Nsight Compute, the sanitizer, the versions."""

import sys
import time

import pytest
import torch

from bench.card import every_op, profile_model
from bench.cases import kernels
from bench.harness import environment
from dpt.kernels.tools import compiler, parity, spaces

ARGUMENTS = ("--toy", "--device", "cpu", "--dtypes", "float32")


@pytest.fixture
def made_up_tool(tmp_path, monkeypatch):
    """A function that puts a program of that name first on the path; it writes its arguments to a file, and then does what is asked."""

    def make(name, does=""):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n{does}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return lambda: (tmp_path / "arguments").read_text().splitlines()

    return make


def test_our_kernels_are_those_that_are_launched():
    """Blind spot: a kernel that no profile or sanitizer looks at, or a helper's name in their list."""
    launched = {case.function.__name__ for op in spaces.ops() for case in spaces.space(op).compile_cases("sm_90")}
    assert profile_model.our_kernels() == launched


def test_the_compiled_code_has_the_function_s_name():
    """Blind spot: a name filter that fits nothing: Triton might decorate the name of what it compiles."""
    case = next(iter(spaces.space("upsample").compile_cases("sm_90")))
    kernel, _ = compiler.compiled(case)
    assert kernel.metadata.name == case.function.__name__ in profile_model.our_kernels()


@pytest.mark.parametrize("op", [op.name for op in kernels.ops()])
def test_every_op_can_pass_and_fail(op, monkeypatch, capsys):
    """Blind spot: an op that is not called, or whose error is not seen, in either direction; the next op is called all the same."""
    assert every_op.main(["--here", "--op", op, *ARGUMENTS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == (1 if op == "upsample_argmax" else 2) and all(": ok, off by" in line for line in lines)
    judge = parity.judge
    monkeypatch.setattr(parity, "judge", lambda out, *rest: judge([tensor + 0.1 * tensor.abs().amax() for tensor in out], *rest))
    assert every_op.main(["--here", "--op", op, *ARGUMENTS]) == 1
    assert all("FAILED: " in line and "off by" in line for line in capsys.readouterr().out.splitlines())


def test_what_an_op_raises_is_told(monkeypatch, capsys):
    """Blind spot: an exception, as of the compiler, that ends the others; a card on which no kernel runs, where all "agree"."""

    def broken(self, contender, prepare=kernels.OpenedOp.prepare):
        if contender == "fused" and self.op.name == "attention":
            raise RuntimeError("ptxas fatal")
        return prepare(self, contender)

    monkeypatch.setattr(kernels.OpenedOp, "prepare", broken)
    assert every_op.main(["--here", "--op", "attention", "--op", "linear_residual", *ARGUMENTS]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [("FAILED: RuntimeError: ptxas fatal" in line) for line in lines] == [True, True, False, False]
    op = next(op for op in kernels.ops() if op.name == "linear_residual")
    context = every_op.Context(torch.device("cpu"), every_op.measure.Budget(1.0), every_op.measure.Rounds(1, 1, 0.0), toy=True)
    opened = kernels.OpenedOp(op, op.toy, "forward", torch.float32, context)
    monkeypatch.setattr(kernels, "OpenedOp", lambda *_: opened)
    context.device = torch.device("cuda")
    assert every_op.check(op, "forward", torch.float32, context) == "FAILED: PyTorch algebra, no kernel on this device"


def test_each_op_has_a_process_of_its_own(monkeypatch, tmp_path, capfd):
    """Blind spot: one op that dies or hangs, and takes the others with it. Made-up processes, one of them without an end."""
    program = tmp_path / "python"
    program.write_text('#!/bin/sh\ncase "$5" in wrong) exit 1;; killed) kill -9 $$;; hangs) exec sleep 60;; esac\necho "$5: ok"\n')
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(every_op.os, "sched_getaffinity", lambda _: range(16))
    started = time.monotonic()
    assert every_op.apart(["wrong", "killed", "hangs", "good"], ["--toy"], 3.0) == ["wrong", "killed", "hangs"]
    output = capfd.readouterr().out
    assert time.monotonic() - started < 10 and "good: ok" in output
    assert "killed: FAILED: its process ended with code -9" in output and "hangs: FAILED: not done when the time was over" in output


def test_the_sanitizer_looks_at_our_kernels(made_up_tool, monkeypatch):
    """Blind spot: a check of PyTorch's kernels, which takes the minutes, or of none; and cuDNN's benchmark mode, which this never sets."""
    arguments = made_up_tool("compute-sanitizer")

    def execute(program, command):
        raise SystemExit(every_op.subprocess.run(command, check=True).returncode)

    monkeypatch.setattr(every_op.os, "execv", execute)
    with pytest.raises(SystemExit):
        every_op.main(["--sanitize", *ARGUMENTS])
    given = arguments()
    assert given[:4] == ["--tool", "memcheck", "--error-exitcode", "99"]
    names = [given[place + 1] for place, part in enumerate(given) if part == "--kernel-name"]
    assert names == [f"kne={name}" for name in sorted(profile_model.our_kernels())]
    assert given[given.index(sys.executable) :] == [
        sys.executable,
        "-m",
        "bench.card.every_op",
        "--here",
        "--dtypes",
        "float32",
        "--device",
        "cpu",
        "--toy",
    ]


SUBJECT = profile_model.Subject("dpt-large-midas", 384, 1, "bfloat16")


def test_the_profile():
    """Blind spot: the profiling step of the GPU session, which no other test starts: on a torch.device("cpu"), at the toy size."""
    run = profile_model.runner(profile_model.Subject("dpt-large-midas", dtype="float32"), torch.device("cpu"), toy=True)
    table, found = profile_model.profile(run, torch.device("cpu"))
    assert "aten::" in table and sum(kernel["share"] for kernel in found) == pytest.approx(1.0)
    assert [k["share"] for k in found] == sorted((k["share"] for k in found), reverse=True)


def test_nsight_compute_s_arguments(made_up_tool, tmp_path):
    """Blind spot: clocks that are fixed on a rented card; a first launch that is skipped where there is only one; a name that is a part of
    another's."""
    arguments = made_up_tool("ncu", "echo details")
    assert profile_model.nsight("linear_kernel", SUBJECT, tmp_path / "ncu.txt", 60.0) == "ncu ended with code 0"
    given = arguments()
    options = dict(zip(given[:10:2], given[1:10:2], strict=True))
    assert options["--clock-control"] == "none" and options["--launch-skip"] == "0" and options["--launch-count"] == "1"
    assert options["--kernel-name"] == "regex:^linear_kernel$"
    assert given[11:14] == ["-m", "bench.card.profile_model", "--once"] and "dpt-large-midas" in given
    assert (tmp_path / "ncu.txt").read_text() == "details\n"


def test_nsight_compute_fits_what_is_left(made_up_tool, tmp_path, monkeypatch):
    """Blind spot: a tool that is waited for longer than its step has, or whose child holds on; one that is begun with no time for it."""
    monkeypatch.setattr(profile_model, "LEAST", 0.5)
    made_up_tool("ncu", "sleep 60 & sleep 60")
    started = time.monotonic()
    assert profile_model.nsight("linear_kernel", SUBJECT, tmp_path / "ncu.txt", 1.0) == "ncu took more than 1 s"
    assert time.monotonic() - started < 10
    assert "too few" in profile_model.nsight("linear_kernel", SUBJECT, tmp_path / "ncu.txt", 0.1)


def test_the_profile_as_a_command(tmp_path, capsys, monkeypatch):
    """Blind spot: the command that the session runs, and what it hands to Nsight Compute: our kernel, and what is left of its seconds."""
    given = []
    profiled = [{"name": name, "share": share, "ours": ours} for name, share, ours in (("gemm", 0.6, False), ("linear_kernel", 0.4, True))]
    monkeypatch.setattr(profile_model, "runner", lambda *_: None)
    monkeypatch.setattr(profile_model, "profile", lambda run, device: time.sleep(0.3) or ("table", profiled))
    monkeypatch.setattr(profile_model, "nsight", lambda kernel, subject, path, seconds: given.append((kernel, seconds)) or "done")
    assert profile_model.main(["--out", str(tmp_path), "--device", "cuda", "--seconds", "30"]) == 0
    [(kernel, seconds)] = given
    assert kernel == "linear_kernel" and 20 < seconds <= 29.7 - profile_model.SPARE
    assert "1 of 2 kernels are ours, 40% of the time" in capsys.readouterr().out


def test_versions_of_a_machine(capsys, monkeypatch):
    """Blind spot: a step that needs a card, a tool or git to say that there is none."""
    monkeypatch.setenv("PATH", "")
    assert environment.main() == (0 if torch.cuda.is_available() else 2)
    output = capsys.readouterr().out
    assert f"torch: {torch.__version__}" in output and "git no" in output and "commit: None" in output and "pytest " in output
