"""The cumulative gain, one row a step, with the accuracy beside it."""

import torch

from bench.cases import models, steps
from bench.harness.runner import Case

ROWS = (
    models.ModelRow("dpt-base-ade20k", 512, (1, 16), 1.2),
    models.ModelRow("dpt-large-midas", 384, (1, 16), 4.0),
)


def cases(device_type: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    return models.cases(ROWS, "steps", steps.STEPS, dtypes, steps.OpenedSteps)


def test_steps(cell, measured):
    measured(cell)
