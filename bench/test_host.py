"""The host's work for an op and for a whole model, by plans and without."""

import torch

from bench.cases import host
from bench.harness.runner import Case

IMPORTANCE = 1.1


def cases(device_type: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    return host.cases(device_type, IMPORTANCE)


def test_host(cell, measured):
    measured(cell)
