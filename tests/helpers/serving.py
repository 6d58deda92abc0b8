"""A server in this process, and what clients send to it."""

import http.client
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

from bench.serving import form
from dpt.serving import guard, server
from dpt.serving.app import Service

LIMITS = {"max_bytes": 1 << 20, "max_pixels": 1 << 20, "queue": 16}


@contextmanager
def started(models: dict, *, batch_size: int = 2, loopback: bool = True, notes: dict = {}, **limits) -> Iterator[tuple[str, Service]]:  # noqa: B006
    """The address of a server that ends with the block, and what serves there."""
    listener = server.listening("127.0.0.1", 0)
    settings = guard.Limits(**{**LIMITS, **limits})
    with closing(Service(models, settings, batch_size=batch_size, loopback=loopback, notes=notes)) as service:
        with server.serving(service.app, listener):
            yield "http://{}:{}".format(*server.address_of(listener)), service


def asked(address: str, path: str, body: object = None, headers: dict = {}, method: str = "GET") -> tuple[int, dict, bytes]:  # noqa: B006
    """Status, headers and body of an answer."""
    place = urlsplit(address)
    with closing(http.client.HTTPConnection(place.hostname, place.port, timeout=60)) as connection:
        connection.request(method, path, body, headers, encode_chunked=not isinstance(body, bytes | None))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def post(address: str, content: bytes, query: str = "", name: str = "a.png", **headers: str) -> tuple[int, dict, bytes]:
    """`asked`, of a picture."""
    body, kind = form(content, name)
    return asked(address, f"/predict?{query}", body, {**kind, **headers}, "POST")


def error_of(content: bytes) -> str:
    (said,) = json.loads(content).values()
    return said


def until(holds: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether it came to hold: what a server does behind its answer, or in other threads, is not there at once."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()
