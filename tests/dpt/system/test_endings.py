"""How commands end. Blind spots: a signal at every moment; Windows; terminals themselves. With real models: test_cli, test_train."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dpt.system import endings

ROOT = Path(__file__).parents[3]
LIGHT = """
import os, signal, sys
from dpt.commands import main
from dpt.system import disk, endings  # without PyTorch, which these tests need not wait for
"""


def light(code: str, **options) -> subprocess.Popen:
    """A Python process that has the light part of this package, and what a terminal's processes do with signals."""

    def as_in_a_terminal():
        for number in endings.SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    environment = {**os.environ, **options.pop("env", {})}
    environment.pop("PYTHONUNBUFFERED", None)  # what is in the buffer at the end is what these tests are about
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment, **options}
    return subprocess.Popen([sys.executable, "-c", LIGHT + code], text=True, preexec_fn=as_in_a_terminal, **pipes)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photo 1 (2).jpg", "photo 1 (2).jpg"),
        ("写真\u3000é𝒳\u00a0☂.jpg", "写真\u3000é𝒳\u00a0☂.jpg"),
        ("a\nb\r\tc\0\x7f\x85", r"a\nb\r\tc\x00\x7f\x85"),
        ("\x1b[2J\x1b]0;title\x07\x9b31m", r"\x1b[2J\x1b]0;title\x07\x9b31m"),
        ("a\u202egpj.exe\u2066\u200e\u2028\u2029\ufeff", r"a\u202egpj.exe\u2066\u200e\u2028\u2029\ufeff"),
        (os.fsdecode(b"\xff\xfe.png"), r"\udcff\udcfe.png"),
        ("\U000e0041\ue000", r"\U000e0041\ue000"),
    ],
)
def test_printable(text, shown):
    """Blind spot: a file name that clears the screen, makes a line of its own, shows another ending, or cannot be encoded."""
    assert endings.printable(text) == shown
    assert endings.printable(Path("/a") / "x\ny") == r"/a/x\ny"


ERRORS = [  # the error, its exit code, what its line says
    (ValueError("depth_scale is 0\nand more"), 2, r"depth_scale is 0\nand more"),
    (endings.CommandError("no pictures", 1), 1, "no pictures"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "a\n.pt"), 2, r"a\n.pt: No such file or directory"),
    (OSError(errno.ENOSPC, "No space left on device", "out/a.png"), 1, "out/a.png: No space left on device: free some space"),
    (OSError(errno.EDQUOT, "Disk quota exceeded", "a"), 1, "free some of your quota"),
    (OSError(errno.EROFS, "Read-only file system", "a"), 1, "choose another folder"),
    (OSError(errno.EIO, "Input/output error"), 1, "check that disk"),
    (OSError(errno.EMFILE, "Too many open files", "a"), 1, "ulimit -n"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), 1, "ulimit -v"),
    (OSError("a.pt: no such thing"), 2, "a.pt: no such thing"),
    (MemoryError(), 1, "memory ran out"),
    (np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype("u1")), 1, "memory ran out"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 1, "memory ran out"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"), 1, "memory ran out"),
    (RuntimeError("std::bad_alloc"), 1, "memory ran out"),
    (ImportError("libtorch_cpu.so: failed to map segment from shared object"), 1, "memory ran out"),
    (RuntimeError("can't start new thread"), 1, "ulimit -u"),
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), 1, "fewer --workers"),
    (RuntimeError("Too many open files. Communication with the workers is no longer possible."), 1, "ulimit -n"),
    (ValueError("Caught ImageError in DataLoader worker process 0.\nTraceback:\n  x\ndpt.ImageError: a.png: empty\n"), 2, "a.png: empty"),
    (ImportError("rendering needs PyBullet: pip install pybullet"), 2, "pip install pybullet"),
    (FloatingPointError("the loss is nan"), 1, "the loss is nan"),
]


@pytest.mark.parametrize(("error", "code", "message"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_that_explain_themselves(capsys, error, code, message):
    """Blind spot: a traceback, another exit code, no remedy, more than one line."""

    def command():
        raise error

    assert endings.run("dpt test", command, restore=True) == code
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("dpt test: ") and message in errors and errors.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), TypeError("x"), KeyError("x"), SystemExit(2)])
def test_what_only_a_traceback_explains_keeps_it(error):
    """Blind spot: our own mistakes hidden behind a line that explains nothing; argparse's own end."""

    def command():
        raise error

    with pytest.raises(type(error)):
        endings.run("dpt test", command, restore=True)


