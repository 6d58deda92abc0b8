"""How a command ends: with a code and at most one line on stderr, by a signal, for want of memory or disk, or because nobody reads what it
prints.
"""

from __future__ import annotations

import errno
import gc
import os
import signal
import sys
import threading
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeGuard, cast

from . import disk

FAILED, USAGE = 1, 2  # exit codes: something failed; nothing could be done
UNREAD = 128 + 13  # what a shell calls SIGPIPE: the reader of stdout is gone
SIGNALS = {
    getattr(signal, name): what
    for name, what in {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "hung up"}.items()
    if hasattr(signal, name)
}

_GO_ON = "the same command then goes on with what is missing"
_FREE_MEMORY = "end other programs, raise the limit (ulimit -v), or use a smaller model, batch or picture"
REMEDIES = {
    errno.ENOSPC: f"free some space on that disk, or choose another folder; {_GO_ON}",
    errno.EDQUOT: f"free some of your quota, or choose another folder; {_GO_ON}",
    errno.EROFS: "choose another folder",
    errno.EIO: f"check that disk, or choose another folder; {_GO_ON}",
    errno.EMFILE: f"raise this process's limit of open files (ulimit -n); {_GO_ON}",
    errno.ENFILE: f"end programs that hold files open; {_GO_ON}",
    errno.ENOMEM: f"{_FREE_MEMORY}; {_GO_ON}",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    errno.ENAMETOOLONG: "choose a folder with a shorter path",
}
_OF_ONE_FILE = {errno.EFBIG, errno.ENAMETOOLONG}  # the others would go wrong with the next file too
_IN_READING = {errno.EMFILE, errno.ENFILE}
_NO_MEMORY = (  # what PyTorch, oneDNN and the dynamic linker say, in lower case
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "could not create a memory",
    "failed to map segment",
)
_OTHERS = {  # errors of PyTorch and Python that are known by their words alone
    "can't start new thread": "no more threads can be started: raise the limit (ulimit -u), or that of memory (ulimit -v)",
    "Too many open files": f"too many open files: {REMEDIES[errno.EMFILE]}",
    "DataLoader worker (pid": "a process that reads pictures was ended, perhaps for want of memory: take fewer --workers",
}


class CommandError(Exception):
    """Ends a subcommand with a message, no traceback, and an exit code."""

    def __init__(self, message: str, code: int = USAGE):
        super().__init__(message)
        self.code = code


class Ended(KeyboardInterrupt):
    """A signal; a KeyboardInterrupt whichever it was, for that is what pools and progress bars know how to end for."""


def printable(text: object) -> str:
    """One line that does to a terminal nothing but show: what is no letter, sign or space (controls, line ends, directions of writing,
    bytes that are no UTF-8) becomes its escape."""
    return "".join(
        letter if letter.isprintable() or unicodedata.category(letter) == "Zs" else letter.encode("unicode_escape").decode("ascii")
        for letter in str(text)
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory, in whatever way."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ImportError) and any(words in str(error).lower() for words in _NO_MEMORY)
    )


def explained(error: BaseException) -> str:
    """An error's message, with the remedy where there is one and the message does not give it."""
    if isinstance(error, OSError):
        name, message = error.filename, error.strerror or str(error)
        if error.strerror and isinstance(name, str | bytes | os.PathLike):
            message = f"{os.fsdecode(name)}: {message}"
        return f"{message}: {REMEDIES[error.errno]}" if error.errno in REMEDIES else message
    if out_of_memory(error):
        return f"memory ran out: {_FREE_MEMORY}"
    message = _of_others(error) or str(error) or type(error).__name__
    return message.strip().splitlines()[-1] if message.startswith("Caught ") else message  # a worker's, behind its traceback


def _of_others(error: BaseException) -> str | None:
    return next((what for words, what in _OTHERS.items() if isinstance(error, RuntimeError) and words in str(error)), None)


def of_the_machine(error: BaseException | None, reading: bool = False) -> TypeGuard[OSError]:
    """Whether an error of a file is not that file's, so that the next one would only meet it too; a disk's faults in reading are."""
    return isinstance(error, OSError) and error.errno in (_IN_READING if reading else REMEDIES.keys() - _OF_ONE_FILE)


def run(name: str, command: Callable[[], int], *, restore: bool) -> int:
    """The exit code of `command()`. An error that its message explains becomes one line on stderr; so does a signal, which ends what is in
    work, and whose code is 128 more than its number. A second one ends the process at once.

    Args:
        name: what the line begins with.
        restore: the signals' handlers, and how warnings and letters are written, are put back. The process's own command does not: while
            its threads end, a signal still ends it at once.
    """
    message: str | None = None
    code: int | None = None
    with _plain_output(name, restore), _signals(name, restore) as received:
        try:
            try:
                code = command()
                _flush_stdout()
            finally:
                received.ending = True
        except KeyboardInterrupt as error:
            _let_go(error)
            code = 128 + signal.SIGINT
            received.number = received.number or signal.SIGINT
        except BrokenPipeError:
            code = UNREAD
        except Exception as error:
            message, code = explained(error), _code(error)
            if code is None and not received.number:
                raise
            _let_go(error)
        finally:
            _drop_what_cannot_be_written()
        if received.number:  # also where a library has made another error of it
            disk.discard_unfinished()
            message, code = SIGNALS[received.number], 128 + received.number
        if message is not None:
            gc.collect()  # progress bars and pools end before the line
        received.reported = True
        _report(name, message)
    return cast(int, code)


