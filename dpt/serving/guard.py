"""What a request has to keep to before anybody reads it: where it comes from, how large it is, how many there are, how long it takes."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from fastapi.responses import JSONResponse

PREDICT = "/predict"  # the one address that takes bodies
FORM_BYTES = 1 << 16  # what a form may have beside the picture
READ_SECONDS = 60.0  # a body has to be there by then
LINGER_SECONDS = 5.0  # so long a body that is refused is read and thrown away: an answer in the middle of it may never be seen
RETRY_SECONDS = 1
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What a server takes: bytes and pixels of a picture, and how many requests may be in work or wait."""

    max_bytes: int
    max_pixels: int
    queue: int


def is_loopback(host: str) -> bool:
    """Whether a name or an address, without a port, is this machine's alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Refused(HTTPException):
    """A request that is answered with its error and nothing else."""

    def response(self) -> JSONResponse:
        return JSONResponse({"error": self.detail}, self.status_code, headers=dict(self.headers or {}))


class Guard:
    """ASGI middleware: refuses what breaks `limits`, and adds `HEADERS` to all answers.

    Args:
        loopback: nobody but this machine can reach the server. Then a request must call it by an address of this machine: a page of
            somebody else's, whose name was made to point here, calls it by its own. From any page but the server's own nothing is taken.

    Attributes:
        inside: how many requests with a picture are in work or wait.
        refused: how many were refused because the queue was full.
    """

    def __init__(self, app: App, limits: Limits, loopback: bool):
        self._app, self._limits, self._loopback = app, limits, loopback
        self.inside = self.refused = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"{scope['type']}: only http is served")

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in HEADERS.items())]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        takes = scope["path"] == PREDICT and scope["method"] == "POST"
        body = _Body(receive, self._limits.max_bytes + FORM_BYTES if takes else 0, self._limits.max_bytes)
        try:
            self._check_origin(headers)
            if takes:
                body.check(headers)
                if self.inside >= self._limits.queue:
                    self.refused += 1
                    why = f"{self.inside} pictures are in work or wait: no more than {self._limits.queue} may (--queue)"
                    raise Refused(503, why, {"retry-after": str(RETRY_SECONDS)})
        except Refused as refused:
            if "expect" not in headers:  # who asks before sending sends nothing then
                await body.discard()
            await refused.response()(scope, receive, headed)
            return
        self.inside += takes
        try:
            await self._app(scope, body.receive, headed)
        finally:
            self.inside -= takes

    def _check_origin(self, headers: dict[str, str]) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            asks = None if origin is None else urlsplit(origin).netloc.lower()
        except ValueError as error:
            raise Refused(400, f"Host: {host}, Origin: {origin}: {error}") from error
        if self._loopback and not is_loopback(name):
            raise Refused(403, f"Host: {host}: this server is called by an address of this machine, such as 127.0.0.1 or localhost")
        if asks is not None and asks != host.lower():
            raise Refused(403, f"Origin: {origin}: only the server's own page, or a program, may ask")


class _Body:
    """A request's body, counted and timed as it is read."""

    def __init__(self, receive: Receive, most: int, max_bytes: int):
        self._receive, self._most, self._max_bytes = receive, most, max_bytes
        self._seen, self._ended = 0, False
        self._until = asyncio.get_running_loop().time() + READ_SECONDS

    def check(self, headers: dict[str, str]) -> None:
        """Refuse by what the headers say."""
        kind, length = headers.get("content-type", ""), headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._most:
            raise self._too_large(f"{int(length)} bytes")
        if kind.partition(";")[0].strip().lower() != "multipart/form-data":
            raise Refused(415, f"Content-Type: {kind or 'none'}: it must be multipart/form-data, with the picture in the field 'picture'")

    def _too_large(self, found: str) -> Refused:
        return Refused(413, f"{found}: a picture has at most {self._max_bytes} (--max-bytes)")

    async def receive(self) -> Message:
        """As ASGI's: Refused beyond the limits."""
        if self._ended:
            return await self._receive()  # that the client has gone
        left = self._until - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0))
        except asyncio.TimeoutError:  # noqa: UP041  # of Python 3.10 not yet the same as TimeoutError
            raise Refused(408, f"the picture was not there within {READ_SECONDS:g} seconds") from None
        self._seen += len(message.get("body", b""))
        self._ended = message["type"] == "http.disconnect" or not message.get("more_body", False)
        if self._seen > self._most:
            await self.discard()
            raise self._too_large(f"more than {self._most} bytes")
        return message

    async def discard(self) -> None:
        """Read what is left, and keep nothing."""

        async def rest() -> None:
            while not self._ended:
                message = await self._receive()
                self._ended = message["type"] == "http.disconnect" or not message.get("more_body", False)

        try:
            await asyncio.wait_for(rest(), LINGER_SECONDS)
        except asyncio.TimeoutError:  # noqa: UP041
            pass
