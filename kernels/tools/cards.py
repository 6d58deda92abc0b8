"""The cards that the time model knows, one a device family."""

from __future__ import annotations

from dataclasses import dataclass

from ..launch import MULTIPROCESSORS
from . import issue
from .issue import Rates


@dataclass(frozen=True)
class Card:
    """A card of a family: what the model knows of it. ``clock`` in GHz, under load; ``tensor``: FLOPs a cycle and multiprocessor of
    bfloat16 products, ``warp_tensor`` those of a warp's instructions (HMMA); ``l2``: bytes a cycle that each multiprocessor gets of the L2
    cache when all ask; ``memory``: TB/s that a copy reaches."""

    name: str
    multiprocessors: int
    clock: float
    tensor: int
    warp_tensor: int
    l2: float
    memory: float
    float_cycles: int = 1

    def rates(self, product: float = 0.0) -> Rates:
        share = issue.SCHEDULERS
        return Rates(self.tensor / share, self.warp_tensor / share, self.float_cycles, product / share)


# Tensor rates from NVIDIA's data sheets. Clocks under load, the L2 cache's and the memory's rates: of the H100 as others have published
# them (560 to 600 TFLOP/s of Triton's matrix products are the L2 cache's 32 bytes); the others' assumed.
CARDS = {
    "sm_80": Card("A100 SXM", MULTIPROCESSORS["sm_80"], 1.35, 2048, 2048, 32, 1.75, float_cycles=2),
    "sm_86": Card("A40", MULTIPROCESSORS["sm_86"], 1.6, 1024, 1024, 24, 0.6),
    "sm_89": Card("L40S", MULTIPROCESSORS["sm_89"], 2.3, 1024, 1024, 24, 0.78),
    "sm_90": Card("H100 SXM", MULTIPROCESSORS["sm_90"], 1.7, 4096, 2560, 32, 3.0),
    "sm_100": Card("B200", MULTIPROCESSORS["sm_100"], 1.7, 8192, 2048, 40, 7.0),
    "sm_120": Card("RTX 5090", MULTIPROCESSORS["sm_120"], 2.3, 512, 512, 24, 1.6),
}
