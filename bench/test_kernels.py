"""The ops one by one, forward and backward, against PyTorch's best."""

import torch

from bench import kernel_cases
from bench.runner import Case

IMPORTANCE = 1.5


def cases(device_type: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    return list(kernel_cases.cases(device_type, dtypes, IMPORTANCE))


def test_kernels(cell, measured):
    measured(cell)
