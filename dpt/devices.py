"""Which device a model takes, and whether it runs on the kernels there, where nobody has said so."""

from __future__ import annotations

import torch


def automatic() -> torch.device:
    """CUDA or MPS where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def runs_fast(asked: bool | None, device: torch.device) -> bool:
    """What was asked for, or of None whether the device is CUDA's and Triton is installed. ImportError where it is asked for and is not."""
    if not (device.type == "cuda" if asked is None else asked):
        return False
    try:
        from .fast import acceleration  # noqa: F401
    except ImportError:
        if asked:
            raise
        return False
    return True
