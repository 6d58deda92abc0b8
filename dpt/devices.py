"""Which device a model takes, and whether it runs on the kernels there, where nobody has said so."""

from __future__ import annotations

from importlib.util import find_spec

import torch


def automatic() -> torch.device:
    """CUDA or MPS where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def runs_fast(asked: bool | None, device: torch.device) -> bool:
    """What was asked for, or of None whether the device is CUDA's and Triton is installed."""
    return device.type == "cuda" and find_spec("triton") is not None if asked is None else asked
