"""Models of transformers, forward: as they come, and under `dpt.accelerate`."""

import torch

from bench.cases import models, transformers
from bench.harness.runner import Case

ROWS = (
    models.ModelRow("dpt-large-midas", 384, (1,), 5.0),
    models.ModelRow("depth-anything-v2-small", 518, (1,), 5.1),
    models.ModelRow("depth-anything-v2-base", 518, (1,), 5.2),
    models.ModelRow("depth-anything-v2-large", 518, (1,), 5.3),
    models.ModelRow("chmv2", 416, (1,), 5.4),
)


def cases(device_type: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    return models.cases(ROWS, "transformers", transformers.CONTENDERS, dtypes, transformers.OpenedTheirs)


def test_transformers(cell, measured):
    measured(cell)
