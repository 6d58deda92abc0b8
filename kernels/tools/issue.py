"""How many cycles a multiprocessor takes for a stretch of machine code, by issuing it instruction after instruction.

A multiprocessor is four schedulers with a share of everything each, and kernels put the same warps on all of them: one stands for the
four. Each cycle it issues one instruction of a warp that is ready: whose stall is over, whose scoreboards are clear, and whose pipe is
free. Tensor-core instructions of a warpgroup are queued behind one another and waited for by their group; asynchronous copies of a turn
of the loop are waited for so many turns later as the kernel has stages, less one. Several CTAs share the scheduler, so what one waits for
the other fills, as far as it does.

Left out: conflicts of banks, of the L2 cache and of DRAM (bytes are :mod:`predict`'s), divergence, and how long a copy waits for bandwidth.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from .sass import NONE, Instruction

SCHEDULERS = 4
LANES = 32

# Cycles for which a warp's instruction keeps its pipe of one scheduler, by (pipe, its instructions); all else is the front's alone. From
# the CUDA programming guide's table of throughputs: 16 lanes of integers a cycle and scheduler, 32 of float32 (16 on sm_80), 4 of special
# functions. Shared memory moves 128 bytes a cycle for all four.
_PIPES = {
    ("special", 8): "MUFU I2F F2I F2F FRND I2FP",
    ("integer", 2): "IADD3 LOP3 SHF LEA ISETP FSETP PLOP3 SEL FSEL FMNMX PRMT VIADD VIMNMX VIADDMNMX IABS SGXT F2FP HSETP2 LOP POPC FLO",
    ("float", 2): "IMAD IDP",
    ("float", 1): "FFMA FADD FMUL HFMA2 HADD2 HMUL2 HMNMX2 FADD2 FFMA2 FMUL2",
    ("memory", 4): "SHFL SYNCS BAR ATOMS REDUX",
}
PIPES = {name: pipe for pipe, names in _PIPES.items() for name in names.split()}
MEMORY = ("LDS", "LDSM", "STS", "STSM", "LDG", "STG", "LDGSTS", "LDTM", "STTM")  # of the memory pipe, by their width
# Cycles until a result is there, of instructions that set a scoreboard. The device's memory is between its L2 cache (270) and DRAM (700).
GLOBAL, COPY = 350, 600
LATENCIES = {
    **dict.fromkeys(("LDS", "LDSM", "ATOMS"), 30), "SHFL": 24, "MUFU": 22, "S2R": 30, "LDC": 40, "S2UR": 30, "ULDC": 30, "LDG": GLOBAL,
    "ATOMG": GLOBAL, "RED": GLOBAL, "LDTM": 40,
}  # fmt: skip
OTHER_LATENCY = 20
BARRIER, TENSOR_DRAIN = 20, 16


@dataclass(frozen=True)
class Rates:
    """Of one scheduler: FLOPs a cycle of its tensor core, by a warpgroup's instructions and by a warp's (HMMA); cycles of a warp's float32
    instruction; FLOPs of an UTCHMMA, which its name does not give."""

    tensor: float
    warp_tensor: float
    float_cycles: int = 1
    product: float = 0.0


@dataclass
class _Warp:
    """``first``: of its CTA, which asks for the copies. ``waits``: at a barrier."""

    cta: int
    first: bool
    waits: bool = False
    place: int = 0
    turn: int = 0
    ready: float = 0.0
    issued: float = 0.0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    products: float = 0.0  # when those of the open group are done
    groups: list[float] = field(default_factory=list)
    copies: float = 0.0  # the same of asynchronous copies
    copied: list[float] = field(default_factory=list)


def tensor_flops(instruction: Instruction) -> int:
    """FLOPs of a tensor-core instruction for one warp; 0 of others, and of those whose size is not in their name (UTCHMMA)."""
    if instruction.kind not in ("HGMMA", "HMMA"):
        return 0
    name = instruction.name
    if match := re.search(r"(\d+)x(\d+)x(\d+)", name):  # of a warpgroup
        m, n, k = map(int, match.groups())
        return 2 * m * n * k // 4
    m, n, k = {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}[re.search(r"\.(\d+)", name)[1]]
    return 2 * m * n * k


def width(instruction: Instruction) -> int:
    """Bytes a lane that a load or store moves."""
    if instruction.kind in ("LDSM", "STSM"):
        return 4 * int((re.search(r"\.(?:MT?88|M16)?\.?(\d)$", instruction.name) or [0, 1])[1])
    match = re.search(r"\.(?:[US]?(8|16)|(32|64|128|256))(?:\.|$)", instruction.name)
    return int(match[1] or match[2]) // 8 if match else 4


def pipe(instruction: Instruction, rates: Rates) -> tuple[str, float]:
    """(the pipe, cycles that it is kept) by an instruction of one warp."""
    if instruction.kind == "HMMA":
        return "tensor", tensor_flops(instruction) / rates.warp_tensor
    if instruction.kind in MEMORY:
        return "memory", max(1, width(instruction) // 4) * SCHEDULERS
    name, cycles = PIPES.get(instruction.kind, ("", 1))
    return name, max(cycles, rates.float_cycles) if name == "float" else cycles


@dataclass
class _Scheduler:
    """What the warps share. ``copies``: (CTA, turn) -> when what was asked for in that turn is there; ``lead``: turns that it has."""

    rates: Rates
    lead: int
    free: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    copies: dict[tuple[int, int], float] = field(default_factory=dict)

    def when(self, warp: _Warp, instruction: Instruction, pipe: str) -> float:
        """The first cycle in which the warp's instruction can be issued."""
        start = max(warp.ready, self.free["front"], self.free[pipe] if pipe else 0.0)
        for board, clear in enumerate(warp.scoreboards):
            if instruction.waits >> board & 1:
                start = max(start, clear)
        if "DEPBAR.LE" in instruction.name:
            pending = int(instruction.operands.split(",")[1], 16)
            groups = warp.groups if instruction.kind == "WARPGROUP" else warp.copied
            return max(start, groups[-1 - pending]) if len(groups) > pending else start
        if "TRYWAIT" in instruction.name:
            return max(start, self.copies.get((warp.cta, warp.turn - self.lead), 0.0))
        return start

    def issue(self, warp: _Warp, instruction: Instruction, start: float, pipe: str, kept: float) -> None:
        """Issue it in cycle ``start``: the warp and the pipes are busy from there."""
        kind, warp.issued = instruction.kind, start
        self.free["front"], warp.ready = start + 1, start + max(1, instruction.stall)
        begins = start
        if kind in ("HGMMA", "UTCHMMA"):  # queued; the warp goes on
            begins = max(start, self.free["tensor"])
            lasts = (tensor_flops(instruction) or self.rates.product * warp.first) / self.rates.tensor
            self.free["tensor"], warp.products = begins + lasts, begins + lasts + TENSOR_DRAIN
            if "gsb" in instruction.operands:
                warp.groups.append(warp.products)
        elif pipe:
            self.free[pipe] = start + kept
        if kind == "LDGSTS":
            warp.copies = start + GLOBAL
        elif kind == "LDGDEPBAR":
            warp.copied.append(warp.copies)
        elif kind == "UTMALDG" and warp.first:
            self.copies[warp.cta, warp.turn] = start + COPY
        if instruction.sets != NONE:
            warp.scoreboards[instruction.sets] = max(warp.scoreboards[instruction.sets], begins + kept + LATENCIES.get(kind, OTHER_LATENCY))
        if instruction.releases != NONE:
            warp.scoreboards[instruction.releases] = max(warp.scoreboards[instruction.releases], begins + kept + OTHER_LATENCY / 2)


