"""Work in threads: order, errors, bounds, ends. Blind spot: an accelerator, whose clock has never been read here."""

import platform
import threading
import time
import weakref

import pytest
import torch

from dpt.commands import pipeline
from dpt.commands.pipeline import Stopwatch, in_threads


def test_each_item_in_order_with_its_error():
    """Blind spot: the quickest first; an error that is lost, or that ends the rest."""

    def work(number):
        time.sleep(0.02 * (3 - number % 4))
        if number % 3 == 0:
            raise ValueError(number)

    results = list(in_threads(work, range(10), 3))
    assert [item for item, _ in results] == list(range(10))
    assert [repr(error) for _, error in results] == [f"ValueError({item})" if item % 3 == 0 else "None" for item in range(10)]


def test_items_are_made_while_others_are_worked_on():
    """Blind spot: one after the other. The second item is only made once the first is at work, and the first waits for the second."""
    at_work, made = threading.Event(), threading.Event()

    def items():
        yield 0
        assert at_work.wait(10)
        made.set()
        yield 1

    def work(number):
        if number == 0:
            at_work.set()
            assert made.wait(10)

    assert [error for _, error in in_threads(work, items(), 1)] == [None, None]


def test_no_more_is_held_than_said():
    """Blind spot: results of a quick network that pile up before a slow disk."""
    made, done = [], []

    def items():
        for number in range(50):
            assert len(made) - len(done) <= 3
            made.append(number)
            yield number

    for item, _ in in_threads(lambda number: time.sleep(0.002), items(), 2):
        done.append(item)
    assert done == made == list(range(50))


@pytest.mark.parametrize("how", ["closed", "interrupted"])
def test_what_is_in_work_is_finished(how):
    """Blind spot: a thread that still writes when the program has ended; a queue that is worked off after Ctrl-C."""
    finished, started = [], threading.Event()

    def items():
        yield from range(4)
        started.wait(10)
        raise KeyboardInterrupt

    def work(number):
        started.set()
        time.sleep(0.1)
        finished.append(number)

    results = in_threads(work, items(), 3)
    if how == "closed":
        next(results)
        results.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            list(results)
    count = len(finished)
    assert count >= 1
    time.sleep(0.25)
    assert len(finished) == count and not any(thread.name.startswith("dpt-write") for thread in threading.enumerate())


def test_an_interruption_in_a_thread_is_raised():
    """Blind spot: an exit asked for in a thread that is handed on as one item's error."""

    def work(number):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(in_threads(work, range(3), 1))


def test_the_networks_time():
    """Blind spot: what happens between the passes counted too; a pass that fails not counted."""
    watch, start = Stopwatch(torch.device("cpu")), time.perf_counter()
    for _ in range(2):
        with watch:
            time.sleep(0.05)
        time.sleep(0.1)
    assert 0.1 <= watch.seconds <= time.perf_counter() - start - 0.2
    with pytest.raises(ZeroDivisionError), watch:
        time.sleep(0.05)
        raise ZeroDivisionError
    assert watch.seconds >= 0.15


def test_a_gpus_time(monkeypatch):
    """Blind spot: a host that waits for the device at every pass; events of a million pictures that are kept; a pass counted twice, or not
    if nobody asks before the end. The device is made up: it is through with what is queued when the test says so."""
    queued, through, waits, events = 0.0, 0.0, [], weakref.WeakSet()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            events.add(self)

        def record(self, stream):
            assert stream == "stream of cuda:1"
            self.at = queued

        def query(self):
            return self.at <= through

        def synchronize(self):
            waits.append(self.at)

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    watch = Stopwatch(torch.device("cuda:1"))
    for number in range(50):
        with watch:
            queued += 2
        queued += 1  # between two passes
        through = max(queued - 9, 0)
        assert len(events) <= 10, number
    with pytest.raises(ZeroDivisionError), watch:
        queued += 5
        raise ZeroDivisionError
    assert not waits
    through = 1e9
    assert watch.seconds == 105 and waits and watch.seconds == 105


def test_freed_memory_is_kept(monkeypatch):
    """Blind spot: options that glibc does not take; a system without glibc. What it gains is measured, not tested."""
    if platform.libc_ver()[0] == "glibc":
        assert pipeline.keep_freed_memory()
    monkeypatch.setattr(pipeline.ctypes, "CDLL", lambda name: object())
    assert not pipeline.keep_freed_memory()
