"""Files written whole or not at all, regular files opened for reading, and JSON objects read from them.

A file is written under a random hidden name in the folder of its final one, and renamed. The writer holds a lock on it meanwhile: a
temporary file without one is of a run that was killed, and `prepare` removes it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing is removed
    fcntl = None  # type: ignore[assignment]

TEMPORARY = re.compile(r"\.dpt-[0-9a-f]{16}\.part")  # as short whatever the final name: that may be as long as a name can be
_WRITE = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)

_unfinished: set[Path] = set()  # the temporary files of this process


class _Output(io.BufferedIOBase):
    """What a writer fills. It hands out no descriptor and keeps the operating system's error, for libraries that are given a descriptor
    (Pillow, NumPy) or that write from C++ (PyTorch) raise another one without its number. What is written once it is over goes nowhere:
    PyTorch's writer, if it was interrupted, writes the end of its file when it is destroyed, where an error ends the process."""

    def __init__(self, file: BinaryIO):
        self._file, self.over = file, False
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0 if self.over else self._file.seek(offset, whence)

    def tell(self) -> int:
        return 0 if self.over else self._file.tell()

    def write(self, data: Any) -> int:
        if self.over:
            return memoryview(data).nbytes
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def write_whole(path: str | Path, writer: Callable[[BinaryIO], object], *, durable: bool = True) -> None:
    """Let `writer` fill a temporary file in the same folder, then rename it to `path`; on any failure or signal nothing is left.

    A link at `path` is replaced, and what it points to stays as it is. The file has the mode that new files have.

    Args:
        durable: the file is on the disk before it is renamed, so that a loss of power leaves the former file or this one, never an empty
            one; it costs the time of an fsync.

    Raises:
        OSError: `path`, and why it could not be written, also where a library made another error of it.
    """
    path = Path(path)
    temporary, output = None, None
    try:
        temporary, file = _create(path.parent)
        with file:
            output = _Output(file)
            try:
                writer(cast(BinaryIO, output))
            finally:
                output.over = True
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException as error:
        cause = output.error if output is not None and output.error is not None else error
        if isinstance(error, Exception) and isinstance(cause, OSError):  # an OSError of a number becomes FileNotFoundError and the like
            raise (OSError(cause.errno, cause.strerror, str(path)) if cause.errno else OSError(f"{path}: {cause}")) from error
        raise
    finally:
        _discard(temporary)


def _create(folder: Path) -> tuple[Path, BinaryIO]:
    """A new temporary file, open and locked."""
    while True:
        path = folder / f".dpt-{os.urandom(8).hex()}.part"
        _unfinished.add(path)
        try:
            descriptor = os.open(path, _WRITE | os.O_CREAT | os.O_EXCL, 0o666)
        except OSError:  # what is there, if anything, is not ours
            _unfinished.discard(path)
            raise
        try:
            file = open(descriptor, "wb")
            if _lock(file) is not False and os.path.exists(path):  # else `prepare` came between, and has removed it
                return path, file
            file.close()
        except BaseException:
            _discard(path)
            raise
        _unfinished.discard(path)


def _lock(file: BinaryIO) -> bool | None:
    """Whether nobody else holds it; None where files cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return None


def _discard(path: Path | None) -> None:
    if path in _unfinished:
        with suppress(OSError):  # it has been renamed, or its disk is gone
            path.unlink()
        _unfinished.discard(path)


def discard_unfinished() -> None:
    """Remove the temporary files of this process, whose threads may still be writing them: it is about to end."""
    for path in list(_unfinished):
        _discard(path)


def prepare(folder: str | Path) -> None:
    """Make a folder, with those above it, remove what killed runs left in it, and raise OSError if no file can be made there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    temporary, file = _create(folder)
    file.close()
    _discard(temporary)


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files of killed runs from a folder, if there is one. Those that a live run is writing are locked, and stay."""
    try:
        with os.scandir(folder) as entries:
            left = [entry.path for entry in entries if TEMPORARY.fullmatch(entry.name)]
    except OSError:  # what is to be written there will say why
        return
    for path in left:
        with suppress(OSError):  # another user's, a link, or gone by now
            with open(os.open(path, _WRITE | getattr(os, "O_NONBLOCK", 0)), "wb") as file:
                if _lock(file):
                    os.unlink(path)


def must_be_replaceable(*paths: Path) -> None:
    """ValueError where a folder is in the way of a file that is to be written later, after hours of work."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: a file is to be written there")


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, or a link to one; anything else is an OSError at once: a pipe would wait for its writer."""
    _check_regular(os.stat(path), path)  # before it is opened, which alone makes some devices act
    file = open(path, "rb", opener=lambda name, _: os.open(name, _READ))
    try:
        _check_regular(os.fstat(file.fileno()), path)  # and now that nobody can put another in its place
    except OSError:
        file.close()
        raise
    return file


def _check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise OSError(errno.EINVAL, f"{kinds.get(stat.S_IFMT(status.st_mode), 'a device')}, not a regular file", str(path))


def read_object(path: str | Path) -> dict[str, Any]:
    """A JSON object from a UTF-8 file.

    Raises:
        ValueError: it is no JSON object; the message names the file. OSError: it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read()
    try:
        values = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not a JSON object")
    return values
