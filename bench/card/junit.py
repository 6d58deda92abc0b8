"""A plugin of pytest: the JUnit file is written as results arrive, so that a run that is cut off keeps them.

    pytest -p bench.card.junit --junit-as-it-goes FILE      # every test collected, whole after every write
    pytest -p bench.card.junit --not-passed-in FILE         # only the tests that FILE has as failed or not run

The file is replaced at most every two seconds, and is well-formed at any moment. A test that has been collected and has no result yet
stands in it as skipped, of type "not run". Under xdist the process that gathers the results writes it. Each test's pytest id is in its
property `nodeid`: the class and name that JUnit asks for cannot be turned back into one.
"""

from __future__ import annotations

import os
import re
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

EVERY = 2.0  # seconds between two writes
KEPT = 8000  # characters of a failure
NOT_RUN = "not run"
ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # in XML, even escaped


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("results as they arrive")
    group.addoption("--junit-as-it-goes", metavar="FILE", type=Path, help="write a JUnit file as results arrive")
    group.addoption("--not-passed-in", metavar="FILE", type=Path, action="append", default=[], help="run only what FILE has not as passed")


def pytest_configure(config: pytest.Config) -> None:
    path = config.option.junit_as_it_goes
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Junit(path.resolve()), "junit-as-it-goes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In every process: xdist's workers have to collect the same."""
    files = config.option.not_passed_in
    if not files:
        return
    wanted = {name for file in files for name in not_passed(file)}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in wanted])
    items[:] = [item for item in items if item.nodeid in wanted]


def not_passed(path: Path) -> list[str]:
    """The ids of the tests that a file has as failed, in error or not run."""
    found = []
    for case in ET.parse(path).getroot().iter("testcase"):
        skipped = case.find("skipped")
        waits = skipped is not None and skipped.get("type") == NOT_RUN
        if waits or case.find("failure") is not None or case.find("error") is not None:
            found += [item.get("value") for item in case.iter("property") if item.get("name") == "nodeid"]
    return found


class Junit:
    """What is known of each test, and its file."""

    def __init__(self, path: Path, clock=time.monotonic):
        self.path, self.clock = path, clock
        self.cases: dict[str, ET.Element] = {}
        self.written = clock() - EVERY
        self.later: threading.Timer | None = None
        self.lock = threading.RLock()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: Iterable[str]) -> None:
        self.collected(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.add(report.nodeid, 0.0, "error", "collection", report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Setup, call and teardown each report; only the call can pass, and what has failed stays so."""
        if hasattr(report, "wasxfail"):
            verdict = ("skipped", "xfail", report.wasxfail) if report.skipped else ("passed", "", "")
        elif report.failed:
            verdict = ("failure" if report.when == "call" else "error", report.when, report.longreprtext)
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            verdict = ("skipped", "skip", reason)
        elif report.when == "call":
            verdict = ("passed", "", "")
        else:
            return
        self.add(report.nodeid, report.duration, *verdict)

    def pytest_sessionfinish(self) -> None:
        self.write()

    def collected(self, ids: Iterable[str]) -> None:
        with self.lock:
            for name in ids:
                if name not in self.cases:
                    self.cases[name] = _case(name, 0.0, "skipped", NOT_RUN, "")
        self.changed()

    def add(self, name: str, seconds: float, verdict: str, kind: str, text: str) -> None:
        with self.lock:
            known = self.cases.get(name)
            if known is None or (known.find("failure") is None and known.find("error") is None):
                self.cases[name] = _case(name, seconds, verdict, kind, text)
        self.changed()

    def changed(self) -> None:
        """Write now, or as soon as the two seconds are over: the next result may never come."""
        with self.lock:
            wait = EVERY - (self.clock() - self.written)
            if wait <= 0:
                self.write()
            elif self.later is None:
                self.later = threading.Timer(wait, self.write)
                self.later.daemon = True
                self.later.start()

    def write(self) -> None:
        with self.lock:
            if self.later is not None:
                self.later.cancel()
                self.later = None
            root = ET.Element("testsuites")
            cases = list(self.cases.values())
            counts = {f"{tag}s" if tag != "skipped" else tag: sum(case.find(tag) is not None for case in cases) for tag in VERDICTS}
            suite = ET.SubElement(root, "testsuite", name="pytest", tests=str(len(cases)), **{k: str(v) for k, v in counts.items()})
            suite.extend(cases)
            partial = self.path.with_name(f"{self.path.name}.partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            ET.ElementTree(root).write(partial, encoding="utf-8", xml_declaration=True)
            os.replace(partial, self.path)
            self.written = self.clock()


VERDICTS = ("failure", "error", "skipped")


def _case(name: str, seconds: float, verdict: str, kind: str, text: str) -> ET.Element:
    file, _, rest = ILLEGAL.sub("?", name).partition("::")
    parent = file.removesuffix(".py").replace("/", ".")
    case = ET.Element("testcase", classname=parent, name=rest or file, time=f"{seconds:.3f}")
    ET.SubElement(ET.SubElement(case, "properties"), "property", name="nodeid", value=ILLEGAL.sub("?", name))
    if verdict != "passed":
        text = ILLEGAL.sub("?", text)[-KEPT:]
        last = text.strip().splitlines()[-1] if text.strip() else ""
        ET.SubElement(case, verdict, type=kind, message=last[:300]).text = text
    return case
