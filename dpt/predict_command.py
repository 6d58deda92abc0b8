"""Depth and label maps of pictures, at each picture's own size.

For a picture a.jpg the folder of --out gets, by each model's task,
  a_MODEL.png          16-bit depth: inverse depth spread over 0..65535, or millimetres; or 8-bit class indices
  a_MODEL.npy, .pfm    depth as float32, .pfm on request
  a_MODEL_color.jpg    the picture with the coloured depth beside it
  a_MODEL_overlay.jpg  the picture tinted by class, with a legend of the classes present
Pictures of the same name get longer names instead of overwriting each other. A picture whose files are there, made from
the same content by the same model with the same options, is skipped; with other options it is done again; files that were
made from another picture, or by something else, are only replaced with --overwrite. Exit code: 0 done, 1 some pictures
failed (each named on stderr, the others finished), 2 nothing could be done, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import __version__, checkpoints, factory, inputs, outputs
from .cli import CommandError
from .config import CONFIGS
from .images import MAX_PIXELS, ImageError
from .predict import Result, predict_iter

CARRIED = ("dpt-tiny-depth", "dpt-tiny-scenes")
DONE = "done"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `dpt predict`."""
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="picture, folder, or pattern such as 'photos/*.jpg'")
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="folder for the results; made if missing")
    parser.add_argument("--model", action="append", metavar="NAME", help=f"can be repeated (default: {' and '.join(CARRIED)})")
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint file or folder, or a model on transformers' hub; without --model the architecture is read off it",
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the model (default: %(default)s)")
    parser.add_argument("--tta", action="store_true", help="average over six scales and flips: slower, more accurate")
    parser.add_argument("--scales", nargs="+", type=float, metavar="S", help="these scales instead of the six, or of 1")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction, help="average with the mirrored picture")
    parser.add_argument("--slide", action="store_true", help="overlapping windows of the network's size, a stride of two thirds")
    parser.add_argument("--window", type=int, metavar="PIXELS", help="side of the windows")
    parser.add_argument("--stride", type=int, metavar="PIXELS", help="distance between windows")
    parser.add_argument("--pfm", action="store_true", help="write depth as .pfm too")
    parser.add_argument("--overwrite", action="store_true", help="do again what is done, and replace files of other origin")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="pictures at a time (default: %(default)s)")
    parser.add_argument("--recursive", action="store_true", help="folders with their subfolders")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="pictures of more pixels are refused (default: %(default)s); each takes some 20 bytes of memory while a file is decoded",
    )


@dataclass
class _Tally:
    done: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failed: int = 0
    unreadable: set[Path] = field(default_factory=set)  # not tried with the next model

    def fail(self, path: Path, reason: str) -> None:
        self.failed += 1
        with tqdm.external_write_mode(file=sys.stderr):
            print(f"dpt predict: {reason if str(path) in reason else f'{path}: {reason}'}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Run `dpt predict`; returns the exit code. CommandError where nothing can be done."""
    if args.weights and len(args.model or []) > 1:
        raise CommandError("--weights is of one model: give --model at most once with it")
    for name in args.model or []:
        if name not in CONFIGS:
            raise CommandError(f"no model is named {name!r}; the names are {', '.join(CONFIGS)}")
    if args.batch_size < 1:
        raise CommandError(f"--batch-size is a positive number, not {args.batch_size}")
    if args.max_pixels < 1:
        raise CommandError(f"--max-pixels is a positive number, not {args.max_pixels}")
    device, tally = _device(args.device), _Tally()
    pictures, missing, notes = inputs.find(args.inputs, args.recursive)
    for note in notes:
        print(f"dpt predict: {note}", file=sys.stderr)
    for argument in missing:
        tally.fail(Path(argument), "no such file, folder or match, or a folder without pictures")
    if not pictures:
        raise CommandError("no pictures found")
    _check_writable(args.out)
    stems = {picture.path: args.out / name for picture, name in zip(pictures, inputs.unique_names(pictures), strict=True)}
    names = args.model or ([None] if args.weights else list(CARRIED))
    for name in names:
        _predict_all(_build(name, args, device), stems, args, tally)
    _report(tally, args.out)
    return 1 if tally.failed else 0


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch built without CUDA asserts
        raise CommandError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        outputs.write_whole(folder / f".dpt-{os.getpid()}", lambda file: None)
        (folder / f".dpt-{os.getpid()}").unlink()
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror}") from error


