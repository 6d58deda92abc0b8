"""The ops one by one, forward and backward, against PyTorch's best."""

import torch

from bench.cases import kernels
from bench.harness.runner import Case

IMPORTANCE = 1.5


def cases(device_type: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    return list(kernels.cases(device_type, dtypes, IMPORTANCE))


def test_kernels(cell, measured):
    measured(cell)
