"""Pictures a second: from files to files, as `dpt predict` goes, and of the network alone."""

import torch

from bench.cases import pictures
from bench.harness.runner import Case

CARRIED = ("dpt-tiny-depth", "dpt-tiny-scenes")
SIZES = (((480, 640), 0.2), ((1080, 1920), 3.4), ((3000, 4000), 4.4))
ROWS = tuple(
    pictures.PictureRow(model, size, (1, 8), importance + 0.1 * place) for size, importance in SIZES for place, model in enumerate(CARRIED)
)


def cases(device_type: str, dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    return pictures.cases(ROWS, dtypes)


def test_pictures(cell, measured):
    measured(cell)
