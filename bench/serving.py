"""How `dpt serve` bears a load: `python -m bench.serving` has 16 clients ask a server for a minute, and writes docs/serving.json.

Each client posts the examples, whole and with their sides swapped by EXIF, over one connection, for every answer that a model has, and
checks that all answers to one question have the same bytes. The memory is the server's resident one. On Linux alone.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import io
import itertools
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import torch
from PIL import ExifTags, Image

from . import ROOT

RECORD = ROOT / "docs" / "serving.json"
CLIENTS, SECONDS, WARM, TAIL, EVERY = 16, 60.0, 10.0, 10.0, 0.25  # seconds but for the first: of a run, its beginning, its end, a sample
LONE = 6.0  # seconds of one client alone, beside which the throughput of all is put
EXAMPLES = sorted((ROOT / "dpt" / "examples").glob("*.png"))
BOUNDARY = "a3f0c1"


@contextmanager
def server(*arguments: str) -> Iterator[tuple[str, int]]:
    """The address, and the process, of a `dpt serve` that ends with the block."""
    command = [sys.executable, "-m", "dpt", "serve", "--port", "0", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise RuntimeError("dpt serve has ended before it began")
            yield found[0], process.pid
        finally:
            process.terminate()


def form(content: bytes, name: str = "picture") -> tuple[bytes, dict[str, str]]:
    """The body and the headers of a POST with a picture."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="picture"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def pictures() -> dict[str, bytes]:
    """By name, the files that are sent: the examples, and cut to another shape, which is batched with its like alone."""
    found = {path.name: path.read_bytes() for path in EXAMPLES}
    for path in EXAMPLES:
        file, exif = io.BytesIO(), Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        image = Image.open(path).convert("RGB")
        image.crop((0, 0, image.width, image.height * 3 // 4)).save(file, "JPEG", quality=92, exif=exif)
        found[f"{path.stem}-turned.jpg"] = file.getvalue()
    return found


def questions(address: str) -> list[tuple[str, tuple[bytes, dict[str, str]], str]]:
    """What is asked: an address below `/predict`, a form, and the name that the two have together."""
    with urllib.request.urlopen(f"{address}/models") as answer:
        models = json.load(answer)["models"]
    asked = []
    for name, content in pictures().items():
        for model in models:
            for task in model["tasks"]:
                for kind in task["formats"]:
                    where = urlencode({"model": model["name"], "task": task["task"], "as": kind})
                    asked.append((f"/predict?{where}", form(content, name), f"{name} {where}"))
    return asked


@dataclass
class Tally:
    """What clients saw."""

    requests: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    answers: dict[str, set[str]] = field(default_factory=dict)  # by question, the hashes of its answers
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, question: str, status: int, content: bytes) -> None:
        with self.lock:
            self.requests += 1
            if status == 200:
                self.answers.setdefault(question, set()).add(hashlib.sha256(content).hexdigest())
            else:
                self.errors[f"{status}: {content[:200]!r}"] += 1


def ask(address: str, asked: Sequence[Any], first: int, until: float, tally: Tally) -> None:
    """One client: questions in turn, from the `first` on, over one connection."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=60)
    for path, (body, headers), question in itertools.islice(itertools.cycle(asked), first, None):
        if time.monotonic() >= until:
            break
        try:
            connection.request("POST", path, body, headers)
            answer = connection.getresponse()
            tally.add(question, answer.status, answer.read())
        except (OSError, http.client.HTTPException) as error:
            tally.add(question, 0, repr(error).encode())
            connection.close()
    connection.close()


def status_of(address: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{address}/status") as answer:
        found: dict[str, int] = json.load(answer)
    return found


def resident(process: int) -> int:
    """Bytes of memory that a process has."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def under(address: str, process: int, clients: int, seconds: float) -> tuple[Tally, dict[str, int], list[tuple[float, int]]]:
    """What clients saw, what the server counted meanwhile, and its memory: seconds since the beginning, bytes."""
    asked, tally, before = questions(address), Tally(), status_of(address)
    start, samples = time.monotonic(), []
    step = len(asked) // clients + 1
    threads = [
        threading.Thread(target=ask, args=(address, asked, number * step % len(asked), start + seconds, tally)) for number in range(clients)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        samples.append((time.monotonic() - start, resident(process)))
        time.sleep(EVERY)
    after = status_of(address)
    return tally, {name: after[name] - before[name] for name in before}, samples


def measured(seconds: float = SECONDS, clients: int = CLIENTS, lone: float = LONE, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """The record of a run; in a short one the beginning and the end are its first and last third."""
    warm, tail = min(WARM, seconds / 3), min(TAIL, seconds / 3)
    with server(*arguments) as (address, process):
        ones, _, _ = under(address, process, 1, lone)
        tally, counted, samples = under(address, process, clients, seconds)
    first = max(size for when, size in samples if when <= warm)
    last = max(size for when, size in samples if when >= seconds - tail)
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "arguments": list(arguments),
        "clients": clients,
        "seconds": seconds,
        "requests": tally.requests,
        "errors": dict(tally.errors + ones.errors),
        "questions": len(tally.answers),
        "questions with two answers": sum(len(tally.answers[name] | ones.answers.get(name, set())) > 1 for name in tally.answers),
        "pictures": counted["pictures"],
        "runs": counted["runs"],
        "mean batch": round(counted["pictures"] / max(counted["runs"], 1), 2),
        "memory, end over beginning": round(last / first, 3),
        "throughput, over one client's": round(tally.requests / seconds / (ones.requests / lone), 2),
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure and write; 1 where a request failed, or two answers to one question differ."""
    parser = argparse.ArgumentParser("python -m bench.serving", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="how many ask (default: %(default)s)")
    parser.add_argument("rest", nargs="*", metavar="-- OPTION", help="of dpt serve")
    args = parser.parse_args(arguments)
    found = measured(args.seconds, args.clients, arguments=args.rest)
    RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return 1 if found["errors"] or found["questions with two answers"] else 0


if __name__ == "__main__":
    sys.exit(main())