@pytest.mark.parametrize("number", endings.SIGNALS)
@pytest.mark.parametrize("turned_into", [None, RuntimeError, OSError, SystemError])
def test_a_signal_ends_a_command(capsys, number, turned_into):
    """Blind spot: SIGTERM and SIGHUP, which end Python at once; a library that makes another error of an interruption; handlers left."""
    before = {each: signal.signal(each, signal.default_int_handler) for each in endings.SIGNALS}
    try:

        def command():
            try:
                os.kill(os.getpid(), number)
                signal.pause()
            except BaseException as error:
                if turned_into is not None:
                    raise turned_into("initialisation failed") from error
                raise

        assert endings.run("dpt test", command, restore=True) == 128 + number
        assert {each: signal.getsignal(each) for each in endings.SIGNALS} == dict.fromkeys(endings.SIGNALS, signal.default_int_handler)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert capsys.readouterr().err == f"dpt test: {endings.SIGNALS[number]}\n"


def test_signals_that_are_ignored_stay_so():
    """Blind spot: nohup, whose command ends with its terminal all the same."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert endings.run("dpt test", lambda: os.kill(os.getpid(), signal.SIGHUP) or 7, restore=True) == 7
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread():
    """Blind spot: signal.signal, which only the main thread may call."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(endings.run("dpt test", lambda: 3, restore=True)))
    thread.start()
    thread.join()
    assert codes == [3]


def test_the_second_signal_ends_at_once(tmp_path):
    """Blind spot: a command that hangs while it ends; its temporary file left; two lines."""
    code = """
def command():
    def write(file):
        file.write(b"half")
        try:
            print("ready", flush=True)
            signal.pause()
        finally:
            print("ending", flush=True)
            signal.pause()
    disk.write_whole("result", write)
endings.run("dpt test", command, restore=False)
"""
    process = light(code, cwd=tmp_path)
    for word in ("ready", "ending"):
        assert process.stdout.readline() == f"{word}\n" and len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and errors == "dpt test: terminated\n" and not list(tmp_path.iterdir())


LAST = """
import atexit
def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(1000):
        pass
class Last:
    def __del__(self):
        terminate()
"""


@pytest.mark.parametrize(
    ("command", "output", "errors", "code"),
    [
        ("id(Last())", "", "dpt test: terminated\n", 143),
        ("print(os.waitstatus_to_exitcode(os.wait()[1])) if os.fork() else id(Last())", "130\nwent on\n", "", 0),
    ],
)
def test_a_signal_while_an_object_is_finalised(command, output, errors, code):
    """Blind spot: what a handler raises there is printed and lost, and the command goes on. In a forked process, that process ends."""
    process = light(f"{LAST}sys.exit(endings.run('dpt test', lambda: [{command}, print('went on', flush=True)] and 0, restore=False))")
    assert process.communicate(timeout=30) == (output, errors) and process.returncode == code


def test_what_complains_as_it_goes():
    """Blind spot: a traceback of an object that the signal has left half made, or whose processes had the signal too."""
    code = """
class Complains:
    def __del__(self):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
def command():
    held = Complains()
    held.itself = held if %s else None
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
sys.exit(endings.run("dpt test", command, restore=False))
"""
    for in_a_cycle in (False, True):
        process = light(code % in_a_cycle)
        assert process.communicate(timeout=30) == ("", "dpt test: terminated\n") and process.returncode == 143


def test_pytorchs_writer_is_destroyed_late(tmp_path):
    """Blind spot: a signal at the end of torch.save: its writer then writes to a file that is closed, and C++ ends the process."""
    code = """
import torch
def interrupted(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
torch.serialization._open_zipfile_writer_buffer.__exit__ = interrupted
sys.exit(endings.run("dpt test", lambda: disk.write_whole("a", lambda file: torch.save(torch.zeros(3), file)), restore=False))
"""
    process = light(code, cwd=tmp_path)
    assert process.communicate(timeout=60) == ("", "dpt test: terminated\n") and process.returncode == 143 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "last",
    [
        "disk.write_whole('result', lambda file: Last())",
        "atexit.register(terminate)",
        "create = os.open; os.open = lambda *how: [create(*how), terminate()][0]; disk.write_whole('result', lambda file: 1)",
    ],
)
def test_a_pools_process_ends_wherever_it_is(tmp_path, last):
    """Blind spot: an exception of the handler, which is printed and lost where an object is finalised or the process is ending by itself,
    and leaves a file where it comes right after that was opened."""
    process = light(f"{LAST}endings.end_with_clean_up()\n{last}", cwd=tmp_path)
    assert process.communicate(timeout=30) == ("", "") and process.returncode == 143 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "chained"), [(KeyboardInterrupt, False), (ValueError, False), (OSError, True)])