def cycles(
    code: Sequence[Instruction], rates: Rates, *, warps: int, ctas: int, stages: int = 1, turns: int = 1, measured: int = 1
) -> float:
    """Cycles for one turn of ``code`` on a multiprocessor that holds ``ctas`` CTAs of ``warps`` each: the mean of the last ``measured``
    of ``turns``; of one turn, until the last warp is done with it."""
    own = max(1, warps // SCHEDULERS)
    found = [_Warp(cta, first=not index) for cta in range(ctas) for index in range(own)]
    scheduler = _Scheduler(rates, max(1, stages - 1) if turns > 1 else 0)
    pipes = [pipe(each, rates) for each in code]
    ends = [0.0] * (turns + 1)
    running = list(found)
    while running:
        start, _, _, warp = min(
            (scheduler.when(warp, code[warp.place], pipes[warp.place][0]), warp.issued, index, warp) for index, warp in enumerate(running)
        )
        scheduler.issue(warp, code[warp.place], start, *pipes[warp.place])
        if code[warp.place].kind == "BAR" and own > 1 and ".ARV" not in code[warp.place].name:
            _meet(warp, [each for each in found if each.cta == warp.cta])
        warp.place += 1
        if warp.place == len(code):
            warp.place, warp.turn = 0, warp.turn + 1
            ends[warp.turn] = max(ends[warp.turn], warp.ready)
        running = [each for each in found if each.turn < turns and not each.waits]
    if turns == 1:
        return max(ends[1], *(warp.products for warp in found))
    return (ends[turns] - ends[turns - measured]) / measured


def _meet(warp: _Warp, cta: list[_Warp]) -> None:
    """The warp is at a barrier; if it is the CTA's last, all go on."""
    warp.waits = True
    if all(each.waits for each in cta):
        together = max(each.ready for each in cta) + BARRIER
        for each in cta:
            each.waits, each.ready = False, together
