"""What a training sees: crops, resizes and colours by hand, and mmsegmentation's by what it computed itself."""

from __future__ import annotations

import colorsys
import pickle
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dpt.data
from dpt.config import InputConfig
from dpt.data import transforms
from dpt.data.augmentation import Augmentation
from dpt.data.crops import Crops
from dpt.data.pairs import PairDataset
from dpt.data.targets import IGNORE, class_labels
from dpt.zoo import CONFIGS

DEPTH, SCENES, ADE = (CONFIGS[name] for name in ("dpt-tiny-depth", "dpt-tiny-scenes", "dpt-base-ade20k"))
PLAIN = InputConfig(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5), size=(8, 8), mode="bilinear")
STILL = Augmentation(smallest=1, aspect=1, flip=0, colour=0)
WINDOW = Augmentation(crop="window", flip=0, colour=0)


class Draws:
    """A random generator that gives what it is told: shares of each interval, in turn."""

    def __init__(self, *shares: float):
        self.shares = list(shares)

    def random(self) -> float:
        return self.shares.pop(0)

    def uniform(self, low: float, high: float, size: int | None = None):
        return low + np.array([self.random() for _ in range(size or 1)])[slice(None) if size else 0] * (high - low)

    def integers(self, low: int, high: int | None = None) -> int:
        low, high = (0, low) if high is None else (low, high)
        return low + int(self.random() * (high - low))


