"""Downloads from a server that drops, stalls, refuses, ignores ranges and changes its file. On this machine: nothing leaves it."""

import hashlib
import http.server
import logging
import os
import re
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from small import config, small, upstream

import dpt
from dpt.checkpoints import downloads
from dpt.checkpoints.downloads import DownloadError, fetch
from dpt.commands.main import main
from dpt.zoo import isl

CONTENT = bytes(range(256)) * 4096  # 1 MiB
NAME = f"weights-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pt"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; each request takes the next of `script`, what goes wrong, and nothing once that is empty."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag, self.ranges = CONTENT, '"one"', True
        self.script: list = []
        self.asked: list[tuple[str | None, str | None]] = []  # Range and If-Range
        self.done = threading.Event()

    def handle_error(self, request, client_address) -> None:
        """A client of an earlier test that has gone is not told on stderr, which tests read."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{NAME}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        wanted, version = self.headers["Range"], self.headers["If-Range"]
        server.asked.append((wanted, version))
        trouble = server.script.pop(0) if server.script else None
        if callable(trouble):
            trouble = trouble(server)
        if isinstance(trouble, int):
            self.send_error(trouble)
            return
        start = 0
        if wanted and server.ranges and version == server.tag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start + (trouble == 'shifted')}-{len(server.content) - 1}/{len(server.content)}")
        else:
            self.send_response(200)
        body = server.content[start:]
        self.send_header("Content-Length", str(len(body)))
        if server.tag:
            self.send_header("ETag", server.tag)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if trouble == "stall":
            server.done.wait(10)
        elif trouble != "drop":
            self.wfile.write(body[len(body) // 2 :])


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.done.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "checkpoints" / NAME


def get(server: Server, target, **options):
    return fetch(server.url, target, **{"timeout": 0.3, "wait": 0.01, **options})


def names(target) -> set[str]:
    return {path.name for path in target.parent.iterdir()} - {f"{NAME}.lock"}


HALF = f"bytes={len(CONTENT) // 2}-"


@pytest.mark.parametrize(
    ("script", "asked"),
    [
        ([], [(None, None)]),
        (["drop"], [(None, None), (HALF, '"one"')]),
        (["stall"], [(None, None), (HALF, '"one"')]),
        (["drop", "drop"], [(None, None), (HALF, '"one"'), (f"bytes={len(CONTENT) * 3 // 4}-", '"one"')]),
        ([500, 503, 429], [(None, None)] * 4),
        (["drop", 416], [(None, None), (HALF, '"one"'), (None, None)]),
        (["drop", "shifted"], [(None, None), (HALF, '"one"'), (None, None)]),
    ],
)
def test_what_passes_is_tried_again(server, target, script, asked):
    """Blind spot: a download that gives up, or begins again, where it could go on; parts glued at the wrong place."""
    server.script = list(script)
    assert get(server, target) == target and target.read_bytes() == CONTENT
    assert server.asked == asked and names(target) == {NAME}


def test_a_second_run_goes_on(server, target):
    """Blind spot: a part that only the process that began it can use."""
    server.script = ["drop"]
    with pytest.raises(DownloadError, match=f"ended after {len(CONTENT) // 2} of {len(CONTENT)} bytes"):
        get(server, target, attempts=1)
    assert names(target) == {f"{NAME}.part", f"{NAME}.part.tag"}
    get(server, target)
    assert server.asked == [(None, None), (HALF, '"one"')] and target.read_bytes() == CONTENT


@pytest.mark.parametrize(("ranges", "tag"), [(False, '"one"'), (True, None), (True, 'W/"one"')])
def test_a_server_without_ranges_or_versions(server, target, ranges, tag):
    """Blind spot: a whole file appended to a part, and a part resumed that nothing says is of the same file, byte for byte."""
    server.script, server.ranges, server.tag = ["drop", "drop"], ranges, tag
    with pytest.raises(DownloadError, match=f"ended after {len(CONTENT) // 2} of {len(CONTENT)} bytes"):
        get(server, target, attempts=2)
    get(server, target)
    assert target.read_bytes() == CONTENT
    assert server.asked[1:] == [(None, None) if ranges else (HALF, '"one"')] * 2


def change(server: Server) -> None:
    server.content, server.tag = CONTENT, '"two"'


def change_in_secret(server: Server) -> None:
    server.content = CONTENT


@pytest.mark.parametrize("how", [change, change_in_secret])
def test_a_file_that_changes_in_between_is_not_glued(server, target, how):
    """Blind spot: the first half of one file and the second of another; also where the server gives both one ETag."""
    server.content, server.script = CONTENT[::-1], ["drop", how]
    get(server, target)
    assert target.read_bytes() == CONTENT and names(target) == {NAME}


@pytest.mark.parametrize(
    ("script", "reason", "requests"),
    [
        ([404], "the server answers 404 Not Found", 1),
        ([403], "the server answers 403 Forbidden", 1),
        ([500] * 9, "the server answers 500 Internal Server Error", 5),
        (["stall"] * 9, "timed out|does not answer", 5),
        ([lambda server: setattr(server, "content", b"another")], "its SHA-256 begins with [0-9a-f]{8}, not", 1),
    ],
)
def test_what_does_not_pass_is_said(server, target, script, reason, requests):
    """Blind spot: an error without the address, the reason or the place for the file; a wrong file that stays; endless attempts."""
    server.script = script
    with pytest.raises(DownloadError, match=reason) as caught:
        get(server, target, timeout=0.1 if "stall" in script else 10)
    message = str(caught.value)
    assert server.url in message and f"put it at {target}" in message and "\n" not in message
    assert len(server.asked) == requests and not target.exists()


def test_waits_are_told(server, target, monkeypatch, capsys):
    """Blind spot: fifteen seconds of silence, or a line without the address, the reason, the attempt or the wait."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's: what a program says that has set up no logging
    server.script = [503, "drop"]
    get(server, target, timeout=10)
    lines = [line for line in capsys.readouterr().err.splitlines() if "attempt" in line]
    dropped = f"the connection ended after {len(CONTENT) // 2} of {len(CONTENT)} bytes"
    assert lines == [
        f"{server.url}: the server answers 503 Service Unavailable; attempt 2 of 5 follows in 0.01 s",
        f"{server.url}: {dropped}; attempt 3 of 5 follows in 0.02 s",
    ]
    server.script = [404]
    with pytest.raises(DownloadError, match="or give its path as the weights"):
        fetch(server.url, target.with_name("other"))
    assert "attempt" not in capsys.readouterr().err


