"""`dpt evaluate`: the metrics of a model on a data set by a protocol, beside what was published or those of trivial predictors."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from typing import Any, cast

import torch

from .. import __version__
from ..config import DPTConfig, HeadConfig
from ..data.datasets import FolderDataset, open_data
from ..distributed import joined
from ..evaluation.metrics import scorer_of
from ..evaluation.points import PointPairs
from ..evaluation.protocols import Protocol, protocol_of
from ..evaluation.published import Published, published
from ..evaluation.scoring import Measured, Scored, evaluate, scored, trivial_predictors
from ..inference.options import TTA_SCALES, Options
from ..model import DPT
from ..system.disk import must_be_replaceable, prepare, write_whole
from ..system.endings import printable
from ..system.processes import Place
from . import running

HUNDREDTHS = {"mIoU", "mAcc", "aAcc", "bad1"}  # figures in percent, of which two decimals are published; of others three or four


def run(args: argparse.Namespace) -> int:
    if args.json:
        must_be_replaceable(args.json)
        prepare(args.json.parent)
    device = running.device_of(args.device)
    with joined(device) as own:
        model = running.model_of(args, args.model, device)
        protocol, head = protocol_of(args.protocol, model.config)
        report, lines = _measured(args, model, protocol, head, own)
    if own.first:
        for line in lines:
            print(printable(line))
        if args.json:
            text = json.dumps(report, indent=1) + "\n"
            write_whole(args.json, lambda file: file.write(text.encode()))
    return 0


def _measured(args: argparse.Namespace, model: DPT, protocol: Protocol, head: HeadConfig, own: Place) -> tuple[dict[str, Any], list[str]]:
    """What --json gets, and what is printed."""
    config, choices = model.config, running.choices(args)
    options = Options.of(config, **choices)
    scorer_of(protocol, head, args.max_depth)  # what it does not take is said before anything is read
    dataset = _opened(args, protocol, head)
    found = scored(model, dataset, args.batch_size, args.max_depth, protocol=protocol, own=own, graph=args.graph, **choices)
    figures, known = {config.name: found.figures}, _published(config, protocol, options)
    report: dict[str, Any] = {
        "protocol": protocol.name,
        "model": config.name,
        "weights": args.weights or config.source,
        "pictures": found.pictures,
        "options": {"scales": options.scales, "flips": options.flips, "window": options.window, "stride": options.stride},
        "versions": {"dpt": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "figures": figures,
    }
    if protocol.name == "folder":
        folder = cast(FolderDataset, dataset)
        train = FolderDataset(args.train_data, head, **running.reading(args)) if args.train_data else None
        for name, predictor in trivial_predictors(folder, train).items():
            figures[name] = evaluate(predictor, folder, max_depth=args.max_depth, progress=False, protocol=protocol, own=own)
        return report, [
            f"{name:24}" + "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()) for name, metrics in figures.items()
        ]
    if found.per_class:
        report["classes"] = {name: {"IoU": _number(iou), "Acc": _number(accuracy)} for name, (iou, accuracy) in found.per_class.items()}
    if known:
        report["published"] = {"figures": known.figures, "source": known.source, **({"note": known.note} if known.note else {})}
    return report, list(_table(config.name, protocol, found, known))


def _published(config: DPTConfig, protocol: Protocol, options: Options) -> Published | None:
    """What was published with these options; None if nothing was."""
    views = {((1.0,), (False, True) if config.input.flip else (False,)): False, (TTA_SCALES, (False, True)): True}
    used = options.scales, options.flips
    return published(config.name, protocol.name, views[used]) if options.window is None and used in views else None


def _opened(args: argparse.Namespace, protocol: Protocol, head: HeadConfig) -> Measured:
    kind = args.kind or protocol.data
    if (kind == "points") != (protocol.data == "points"):
        raise ValueError(f"--kind {kind}: {protocol.name} is measured on {protocol.data}")
    if kind == "points":
        return PointPairs(args.data, head)
    return open_data(kind, args.data, None if kind == "folder" else protocol.split, head, **running.reading(args))


def _table(model: str, protocol: Protocol, found: Scored, known: Published | None) -> Iterable[str]:
    """Figures beside what was published of them, and of segmentation the classes."""
    if found.per_class:
        width = max(map(len, found.per_class))
        yield f"{'class':{width}}     IoU     Acc"
        for name, values in found.per_class.items():
            yield f"{name:{width}}" + "".join(f"{value:8.2f}" for value in values)
        yield ""
    yield f"{model}, {protocol.name}, {found.pictures} pictures"
    yield f"{'':10}{'measured':>10}{'published':>11}" if known else f"{'':10}{'measured':>10}"
    for name, value in found.figures.items():
        beside = f"{known.figures.get(name, ''):>11}" if known else ""
        yield f"{name:10}{value:10.{2 if name in HUNDREDTHS else 4}f}{beside}".rstrip()
    if known:
        yield f"published, of its authors' weights: {known.source}" + (f" ({known.note})" if known.note else "")


def _number(value: float) -> float | None:
    """A figure as JSON has it, which knows no NaN: of a class that never occurs there is none."""
    return None if value != value else value
