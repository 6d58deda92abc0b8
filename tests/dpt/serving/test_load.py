"""Sixteen clients at once, for seconds here and for a minute in docs/serving.json."""

import json

import pytest

from bench import serving

ZERO = ("errors", "questions with two answers")


def test_sixteen_clients():
    """Blind spot: an error under load, an answer that depends on who else asked, memory that grows with each request, no batches. The
    memory of seconds is held to less than that of a minute: a fifth more than in the first third."""
    found = serving.measured(6, serving.CLIENTS, lone=1, arguments=["--device", "cpu"])
    assert [found[name] for name in ZERO] == [{}, 0]
    assert found["requests"] > 2 * serving.CLIENTS and found["pictures"] == found["requests"]
    assert found["mean batch"] > 1.2
    assert found["memory, end over beginning"] < 1.2


def test_the_minute_that_was_recorded():
    """Blind spot: a record of another load than is told, with errors, or whose page tells other figures."""
    found = json.loads(serving.RECORD.read_text(encoding="utf-8"))
    assert (found["clients"], found["seconds"]) == (16, 60) and [found[name] for name in ZERO] == [{}, 0]
    assert found["memory, end over beginning"] < 1.1 and found["mean batch"] > 1.2 and found["requests"] == found["pictures"]
    page = " ".join(serving.RECORD.with_name("serve.md").read_text(encoding="utf-8").split())
    for name in ("requests", "runs", "questions", "mean batch", "memory, end over beginning", "throughput, over one client's"):
        assert f" {found[name]} " in page, name


def test_a_request_that_fails_is_counted():
    """Blind spot: errors that nobody adds up."""
    tally = serving.Tally()
    tally.add("a", 200, b"x")
    tally.add("a", 200, b"y")
    tally.add("b", 503, b"no")
    tally.add("b", 0, b"gone")
    assert tally.requests == 4 and sum(tally.errors.values()) == 2 and len(tally.answers["a"]) == 2


@pytest.mark.parametrize("name", serving.pictures())
def test_what_is_sent_is_a_picture(name):
    assert serving.form(serving.pictures()[name], name)[0].startswith(b"--" + serving.BOUNDARY.encode())
