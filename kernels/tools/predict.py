"""What the launches of a model will take, predicted from their compiled code: nothing here has been measured.

    python -m dpt.kernels.tools.predict --cases bench.cases.predicted [MODEL ...] [--batch 1 16] [--arch sm_90] [--dtype bfloat16]
    python -m dpt.kernels.tools.predict --cases bench.cases.predicted --write          # kernels/compiled-code/predicted.md and its record
    python -m dpt.kernels.tools.predict --kernel linear_residual [--arch sm_90]        # each workload of an op, each candidate

The model is ``time_model``'s, and says what of it is calibrated.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import launch
from . import compiler, library, loops, spaces, tune
from .cards import CARDS, Card
from .parity import float32_products
from .time_model import Launch, Library, Prediction, launch_of, predict
from .workload import Bucket, Config, buckets

PROVENANCE = "chosen by the time model, not measured"
CLOSE = 0.02  # as in tune: what is no faster than this does not replace the table's own


@dataclass(frozen=True)
class Row:
    """A launch or call, how often it is made, and what one takes."""

    work: Launch | Library
    count: int
    each: Prediction

    @property
    def microseconds(self) -> float:
        return self.count * self.each.microseconds


def counted(
    works: Iterable[launch.CompileCase | Library], known: Mapping[str, loops.Facts]
) -> tuple[dict[Launch | Library, int], dict[str, loops.Facts]]:
    """(work -> how often, facts by key) of a forward; what is not ``known`` is compiled."""
    keys: dict[Any, str] = {}
    found: dict[str, loops.Facts] = {}
    counts: dict[str, tuple[Launch | Library, int]] = {}
    for each in works:
        if isinstance(each, Library):
            made: Launch | Library = each
        else:
            what = each.specialisation()
            key = keys.setdefault(what, "") or compiler.key_of(each)
            keys[what] = key
            if key not in found:
                found[key] = known[key] if key in known else loops.facts(each)
            made = launch_of(each, key)
        _, count = counts.get(repr(made), (made, 0))
        counts[repr(made)] = made, count + 1
    return dict(counts.values()), found


def rows(counts: Mapping[Launch | Library, int], facts: Mapping[str, loops.Facts], card: Card) -> list[Row]:
    """What each takes, the most first."""
    found = [Row(work, count, predict(work, facts, card)) for work, count in counts.items()]
    return sorted(found, key=lambda row: -row.microseconds)


def table(found: Sequence[Row]) -> list[str]:
    """The Markdown table of a forward."""
    lines = ["| launch | number | us each | us | TFLOP/s | limited by | idle |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in found:
        rate = f"{row.each.flops / row.each.microseconds / 1e6:.0f}" if row.each.flops else ""
        cells = [
            row.work.name,
            row.count,
            f"{row.each.microseconds:.1f}",
            f"{row.microseconds:.0f}",
            rate,
            row.each.limit,
            f"{row.each.idle:.0%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def times_of(bucket: Bucket, candidate: Config, family: str) -> Iterator[float]:
    """The microseconds of each of a bucket's workloads under a candidate."""
    for workload in bucket.workloads:
        arguments = workload.build("meta")
        with launch.using(bucket.kernel, candidate), float32_products(workload.precision), library.Recorded() as recorded:
            cases = launch.record(family, workload.name, workload.launcher, **arguments)
        counts, facts = counted([*cases, *recorded.calls], {})
        yield sum(row.microseconds for row in rows(counts, facts, CARDS[family]))


def judge(task: tuple[Bucket, Config, str]) -> tuple[Config, str, tuple[float, ...]]:
    """(candidate, why it is refused or "", the microseconds of each workload)."""
    bucket, candidate, family = task
    try:
        problems = tune.candidate_problems(bucket, family, candidate)
        return candidate, "; ".join(problems), () if problems else tuple(times_of(bucket, candidate, family))
    except Exception as error:  # of a kernel that the model cannot read: told, and the others are predicted
        return candidate, " ".join(f"{type(error).__name__}: {error}".split())[:300], ()


