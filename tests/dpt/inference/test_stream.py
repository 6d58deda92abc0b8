"""A stream of pictures: batches by size, the device and the host at the same time, memory, ends. Blind spot: a GPU, whose rounding may also
depend on a picture's place in its batch."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import weakref

import numpy as np
import pictures
import pytest
import torch
from staged import stage
from torch import nn

from dpt.config import HALF, DPTConfig, InputConfig
from dpt.inference import prediction as predicting
from dpt.inference import transfer
from dpt.inference.images import ImageError
from dpt.inference.reading import LOOK_AHEAD, Window
from dpt.zoo import CONFIGS

BASE = CONFIGS["dpt-tiny-depth"]


def _config() -> DPTConfig:
    size = {"mean": HALF, "std": HALF, "size": (32, 32), "rule": "short_side", "mode": "bilinear", "output_mode": "bilinear"}
    return dataclasses.replace(BASE, input=InputConfig(**size))


class Stub(nn.Module):
    """A model whose depth is the picture's brightness; it tells its batches' shapes."""

    def __init__(self, told: list[str], function=lambda x: x.mean(1)):
        super().__init__()
        self.config, self.told, self.function = _config(), told, function
        self.parameter, self.head = nn.Parameter(torch.zeros(())), None

    def forward(self, x):
        self.told.append(f"{len(x)} of {x.shape[3]}x{x.shape[2]}")
        return self.function(x)


def _grey(height: int, width: int, level: int) -> np.ndarray:
    return np.full((height, width, 3), level, np.uint8)


def test_a_batch_is_queued_before_the_one_before_it_is_waited_for(monkeypatch):
    """Blind spot: a host that waits for a map and then begins with the next; results that come before they are waited for, or never."""
    told = stage(monkeypatch)
    levels = []
    for result in predicting.predict_iter(Stub(told), (_grey(32, 32, level) for level in range(4))):
        levels.append(round((result.prediction.depth[0, 0] + 1) * 127.5))
        told.append(f"got {levels[-1]}")
    one = "1 of 32x32"
    start = [one, "recorded 0", one, "recorded 1", "waited 0", "got 0", one, "recorded 2", "waited 1", "got 1"]
    assert told == [*start, one, "recorded 3", "waited 2", "got 2", "waited 3", "got 3"] and levels == [0, 1, 2, 3]


def test_a_cpu_has_nothing_in_work():
    """Blind spot: results that come a batch late where nothing is gained by it."""
    told: list[str] = []
    for number, _ in enumerate(predicting.predict_iter(Stub(told), (_grey(32, 32, level) for level in range(4))), 1):
        assert len(told) == number


@pytest.mark.parametrize("staged", [False, True])
def test_mixed_sizes_make_whole_batches(monkeypatch, staged):
    """Blind spot: batches that a change of orientation cuts short; results in the order of the batches instead of the pictures."""
    if staged:
        stage(monkeypatch)
    sizes = [(32, 48), (48, 32)] * 20
    sources = [_grey(*size, level) for level, size in enumerate(sizes)]
    sources[7] = np.zeros((0, 3, 3), np.uint8)
    shapes: list[str] = []
    results = list(predicting.predict_iter(Stub(shapes), sources, batch_size=8))
    assert sorted(shapes) == ["8 of 32x48"] * 3 + ["8 of 48x32"] * 3  # 20 and 19
    assert isinstance(results[7].error, ImageError)
    for level, (result, size) in enumerate(zip(results, sizes, strict=True)):
        if level != 7:
            assert result.source is sources[level] and result.prediction.size == size
            np.testing.assert_allclose(result.prediction.depth, level / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_more_is_held_than_is_said(monkeypatch, staged, batch_size):
    """Blind spot: a list of ten thousand pictures in memory, decoded or predicted; one rare size that holds all others up."""
    if staged:
        stage(monkeypatch)
    alive: weakref.WeakSet = weakref.WeakSet()
    taken = itertools.count()
    most = 0

    def sources():
        for number in range(60):
            next(taken)
            yield _grey(32, 48 if number % 10 else 80, number)

    load = predicting.load

    class Pixels(np.ndarray):
        """An array that can be watched."""

    def watched(source, limit):
        loaded = load(source, limit)
        image = loaded.image.view(Pixels)
        alive.add(image)
        return dataclasses.replace(loaded, image=image)

    monkeypatch.setattr(predicting, "load", watched)
    shapes: list[str] = []
    for given, _ in enumerate(predicting.predict_iter(Stub(shapes), sources(), batch_size=batch_size)):
        most = max(most, len(alive))
        ahead = int(repr(taken)[6:-1]) - given
        assert ahead <= LOOK_AHEAD * batch_size
    assert given == 59 and most <= LOOK_AHEAD * batch_size + 1  # and what was handed out last


class Reads:
    """What `Window` reads items as: numbers, batched by their last digit, of which those below 0 are nobody's company."""

    def __init__(self):
        self.read: list[int] = []

    def __call__(self, item: int):
        self.read.append(item)
        return item, item % 10 if item >= 0 else None


