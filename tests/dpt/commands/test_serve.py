"""`dpt serve`, as a user calls it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import asked, error_of, post

from dpt.commands import arguments, main, serve
from dpt.commands.demo import PICTURES

ROOT = Path(__file__).parents[3]


@contextmanager
def running(*options: str):
    """A process of its own, with signals as a terminal's processes have them, and its address."""

    def as_in_a_terminal():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    command = [sys.executable, "-m", "dpt", "serve", "--port", "0", "--device", "cpu", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, preexec_fn=as_in_a_terminal, **pipes) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, line, re.search(r"http://\S+", line)[0]
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_it_serves_until_a_signal(number, code, word):
    """Blind spot: another address than is told; a traceback at the end; a server that does not end."""
    with running("--max-bytes", "300000", "--max-pixels", "150000", "--batch-size", "1") as (process, line, address):
        assert line == f"dpt serve: {address} has dpt-tiny-depth, dpt-tiny-scenes; Ctrl-C ends it\n" and "127.0.0.1" in address
        assert asked(address, "/")[0] == 200
        assert post(address, PICTURES[0].read_bytes(), "as=png16")[0] == 200
        status, _, content = post(address, bytes(300001))
        assert status == 413 and error_of(content) == "300001 bytes: a picture has at most 300000 (--max-bytes)"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
        assert process.returncode == code
        assert [said.partition(":")[0] for said in err.splitlines()] == ["dpt serve"] * 2
        assert "know rendered scenes" in err.splitlines()[0] and err.splitlines()[1] == f"dpt serve: {word}"


def test_another_address_is_warned_of():
    """Blind spot: a server that is open to others without a word."""
    with running("--host", "0.0.0.0", "--model", "dpt-tiny-scenes") as (process, line, address):
        assert line.startswith("dpt serve: http://0.0.0.0:") and line.endswith(" has dpt-tiny-scenes; Ctrl-C ends it\n")
        assert asked(address.replace("0.0.0.0", "127.0.0.1"), "/models", headers={"Host": "this-machine.example"})[0] == 200
        process.terminate()
        assert "dpt serve: --host 0.0.0.0: whoever reaches this machine can use it; nobody is asked" in process.communicate(timeout=30)[1]


def test_it_cannot_begin(capsys, tmp_path):
    """Blind spot: a model loaded before it is known that there is no port; a traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main.main(["serve", "--port", port, "--weights", str(tmp_path / "none.pth")]) == 2
    assert f"dpt serve: --host 127.0.0.1 --port {port} cannot be used: " in capsys.readouterr().err
    assert main.main(["serve", "--host", "no.such.host.invalid"]) == 2
    assert "dpt serve: --host no.such.host.invalid --port 8000 cannot be used: " in capsys.readouterr().err
    assert main.main(["serve", "--port", "0", "--model", "prompt-depth-anything-small"]) == 2
    assert "prompt-depth-anything-small needs a sensor's depth beside each picture, which is not served" in capsys.readouterr().err
    assert main.main(["serve", "--port", "0", "--weights", str(tmp_path / "none.pth")]) == 2
    assert "none.pth" in capsys.readouterr().err


def test_what_is_missing_is_named(monkeypatch, capsys):
    """Blind spot: an ImportError that does not say what to install."""
    monkeypatch.setitem(sys.modules, "python_multipart", None)
    assert main.main(["serve", "--port", "0"]) == 2
    assert "pip install '.[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--port", "65536"], ["--port", "-1"], ["--max-bytes", "0"], ["--queue", "0"], ["--batch-size", "0"]])
def test_mistakes(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["serve", *given])
    assert ended.value.code == 2 and f"argument {given[0]}: {given[1]!r}: it must be a whole number" in capsys.readouterr().err


def test_defaults_are_those_that_are_told():
    """Blind spot: an address that others reach, by default; a default that was changed, and its description not."""
    args = main.parser_of("serve").parse_args([])
    assert (args.host, args.port, args.max_bytes, args.max_pixels, args.queue) == ("127.0.0.1", 8000, 32 << 20, 32_000_000, 64)
    (action,) = (action for action in main.parser_of("serve")._actions if action.dest == "batch_size")
    assert f"{serve.BATCH_ON_A_GPU} on CUDA, else {serve.BATCH}" in action.help
    assert arguments.CARRIED == ("dpt-tiny-depth", "dpt-tiny-scenes")
