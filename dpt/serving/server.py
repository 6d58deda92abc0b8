"""The server itself: an address, and a thread that serves while a block of code runs."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import uvicorn

ENDING_SECONDS = 2  # for answers that are on their way when the server ends


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens; a port of 0 is any that is free. OSError where there is none to have, or no such host."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return socket.create_server(cast(Any, address[:2]), family=family, backlog=256)


def address_of(listener: socket.socket) -> tuple[str, int]:
    """The numeric address and the port of a socket that listens."""
    host, port = listener.getsockname()[:2]
    return host, port


@contextmanager
def serving(app: Any, listener: socket.socket) -> Iterator[threading.Event]:
    """Serves an ASGI application in a thread; it ends with the block, and before that only by an error, of which the event tells. (A
    signal that comes while a thread is joined would make Python think that it had ended.)"""
    options: dict[str, Any] = {"http": "h11", "ws": "none", "loop": "asyncio", "lifespan": "off"}  # what is there wherever uvicorn is
    quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "date_header": False}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=ENDING_SECONDS, **options, **quiet))
    ended = threading.Event()

    def serve() -> None:
        try:
            server.run(sockets=[listener])
        finally:
            ended.set()

    thread = threading.Thread(target=serve, name="dpt-serve", daemon=True)
    thread.start()
    try:
        yield ended
    finally:
        server.should_exit = True
        thread.join()