def _let_go(error: BaseException | None) -> None:
    """End what the frames of an error's traceback hold, each object before its parts. Left to the garbage collector, which ends the parts
    first, a DataLoader could no longer tell its processes to stop and would wait five seconds for each."""
    sys.unraisablehook = lambda _: None  # objects that were half made, or whose processes are gone, complain as they go
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _code(error: Exception) -> int | None:
    """The exit code of an error that its message explains; None for one that only a traceback does."""
    if isinstance(error, CommandError):
        return error.code
    if of_the_machine(error) or out_of_memory(error) or isinstance(error, FloatingPointError) or _of_others(error):
        return FAILED
    return USAGE if isinstance(error, ValueError | OSError | ImportError) else None


class _Received:
    """The handler of `SIGNALS` in a process: the first is an `Ended`, and any after it, or once the command is over, the end."""

    def __init__(self, name: str):
        self.name, self.ending, self.reported, self._process = name, False, False, os.getpid()
        self.number: int | None = None

    def __call__(self, number: int, frame: object) -> None:
        if os.getpid() == self._process:
            again, self.number = self.number is not None, self.number or number
            if again or self.ending:
                self.end_at_once()
        raise Ended  # in a process that was forked from this one too

    def end_at_once(self) -> None:
        if os.getpid() != self._process:
            os._exit(128 + signal.SIGINT)
        disk.discard_unfinished()
        number = cast(int, self.number)
        if not self.reported:
            _report(self.name, SIGNALS[number])
        if "multiprocessing" in sys.modules:
            for child in sys.modules["multiprocessing"].active_children():
                child.terminate()
        os._exit(128 + number)


@contextmanager
def _signals(name: str, restore: bool) -> Iterator[_Received]:
    """Handles `SIGNALS`, those that are not ignored (by nohup, say), if this is the main thread."""
    received, former = _Received(name), {}
    if threading.current_thread() is threading.main_thread():
        former = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    try:
        for number in former:
            signal.signal(number, received)
        if not restore:
            sys.unraisablehook = _if_lost(Ended, received.end_at_once)
        yield received
    finally:
        for number, handler in former.items() if restore else ():
            signal.signal(number, handler)


@contextmanager
def leaving_signals_to_us() -> Iterator[None]:
    """Processes started inside do not see a terminal's Ctrl-C and hang-up, which go to all of its processes: this one ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS.keys() - {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def end_with_clean_up() -> None:
    """In a process of a pool: SIGTERM, by which a pool ends it, removes what it was writing, and unwinds it, so that it lets go of the
    pool's locks."""

    def end(number: int, _: object) -> None:
        disk.discard_unfinished()
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)
    sys.unraisablehook = _if_lost(SystemExit, lambda: os._exit(128 + signal.SIGTERM))


def _if_lost(raised: type[BaseException], end_at_once: Callable[[], object]) -> Callable[[sys.UnraisableHookArgs], None]:
    """A `sys.unraisablehook`. What a signal's handler raises where nothing can be unwound, while an object is finalised or at the end of
    a process, would be printed with a traceback and otherwise ignored: it ends the process."""

    def hook(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, raised):
            end_at_once()
        sys.__unraisablehook__(lost)

    return hook


def leave_words_to_the_main_process(_: int = 0) -> None:
    """In a process of a DataLoader: its errors reach the main process with the batch. What is left for it to print is that the main
    process, ending, cut off a connection."""
    sys.excepthook = lambda *_: None


@contextmanager
def _plain_output(name: str, restore: bool) -> Iterator[None]:
    """Warnings are lines like those of errors, and letters that the terminal has not are written as escapes."""
    streams = [stream for stream in (sys.stdout, sys.stderr) if hasattr(stream, "reconfigure")]
    errors, form, hook = [stream.errors for stream in streams], warnings.formatwarning, sys.unraisablehook
    for stream in streams:
        stream.reconfigure(errors="backslashreplace")
    warnings.formatwarning = lambda message, *_, **__: f"{name}: {printable(message)}\n"
    try:
        yield
    finally:
        if restore:
            warnings.formatwarning, sys.unraisablehook = form, hook
            for stream, former in zip(streams, errors, strict=True):
                if not stream.closed:
                    stream.reconfigure(errors=former)


def _report(name: str, message: str | None) -> None:
    if message is not None and sys.stderr is not None:
        try:
            print(f"{name}: {printable(message)}", file=sys.stderr, flush=True)
        except (OSError, ValueError, RuntimeError):  # nobody reads it, or a signal came in the middle of a print
            pass


def _flush_stdout() -> None:
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, "stdout") from error


def _drop_what_cannot_be_written() -> None:
    """Lead a stream that nobody reads, or whose disk is full, to nowhere: Python would fail once more when it closes it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
        except ValueError:  # closed
            pass
