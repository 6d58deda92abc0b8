"""What the launches of a model will take, predicted from their compiled code: nothing here has been measured.

    python -m dpt.kernels.tools.predict --cases bench.cases.predicted [MODEL ...] [--batch 1 16] [--arch sm_90] [--dtype bfloat16]
    python -m dpt.kernels.tools.predict --cases bench.cases.predicted --write          # kernels/compiled-code/predicted.md and its record
    python -m dpt.kernels.tools.predict --kernel linear_residual [--arch sm_90]        # each workload of an op, each candidate

The model is ``time_model``'s, and says what of it is calibrated.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import launch
from . import library, loops, predicted, spaces, tune
from .cards import CARDS
from .parity import float32_products
from .workload import Bucket, Config, buckets

PROVENANCE = "chosen by the time model, not measured"
CLOSE = 0.02  # as in tune: what is no faster than this does not replace the table's own
# A library's calls are predicted by one rate for all shapes: to be chosen they have to be faster by more than the model's error.
LIBRARY_HANDICAP = 1.25


def times_of(bucket: Bucket, candidate: Config, family: str) -> Iterator[float]:
    """The microseconds of each of a bucket's workloads under a candidate."""
    for workload in bucket.workloads:
        arguments = workload.build("meta")
        with launch.using(bucket.kernel, candidate), float32_products(workload.precision), library.Recorded() as recorded:
            cases = launch.record(family, workload.name, workload.launcher, **arguments)
        known: dict[str, loops.Facts] = {}
        counts = predicted.counted([*cases, *recorded.calls], known)
        yield predicted.forward(counts, known, CARDS[family]).microseconds


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
            ranked = sorted((each for each in judged if each[2]), key=score)
            for config, _, times in ranked[: options.top]:
                mark = " (the table's)" if config == bucket.shipped else ""
                print(f"  {' '.join(f'{time:.1f}' for time in times)} us  {json.dumps(config)}{mark}", flush=True)
            refused = [each for each in judged if not each[2]]
            if refused:
                print(f"  refused: {len(refused)}, e.g. {json.dumps(refused[0][0])}: {refused[0][1]}", flush=True)
            if options.choose and ranked:
                choose(bucket, ranked, options.arch, options.tables)
    return 0


def score(judged: tuple[Config, str, tuple[float, ...]]) -> float:
    """By what candidates are ranked: microseconds, with the handicap."""
    config, _, times = judged
    return statistics.geometric_mean(times) * (1.0 if config.get("backend", "triton") == "triton" else LIBRARY_HANDICAP)


def choose(bucket: Bucket, ranked: Sequence[tuple[Config, str, tuple[float, ...]]], family: str, folder: Path) -> None:
    """Write the fastest, or the table's own where that is as fast within ``CLOSE``, and then no new entry for it; never over what was
    measured. In the shipped tables an entry has to pass the gates in all cases that it serves, as after tuning
    (:func:`tune.entry_problems`), or the next best is taken."""
    entries = json.loads((folder / f"{launch.TABLES[family]}.json").read_text())[bucket.kernel]
    if any(entry["when"] == bucket.when and entry["provenance"].startswith("measured on ") for entry in entries):
        print("  measured: left as it is")
        return
    own = [each for each in ranked if each[0] == bucket.shipped and score(each) <= score(ranked[0]) * (1 + CLOSE)]
    known = any(entry["when"] == bucket.when for entry in entries)
    for config, _, times in [*own, *(each for each in ranked if each not in own)]:
        if config == bucket.shipped and not known:
            return
        text = f"{PROVENANCE}: {CARDS[family].name}, {statistics.geometric_mean(times):.1f} us"
        tune.write_config(family, bucket.kernel, bucket.when, config, text, folder, before=bucket.parent)
        found = tune.entry_problems(bucket.kernel, bucket.when, family) if folder == launch.CONFIGS else []
        if not found:
            return
        print(f"  {json.dumps(config)}: {found[0]}", flush=True)


def models(options: argparse.Namespace) -> int:
    """Predict forwards and print them."""
    module, card, known = importlib.import_module(options.cases), CARDS[options.arch], dict[str, loops.Facts]()
    for model, batch in itertools.product(options.models or module.MODELS, options.batch):
        counts = predicted.counted(module.works(model, batch, getattr(torch, options.dtype), options.arch), known)
        made = predicted.forward(counts, known, card)
        total = made.microseconds
        said = f"{total / 1e3:.2f} ms, {batch / total * 1e6:.0f} pictures/s, {made.rate:.0f} TFLOP/s, {made.launches} launches"
        print("\n".join([f"## {module.name_of(model, batch, options.dtype)}: {said}", "", *made.table(), ""]), flush=True)
    return 0


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
    parser.add_argument("--write", action="store_true", help="write the committed predictions")
    parser.add_argument("--before", metavar="COMMIT", help="record the code as it is, that commit's, as what the table compares with")
    parser.add_argument("--check", action="store_true", help="whether the committed predictions are current")
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="with --check: compile so many of the recorded again")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    options = parser.parse_args(arguments)
    if options.kernel or options.choose:
        return candidates(options)
    if not (options.write or options.before or options.check):
        return models(options)
    module = importlib.import_module(options.cases)
    if options.before:
        predicted.write_before(module, options.before)
    if options.write:
        predicted.write(module)
    found = list(predicted.problems(module, options.draw, options.seed)) if options.check else []
    print("\n".join(found), file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