def told(transform, *shares: float, image: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a transform makes of a picture and a target where its draws are these, all of which it takes."""
    transform.random_generator = Draws(*shares)
    seen = transform(image=image, mask=mask)
    assert not transform.random_generator.shares
    return seen["image"], seen["mask"]


def seen(
    how: Augmentation, size: tuple[int, int], config: InputConfig, image: np.ndarray, mask: np.ndarray, no_target: int = IGNORE, seed=0
):
    """What a whole pipeline makes of a picture and a target."""
    steps = transforms.pipeline(how, size, config, no_target)
    steps.set_random_state(np.random.default_rng(seed), random.Random(seed))
    result = steps(image=image, mask=mask)
    return result["image"], result["mask"]


class Held(PairDataset):
    """A data set of one picture and its target, held in memory."""

    def __init__(self, head, image: np.ndarray, target: np.ndarray):
        self.head, self.root, self.images, self.pair = head, "held", [None], (image, target)

    def __getitem__(self, index: int):
        return self.pair


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 256)])
@pytest.mark.parametrize("shape", [(100, 200), (200, 100), (30, 400)])
def test_a_crop_keeps_the_aspect(shape, size):
    """Blind spot: a 2:1 picture squashed into a square. A pixel of the result is as many columns wide as it is rows high."""
    image, (rows, columns) = np.zeros((*shape, 3), np.uint8), np.indices(shape).astype(np.float32)
    how = Augmentation(smallest=0.3, aspect=1, flip=0, colour=0)
    shares = []
    for seed in range(8):
        down, across = (seen(how, size, SCENES.input, image, target, seed=seed)[1] for target in (rows, columns))
        height, width = (down[-1, 0] - down[0, 0]).item() + 1, (across[0, -1] - across[0, 0]).item() + 1
        assert height / size[0] == pytest.approx(width / size[1], rel=2 / min(height, width) + 0.02)
        shares.append(height * width / rows.size)
    largest = min(shape[0] / size[0], shape[1] / size[1]) ** 2 * size[0] * size[1] / rows.size
    assert 0.9 * min(0.3, largest) < min(shares) and max(shares) <= 1.1 * largest


@pytest.mark.parametrize(
    ("shares", "window"),  # of the area, of the aspect, and of the room below and to the right; top, bottom, left, right
    [
        ((0, 0.5, 0, 0), (0, 10, 0, 20)),  # a quarter of 20x40, as it is
        ((0, 0.5, 0.999, 0.999), (10, 20, 20, 40)),
        ((0, 0.5, 0.5, 0.25), (5, 15, 5, 25)),
        ((0, 1, 0, 0), (0, 5, 0, 40)),  # four times as wide
        ((0, 0, 0, 0), (0, 20, 0, 10)),
        ((1, 0.5, 0, 0), (0, 20, 0, 40)),
        ((1, 1, 0.5, 0), (8, 13, 0, 40)),  # 10x80 does not fit: the largest of this aspect that does
    ],
)
def test_shares_by_hand(shares, window):
    """Blind spot: crops of other areas or aspects than are stated, or that never reach an edge; a target between two pixels. Each
    pixel's value is its place."""
    place = np.arange(800, dtype=np.float32).reshape(20, 40)
    image, inside = np.repeat((place // 4).astype(np.uint8)[..., None], 3, 2), (slice(*window[:2]), slice(*window[2:]))
    crop = transforms.ShareCrop(Augmentation(smallest=0.25, aspect=4.0), (20, 40), SCENES.input)
    picture, target = told(crop, *shares, image=image, mask=place)
    height, width = place[inside].shape
    assert np.array_equal(target, place[inside][np.arange(20) * height // 20][:, np.arange(40) * width // 40])
    x = torch.from_numpy(image[inside]).permute(2, 0, 1)[None] / 255
    resized = F.interpolate(x, (20, 40), mode=SCENES.input.mode, antialias=SCENES.input.antialias)[0]
    torch.testing.assert_close(torch.from_numpy(picture).permute(2, 0, 1), resized)


def test_a_target_that_shrinks_has_the_middle_pixels():
    """Blind spot: every target half a pixel beside its picture, at the top and the left."""
    crop = transforms.ShareCrop(STILL, (2, 3), SCENES.input)
    place = np.arange(54, dtype=np.float32).reshape(6, 9)
    _, target = told(crop, 1, 0.5, 0, 0, image=np.zeros((6, 9, 3), np.uint8), mask=place)
    assert target.tolist() == [[10, 13, 16], [37, 40, 43]]  # rows 1 and 4, columns 1, 4 and 7


@pytest.mark.parametrize(
    ("shares", "wanted"),  # of brightness, contrast and saturation: 0.5 is none of it, 1 is 0.4 more, 0 is 0.4 less
    [
        ((0.5, 0.5, 0.5), [[0.2, 0.4, 0.6], [0.8, 0.8, 0.8]]),
        ((1, 0.5, 0.5), [[0.28, 0.56, 0.84], [1, 1, 1]]),
        ((0, 0.5, 0.5), [[0.12, 0.24, 0.36], [0.48, 0.48, 0.48]]),
        ((0.5, 1, 0.5), [[0.04, 0.32, 0.6], [0.88, 0.88, 0.88]]),  # away from 0.6, the mean of all
        ((0.5, 0.5, 1), [[0.12, 0.4, 0.68], [0.8, 0.8, 0.8]]),  # away from each pixel's own
        ((0.5, 0, 0), [[0.408, 0.48, 0.552], [0.72, 0.72, 0.72]]),
    ],
)
def test_colours_by_hand(shares, wanted):
    """Blind spot: contrast around each pixel's mean, saturation around the picture's; colours beyond white."""
    image = np.array([[[0.2, 0.4, 0.6], [0.8, 0.8, 0.8]]], np.float32)  # two pixels beside each other
    picture, _ = told(transforms.Jitter(0.4), *shares, image=image, mask=np.zeros((1, 2), np.uint8))
    np.testing.assert_allclose(picture[0], wanted, atol=1e-6)


@pytest.mark.parametrize("how", [Augmentation(colour=0), replace(WINDOW, scale=(400, 60), ratio=(0.5, 2.0), flip=0.5, rotate=10)])
@pytest.mark.parametrize("head", [SCENES.head, DEPTH.head], ids=["labels", "depth"])
def test_a_picture_and_its_target_move_together(how, head):
    """Blind spot: a crop, flip, resize or rotation of one alone. The picture's red channel is the target, so both must stay equal."""
    place = np.add.outer(2 * np.arange(60), np.arange(80))
    image = np.repeat(place.astype(np.uint8)[..., None], 3, 2)
    config, different, filled = replace(SCENES.input, mean=(0, 0, 0), std=(1, 1, 1)), set(), False
    labels = head.task == "segmentation"
    for epoch in range(12):
        crops = Crops(Held(head, image, place if labels else (place + 1).astype(np.float32)), config, how)
        x, y = crops[epoch, 0, (48, 48)]
        assert x.shape == (3, 48, 48) and y.shape == (48, 48) and x.dtype == torch.float32
        assert y.dtype == (torch.int64 if labels else torch.float32) and x.is_contiguous() and y.is_contiguous()
        known = (y != IGNORE) if labels else (y > 0)
        known = F.max_pool2d((~known)[None].float(), 5, 1, 2)[0] == 0  # the picture is interpolated, the target is not
        assert known[2:-2, 2:-2].float().mean() > 0.3
        filled |= not known.all()
        assert (255 * x[0] - (y if labels else y - 1))[2:-2, 2:-2][known[2:-2, 2:-2]].abs().max() <= 4.5
        different.add(x.numpy().tobytes())
    assert len(different) == 12 and filled is (how.crop == "window")


@pytest.mark.parametrize(
    ("size", "scale", "ratio", "wanted"),
    [
        ((512, 683), (2048, 512), 1.0, (512, 683)),
        ((512, 681), (2048, 512), 0.5, (256, 341)),  # 340.5, rounded up
        ((681, 512), (2048, 512), 0.5, (341, 256)),  # the shorter side is the shorter of both
        ((300, 3000), (2048, 512), 1.0, (205, 2048)),  # the longer side decides: 204.8
        ((100, 100), (2048, 512), 2.0, (1024, 1024)),
        ((375, 500), (520, 520), 1.0, (390, 520)),  # Pascal Context's: the longer side becomes 520
        ((480, 640), (65536, 518), 1.0, (518, 691)),  # Depth Anything's lower bound
        ((512, 683), (2048, 512), 0.7777, (398, 531)),  # int(1592.7), int(398.2): 398 / 512 * 683 = 530.9
    ],
)
def test_random_resize_by_hand(size, scale, ratio, wanted):
    """Blind spot: sides taken in the order of height and width, halves rounded to even, the factor not cut to whole pixels first."""
    resize = transforms.RandomResize(scale, (ratio - 0.25, ratio + 0.75), PLAIN)
    picture, target = told(resize, 0.25, image=np.zeros((*size, 3), np.uint8), mask=np.zeros(size, np.uint8))
    assert picture.shape == (*wanted, 3) and target.shape == wanted


def test_what_a_resize_makes_of_a_target():
    """Blind spot: labels or metres between two, sky that becomes unknown, metres that are scaled with the picture."""
    labels = np.array([[0, 7, 255], [149, 1, 2]], np.uint8)
    metres = np.array([[0, 7.25, np.inf], [80, 1, 2]], np.float32)
    resize = transforms.RandomResize((6, 4), (1.0, 1.0), PLAIN)
    for target in (labels, metres):
        _, found = told(resize, 0.5, image=np.zeros((2, 3, 3), np.uint8), mask=target)
        assert np.array_equal(found, target.repeat(2, 0).repeat(2, 1)) and found.dtype == target.dtype


@pytest.mark.parametrize(
    ("mode", "antialias", "wanted"),
    [
        ("bilinear", False, [50, 200]),  # between the two nearest: 0 and 100, 150 and 250
        ("bicubic", False, [45, 205]),  # 0.59375 of each of these, less 0.09375 of the next: 0 and 150, 100 and 250
        ("bilinear", True, [50, 200]),
    ],
)
def test_pictures_are_resized_as_the_model_is_told(mode, antialias, wanted):
    """Blind spot: every model's pictures resized alike; antialiasing that is left out."""
    image = np.repeat(np.array([[0, 100, 150, 250]], np.uint8)[..., None], 3, 2)
    resize = transforms.RandomResize((2, 1), (1.0, 1.0), replace(PLAIN, mode=mode, antialias=antialias))
    picture, _ = told(resize, 0.5, image=image, mask=np.zeros((1, 4), np.uint8))
    assert picture[0, :, 0].tolist() == wanted
    wide = np.repeat(image, 2, 1)  # by four: of four pixels bilinear reads the middle two, and an average reads all
    wide[0, ::4] = 255
    picture, _ = told(resize, 0.5, image=wide, mask=np.zeros((1, 8), np.uint8))
    assert bool(abs(picture[0, 0, 0] - wide[0, :4, 0].mean()) < 1) is antialias


def varied(*rows: str) -> np.ndarray:
    return np.array([[IGNORE if letter == "." else int(letter) for letter in row] for row in rows], np.uint8)


@pytest.mark.parametrize(
    ("labels", "good"),
    [
        (varied("1122", "1122"), True),
        (varied("1112", "1112"), False),  # three quarters exactly: not below
        (varied("1112", "1122"), True),
        (varied("1111", "1111"), False),  # one class is too few, whatever its share
        (varied("....", "...."), False),
        (varied("12..", "...."), True),  # of two labelled pixels a half each
        (varied("1112", "...."), False),
        (varied("111.", "...."), False),
        (varied("0123", "4567"), True),
    ],
)
def test_which_windows_are_varied(labels, good):
    """Blind spot: ignored pixels that count, as a class or in the whole; 0.75 taken for enough; class 0 left out."""
    assert transforms.RandomWindow((2, 4), 0.75).is_varied(labels) is good


def test_ten_windows_are_tried():
    """Blind spot: the first window taken, or a search that never ends. Columns 0 to 8 are one class, 9 on is another: a window of two
    columns is varied only at 8."""
    labels = np.repeat(np.where(np.arange(12) < 9, 1, 2).astype(np.uint8)[None], 2, 0)
    image = np.repeat(np.arange(12, dtype=np.uint8)[None, :, None], 3, 2).repeat(2, 0)
    bad, good = (0.0, 0.05), (0.0, 0.75)  # of the rows' room, which is none, and of the eleven columns'
    window = transforms.RandomWindow((2, 2), 0.75)
    for tried in (0, 3, 9):
        picture, target = told(window, *bad * tried, *good, image=image, mask=labels)
        assert target.tolist() == [[1, 2]] * 2 and picture[0, :, 0].tolist() == [8, 9]
    picture, _ = told(window, *bad * 10, 0.0, 0.95, image=image, mask=labels)  # the eleventh, whatever it is
    assert picture[0, :, 0].tolist() == [10, 11]
    picture, _ = told(transforms.RandomWindow((2, 2), 1.0), *bad, image=image, mask=labels)  # no limit: the first
    assert picture[0, :, 0].tolist() == [0, 1]


@pytest.mark.parametrize("no_target", [IGNORE, 0])
def test_a_picture_smaller_than_the_window_is_filled(no_target):
    """Blind spot: black instead of the mean colour, which is 0 once normalised; 0, a class, where no picture is; filled at the top."""
    image, target = np.full((3, 5, 3), 255, np.uint8), np.full((3, 5), 4, np.uint8 if no_target else np.float32)
    picture, found = seen(WINDOW, (4, 4), PLAIN, image, target, no_target)
    assert picture.shape == (4, 4, 3) and picture.dtype == np.float32 and found.dtype == target.dtype
    assert (picture[3] == 0).all() and (found[3] == no_target).all() and (found[:3] == 4).all()
    np.testing.assert_allclose(picture[:3], np.broadcast_to((1 - np.array(PLAIN.mean)) / np.array(PLAIN.std), (3, 4, 3)), rtol=1e-6)


def slow_distortion(pixel: list[int], steps) -> list[int]:
    """The formula, a pixel at a time: 8 bits after each step, the colour circle in 180 parts, of which one moves a channel by up to 8."""

    def linear(values, factor, added=0):
        return [int(min(255, max(0, value * factor + added))) for value in values]

    for name, value in steps:
        if name in ("brightness", "contrast"):
            pixel = linear(pixel, *((1, value) if name == "brightness" else (value, 0)))
            continue
        h, s, v = colorsys.rgb_to_hsv(*(level / 255 for level in pixel))
        h, s = round(180 * h), round(255 * s)
        h, s = ((h + value) % 180, s) if name == "hue" else (h, linear([s], value)[0])
        pixel = [round(255 * level) for level in colorsys.hsv_to_rgb(h / 180, s / 255, v)]
    return pixel


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [("brightness", 20.75)],
        [("brightness", -31.5)],
        [("contrast", 1.375)],
        [("contrast", 0.625)],
        [("saturation", 1.5)],
        [("saturation", 0.5)],
        [("hue", 17)],
        [("hue", -18)],
        [("brightness", 25.0), ("contrast", 1.25), ("saturation", 0.75), ("hue", 9)],
        [("brightness", 25.0), ("saturation", 0.75), ("hue", 9), ("contrast", 1.25)],
    ],
    ids=str,
)
def test_distortion_by_the_formula(steps):
    """Blind spot: BGR taken for RGB, hues of 256, levels rounded to the nearest, a step that is left out."""
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    found = transforms.PhotometricDistortion().apply(image, steps)
    wanted = np.array([slow_distortion(pixel.tolist(), steps) for pixel in image.reshape(-1, 3)]).reshape(image.shape)
    in_tables = any(name in ("hue", "saturation") for name, _ in steps)  # OpenCV's, of HSV
    assert found.dtype == np.uint8 and np.abs(found - wanted).max() <= (3 if in_tables else 0)
    assert bool(steps) is (not np.array_equal(found, image))


def test_what_distortion_draws():
    """Blind spot: odds or bounds that are others than mmsegmentation's; a decision that is never, or always, made; one order for all."""
    transform = transforms.PhotometricDistortion()
    transform.random_generator = np.random.default_rng(0)
    drawn = [transform.get_params()["steps"] for _ in range(2000)]
    for name, low, high in (("brightness", -32, 32), ("contrast", 0.5, 1.5), ("saturation", 0.5, 1.5), ("hue", -18, 17)):
        values = np.array([dict(steps)[name] for steps in drawn if name in dict(steps)])
        assert 900 < len(values) < 1100, name
        assert low <= values.min() < low + 0.02 * (high - low) and high >= values.max() > high - 0.02 * (high - low), name
    orders = ("brightness", "contrast", "saturation", "hue"), ("brightness", "saturation", "hue", "contrast")
    whole = [tuple(name for name, _ in steps) for steps in drawn if len(steps) == 4]
    assert 90 < len(whole) < 160 and all(35 < whole.count(order) for order in orders) and set(whole) == set(orders)


def test_exposure_is_drawn_for_every_other_sample():
    """Blind spot: gamma, brightness and tint of other sizes, or of one channel for all; depth that is changed with the colours."""
    image, metres = np.full((4, 4, 3), 128, np.uint8), np.full((4, 4), 7, np.float32)
    plain = replace(PLAIN, mean=(0, 0, 0), std=(1, 1, 1))
    grey = 128 / 255
    for how, low, high, alike in (
        ({"gamma": 0.5}, grey**1.5, grey**0.5, True),
        ({"brightness": 0.25}, 0.75 * grey, 1.25 * grey, True),
        ({"tint": 0.1}, 0.9 * grey, 1.1 * grey, False),
    ):
        found = []
        for seed in range(200):
            picture, target = seen(replace(WINDOW, **how), (4, 4), plain, image, metres, 0, seed)
            assert np.array_equal(target, metres) and np.ptp(picture, (0, 1)).max() < 1e-6
            found.append(picture[0, 0])
        changed = np.array([each for each in found if np.abs(each - grey).max() > 1e-4])
        assert 70 < len(changed) < 130, how
        assert low - 1e-5 <= changed.min() < low + 0.1 * (high - low) and high + 1e-5 >= changed.max() > high - 0.1 * (high - low), how
        assert bool(np.ptp(changed, 1).max() < 1e-6) is alike, how


def test_rotation_brings_in_no_target():
    """Blind spot: corners of class 0, or of the nearest pixel; degrees taken for radians; metres between two."""
    metres = np.full((40, 40), 3, np.float32)
    image = np.full((40, 40, 3), 255, np.uint8)
    corners = []
    for seed in range(6):
        how = replace(WINDOW, rotate=20.0)
        picture, found = seen(how, (40, 40), replace(PLAIN, mean=(0, 0, 0), std=(1, 1, 1)), image, metres, 0, seed)
        assert set(np.unique(found)) <= {0, 3} and found[20, 20] == 3
        assert (picture[found == 0].mean() if (found == 0).any() else 0) < 0.5
        corners.append((found == 0).mean())
    assert 0.01 < max(corners) < 0.2


def test_odds_of_the_mirror():
    """Blind spot: always or never mirrored, or upside down."""
    image = np.repeat(np.arange(8, dtype=np.uint8).reshape(2, 4)[..., None], 3, 2)
    target = np.arange(8, dtype=np.uint8).reshape(2, 4)
    found = [seen(replace(WINDOW, flip=0.25), (2, 4), PLAIN, image, target, seed=seed)[1] for seed in range(400)]
    mirrored = [np.array_equal(each, target[:, ::-1]) for each in found]
    assert 70 < sum(mirrored) < 130 and sum(np.array_equal(each, target) for each in found) == 400 - sum(mirrored)


def test_a_sample_depends_on_its_key_and_the_seed_alone():
    """Blind spot: a state that goes on from sample to sample, which a resumed run or a loader's process does not share; one seed for all
    epochs; decisions of two transforms that are one draw."""
    image = np.random.default_rng(1).integers(0, 256, (90, 120, 3)).astype(np.uint8)
    labels = np.random.default_rng(2).integers(0, 9, (90, 120))
    how = replace(WINDOW, scale=(256, 64), ratio=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5, distortion=True)
    one, two = (Crops(Held(SCENES.head, image, labels), SCENES.input, how, seed=3) for _ in range(2))
    two[9, 0, (64, 64)]
    np.random.default_rng(0).random(5), random.random(), torch.rand(3), np.random.rand(2)
    for epoch in (0, 5):
        assert all(torch.equal(*pair) for pair in zip(one[epoch, 0, (64, 64)], two[epoch, 0, (64, 64)], strict=True))
    sent = pickle.loads(pickle.dumps(one))
    assert torch.equal(sent[5, 0, (64, 64)][0], two[5, 0, (64, 64)][0])
    assert not torch.equal(one[0, 0, (64, 64)][0], one[1, 0, (64, 64)][0])
    assert not torch.equal(one[0, 0, (64, 64)][0], Crops(one.data, SCENES.input, how, seed=4)[0, 0, (64, 64)][0])


def test_all_decisions_are_draws_of_one_generator():
    """Blind spot: another sample than the carried models' trainings saw of the same key: window, mirror, colour, in this order; what
    albumentations draws from Python's generator left to another."""
    target = np.arange(4800).reshape(60, 80).astype(np.float32)
    image = np.random.default_rng(1).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    config = replace(SCENES.input, mean=(0, 0, 0), std=(1, 1, 1))
    crops = Crops(Held(DEPTH.head, image, target), config, Augmentation(smallest=1, aspect=1), seed=6)
    mirrored = set()
    for epoch in range(8):
        rng = np.random.default_rng((6, epoch, 0))
        rng.uniform(), rng.uniform(), rng.integers(1), rng.integers(1)
        flip = bool(rng.random() < 0.5)
        factors = dict(zip(("brightness", "contrast", "saturation"), (1 + rng.uniform(-0.3, 0.3, 3)).tolist(), strict=True))
        x, y = crops[epoch, 0, (60, 80)]
        assert np.array_equal(y.numpy(), target[:, ::-1] if flip else target)
        wanted = transforms.Jitter(0.3).apply((image[:, ::-1] if flip else image).astype(np.float32) / 255, **factors)
        np.testing.assert_allclose(x.permute(1, 2, 0).numpy(), wanted, atol=1e-5)
        mirrored.add(flip)
    assert mirrored == {True, False}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "middle"}, "Augmentation.crop='middle': it must be one of share, window"),
        ({"smallest": 0}, "Augmentation.smallest=0: it must be a number from 0.01 to 1"),
        ({"flip": 1.5}, "Augmentation.flip=1.5: it must be a number from 0 to 1"),
        ({"crop": "window", "scale": (512,)}, r"Augmentation.scale=\(512,\): it must be a tuple of 2, each a whole number"),
        ({"crop": "window", "scale": (512, 2.5)}, "Augmentation.scale="),
        ({"crop": "window", "scale": (512, 512), "ratio": (2.0, 0.5)}, r"ratio=\(2.0, 0.5\): the first must not be above the second"),
        ({"crop": "window", "ratio": (0.5, 2.0)}, "it is a factor on `scale`, which is None"),
        ({"scale": (2048, 512)}, r"scale=\(2048, 512\): only crop='window' has it, and this one is 'share'"),
        ({"crop": "window", "smallest": 0.5}, "smallest=0.5: only crop='share' has it"),
        ({"crop": "window", "distortion": True}, "colour=0.3: distortion changes the same, so one of them must be 0"),
        ({"distortion": True, "colour": 0}, "distortion=True: only crop='window' has it"),
        ({"colour": True}, "Augmentation.colour=True"),
    ],
)
def test_an_augmentation_that_is_none(changes, message):
    """Blind spot: an option that does nothing where it stands; a typing error that is found in the middle of a training."""
    with pytest.raises(ValueError, match=message):
        Augmentation(**changes)


