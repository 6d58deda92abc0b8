"""The plugin that writes a JUnit file as results arrive, in pytest processes of their own."""

import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import pytest

from bench import ROOT
from bench.card import junit

OURS = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS")
TESTS = """
import os, time, pytest
def test_good(pytestconfig):
    assert not hasattr(pytestconfig, "workerinput") or not pytestconfig.pluginmanager.hasplugin("junit-as-it-goes")
@pytest.mark.parametrize("name", ["a", "[<&>]"])
def test_bad(name):
    if not os.environ.get("MENDED"):
        raise ValueError("the reason \\x00 \\x1b[31m < & >")
def test_skipped(): pytest.skip("no card")
@pytest.fixture
def broken(): raise OSError("set-up")
def test_error(broken): pass
@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""
HANGS = "\ndef test_that_hangs():\n    time.sleep(60)\ndef test_behind_it(): pass\n"


def start(folder, *arguments, text=TESTS, **environment):
    (folder / "test_made_up.py").write_text(text)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "bench.card.junit",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        "-c",
        os.devnull,
    ]
    variables = {key: value for key, value in os.environ.items() if key not in OURS} | {"PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen([*command, *arguments, "test_made_up.py"], cwd=folder, env=variables, stdout=subprocess.PIPE, text=True)


def verdicts(path):
    """Name -> what the file has of it."""
    found = {}
    for case in ET.parse(path).getroot().iter("testcase"):
        element = next((child for child in case if child.tag != "properties"), None)
        found[case.get("name")] = "passed" if element is None else f"{element.tag} {element.get('type')}"
    return found


EXPECTED = {
    "test_good": "passed",
    "test_bad[a]": "failure call",
    "test_bad[[<&>]]": "failure call",
    "test_skipped": "skipped skip",
    "test_error": "error setup",
    "test_known": "skipped xfail",
}


@pytest.mark.parametrize("workers", [("-p", "no:xdist"), ("-n", "2")])
def test_every_verdict(tmp_path, workers):
    """Blind spot: a verdict that is lost or another, with or without xdist; characters that no XML may hold."""
    process = start(tmp_path, *workers, "--junit-as-it-goes", "results/junit.xml")
    process.communicate(timeout=60)
    found = verdicts(tmp_path / "results" / "junit.xml")
    assert process.returncode == 1 and found == EXPECTED
    suite = next(ET.parse(tmp_path / "results" / "junit.xml").getroot().iter("testsuite"))
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "6",
        "failures": "2",
        "errors": "1",
        "skipped": "2",
    }
    assert "the reason" in (tmp_path / "results" / "junit.xml").read_text() and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("workers", [("-p", "no:xdist"), ("-n", "1")])
def test_a_run_that_is_killed(tmp_path, workers):
    """Blind spot: results that wait for the end, or for the next result: the test after them hangs, and the process is killed."""
    process = start(tmp_path, *workers, "--junit-as-it-goes", "junit.xml", text=TESTS + HANGS)
    file, deadline = tmp_path / "junit.xml", time.monotonic() + 40
    found = {}
    while time.monotonic() < deadline and found.get("test_known") != "skipped xfail":
        time.sleep(0.05)
        found = verdicts(file) if file.exists() else {}  # well-formed whenever it is read
    process.kill()
    process.communicate()
    found = verdicts(file)
    assert found.pop("test_that_hangs") == found.pop("test_behind_it") == "skipped not run"
    assert found == EXPECTED


@pytest.mark.parametrize("workers", [("-p", "no:xdist"), ("-n", "2")])
def test_only_what_has_not_passed(tmp_path, workers):
    """Blind spot: a second run of everything, or of nothing; a test that was never reached counts as one to be run."""
    first = junit.Junit(tmp_path / "first.xml")
    name = "test_made_up.py::"
    first.collected([f"{name}test_{test}" for test in ("good", "bad[a]", "bad[[<&>]]", "skipped", "error", "known")])
    first.add(f"{name}test_good", 0.1, "passed", "", "")
    first.add(f"{name}test_skipped", 0.1, "skipped", "skip", "no card")
    first.add(f"{name}test_bad[a]", 0.1, "failure", "call", "wrong")
    first.add(f"{name}test_bad[a]", 0.1, "passed", "", "")  # a teardown or a second report does not mend it
    first.add(f"{name}test_error", 0.1, "error", "setup", "wrong")
    first.write()
    assert [found.removeprefix(f"{name}test_") for found in junit.not_passed(tmp_path / "first.xml")] == [
        "bad[a]",
        "bad[[<&>]]",
        "error",
        "known",
    ]
    process = start(tmp_path, *workers, "--not-passed-in", "first.xml", "--junit-as-it-goes", "second.xml", MENDED="1")
    process.communicate(timeout=60)
    assert set(verdicts(tmp_path / "second.xml")) == {"test_bad[a]", "test_bad[[<&>]]", "test_error", "test_known"}
    assert junit.not_passed(tmp_path / "second.xml") == [f"{name}test_error"]


def test_at_most_every_two_seconds(tmp_path, clock):
    """Blind spot: thousands of results, and the whole file written for each."""
    file = junit.Junit(tmp_path / "junit.xml", clock)
    wrote = []
    write = file.write
    file.write = lambda: (wrote.append(clock.now), write())
    for number in range(100):
        clock.advance(0.1)
        file.add(f"t.py::test_{number}", 0.1, "passed", "", "")
    assert 4 <= len(wrote) <= 6
    file.pytest_sessionfinish()
    assert len(verdicts(tmp_path / "junit.xml")) == 100


def test_a_file_that_cannot_be_collected(tmp_path):
    """Blind spot: an import error, of which no test is left to fail."""
    process = start(tmp_path, "-p", "no:xdist", "--junit-as-it-goes", "junit.xml", text="import nothing_of_that_name\n")
    process.communicate(timeout=60)
    [verdict] = verdicts(tmp_path / "junit.xml").values()
    assert verdict == "error collection"
