"""Measures the ways in which a 3x3 convolution, and a linear layer, can be computed on this CPU: what ``kernels/cpu`` rests on.

    python -m dpt.kernels.tools.measure_cpu                 # with this machine's vector instructions
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python -m dpt.kernels.tools.measure_cpu    # with fewer

Writes ``kernels/cpu/measured/<vector instructions>.json``: for each form of a map how many times as fast as the direct convolution
Winograd's is, by the medians of runs side by side, and the least and the greatest of the runs' own ratios. The table is written by hand, so
that its entries are few, and held to these by a test. Then for linear layers how many times as fast as PyTorch's are the bias added after
the product, which ``cpu.linear`` takes, and weights packed once by MKL and by oneDNN, which would be a second copy of them. On a machine
that does nothing else.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..cpu import choices, winograd

CHANNELS = [
    (32, 32), (48, 64), (64, 32), (64, 64), (96, 64), (96, 128), (96, 256), (128, 32), (128, 64), (128, 128), (192, 128), (192, 256),
    (256, 64), (256, 128), (256, 256), (384, 128), (384, 256), (512, 256), (768, 256), (1024, 256),
]  # fmt: skip
SIDES = (8, 12, 16, 19, 24, 32, 37, 48, 64, 74, 96, 128, 148, 192, 296)
MOST = 2.5e10  # FLOPs of a convolution
RUNS = 7
LINEAR = [(rows, *sizes) for rows, width in ((577, 1024), (1025, 768), (1370, 384), (1370, 768), (4100, 768)) for sizes in (
    (width, 3 * width), (width, width), (width, 4 * width), (4 * width, width),
)]  # fmt: skip


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.inference_mode()
def measured(channels: int, outputs: int, side: int) -> dict[str, float]:
    """One row: of a map of so many pixels a side, one picture, channels-last."""
    x = torch.randn(1, channels, side, side).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, channels, 3, 3).to(memory_format=torch.channels_last), torch.randn(outputs)
    ways = (lambda: F.conv2d(x, weight, bias, padding=1), lambda: winograd.conv3x3(x, weight, bias))
    for way in ways:
        way()
    direct, ours = zip(*([_seconds(way) for way in ways] for _ in range(RUNS)), strict=True)
    ratios = [one / other for one, other in zip(direct, ours, strict=True)]
    gain = statistics.median(direct) / statistics.median(ours)
    found = {"gain": gain, "least": min(ratios), "most": max(ratios)}
    return {"C": channels, "O": outputs, "side": side, **{name: round(value, 2) for name, value in found.items()}}


@torch.inference_mode()
def measured_linear(rows: int, inputs: int, outputs: int) -> dict[str, float | None]:
    """One row: for each way how many times as fast as PyTorch's layer; None where this PyTorch has it not."""
    x, y, bias = torch.randn(rows, inputs), torch.empty(rows, outputs), torch.randn(outputs)
    weights = itertools.cycle(torch.randn(6, outputs, inputs))  # as many as no cache holds, of the larger
    ways: dict[str, Callable[[], object]] = {
        "pytorch": lambda: F.linear(x, next(weights), bias),
        "bias after": lambda: torch.mm(x, next(weights).t(), out=y).add_(bias),
    }
    if torch.backends.mkl.is_available():
        by_mkl = itertools.cycle([(w, torch.ops.mkl._mkl_reorder_linear_weight(w, rows)) for w in itertools.islice(weights, 6)])

        def packed_by_mkl() -> object:
            weight, packed = next(by_mkl)
            return torch.ops.mkl._mkl_linear(x, packed, weight, bias, rows)

        ways["mkl packed"] = packed_by_mkl
    if torch.backends.mkldnn.is_available():
        by_onednn = itertools.cycle([torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in itertools.islice(weights, 6)])
        ways["onednn packed"] = lambda: torch.ops.mkldnn._linear_pointwise(x, next(by_onednn), bias, "none", [], "")
    for way in ways.values():
        way()
    seconds = [[_seconds(way) for way in ways.values()] for _ in range(3 * RUNS)]
    theirs, *ours = (statistics.median(column) for column in zip(*seconds, strict=True))
    gains = dict(zip(list(ways)[1:], (round(theirs / median, 2) for median in ours), strict=True))
    return {"rows": rows, "C": inputs, "O": outputs, **{name: gains.get(name) for name in ("bias after", "mkl packed", "onednn packed")}}


def main() -> int:
    name = choices.capability()
    if name not in choices.MEASURED:
        print(f"no table is of {name}: choices.MEASURED has {', '.join(choices.MEASURED)}", file=sys.stderr)
        return 2
    rows = []
    for channels, outputs in CHANNELS:
        for side in SIDES:
            if 18 * channels * outputs * side * side <= MOST:
                rows.append(measured(channels, outputs, side))
        print(channels, outputs, " ".join(f"{row['side']}:{row['gain']}" for row in rows if (row["C"], row["O"]) == (channels, outputs)))
    linear = [measured_linear(*sizes) for sizes in LINEAR]
    print(*linear, sep="\n")
    lines, linear_lines = (",\n".join(f"  {json.dumps(row)}" for row in found) for found in (rows, linear))
    how = json.dumps({"capability": name, "threads": torch.get_num_threads(), "torch": torch.__version__})
    file = choices.measured_file(name)
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'{{"how": {how}, "rows": [\n{lines}\n], "linear": [\n{linear_lines}\n]}}\n')
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