def test_what_is_not_installed(monkeypatch):
    """Blind spot: the name of a module that nobody knows, in the middle of a training."""
    monkeypatch.delattr(dpt.data, "transforms")
    monkeypatch.setitem(sys.modules, "dpt.data.transforms", None)
    with pytest.raises(ImportError, match=r"training needs albumentations: pip install 'dense-prediction-transformers\[train\]'"):
        Crops(Held(DEPTH.head, np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32)), DEPTH.input, STILL)


def test_classes_of_depth():
    """Blind spot: metres counted as classes."""
    data = Held(DEPTH.head, np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match=r"cat_max_ratio=0.75: it is of classes, and held is read for depth"):
        Crops(data, DEPTH.input, replace(WINDOW, cat_max_ratio=0.75))


class Replay(random.Random):
    """A generator, NumPy's and Python's at once, that gives what another program drew, each within the bounds that are asked for."""

    def __init__(self, drawn: np.ndarray):
        super().__init__(0)
        self.drawn = drawn.tolist()

    def random(self) -> float:
        return self.drawn.pop(0)

    def uniform(self, low: float, high: float) -> float:
        value = self.random()
        assert low <= value <= high
        return value

    def integers(self, low: int, high: int | None = None) -> int:
        low, high = (0, low) if high is None else (low, high)
        value = self.random()
        assert value == int(value) and low <= value < high
        return int(value)