def _build(name: str | None, args: argparse.Namespace, device: torch.device) -> nn.Module:
    if name is None:
        return factory.load(args.weights, device=device, dtype=DTYPES[args.dtype])
    return factory.build(name, weights=args.weights or "pretrained", device=device, dtype=DTYPES[args.dtype])


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("tta", "scales", "flip", "slide", "window", "stride")}


def _predict_all(model: nn.Module, stems: dict[Path, Path], args: argparse.Namespace, tally: _Tally) -> None:
    config = model.config
    weights = _weights_identity(args.weights)
    made_with = {"model": config.name, "weights": weights, "version": __version__, "dtype": args.dtype, **_options(args)}
    jobs: dict[Path, Path] = {}
    for path, stem in stems.items():
        if path in tally.unreadable:
            continue
        stem = stem.with_name(f"{stem.name}_{config.name}")
        paths = outputs.result_paths(stem, config.head, args.pfm)
        obstacle = None if args.overwrite else _obstacle(path, paths, made_with)
        if obstacle == DONE:
            tally.skipped += 1
        elif obstacle:
            tally.fail(path, obstacle)
        else:
            jobs[path] = stem
    results = predict_iter(model, jobs, batch_size=args.batch_size, max_pixels=args.max_pixels, **_options(args))
    for result in _timed(tqdm(results, config.name, len(jobs), unit="picture", disable=len(jobs) < 2), tally):
        if isinstance(result.error, ImageError):
            tally.unreadable.add(result.source)
        if result.error is not None:
            tally.fail(result.source, str(result.error))
            continue
        stem = jobs[result.source]
        try:
            record = {"source": _identity(result.source), **made_with}
            outputs.write(stem, result.image, result.prediction, config.head, pfm=args.pfm, record=record)
        except OSError as error:
            raise CommandError(f"cannot write {stem}*: {error}", code=1) from error
        tally.done += 1


def _weights_identity(weights: str | None) -> list | None:
    """What `--weights` names: a file, all files of a folder, or of a model on the hub."""
    return None if weights is None else _identity(weights, checkpoints.find(weights).files)


def _identity(path: str | Path, files: Sequence[Path] | None = None) -> list:
    """The name, bytes and checksum of a file, or of several under one name, as JSON gives them back."""
    size = checksum = 0
    for part in files or (path,):
        with open(part, "rb") as file:
            while block := file.read(1 << 20):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [Path(path).name, size, checksum]


def _obstacle(source: Path, paths: list[Path], made_with: dict[str, Any]) -> str | None:
    """None if the results may be written, DONE if they are there already, or else why they must not be written."""
    png = paths[-1]  # written last: without it the others are the rest of an interrupted run
    if not png.exists():
        return None
    record = outputs.read_record(png)
    if not record or "source" not in record:
        return f"{png} was not made by dpt predict; --overwrite replaces it"
    name, *content = record["source"]
    try:
        changed = content != _identity(source)[1:]
    except OSError:
        return None  # reading the picture will fail too, and say why
    if changed:
        return f"{png} was made from another picture, or another version of it ({name}); --overwrite replaces it"
    same = {key: value for key, value in record.items() if key != "source"} == made_with
    return DONE if same and all(path.exists() for path in paths) else None


def _timed(results: Iterator[Result], tally: _Tally) -> Iterator[Result]:
    """The results, the seconds spent waiting for them added up."""
    start = time.perf_counter()
    for result in results:
        tally.seconds += time.perf_counter() - start
        yield result
        start = time.perf_counter()


def _report(tally: _Tally, folder: Path) -> None:
    parts = [f"{tally.done} done"]
    if tally.done:
        parts[0] += f" ({tally.seconds / tally.done:.2f} s each to predict)"
    parts += [f"{tally.skipped} done before"] if tally.skipped else []
    parts += [f"{tally.failed} failed"] if tally.failed else []
    print(f"dpt predict: {', '.join(parts)}; results in {folder}")