def test_a_loaders_processes_are_told_to_stop(error, chained):
    """Blind spot: an iterator that its error's traceback holds in a cycle: the garbage collector ends its queues first, nobody can tell
    the processes anything, and each is waited for for five seconds."""

    def command():
        batches = iter(torch.utils.data.DataLoader(range(1000), num_workers=2))
        try:
            next(batches)
            raise error("x")
        except BaseException as caught:
            kept = caught  # in a local of a frame that the error's own traceback holds
            if chained:
                raise ValueError("of another") from kept
            raise

    started = time.monotonic()
    assert endings.run("dpt test", command, restore=True) in (2, 130)
    assert time.monotonic() - started < 5


def test_a_reader_that_goes_away(tmp_path):
    """Blind spot: `dpt info | head -1`; a full disk behind stdout; Python's own complaint when it closes the stream."""
    code = "sys.exit(endings.run('dpt test', lambda: [print('line') for _ in range(%d)] and 0, restore=False))"
    for lines in (10, 100_000):  # the buffer is written when the command ends, or before
        process = light(code % lines)
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == ("", 141)
        with open("/dev/full", "w") as full:
            process = light(code % lines, stdout=full)
            errors = process.stderr.read()
        assert process.wait(30) == 1 and "No space left on device" in errors and errors.count("\n") == 1
    process = light("endings.run('dpt test', lambda: print('help') or sys.exit(0), restore=False)")  # as argparse ends
    process.stdout.close()
    assert (process.stderr.read(), process.wait(30)) == ("", 0)


def test_a_terminal_of_few_letters():
    """Blind spot: UnicodeEncodeError on stdout where the locale is C, or for bytes that are no UTF-8 in any locale; names in warnings."""
    code = r"""
import warnings
def command():
    print(endings.printable("写\udcff"))
    warnings.warn("写\x1b[2J\udcff: 3 files are left out")
    raise ValueError("写\udcff")
sys.exit(endings.run("dpt test", command, restore=False))
"""
    for encoding, letter in (("ascii", r"\u5199"), ("utf-8", "写")):
        process = light(code, env={"PYTHONIOENCODING": encoding, "LC_ALL": "C"}, encoding="utf-8")
        output, errors = process.communicate(timeout=30)
        assert process.returncode == 2 and output == f"{letter}\\udcff\n"
        assert errors == f"dpt test: {letter}\\x1b[2J\\udcff: 3 files are left out\ndpt test: {letter}\\udcff\n"


def test_what_main_changes_is_put_back(capsys):
    """Blind spot: a host program whose warnings and streams are another's afterwards."""
    before = warnings.formatwarning, sys.unraisablehook, sys.stdout.errors, sys.stderr.errors
    for command in (lambda: 0, lambda: int("x")):
        endings.run("dpt test", command, restore=True)
        assert (warnings.formatwarning, sys.unraisablehook, sys.stdout.errors, sys.stderr.errors) == before


def test_processes_started_for_work_leave_a_terminals_signals_to_us():
    """Blind spot: a traceback of every worker at Ctrl-C, which goes to all of them."""
    ask = "import signal; print(*(int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])))"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with endings.leaving_signals_to_us():
        masked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True).stdout
    assert set(map(int, masked.split())) == {*before, signal.SIGINT, signal.SIGHUP}
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


@pytest.mark.parametrize("megabytes", [150, 300])
def test_too_little_memory_for_pytorch_itself(megabytes):
    """Blind spot: the dynamic linker's error as a traceback. What ends the process from C++ cannot be caught."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, ({megabytes << 20},) * 2)
sys.exit(main.main(["predict", "a.png", "-o", "out"]))
"""
    process = light(code)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.startswith("dpt predict: memory ran out: ") and errors.count("\n") == 1