RECORDED = np.load(Path(__file__).parent / "oracles" / "mmsegmentation.npz")


@pytest.mark.parametrize("name", sorted({key.partition(".")[0] for key in RECORDED.files}))
def test_mmsegmentations_samples_level_by_level(name):
    """Blind spot: any step that is not mmsegmentation's: what is drawn and in which order, the resize's rounding, windows, the mirror,
    colours, reduce_zero_label, what is filled in. The same random numbers, the published pipeline at a tenth of its size."""
    shape, state = tuple(RECORDED[f"{name}.shape"].tolist()), np.random.RandomState(int(RECORDED[f"{name}.seed"]))
    picture, blocks = state.randint(0, 256, (*shape, 3)), state.randint(0, 5, [-(-side // 36) for side in shape])
    stored = blocks.repeat(36, 0).repeat(36, 1)[: shape[0], : shape[1]]
    labels = class_labels(stored, 4, True, name)
    how = Augmentation(crop="window", scale=(205, 51), ratio=(0.5, 2.0), cat_max_ratio=0.75, flip=0.5, distortion=True, colour=0)
    steps, drawn = transforms.pipeline(how, (51, 51), ADE.input, IGNORE), Replay(RECORDED[f"{name}.drawn"])
    steps.set_random_state(drawn, drawn)
    result = steps(force_apply=True, image=picture.astype(np.uint8), mask=labels.astype(np.uint8))
    assert not drawn.drawn
    assert np.array_equal(result["mask"], RECORDED[f"{name}.labels"])
    levels = RECORDED[f"{name}.levels"]
    height, width = levels.shape[:2]
    mean, std = np.array(ADE.input.mean), np.array(ADE.input.std)
    found = 255 * (result["image"][:height, :width] * std + mean)
    assert np.array_equal(found.round(), levels) and np.abs(found - levels).max() < 1e-3
    np.testing.assert_allclose(result["image"].transpose(2, 0, 1)[:, ::4, ::4], RECORDED[f"{name}.picture"], atol=2e-6)


def test_what_was_recorded_shows_every_decision():
    """Blind spot: recorded samples in which nothing was drawn: no second window, no mirror, nothing to fill in."""
    drawn = [RECORDED[key].tolist() for key in RECORDED.files if key.endswith(".drawn")]
    sizes = [RECORDED[key].shape[:2] for key in RECORDED.files if key.endswith(".levels")]
    assert max(map(len, drawn)) > 15 and any(size != (51, 51) for size in sizes)
    assert {min(rows[0] < 1, 1) for rows in drawn} == {True, False}  # smaller and larger
