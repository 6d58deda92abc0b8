"""Which pictures a command line means, what of it is left out, and a name for each picture that no other has."""

from __future__ import annotations

import glob
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

from ..inference.images import EXTENSIONS, VIDEOS
from ..inference.maps import WRITERS
from ..inference.outputs import RECORD, read_record
from ..system.disk import open_regular

LEFT_OUT = {  # a kind of what lies in a folder and is not taken: one, and several
    "other": ("file that is no picture", "files that are no pictures"),
    "video": ("video", "videos"),
    "result": ("result of dpt predict", "results of dpt predict"),
    "broken": ("link that leads nowhere", "links that lead nowhere"),
    "loop": ("link back to a folder that it lies in", "links back to folders that they lie in"),
    "closed": ("folder that may not be read", "folders that may not be read"),
    "folder": ("folder, as --recursive is not given", "folders, as --recursive is not given"),
}
NAMED = 3  # of each kind so many are named
RECORD_WITHIN = 4096  # the first bytes of a result, in which its record begins


@dataclass(frozen=True)
class Found:
    """A picture's `path`, and its place below the folder it was found in (only its file name, if it was named itself)."""

    path: Path
    place: Path


class Findings(NamedTuple):
    """The pictures, the arguments that led to none, and for each argument that something was left out of a sentence that says so."""

    pictures: list[Found]
    missing: list[str]
    notes: list[str]


def find(arguments: Sequence[str], recursive: bool = False) -> Findings:
    """Files, folders and glob patterns -> the pictures, each path once.

    A folder gives its visible files with a picture's extension, sorted, and those of its subfolders if `recursive`. A link is what it
    leads to, under the link's own name; only one to a folder that it lies in is not followed. Folders and patterns leave out what
    `dpt predict` wrote itself. A file that is named is taken whatever it is.
    """
    pictures: dict[str, Found] = {}
    missing, notes = [], []
    real = cache(os.path.realpath)
    for argument in arguments:
        left_out: dict[str, list[str]] = defaultdict(list)
        numbers: Counter[str] = Counter()
        found = False
        for folder, place, kind in _expand(argument, recursive):
            if kind is None:
                found = True
                pictures.setdefault(os.path.join(real(folder), place), Found(Path(folder, place), Path(place)))
            else:
                numbers[kind] += 1
                if numbers[kind] <= NAMED:
                    left_out[kind].append(place)
        if not found:
            missing.append(argument)
        if left_out:
            clauses = (_clause(kind, numbers[kind], left_out[kind]) for kind in LEFT_OUT if kind in left_out)
            notes.append(f"{argument}: left out: {'; '.join(clauses)}")
    return Findings(list(pictures.values()), missing, notes)


def _clause(kind: str, number: int, first: list[str]) -> str:
    return f"{number} {LEFT_OUT[kind][number > 1]} ({', '.join(first)}{', ...' if number > len(first) else ''})"


def _expand(argument: str, recursive: bool) -> Iterator[tuple[str, str, str | None]]:
    """What an argument means: folder, place below it, and the kind by which it is left out, or None of a picture."""
    if os.path.isdir(argument):
        yield from ((argument, place, kind) for place, kind in _in_folder(argument, recursive))
    elif os.path.lexists(argument):
        yield (*os.path.split(argument), None if os.path.exists(argument) else "broken")
    else:
        for match in _matches(argument):
            if recursive and os.path.isdir(match):
                yield from _expand(match, recursive)
            elif os.path.isdir(match):
                yield (*os.path.split(match), "folder")
            elif not os.path.exists(match):
                yield (*os.path.split(match), "broken")
            else:
                yield (*os.path.split(match), "result" if _is_result(match) else None)


def _matches(pattern: str) -> list[str]:
    """Sorted. `glob` follows links below **, and never ends where two lead back; pathlib, which knows no hidden files, does not."""
    parts = Path(pattern).parts
    try:
        if "**" not in parts:
            return sorted(glob.glob(pattern))
        first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
        base, below = Path(*parts[:first]), Path(*parts[first:], *(["*"] if parts[-1] == "**" else []))
        places = (match.relative_to(base) for match in base.glob(str(below)))
        return sorted(str(base / place) for place in places if not any(part.startswith(".") for part in place.parts))
    except (OSError, ValueError, RecursionError):  # a folder that may not be read; a name no file can have
        return []


