"""What waits is predicted together, and nobody is the worse for whom he waited with. Blind spot: a GPU, whose batches overlap."""

from __future__ import annotations

import io
import threading
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from dpt.inference.images import ImageError
from dpt.inference.reading import LOOK_AHEAD
from dpt.serving.batching import Batcher, Closed

DEPTH, SCENES = "dpt-tiny-depth", "dpt-tiny-scenes"


def png(seed: int, size: tuple[int, int] = (48, 64)) -> bytes:
    """A small picture; its first pixel is its seed."""
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    values[0, 0] = seed
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


class Instead:
    """A model that asks first: `before(x)` sees each batch."""

    def __init__(self, model, before):
        self._model, self._before = model, before

    def __call__(self, x):
        self._before(x)
        return self._model(x)

    def __getattr__(self, name):
        return getattr(self._model, name)


class Gate:
    """Holds a network until it is opened, so that others come to wait; keeps how many were in each batch."""

    def __init__(self):
        self.open, self.entered, self.batches = threading.Event(), threading.Event(), []

    def __call__(self, x):
        self.batches.append(len(x))
        self.entered.set()
        assert self.open.wait(30)


def batcher(models, **changes) -> Batcher:
    return Batcher(models, **{"batch_size": 4, "max_pixels": 1 << 20, **changes})


def test_what_waits_is_predicted_together(models):
    """Blind spot: one run a picture; a result that goes to another; bits that depend on who else was there."""
    gate = Gate()
    with closing(batcher({DEPTH: Instead(models[DEPTH], gate)})) as held:
        answers = [held.submit(DEPTH, png(0), "0.png")]
        assert gate.entered.wait(30)
        answers += [held.submit(DEPTH, png(seed), f"{seed}.png") for seed in range(1, 9)]
        assert held.waiting == 8
        gate.open.set()
        found = [answer.result(60) for answer in answers]
        assert (held.pictures, held.runs, held.waiting) == (9, 3, 0) and gate.batches == [4, 4, 4]
    assert [result.source.name for result in found] == [f"{seed}.png" for seed in range(9)]
    for seed, result in enumerate(found):
        assert result.image[0, 0, 0] == seed
        assert np.array_equal(result.prediction.depth, models[DEPTH].predict(io.BytesIO(png(seed)), batch_size=4).depth)


def test_sizes_and_broken_files_share_a_turn(models):
    """Blind spot: one bad file that fails the others; a small picture among large ones; the limit of pixels."""
    with closing(batcher({DEPTH: models[DEPTH]}, max_pixels=64 * 96)) as held:
        contents = [png(1), b"", png(2, (64, 48)), b"no picture", png(3), png(4, (80, 96)), png(5)[:300]]
        answers = [held.submit(DEPTH, content, f"{place}.png") for place, content in enumerate(contents)]
        found = [answer.result(60) for answer in answers]
    assert [result.error is None for result in found] == [True, False, True, False, True, False, False]
    for place in (1, 3, 5, 6):
        assert isinstance(found[place].error, ImageError) and f"{place}.png: " in str(found[place].error)
    assert found[2].prediction.depth.shape == (64, 48)


def refuse(words: str, when):
    def before(x):
        if when(x):
            raise RuntimeError(words)

    return before


def bright(x) -> bool:
    """Whether a white picture is in the batch."""
    return bool((x.amin((1, 2, 3)) > 0.9).any())


def white() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "white").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(("words", "kind"), [("out of memory", MemoryError), ("a mistake", RuntimeError)])
def test_one_that_fails_fails_alone(models, words, kind):
    """Blind spot: a batch in which one cannot be predicted; the thread that dies of it; a future that is never settled."""
    gate = Gate()

    def before(x):
        gate(x)
        refuse(words, bright)(x)

    with closing(batcher({DEPTH: Instead(models[DEPTH], before)})) as held:
        first = held.submit(DEPTH, png(0), "0")
        assert gate.entered.wait(30)
        others = [held.submit(DEPTH, content, "a") for content in (png(1), white(), png(2))]
        gate.open.set()
        assert first.result(60).prediction is not None
        assert all(others[place].result(60).prediction is not None for place in (0, 2))
        error = others[1].exception(60) or others[1].result().error
        assert isinstance(error, kind)
        assert held.submit(DEPTH, png(3), "a").result(60).prediction is not None


