"""The parts of a picture that benchmarks look at, as rectangles of rows and columns."""

from __future__ import annotations

from collections.abc import Callable

Rectangle = tuple[slice, slice]  # rows, columns


def _shares(top: float, bottom: float, left: float = 0.03594771, right: float = 0.96405229) -> Callable[[int, int], Rectangle]:
    def rectangle(height: int, width: int) -> Rectangle:
        return slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width))

    return rectangle


def _nyu(height: int, width: int) -> Rectangle:
    if (height, width) != (480, 640):
        raise ValueError(f"the crop of NYU is of 640x480 pixels, not of {width}x{height}")
    return slice(45, 471), slice(41, 601)


def _kitti(height: int, width: int) -> Rectangle:
    if height < 352 or width < 1216:
        raise ValueError(f"the crop of KITTI's benchmark is 1216x352 pixels, and {width}x{height} are fewer")
    left = (width - 1216) // 2
    return slice(height - 352, height), slice(left, left + 1216)


CROPS: dict[str, Callable[[int, int], Rectangle]] = {
    "garg": _shares(0.40810811, 0.99189189),  # Garg et al. 2016; the numbers are those of everybody's code (BTS, ZoeDepth, Marigold)
    "eigen": _shares(0.3324324, 0.91351351),  # Eigen et al. 2014, of KITTI
    "nyu": _nyu,  # the same of NYUv2: where the depth that was projected onto the picture is whole
    "kitti": _kitti,  # of KITTI's benchmark: at the bottom's middle, for above is the sky, without depth
}


def rectangle(name: str | None, size: tuple[int, int]) -> Rectangle:
    """The named crop of a map of (height, width); all of it without a name. ValueError where it does not fit."""
    return (slice(0, size[0]), slice(0, size[1])) if name is None else CROPS[name](*size)
