"""Pictures a second: from files to files, as `dpt predict` goes, and of the network alone."""

import torch

from bench.cases import pictures
from bench.harness.runner import Case

CARRIED = ("dpt-tiny-depth", "dpt-tiny-scenes")
SIZES = (((480, 640), 1.5), ((1080, 1920), 4.2), ((3000, 4000), 5.2))
ROWS = tuple(
    pictures.PictureRow(model, size, (1, 8), importance + 0.1 * place) for size, importance in SIZES for place, model in enumerate(CARRIED)
)


def cases(device_type: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    return pictures.cases(ROWS, dtypes)


def test_pictures(cell, measured):
    measured(cell)
