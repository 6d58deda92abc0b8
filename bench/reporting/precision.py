"""docs/precision.md out of docs/precision.json, the record of `python -m bench.precision`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

Record = Mapping[str, Any]
HALVES = ("bfloat16", "float16")
PARTS = {  # of ROUNDED in bench/precision.py: what is done about it
    "LayerNorm's statistics": "PyTorch's and our kernels take mean and variance in float32 and round the result once",
    "attention's softmax": "scores, their exponentials and sums are float32 in PyTorch's fused attention, xformers' and our kernel's",
    "GELU": "PyTorch's and our kernels compute it, and every sigmoid and exponential, in float32 and round the result once",
}


def largest_of(dtype: str) -> float:
    return torch.finfo(getattr(torch, dtype)).max


def roundoff(dtype: str) -> float:
    """Half of the distance from 1 to the next number."""
    return torch.finfo(getattr(torch, dtype)).eps / 2


def number(value: float) -> str:
    return f"{value:.0f}" if 1000 <= value < 1e6 else f"{value:.3g}"


def share(value: float) -> str:
    return f"{100 * value:.2g} %"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _map_errors(record: Record, part: str) -> list[str]:
    return [share(record["rounded"][part][dtype]["rms"]) for dtype in HALVES]


def _rounded(models: Sequence[Record]) -> str:
    """The map's error as it is, and were a part rounded at every step."""
    rows = [[f"`{record['name']}`, {part}", *_map_errors(record, part)] for record in models for part in ("nothing else", *PARTS)]
    return table(["rounded at every step", *HALVES], rows)


def _times(models: Sequence[Record], dtype: str) -> str:
    """How many times as large the map's error becomes at most, by each part."""
    found = []
    for part in PARTS:
        errors = [(record["rounded"][part][dtype]["rms"], record["rounded"]["nothing else"][dtype]["rms"]) for record in models]
        found.append(f"{max(1.0, *(rounded / kept for rounded, kept in errors)):.1f} times as large by {part}")
    return ", ".join(found)


def _last_layer(models: Sequence[Record]) -> str:
    rows = []
    for record in models:
        for kind in ("float32", "half"):
            found = [record["last layer"][kind][dtype] for dtype in HALVES]
            seen = [share(one["labels"]) if "labels" in one else f"{one['values']}" for one in found]
            of = "labels that differ" if "labels" in found[0] else f"values a map, of {record['values']}"
            rows.append([f"`{record['name']}`, {kind}", *(share(one["rms"]) for one in found), *seen, of])
    return table(["last layer in", *HALVES, *HALVES, "the last two"], rows)


def _stages(record: Record) -> str:
    kinds = [(dtype, kind) for dtype in HALVES for kind in ("largest", "rms")]
    rows = [
        [name, number(stage["largest"]), *(share(stage[dtype][kind]) for dtype, kind in kinds)] for name, stage in record["stages"].items()
    ]
    return table(["stage", "largest", *(f"{dtype}, {kind}" for dtype, kind in kinds)], rows)


def _model(record: Record) -> str:
    count, _, height, width = record["input"]
    largest = record["largest"]
    room = largest_of("float16") / largest["value"]
    return "\n\n".join(
        [
            f"## {record['name']}, {record['weights']} weights, {count} pictures of {height}x{width}",
            f"The largest activation of all modules is {number(largest['value'])}, of `{largest['module']}`: float16 has room for one "
            f"{number(room)} times as large.",
            _stages(record),
        ]
    )


INTRODUCTION = """# Precision

What `dtype=torch.bfloat16` and `torch.float16` cost, stage by stage, and what is computed in float32 all the same. Written by
`python -m bench.precision` from [precision.json](precision.json), which it measures: of the carried models with their weights, and of
larger ones with random weights, which show how rounding adds up, but not how large activations are after a training. The pictures are the
carried ones; on a CPU ({machine}), PyTorch {torch}.

float16 ends at {float16:g}, bfloat16 where float32 does, at {bfloat16:.3g}; the unit roundoff is {roundoffs}. Errors are
against float32: *largest* is relative to the stage's largest value, *rms* the root mean square, relative to that of the stage. A map that
is not finite is an error, which names the first module that gave such a number (`dpt.inference.finite`).

## What is float32

Parameters and activations have the model's dtype, and so have the operands of products, which are summed in float32. Pictures are resized
and normalised in float32; maps are resized, merged and made labels in float32. In the network:

{kept}
- The last layer of depth and normals, and what follows it (activation, reciprocal, mean of bins, far sky), is computed in float32, and so
  are the maps, by the fused depth head too.
- So are the rotation of queries and keys, the resizes of positions and tables, and ZoeDepth's bins.

The map's error (rms) as it is, and were one of these parts rounded to half precision at each of its steps. At most it becomes

{times}

and where it becomes smaller, by chance, that counts as 1.0. Squares in float16 also end at 65504, which activations of 256 reach.

{rounded}

The map's error (rms) with the last layer in float32 and in half precision, and what is seen of it: of depth how many distinct values a map
has, of labels how many are others. Depth keeps float32, for in half precision it has steps. Logits do not: hardly a label changes, and in
float32 they, the most memory of all that such a model makes, would take twice as much.

{last}
"""


def page(record: Record) -> str:
    """The whole page."""
    models = record["models"]
    introduction = INTRODUCTION.format(
        machine=record["machine"],
        torch=record["torch"],
        float16=largest_of("float16"),
        bfloat16=largest_of("bfloat16"),
        roundoffs=" and ".join(f"{number(roundoff(dtype))} in {dtype}" for dtype in HALVES),
        kept="\n".join(f"- {part}: {said}." for part, said in PARTS.items()),
        rounded=_rounded(models),
        times="\n".join(f"- in {dtype} {_times(models, dtype)}" for dtype in HALVES),
        last=_last_layer(models),
    )
    return "\n".join([introduction, *(f"{_model(model)}\n" for model in models)])
