"""Measures the ways in which a 3x3 convolution can be computed on this CPU: what the tables of ``kernels/cpu`` rest on.

    python -m dpt.kernels.tools.measure_cpu                 # with this machine's vector instructions
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python -m dpt.kernels.tools.measure_cpu    # with fewer

Writes ``kernels/cpu/measured/<vector instructions>.json``: for each form of a map how many times as fast as the direct convolution
Winograd's is, by the medians of runs side by side, and the least and the greatest of the runs' own ratios. The table is written by hand, so
that its entries are few, and held to these by a test. On a machine that does nothing else.
"""

from __future__ import annotations

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
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    how = json.dumps({"capability": name, "threads": torch.get_num_threads(), "torch": torch.__version__})
    file = choices.measured_file(name)
    file.parent.mkdir(exist_ok=True)
    file.write_text(f'{{"how": {how}, "rows": [\n{lines}\n]}}\n')
    print(f"written: {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