def test_nobody_answers(target):
    """Blind spot: a traceback without a network; a wait that does not grow."""
    started = time.monotonic()
    with pytest.raises(DownloadError, match=r"http://127.0.0.1:9/.* could not be downloaded: .*refused.*put it at"):
        fetch(f"http://127.0.0.1:9/{NAME}", target, wait=0.02)
    assert time.monotonic() - started >= 0.02 * (1 + 2 + 4 + 8)


def test_a_name_without_a_hash(server, tmp_path):
    """Blind spot: a file that nobody published a hash of refused, or its later damage not seen; one that was put there by hand refused."""
    url, target = server.url.replace(NAME, "weights.pt"), tmp_path / "weights.pt"
    assert fetch(url, target).read_bytes() == CONTENT and len(server.asked) == 1
    assert (tmp_path / "weights.pt.sha256").read_text().strip() == hashlib.sha256(CONTENT).hexdigest()
    assert fetch(url, target) == target and len(server.asked) == 1
    target.write_bytes(CONTENT[:-1])
    with pytest.warns(UserWarning, match="weights.pt is damaged"):
        fetch(url, target)
    assert target.read_bytes() == CONTENT and len(server.asked) == 2
    server.content, other = CONTENT * 2, tmp_path / "other.pt"
    server.script = ["drop", "drop"]
    with pytest.raises(DownloadError, match="the connection ended after"):
        fetch(url.replace("weights", "other"), other, attempts=1)
    assert not other.exists()
    other.write_bytes(b"by hand")
    assert fetch(url.replace("weights", "other"), other).read_bytes() == b"by hand"


