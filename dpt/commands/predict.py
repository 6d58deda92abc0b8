"""`dpt predict`: pictures to files. What it takes, writes and returns is told by its help, in `arguments`."""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm

from .. import __version__, checkpoints
from ..distributed import gathered, joined, of_first
from ..inference import maps, outputs
from ..inference.images import MAX_PIXELS, ImageError, NoFocalLength
from ..inference.prediction import Beside, Result, predict_iter
from ..model import DPT
from ..system.disk import open_regular, prepare, remove_leftovers
from ..system.endings import FAILED, CommandError, explained, of_the_machine, out_of_memory, printable
from ..system.processes import Place
from ..zoo import config_of
from . import clips, live, picture_paths, running
from .arguments import CARRIED
from .pipeline import Stopwatch, in_threads, keep_freed_memory
from .single import calibrated

DONE = "done"
WRITERS = 8  # threads, at most, that write results
SLOWEST = timedelta(days=365)  # for so long one process may have pictures left when another has none


@dataclass
class _Tally:
    done: int = 0
    skipped: int = 0
    failed: int = 0
    rates: dict[str, tuple[int, float, float]] = field(default_factory=dict)  # of a model its pictures, their seconds, those of the network
    unreadable: set[Path] = field(default_factory=set)  # not tried with the next model

    @classmethod
    def of_all(cls, parts: Sequence[_Tally]) -> _Tally:
        """What processes that worked side by side did together: the slowest one's seconds."""
        rates = {}
        for name in dict.fromkeys(name for part in parts for name in part.rates):
            counts, seconds, network = zip(*(part.rates[name] for part in parts if name in part.rates), strict=True)
            rates[name] = sum(counts), max(seconds), max(network)
        return cls(sum(part.done for part in parts), sum(part.skipped for part in parts), sum(part.failed for part in parts), rates)

    def fail(self, path: Path, reason: str) -> None:
        self.failed += 1
        with tqdm.external_write_mode(file=sys.stderr):
            print(f"dpt predict: {printable(reason if str(path) in reason else f'{path}: {reason}')}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Run `dpt predict`; returns the exit code. CommandError where nothing can be done.

    Each of several processes does its share. All end together: torchrun ends the others as soon as one returns another code than 0.
    """
    if args.camera is not None:
        return live.run(args)
    device = running.device_of(args.device)
    with joined(torch.device("cpu"), SLOWEST) as own:
        return _run(args, device, own)


def _run(args: argparse.Namespace, device: torch.device, own: Place) -> int:
    tally = _Tally()
    try:
        maps.check(args.further)
    except ValueError as error:
        raise CommandError(str(error)) from error
    moving = [argument for argument in args.inputs if clips.is_clip(argument)]
    pictures, missing, notes = of_first(lambda: picture_paths.find([one for one in args.inputs if one not in moving], args.recursive))
    pictures += [picture_paths.Found(Path(argument), Path(Path(argument).name)) for argument in dict.fromkeys(moving)]
    if own.first:
        for note in notes:
            print(f"dpt predict: {printable(note)}", file=sys.stderr)
        for argument in missing:
            tally.fail(Path(argument), "no such file, folder or match, or a folder without pictures")
    if not pictures:
        raise CommandError("no pictures found")
    for option in ("prompt", "calibrate"):
        if getattr(args, option) is not None and (len(pictures) > 1 or moving):
            raise CommandError(f"--{option} is of one picture, and {'a clip is' if moving else f'{len(pictures)} are'} given")
    _check_writable(args.out)
    stems = {picture.path: args.out / name for picture, name in zip(pictures, picture_paths.unique_names(pictures), strict=True)}
    for folder in {stem.parent for stem in stems.values()}:
        remove_leftovers(folder)
    names = args.model or ([None] if args.weights else CARRIED)
    caution = None if args.weights else running.scenes_only(map(config_of, names))
    if caution and own.first:
        print(f"dpt predict: {caution}", file=sys.stderr)
    keep_freed_memory()
    share = dict(own.share(list(stems.items())))
    tasks = {head.task for name in names if name is not None for head in config_of(name).heads}
    if args.calibrate is not None and tasks and "depth" not in tasks:
        raise CommandError(f"--calibrate is of depth, which {' and '.join(names)} has not")
    for name in names:
        model = running.model_of(args, name, device, getattr(torch, args.dtype))
        chosen = args
        if args.tiles and len(names) > 1 and all(head.task != "depth" for head in model.config.heads):  # whose labels stay the whole's
            chosen = argparse.Namespace(**{**vars(args), "tiles": False, "window": None, "stride": None})
        _predict_all(model, share, chosen, tally, own)
    total = _Tally.of_all(gathered(tally))
    of_first(lambda: _report(total, len(pictures), len(names), args.out))  # the others end when all is told
    return 1 if total.failed else 0


def _check_writable(folder: Path) -> None:
    try:
        prepare(folder)
    except OSError as error:
        raise CommandError(f"cannot write to {folder}: {error.strerror}") from error


def _predict_all(model: DPT, stems: dict[Path, Path], args: argparse.Namespace, tally: _Tally, own: Place) -> None:
    config = model.config
    weights = _weights_identity(args.weights)
    made_with = {"model": config.name, "weights": weights, "version": __version__, "dtype": args.dtype, **running.choices(args)}
    made_with = {name: value for name, value in made_with.items() if name not in ("prompt", "tiles") or value}  # as older records
    for option in ("prompt", "calibrate"):
        if (path := getattr(args, option)) is not None:
            made_with[option] = _identity(path)
    if args.range is not None:
        made_with["range"] = list(args.range)
    jobs: dict[Path, Path] = {}
    for path, stem in stems.items():
        if path in tally.unreadable:
            continue
        stem = stem.with_name(outputs.result_name(stem.name, config.name, outputs.separate_tasks(config)))
        if clips.is_clip(str(path)):
            _predict_clip(model, path, stem, args, made_with, tally)
            continue
        sets = [outputs.result_paths(outputs.stem_of(stem, head, config), head, args.further) for head in config.heads]
        obstacles = [None] if args.overwrite else [_obstacle(path, paths, made_with) for paths in sets]
        # what a file of somebody's is in the way of is told first; done is what is so for all tasks
        obstacle = next((found for found in obstacles if found not in (None, DONE)), None if None in obstacles else DONE)
        if obstacle == DONE:
            tally.skipped += 1
        elif obstacle:
            tally.fail(path, obstacle)
        else:
            jobs[path] = stem
    if not jobs:
        return

    def write(result: Result) -> None:
        if result.image is not None and result.prediction is not None:
            record = {"source": _identity(result.source), **made_with}
            for head in config.heads:
                stem = outputs.stem_of(jobs[result.source], head, config)
                prediction, drawn, how = result.prediction, result.drawn.get(head.task), head
                if args.calibrate is not None and head.task == "depth":
                    depth, how = calibrated(cast(np.ndarray, prediction.depth), head, args.calibrate, "predict")
                    prediction, drawn = replace(prediction, depth=depth), None
                kept: dict[str, Any] = {"further": args.further, "record": record, "drawn": drawn, "ends": args.range}
                outputs.write(stem, result.image, prediction, how, **kept)

    done, start, watch = tally.done, time.perf_counter(), Stopwatch(next(model.parameters()).device)
    how: dict[str, Any] = {"batch_size": args.batch_size, "max_pixels": args.max_pixels or MAX_PIXELS, "graph": args.graph}
    results = predict_iter(model, jobs, Beside(drawn=True, ends=args.range, clock=watch), **how, **running.choices(args))
    written = in_threads(write, results, min(WRITERS, torch.get_num_threads()))
    share = "" if own.world == 1 else f", a share of {own.world}"  # one bar for all: theirs would overwrite each other
    bar = tqdm(desc=printable(config.name) + share, total=len(jobs), unit="picture", disable=len(jobs) < 2 or not own.first)
    with closing(results), closing(written), bar:
        for result, error in written:
            bar.update()
            if result.error is None and error is None:
                tally.done += 1
            else:
                _fail(result, error, tally)
    tally.rates[config.name] = tally.done - done, time.perf_counter() - start, watch.seconds


def _predict_clip(model: DPT, path: Path, stem: Path, args: argparse.Namespace, made_with: dict[str, Any], tally: _Tally) -> None:
    """A clip's maps, or why there are none."""
    chosen = {"view": args.view, "frames": args.frames, "range": args.range}
    record = {"source": _identity(path), **made_with, **json.loads(json.dumps(chosen))}
    if not args.overwrite:
        obstacle = clips.obstacle(path, stem, record)
        if obstacle is not None:
            tally.skipped += obstacle == DONE
            if obstacle != DONE:
                tally.fail(path, obstacle)
            return

    def tell(problem: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            print(f"dpt predict: {printable(f'{path}: {problem}')}", file=sys.stderr)

    start = time.perf_counter()
    try:
        target, frames, watch = clips.predict(model, path, stem, args, record, tell)
    except (ImageError, OSError) as error:
        if of_the_machine(error, reading=isinstance(error, ImageError)):
            raise CommandError(explained(error), FAILED) from error
        tally.unreadable.add(path)
        tally.fail(path, str(error))
        return
    tally.done += 1
    seconds = time.perf_counter() - start
    if frames:
        speed = f"{frames / seconds:.3g} frames a second end to end, {frames / max(watch.seconds, 1e-9):.3g} of the network alone"
        print(f"{printable(target)}: {_count(frames, 'frame')}, {speed}")


def _fail(result: Result, error: Exception | None, tally: _Tally) -> None:
    """Count a picture that could not be predicted, or whose results could not be written; CommandError where the next could not either."""
    if isinstance(result.error, ImageError) and not isinstance(result.error, NoFocalLength):
        tally.unreadable.add(result.source)
    cause = error if result.error is None else result.error.__cause__
    if of_the_machine(cause, reading=error is None):
        raise CommandError(explained(cause), FAILED) from cause
    if error is not None and not (isinstance(error, OSError) or out_of_memory(error)):
        raise error
    tally.fail(result.source, str(result.error) if error is None else explained(error))


def _weights_identity(weights: str | None) -> list[Any] | None:
    """What `--weights` names: a file, all files of a folder, or of a model on the hub."""
    return None if weights is None else _identity(weights, checkpoints.find(weights).files)


def _identity(path: str | Path, files: Sequence[Path] | None = None) -> list[Any]:
    """The name, bytes and checksum of a file, or of several under one name, as JSON gives them back."""
    size = checksum = 0
    for part in files or (path,):
        with open_regular(part) as file:
            while block := file.read(1 << 20):
                size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [Path(path).name, size, checksum]


def _obstacle(source: Path, paths: list[Path], made_with: dict[str, Any]) -> str | None:
    """None if the results may be written, DONE if they are there already, or else why they must not be written."""
    png = paths[-1]  # written last: without it the others are the rest of an interrupted run
    record = outputs.read_record(png) or {}
    if "source" in record:
        name, *content = record["source"]
        try:
            changed = content != _identity(source)[1:]
        except OSError:
            return None  # reading the picture will fail too, and say why
        if changed:
            return f"{png} was made from another picture, or another version of it ({name}); --overwrite replaces it"
        if outputs.is_done(paths, {"source": record["source"], **made_with}):
            return DONE
    taken = outputs.of_others(paths)
    return None if taken is None else f"{taken} was not made by dpt predict; --overwrite replaces it"


def _report(tally: _Tally, pictures: int, models: int, folder: Path) -> None:
    for name, (done, seconds, network) in tally.rates.items():
        if done:
            speed = f"{done / seconds:.3g} a second end to end, {done / network:.3g} of the network alone"
            print(f"{printable(name)}: {_count(done, 'picture')}, {speed}")
    parts = [f"{tally.done} done"]
    parts += [f"{tally.skipped} done before"] if tally.skipped else []
    parts += [f"{tally.failed} failed"] if tally.failed else []
    counted = f", of {_count(pictures, 'picture')} by {_count(models, 'model')}" if models > 1 else ""
    print(f"dpt predict: {', '.join(parts)}{counted}; results in {printable(folder)}", flush=True)


def _count(number: int, of: str) -> str:
    return f"{number} {of}{'s' * (number != 1)}"