def _batches(items, batch_size: int) -> tuple[list[list[int]], list[int]]:
    """The batches that are made, and the order in which results are handed out, each finished at once."""
    window, batches, order = Window(items, Reads(), batch_size), [], []
    while (batch := window.next_batch()) is not None:
        batches += [[read for _, read in batch]] if batch else []
        for place, read in batch:
            place.finish(read)
        order += window.finished()
    window.close()
    return batches, order


def test_batches_by_hand():
    """Blind spot: a batch that takes from beyond the window, leaves the first item waiting, or mixes; a window of bad items as the end."""
    items = [10, 21, 30, 41, 50, 61, 70, 81, 90, 0]
    assert _batches(items, 2) == ([[10, 30], [21, 41], [50, 70], [61, 81], [90, 0]], items)
    lonely = [5, *range(0, 300, 10)]  # a window has 8 places: 5's batch is not filled, and waits for none beyond
    batches, order = _batches(lonely, 2)
    assert batches[0] == [5] and order == lonely and all(len(batch) == 2 for batch in batches[1:])
    bad = [-1] * 20 + [10] + [-2] * 20 + [20]
    assert _batches(bad, 2) == ([[10], [20]], bad)
    assert _batches([], 4) == ([], [])


def test_company_changes_no_bit():
    """Blind spot: a result that another picture's presence changes by a rounding; the network of real convolutions and products, whose
    libraries choose how to sum by the batch's number."""
    model = pictures.lively_model(BASE.with_("input", size=(64, 64)))
    rng = np.random.default_rng(0)
    sources = [rng.integers(0, 256, size, dtype=np.uint8) for size in [(60, 90, 3), (90, 60, 3), (64, 64, 3)] for _ in range(4)]
    rng.shuffle(order := list(range(12)))
    for batch_size in (1, 3, 4):
        alone = [model.predict(source, batch_size=batch_size).depth for source in sources]
        listed = model.predict([sources[index] for index in order], batch_size=batch_size)
        assert len({depth.tobytes() for depth in alone}) == 12
        for index, prediction in zip(order, listed, strict=True):
            np.testing.assert_array_equal(prediction.depth, alone[index])


def test_an_error_is_its_batchs(monkeypatch):
    """Blind spot: memory that runs out while a batch is queued, or while one is fetched, told of the batch before or after it."""

    def function(x):
        if x.max() > 0.99:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.mean(1)

    stage(monkeypatch)
    arrays, calls = transfer.Fetched.arrays, itertools.count()

    def failing(self):
        if next(calls) == 1:
            raise MemoryError
        return arrays(self)

    monkeypatch.setattr(transfer.Fetched, "arrays", failing)
    levels = [0, 255, 1, 2, 3]
    results = list(predicting.predict_iter(Stub([], function), [_grey(32, 32, level) for level in levels]))
    assert [result.error is None for result in results] == [True, False, False, True, True]  # in queueing, and in fetching
    assert all("memory ran out" in str(result.error) for result in results[1:3])
    assert [round((result.prediction.depth[0, 0] + 1) * 127.5) for result in results if result.error is None] == [0, 2, 3]
    broken = predicting.predict_iter(Stub([], lambda x: x.mean(1).no_such_name), [_grey(32, 32, 0)] * 3)
    with pytest.raises(AttributeError, match="no_such_name"):
        list(broken)


@pytest.mark.parametrize("staged", [False, True])
def test_an_early_end(monkeypatch, staged):
    """Blind spot: threads that wait for ever for a stream that nobody reads any more, or a device that is waited for at its end."""
    told = stage(monkeypatch) if staged else []
    results = predicting.predict_iter(Stub([]), (_grey(32, 32, level) for level in itertools.cycle(range(256))), batch_size=2)
    for _ in range(3):
        next(results)
    waited = len([word for word in told if word.startswith("waited")])
    results.close()
    for thread in threading.enumerate():
        if thread.name.startswith("dpt-load"):
            thread.join(10)
            assert not thread.is_alive()
    assert len([word for word in told if word.startswith("waited")]) == waited == (2 if staged else 0)


def test_the_clock_is_of_the_network_alone():
    """Blind spot: a clock that runs while pictures are resized, or does not for one of the views."""
    told: list[str] = []

    class Clock:
        def __enter__(self):
            told.append("on")

        def __exit__(self, *_):
            told.append("off")

    list(predicting.predict_iter(Stub(told), [_grey(32, 32, 0)] * 3, predicting.Beside(clock=Clock()), batch_size=2, flip=True))
    assert told == ["on", "2 of 32x32", "off"] * 4