def test_a_licence_is_accepted_first(server, tmp_path, monkeypatch, capsys):
    """Blind spot: weights that are not for every use, downloaded without a word; an option of the command line that does nothing."""
    source = tmp_path / "weights.pt"
    torch.save(upstream(small(), isl.LAYOUT), source)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    restricted = replace(config(), source=source.as_uri(), licence="CC-BY-NC-4.0")
    said = "are under CC-BY-NC-4.0, which does not allow every use .*accept_license=True"
    with pytest.raises(ValueError, match=f"the weights of {restricted.name} {said}"):
        dpt.build(restricted, weights="pretrained")
    assert not (tmp_path / "hub").exists()
    model = dpt.build(restricted, weights="pretrained", accept_license=True)
    assert torch.equal(model.head.conv1.weight, small().head.conv1.weight)
    assert capsys.readouterr().err == f"{restricted.name}: weights from {source.as_uri()}, licence CC-BY-NC-4.0\n"
    monkeypatch.setitem(dpt.zoo.CONFIGS, "dpt-large-midas", restricted)
    command = ["predict", "dpt/examples", "-o", str(tmp_path / "out"), "--model", "dpt-large-midas", "--device", "cpu"]
    assert main(command) == 2 and "--accept-license" in capsys.readouterr().err
    assert main([*command, "--accept-license"]) == 0
    assert dpt.build(replace(restricted, licence="MIT"), weights="pretrained") is not None  # which allows every use


def test_a_cached_file_is_checked_when_used(server, target):
    """Blind spot: a file that was cut off or changed on the disk, loaded for ever after; and a whole one asked for again."""
    get(server, target)
    get(server, target)
    assert len(server.asked) == 1
    target.write_bytes(CONTENT[:-1])
    with pytest.warns(UserWarning, match=f"{NAME} is damaged: its SHA-256 begins with .* downloaded again"):
        get(server, target)
    assert target.read_bytes() == CONTENT and len(server.asked) == 2
    target.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(DownloadError, match=f"{NAME} is damaged .*, and http.*refused.*put it at"):
        fetch(f"http://127.0.0.1:9/{NAME}", target, attempts=1)
    assert target.read_bytes() == b""


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_the_file_has_the_umasks_mode(server, target, mask):
    """Blind spot: a file of mode 600, as temporary files are, which the other users of a machine cannot read."""
    before = os.umask(mask)
    try:
        get(server, target)
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask


def test_two_processes_want_the_same(server, target):
    """Blind spot: two that write one part. The second waits, and finds the file."""
    server.script = [lambda server: time.sleep(0.3)]
    code = "import sys; from pathlib import Path; from dpt.checkpoints.downloads import fetch; fetch(sys.argv[1], Path(sys.argv[2]))"
    processes = [subprocess.Popen([sys.executable, "-c", code, server.url, str(target)]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert target.read_bytes() == CONTENT and len(server.asked) == 1 and names(target) == {NAME}


def test_the_disk_is_not_the_network(server, target, monkeypatch):
    """Blind spot: a full disk that is tried five times and called a failure of the network."""
    target.parent.mkdir()
    (target.parent / f"{NAME}.part").mkdir()
    with pytest.raises(OSError, match="directory|permitted"):
        get(server, target)
    assert len(server.asked) == 1


def test_commands_say_it_in_a_sentence(server, tmp_path, monkeypatch, capsys):
    """Blind spot: a traceback from `dpt predict`; weights="pretrained" that goes another way."""
    server.script = [404]
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    served = replace(config(), source=server.url)
    monkeypatch.setitem(dpt.zoo.CONFIGS, "dpt-large-midas", served)
    code = main(["predict", "dpt/examples", "-o", str(tmp_path / "out"), "--model", "dpt-large-midas", "--device", "cpu"])
    licence, said = capsys.readouterr().err.strip().splitlines()
    assert licence == f"{served.name}: weights from {server.url}, licence MIT"
    place = tmp_path / "checkpoints" / NAME
    assert code == 2 and said.startswith("dpt predict: ") and server.url in said and "404" in said and str(place) in said
    assert "Traceback" not in said
    assert downloads.fetch(server.url, place) == place
