"""A training step: forward, loss, backward, AdamW. On a GPU dpt-base-ade20k's, under autocast; on a CPU also one that a CPU can do."""

import torch

from bench.cases import models, training
from bench.harness.runner import Case

FORWARD_PASSES = 4.0  # a step costs three; the optimiser and the gradients' reference are the rest
ROWS = (
    models.ModelRow("dpt-tiny-scenes", 192, (16,), 0.5 - models.BATCH_IMPORTANCE[16]),
    models.ModelRow("dpt-base-ade20k", 512, (2,), 1.4),
)


def cases(device_type: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    return models.cases(ROWS, "training", training.CONTENDERS, dtypes, training.OpenedTraining, cost=FORWARD_PASSES)


def test_training(cell, measured):
    measured(cell)
