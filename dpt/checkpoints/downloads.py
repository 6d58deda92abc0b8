"""Downloads of weights: resumed, tried again, checked against the hash in the file's name, and safe where two processes want the same.

Where the name holds no hash, that of what was downloaded is kept beside it, so that later damage is seen.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

log = logging.getLogger(__name__)  # its warnings are lines on stderr where nobody has set up logging

BLOCK = 1 << 20
PASSING = {408, 425, 429, 500, 502, 503, 504}  # answers of a server that may be another the next time
START_AGAIN = 416  # what is there is longer than the file


class DownloadError(OSError):
    """A file that could not be had; the message names the address, the reason, and where to put the file by hand."""


class _Interrupted(Exception):
    """An attempt that failed for a reason that may pass."""


def fetch(url: str, target: Path, *, attempts: int = 5, timeout: float = 30.0, wait: float = 1.0) -> Path:
    """The file of an address, at `target`: the one that is there, if it is whole, or else downloaded.

    Args:
        url: http, https or file. Where the name of the file ends in the first hex digits of its SHA-256, e.g. `weights-2f21e586.pt`, it is
            checked.
        target: where it is kept. Beside it stand a part that was interrupted, from which the next download goes on, a lock, for of two
            processes one downloads and the other waits, and the hash of a file whose name has none.
        attempts: how often it is tried, with twice as long a wait each time; each wait is logged, a warning, with its reason.
        timeout: seconds without a byte after which an attempt ends.
        wait: seconds before the second attempt.

    Raises:
        DownloadError: an OSError.
    """
    digits, kept = _digits(url), target.with_name(f"{target.name}.sha256")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock", mode=0o666):
        damage = None
        if target.is_file():
            damage = _mismatch(target, digits or (kept.read_text().strip() if kept.is_file() else ""))
            if damage is None:
                return target
            warnings.warn(f"{target} is damaged: {damage}. It is downloaded again", stacklevel=2)
        try:
            part = _download(url, target, digits, attempts, timeout, wait)
        except (_Interrupted, DownloadError) as error:
            there = f"{target} is damaged ({damage}), and " if damage else ""
            advice = f"Get it by other means and put it at {target}, or give its path as the weights (--weights FILE)"
            raise DownloadError(f"{there}{url} could not be downloaded: {error}. {advice}") from error
        if not digits:
            kept.write_text(_sha256(part) + "\n")
        os.replace(part, target)
        _tag_of(part).unlink(missing_ok=True)
    return target


def _digits(url: str) -> str:
    """The first hex digits of the SHA-256 that a file's name ends in, at least 8; empty where it has none."""
    found = re.search(r"-([0-9a-f]{8,64})\.\w+$", url)
    return found[1] if found else ""


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def _mismatch(path: Path, digits: str) -> str | None:
    """How a file's hash is another than is known of it; None if it is not, or nothing is."""
    found = _sha256(path) if digits else ""
    return None if found.startswith(digits) else f"its SHA-256 begins with {found[: len(digits)]}, not {digits}"


def _download(url: str, target: Path, digits: str, attempts: int, timeout: float, wait: float) -> Path:
    """The whole file, beside `target`. _Interrupted or DownloadError, with the reason."""
    part, problem = target.with_name(f"{target.name}.part"), _Interrupted("no attempt was made")
    for attempt in range(attempts if url.startswith("http") else 1):
        if attempt:
            pause = wait * 2 ** (attempt - 1)
            log.warning("%s: %s; attempt %d of %d follows in %g s", url, problem, attempt + 1, attempts, pause)
            time.sleep(pause)
        try:
            resumed = _go_on(url, part, timeout)
        except _Interrupted as error:
            problem = error
            continue
        damage = _mismatch(part, digits)
        if damage is None:
            return part
        part.unlink()
        problem = _Interrupted(damage)
        if not resumed:  # the server's file is another
            break
    raise problem


def _tag_of(part: Path) -> Path:
    """Where the version of the file that a part is of is written: its ETag, or its date."""
    return part.with_name(f"{part.name}.tag")


def _go_on(url: str, part: Path, timeout: float) -> bool:
    """Download what is missing of a part, or all of it; whether some of it was there and is of the same version."""
    tag = _tag_of(part).read_text() if _tag_of(part).is_file() else ""
    there = part.stat().st_size if tag and part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "dpt"})
    if there:
        request.add_header("Range", f"bytes={there}-")
        request.add_header("If-Range", tag)  # the whole file, if it is another by now
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == START_AGAIN:
            part.unlink(missing_ok=True)
        elif error.code not in PASSING:
            raise DownloadError(f"the server answers {error.code} {error.reason}") from error
        raise _Interrupted(f"the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_reason(error)) from error
    with response:
        resumed: bool = response.status == http.HTTPStatus.PARTIAL_CONTENT
        if resumed and not (response.headers.get("Content-Range") or "").startswith(f"bytes {there}-"):
            part.unlink()
            raise _Interrupted(f"the server sent {response.headers.get('Content-Range')} when asked for the bytes from {there}")
        if not resumed:
            there = 0
            part.unlink(missing_ok=True)
            _tag_of(part).write_text(_version(response.headers))
        length = int(response.headers.get("Content-Length") or 0)
        bar = tqdm(total=there + length or None, initial=there, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with bar, open(part, "ab") as file:
            received = 0
            for block in _blocks(response):
                file.write(block)
                received += len(block)
                bar.update(len(block))
        if received < length:
            raise _Interrupted(f"the connection ended after {there + received} of {there + length} bytes")
    return resumed


def _version(headers: http.client.HTTPMessage) -> str:
    """What `If-Range` may compare: a strong ETag or a date; empty where the server gives neither, and then nothing is resumed."""
    tag = headers.get("ETag") or ""
    return tag if tag.startswith('"') else headers.get("Last-Modified") or ""


def _blocks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            block = response.read1(BLOCK)  # what has come, so that none is lost where the connection ends
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(_reason(error)) from error
        if not block:
            return
        yield block


def _reason(error: Exception) -> str:
    """The cause of an error of the network, in words."""
    cause = getattr(error, "reason", error)
    return "the server does not answer" if isinstance(cause, TimeoutError) else str(cause) or type(cause).__name__