def test_where_a_batch_has_no_memory_its_pictures_go_one_by_one(models):
    """Blind spot: a size of batch that is too large for a picture that alone would be none."""
    with closing(batcher({DEPTH: Instead(models[DEPTH], refuse("out of memory", lambda x: len(x) > 1))})) as held:
        answers = [held.submit(DEPTH, png(seed), "a") for seed in range(3)]
        assert all(answer.result(60).prediction is not None for answer in answers)


def test_who_gave_up_costs_nothing(models):
    """Blind spot: pictures predicted for nobody."""
    gate = Gate()
    with closing(batcher({DEPTH: Instead(models[DEPTH], gate)})) as held:
        first = held.submit(DEPTH, png(0), "a")
        assert gate.entered.wait(30)
        others = [held.submit(DEPTH, png(seed), "a") for seed in range(1, 5)]
        assert others[0].cancel() and others[2].cancel() and not first.cancel()
        gate.open.set()
        assert others[3].result(60).prediction is not None
        assert (held.pictures, held.dropped) == (3, 2)


def test_no_model_keeps_another_waiting(models):
    """Blind spot: a stream of pictures for one model, in which another's never has its turn."""
    order, lock = [], threading.Lock()

    def note(name):
        def before(x):
            with lock:
                order.append(name)
            if name == DEPTH and len(order) < 40:  # as many come as go
                held.submit(DEPTH, png(0), "a")

        return before

    with closing(batcher({name: Instead(model, note(name)) for name, model in models.items()}, batch_size=1)) as held:
        for _ in range(3 * LOOK_AHEAD):
            held.submit(DEPTH, png(0), "a")
        assert held.submit(SCENES, png(0), "a").result(60).prediction.labels is not None
        assert order.index(SCENES) <= 4 * LOOK_AHEAD  # behind those that were there before it, and what was read ahead


def test_a_focal_length_is_of_its_picture(models):
    """Blind spot: pictures of two focal lengths in one batch, whose option is of all."""
    gate = Gate()
    model = Instead(models[DEPTH], gate)
    model.config = models[DEPTH].config.with_("head", inverse=False, focal=100.0)
    with closing(batcher({DEPTH: model}, batch_size=2)) as held:
        first = held.submit(DEPTH, png(1), "a", 50.0)
        assert gate.entered.wait(30)
        others = [held.submit(DEPTH, png(1), "a", focal) for focal in (50.0, 100.0)]
        gate.open.set()
        one, two, three = (answer.result(60).prediction.depth for answer in (first, *others))
    assert np.array_equal(one, two) and np.allclose(2 * one, three, rtol=1e-5)


def test_the_end(models):
    """Blind spot: who waits when the server ends waits for ever."""
    gate = Gate()
    held = batcher({DEPTH: Instead(models[DEPTH], gate)})
    first = held.submit(DEPTH, png(0), "a")
    assert gate.entered.wait(30)
    second = held.submit(DEPTH, png(1), "a", None)
    third = held.submit(DEPTH, png(1), "a", None)
    third.cancel()
    threading.Timer(0.2, gate.open.set).start()
    held.close()
    assert first.result(1).prediction is not None
    assert isinstance(second.exception(1), Closed)
    with pytest.raises(Closed):
        held.submit(DEPTH, png(1), "a")


def test_another_model_is_refused(models):
    with closing(batcher({DEPTH: models[DEPTH]})) as held, pytest.raises(KeyError):
        held.submit(SCENES, b"", "a")