def _in_folder(folder: str, recursive: bool) -> Iterator[tuple[str, str | None]]:
    """Place below the folder, and kind, of everything visible, in order."""
    try:
        levels = [("", _identity(folder), iter(_listing(folder)))]  # from this folder down: place, identity, what is still to come
    except OSError:
        yield ".", "closed"
        return
    while levels:
        above, _, entries = levels[-1]
        name, kind = next(entries, (None, None))
        if name is None:
            levels.pop()
            continue
        place = above + name
        if kind == "folder" and recursive:
            path = os.path.join(folder, place)
            try:
                identity = _identity(path)
                if all(identity != known for _, known, _ in levels):
                    levels.append((f"{place}/", identity, iter(_listing(path))))
                    continue
                kind = "loop"
            except OSError:
                kind = "closed"
        yield place, kind


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _listing(folder: str) -> list[tuple[str, str | None]]:
    """Name and kind of all that is visible in a folder, sorted. Only links, folders and what may be a result are looked at closer."""
    with os.scandir(folder) as entries:
        kinds = {entry.name: _kind(entry) for entry in entries if not entry.name.startswith(".")}
    for name in kinds:
        stem, extension = os.path.splitext(name)
        if extension in WRITERS and kinds.get(f"{stem}.png") == "result":
            kinds[name] = "result"
    return sorted(kinds.items())


def _kind(entry: os.DirEntry[str]) -> str | None:
    try:
        if entry.is_dir():
            return "folder"
        if not entry.is_file():
            return "other" if os.path.exists(entry.path) else "broken"
    except OSError:  # links in a circle
        return "broken"
    extension = os.path.splitext(entry.name)[1].lower()
    if extension not in EXTENSIONS:
        return "video" if extension in VIDEOS else "other"
    return "result" if _is_result(entry.path) else None


def _is_result(path: str) -> bool:
    """Whether `dpt predict` wrote a file; few others are read beyond their first bytes."""
    stem, extension = os.path.splitext(path)
    if extension in WRITERS:  # beside its PNG, which tells
        return _is_result(f"{stem}.png")
    if extension not in (".png", ".jpg"):
        return False
    try:
        with open_regular(path) as file:
            return RECORD in file.read(RECORD_WITHIN) and read_record(Path(path)) is not None
    except OSError:
        return False


def unique_names(pictures: Sequence[Found]) -> list[str]:
    """A name for each picture's results, relative and without an extension, no two equal even where case does not count.

    It is the picture's place without its extension; where that would be another's too, with the extension (a_jpg, a_png), then
    with the parent folder's name before it, and at last with a number.
    """
    names: dict[int, str] = {}
    taken: set[str] = set()
    waiting = list(range(len(pictures)))
    for form in (_plain, _with_extension, _with_parent):
        forms = {index: form(pictures[index]) for index in waiting}
        uses = Counter(name.casefold() for name in forms.values())
        free = [index for index in waiting if uses[forms[index].casefold()] == 1 and forms[index].casefold() not in taken]
        names.update((index, forms[index]) for index in free)
        taken.update(forms[index].casefold() for index in free)
        waiting = [index for index in waiting if index not in names]
    for index in waiting:
        base = _with_parent(pictures[index])
        names[index] = next(name for name in (f"{base}_{number}" for number in count(2)) if name.casefold() not in taken)
        taken.add(names[index].casefold())
    return [names[index] for index in range(len(pictures))]


def _plain(picture: Found) -> str:
    return picture.place.with_suffix("").as_posix()


def _with_extension(picture: Found) -> str:
    return f"{_plain(picture)}_{picture.place.suffix[1:]}"


def _with_parent(picture: Found) -> str:
    named = Path(_with_extension(picture))
    return (named.parent / f"{picture.path.absolute().parent.name}_{named.name}").as_posix()