def candidates(options: argparse.Namespace) -> int:
    """Predict the candidates of the entries, an entry after the other; ``--choose`` writes the fastest."""
    found = [bucket for op in options.kernel or spaces.ops() for bucket in buckets(list(spaces.space(op).tuning_space()), options.arch)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for bucket in found:
            kept = tuple(workload for workload in bucket.workloads if options.only in workload.name)
            dtypes = {str(workload.dtype).removeprefix("torch.") for workload in kept}
            if not kept or options.dtype not in dtypes:
                continue
            bucket = replace(bucket, workloads=kept)
            print(f"{bucket.kernel} {json.dumps(bucket.when)}: {'; '.join(workload.name for workload in kept)}", flush=True)
            judged = pool.map(judge, [(bucket, candidate, options.arch) for candidate in bucket.candidates], chunksize=1)
            ranked = sorted((each for each in judged if each[2]), key=lambda each: statistics.geometric_mean(each[2]))
            for config, _, times in ranked[: options.top]:
                mark = " (the table's)" if config == bucket.shipped else ""
                print(f"  {' '.join(f'{time:.1f}' for time in times)} us  {json.dumps(config)}{mark}", flush=True)
            refused = [each for each in judged if not each[2]]
            if refused:
                print(f"  refused: {len(refused)}, e.g. {json.dumps(refused[0][0])}: {refused[0][1]}", flush=True)
            if options.choose and ranked:
                choose(bucket, ranked, options.arch, options.tables)
    return 0


def choose(bucket: Bucket, ranked: Sequence[tuple[Config, str, tuple[float, ...]]], family: str, folder: Path) -> None:
    """Write the fastest, or the table's own where that is as fast within ``CLOSE``; never over what was measured."""
    entries = json.loads((folder / f"{launch.TABLES[family]}.json").read_text())[bucket.kernel]
    if any(entry["when"] == bucket.when and entry["provenance"].startswith("measured on ") for entry in entries):
        print("  measured: left as it is")
        return
    least = statistics.geometric_mean(ranked[0][2])
    close = (each for each in ranked if each[0] == bucket.shipped and statistics.geometric_mean(each[2]) <= least * (1 + CLOSE))
    config, _, times = next(close, ranked[0])
    text = f"{PROVENANCE}: {CARDS[family].name}, {statistics.geometric_mean(times):.1f} us"
    tune.write_config(family, bucket.kernel, bucket.when, config, text, folder, before=bucket.parent)


def models(options: argparse.Namespace) -> int:
    """Predict forwards and print them."""
    module, card = importlib.import_module(options.cases), CARDS[options.arch]
    known: dict[str, loops.Facts] = {}
    for model in options.models or list(module.TABLE):
        for batch in options.batch:
            counts, found = counted(module.works(model, batch, getattr(torch, options.dtype), options.arch), known)
            known |= found
            made = rows(counts, known, card)
            print("\n".join([f"## {title(model, module.side_of(model), batch, made)}", "", *table(made), ""]))
    return 0


def title(model: str, side: int, batch: int, found: Sequence[Row]) -> str:
    """A forward in a line."""
    total, flops = sum(row.microseconds for row in found), sum(row.count * row.each.flops for row in found)
    launches = sum(row.count for row in found)
    rate = f"{batch / total * 1e6:.0f} pictures/s, {flops / total / 1e6:.0f} TFLOP/s"
    return f"{model} {side}x{side} batch {batch}: {total / 1e3:.2f} ms, {rate}, {launches} launches"


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict models; or an op's workloads, with ``--kernel`` or ``--choose``."""
    parser = argparse.ArgumentParser(prog="python -m dpt.kernels.tools.predict", description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--cases", default="bench.cases.predicted", metavar="MODULE", help="gives the models' launches")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--arch", choices=list(CARDS), default="sm_90")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kernel", action="append", choices=spaces.ops(), help="predict the candidates of an op's workloads")
    parser.add_argument("--only", default="", metavar="TEXT", help="of the workloads those with this in their name")
    parser.add_argument("--top", type=int, default=10, help="candidates printed of an entry")
    parser.add_argument("--choose", action="store_true", help="write the fastest candidates into the table")
    parser.add_argument("--tables", type=Path, default=launch.CONFIGS, help="the folder of the tables that --choose writes")
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    return candidates(options) if options.kernel or options.choose else models(options)


if __name__ == "__main__":
    sys.exit(main())
