"""Which pictures a command line means, and a name for each that no other has."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from .images import EXTENSIONS
from .outputs import read_record


@dataclass(frozen=True)
class Found:
    """A picture's `path`, and its place below the folder it was found in (only its file name, if it was named itself)."""

    path: Path
    place: Path


def find(arguments: Sequence[str], recursive: bool = False) -> tuple[list[Found], list[str]]:
    """Files, folders and glob patterns -> the pictures, each once, and the arguments that led to none.

    A folder gives its visible files with a picture's extension, sorted, and those of its subfolders if `recursive`. Folders
    and patterns leave out what `dpt predict` wrote itself. A file that is named is taken whatever it is.
    """
    found: dict[Path, Found] = {}
    missing = []
    for argument in arguments:
        try:
            pictures = _expand(argument, recursive)
        except (OSError, ValueError):  # a folder that may not be read; a name no file can have
            pictures = []
        if not pictures:
            missing.append(argument)
        for picture in pictures:
            found.setdefault(Path(os.path.realpath(picture.path)), picture)
    return list(found.values()), missing


def _expand(argument: str, recursive: bool) -> list[Found]:
    path = Path(argument)
    if path.is_dir():
        return _in_folder(path, recursive)
    if path.exists():
        return [Found(path, Path(path.name))]
    matches = (Path(match) for match in sorted(glob.glob(argument, recursive=True)))
    return [Found(match, Path(match.name)) for match in matches if match.is_file() and not _is_result(match)]


def _in_folder(folder: Path, recursive: bool) -> list[Found]:
    paths = folder.rglob("*") if recursive else folder.iterdir()
    places = sorted(path.relative_to(folder) for path in paths if path.suffix.lower() in EXTENSIONS)
    visible = [place for place in places if not any(part.startswith(".") for part in place.parts)]
    return [Found(folder / place, place) for place in visible if (folder / place).is_file() and not _is_result(folder / place)]


def _is_result(path: Path) -> bool:
    return path.suffix in (".png", ".jpg") and read_record(path) is not None


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
