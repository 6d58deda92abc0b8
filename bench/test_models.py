"""Whole models, forward: ours plain and fast, under torch.compile, and other people's on the same weights."""

import torch

from bench.cases import models
from bench.harness.runner import Case

# First the carried model, whose case costs little on any machine.
ROWS = (
    models.ModelRow("dpt-tiny-depth", 192, (1, 16), 0.0),
    models.ModelRow("dpt-base-ade20k", 512, (1, 4, 16), 1.0),
    models.ModelRow("dpt-large-midas", 384, (1, 4, 16), 2.0),
    models.ModelRow("depth-anything-v2-small", 518, (1, 4, 16), 2.5),
    models.ModelRow("depth-anything-v2-base", 518, (1, 4, 16), 2.6),
    models.ModelRow("depth-anything-v2-large", 518, (1, 4, 16), 2.7),
    models.ModelRow("depth-anything-3-mono-large", 504, (1, 4), 2.8),
    models.ModelRow("dpt-hybrid-midas", 384, (1,), 3.0),
    models.ModelRow("dpt-dinov2-small-nyu", 490, (1,), 3.1),
    models.ModelRow("midas-3.1-beit-large-512", 512, (1,), 3.2),
    models.ModelRow("midas-3.1-swin2-base-384", 384, (1,), 3.3),
    models.ModelRow("chmv2", 416, (1,), 3.5),
    models.ModelRow("tipsv2-base", 448, (1,), 3.6),
    models.ModelRow("prompt-depth-anything-small", 518, (1,), 3.7),
)


def cases(device_type: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    return models.cases(ROWS, "models", models.CONTENDERS, dtypes, models.OpenedModel)


def test_models(cell, measured):
    measured(cell)
