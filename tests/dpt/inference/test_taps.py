"""OpenCV's resizes: of 8 bits, to the grey level, and of floats."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dpt.inference import taps

# OpenCV 4.14, x86: cv2.resize of `_picture`, INTER_CUBIC where a side grows, else INTER_AREA
OPENCV = [
    ((4, 6), [[43, 144, 165], [133, 128, 167]]),  # halves of a grey level, 2 x 2: up
    ((6, 6), [[104, 150], [165, 135]]),
    ((4, 6), [[38, 46, 128, 159, 138, 191], [124, 142, 233, 22, 136, 198]]),  # halves, 2 x 1: to even
    ((4, 8), [[122, 144, 147, 133]]),
    ((7, 5), [[91, 134], [133, 169], [138, 167]]),
    ((5, 7), [[37, 103, 120], [104, 207, 153], [140, 172, 154], [73, 177, 124], [190, 187, 135]]),
    ((3, 4), [[0, 0, 49, 142, 130, 78], [50, 88, 119, 99, 67, 45], [98, 168, 204, 125, 99, 109], [99, 180, 245, 200, 203, 223]]),
    ((4, 6), [[10, 22, 110, 134, 98, 118, 182], [57, 142, 168, 155, 174, 203, 174], [176, 83, 208, 129, 3, 135, 237]]),  # one side grows
]


def _picture(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.arange(height * width).reshape(1, height, width) ** 2 * 37 % 251).float()


@pytest.mark.parametrize(("size", "expected"), OPENCV)
def test_opencv_to_the_grey_level(size, expected):
    """Blind spot: another filter, rounding or border; and a batch of channels that runs into one another."""
    wanted = torch.tensor(expected, dtype=torch.float32)
    both = torch.cat((_picture(*size), 255 - _picture(*size)))
    found = taps.area_or_cubic(both, tuple(wanted.shape))
    assert torch.equal(found[0], wanted)
    assert (found[1] - (255 - wanted)).abs().max() <= 1 and not torch.equal(found[1], wanted)


def test_the_same_size_is_the_picture():
    """Blind spot: a filter that blurs where there is nothing to do."""
    assert torch.equal(taps.area_or_cubic(_picture(5, 4), (5, 4)), _picture(5, 4))


@pytest.mark.parametrize(("source", "target"), [(10, 7), (504, 490), (4000, 504), (333, 1), (9, 3), (1000, 999)])
def test_area_is_the_exact_average(source, target):
    """Blind spot: an edge that is counted twice or not at all. Against the integral of the row as steps."""
    index, weight = taps.area(source, target)
    row = torch.randn(source, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    integral = torch.cat((torch.zeros(1, dtype=torch.float64), row.cumsum(0)))
    edges = torch.arange(target + 1, dtype=torch.float64) * source / target
    below = edges.floor().long().clamp(max=source - 1)
    upto = integral[below] + (edges - below) * row[below]
    wanted = (upto[1:] - upto[:-1]) * target / source
    torch.testing.assert_close((row[index] * weight.double()).sum(1), wanted, rtol=0, atol=4 * taps.LEAST_EDGE)
    torch.testing.assert_close(weight.sum(1), torch.ones(target), rtol=0, atol=2 * taps.LEAST_EDGE)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(9, 31), (23, 17), (12, 40), (1, 1)])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_floats_are_interpolated(mode, size, order):
    """Blind spot: rows and columns, channels or pictures exchanged, another filter, borders. That the places are OpenCV's shows in
    DPT-Hybrid's recorded tensors."""
    image = (255 * torch.rand(2, 3, 12, 40)).contiguous(memory_format=order)
    wanted = F.interpolate(image.double(), size=size, mode=mode, align_corners=False).float()
    found = taps.resized(image, size, mode)
    assert found.shape == wanted.shape and found.is_contiguous()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-3)
    assert size != (12, 40) or torch.equal(found, image)
