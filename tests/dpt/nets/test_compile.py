"""Compiled and exported models: predicting runs what was compiled, and one graph holds for pictures of all sizes."""

import inspect

import numpy as np
import pytest
import torch
from small import depth_anything, depth_anything_3, randomise, wide

import dpt
from dpt.model import DPT

PICTURE = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def forget() -> None:
    torch.compiler.reset()


class Counting:
    """A backend that runs the graph as it is and counts: graphs made, and runs of them."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            return graph(*args)

        return run


def wrapped(model: DPT, backend: Counting) -> torch.nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: DPT, backend: Counting) -> torch.nn.Module:
    model.compile(backend=backend)
    return model


def accelerated(model: DPT, backend: Counting) -> torch.nn.Module:
    return torch.compile(dpt.accelerate(model), backend=backend)


@pytest.mark.parametrize(
    ("name", "compiled"),
    [("dpt-large-midas", wrapped), ("dpt-base-ade20k", wrapped), ("dpt-large-midas", in_place), ("dpt-large-midas", accelerated)],
)
def test_predictions_run_compiled(name, compiled):
    """Blind spot: torch.compile's wrapper hands `predict` on to the model it wraps, which then runs uncompiled without a word."""
    model = wide(name)
    wanted = model.predict(PICTURE)
    backend = Counting()
    quick = compiled(model, backend)
    found = quick.predict(PICTURE)
    assert backend.graphs == 1 and backend.runs == 1, "the graph is not what ran"
    assert len(quick.predict([PICTURE, PICTURE], batch_size=1)) == 2 and backend.runs == 3 and backend.graphs == 1
    if name == "dpt-large-midas":
        np.testing.assert_allclose(found.depth, wanted.depth, rtol=1e-4, atol=1e-4 * wanted.depth.max())
    else:
        assert (found.labels == wanted.labels).mean() > 0.999


def test_a_model_and_its_wrapper_are_told_apart():
    """Blind spot: a plain model that runs compiled because another holds it, one wrapper that gets another's graph, a wrapper of an
    outer module, and training modes that are not put back."""
    model, backends = wide(), (Counting(), Counting())
    one, other = (torch.compile(model, backend=backend) for backend in backends)
    model.predict(PICTURE)
    assert [backend.runs for backend in backends] == [0, 0] and model.predict.__self__ is model
    other.predict(PICTURE)
    assert [backend.runs for backend in backends] == [0, 1]
    assert one.predict.__self__ is one and getattr(other, "predict").__self__ is other  # noqa: B009
    one.train()
    one.predict(PICTURE)
    assert all(module.training for module in model.modules())

    class Holder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod = wide()  # its name, in a module of somebody's own

        def ask(self):
            return self._orig_mod.predict

    holder = Holder()
    assert holder.ask().__self__ is holder._orig_mod
    assert inspect.signature(DPT.predict).parameters.keys() == {"self", "images", "options"} and "compiled" in DPT.predict.__doc__


def metric_bins(name: str) -> DPT:
    """With few attractors, each of which is a part of the graph."""
    return randomise(DPT(wide(name).config.with_("head", attractors=(2, 1, 1, 1))))


MODELS = {
    "bilinear": lambda: wide("dpt-large-midas"),
    "by count": lambda: wide("dpt-base-ade20k"),
    "hybrid": lambda: wide("dpt-tiny-scenes", depth=2, hooks=(0, 1)),
    "resnetv2": lambda: wide("dpt-hybrid-nyu", depth=2, hooks=(0, 1)),
    "offset": depth_anything,
    "own size": lambda: wide("dpt-dinov2-giant-kitti"),
    "sky": depth_anything_3,
    "rotated": lambda: wide("chmv2"),
    "three tasks": lambda: wide("tipsv2-base"),
    "beit": lambda: wide("midas-3.1-beit-base-384"),
    "bins": lambda: metric_bins("zoedepth-k"),
    "router": lambda: metric_bins("zoedepth-nk"),
}
STORED = (4, 4)  # rows and columns of patches of the small models' own size
# Sides in patches: the own size, even and odd ones, and (2, 8), of as many patches as the own size has: not resized by count.
SIDES = [STORED, (5, 3), (3, 8), (7, 7)]


def pictures(model: DPT, sides: tuple[int, int], batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, *(side * model.config.encoder.patch_size for side in sides))


def agrees(program, model: DPT, sides: tuple[int, int], batch: int) -> bool:
    x = pictures(model, sides, batch)
    ours, theirs = (found if isinstance(found, dict) else {"": found} for found in (program(x), model(x)))
    same = (ours[task].shape == maps.shape and (ours[task] - maps).abs().max() <= 2e-5 * maps.abs().max() for task, maps in theirs.items())
    return ours.keys() == theirs.keys() and all(same)


@pytest.mark.parametrize(
    ("kind", "fast", "example"),
    [
        ("bilinear", False, STORED),
        ("by count", False, STORED),
        ("by count", True, (6, 4)),
        ("hybrid", False, STORED),
        ("resnetv2", False, STORED),
        ("offset", False, STORED),
        ("own size", False, STORED),
        ("own size", True, (6, 4)),
        ("sky", False, STORED),
        ("sky", True, (6, 4)),
        ("rotated", False, STORED),
        ("rotated", True, (5, 3)),
        ("three tasks", False, STORED),
        ("three tasks", True, (5, 3)),
        ("beit", False, STORED),
        ("beit", True, (5, 3)),
        ("bins", True, STORED),
        ("router", False, (6, 4)),
    ],
)
def test_one_exported_program_for_all_sizes(kind, fast, example):
    """Blind spot: a choice by the example's size that becomes a rule of the program: the stored positional embedding, or a skip that is
    resized where patches come in odd numbers. From three patches a side: PyTorch settles maps of one pixel."""
    model = MODELS[kind]()
    if fast:
        dpt.accelerate(model, strict=True)
    patch = model.config.encoder.patch_size
    rows, columns, batch = (torch.export.Dim(name, min=least, max=64) for name, least in (("h", 3), ("w", 3), ("b", 1)))
    shapes = ({0: batch, 2: patch * rows, 3: patch * columns},)
    with torch.no_grad():
        program = torch.export.export(model, (pictures(model, example, 2),), dynamic_shapes=shapes).module()
        for number, sides in enumerate([*SIDES, example, (16, 15)]):
            assert agrees(program, model, sides, 1 + 2 * (number % 2)), sides


def test_by_count_in_a_program():
    """Blind spot: 3x12 patches on a stored 6x6 are not resized by mmsegmentation: the same number of patches. In the program neither."""
    model = wide("dpt-base-ade20k", pos_grid=(6, 6))
    rows, columns = (torch.export.Dim(name, min=3, max=64) for name in ("h", "w"))
    with torch.no_grad():
        position = model.encoder.position((3, 12))
        assert position is model.encoder.pos_embed
        program = torch.export.export(model.encoder, (pictures(model, (4, 5), 1),), dynamic_shapes=({2: 16 * rows, 3: 16 * columns},))
        for sides in ((3, 12), (12, 3), (4, 9), (6, 6), (3, 11)):
            x = pictures(model, sides, 1)
            for ours, theirs in zip(program.module()(x), model.encoder(x), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "fast", "dynamic"),
    [
        ("hybrid", False, None),
        ("hybrid", True, True),
        ("resnetv2", True, True),
        ("own size", False, None),
        ("own size", True, True),
        ("sky", True, True),
        ("rotated", False, None),
        ("rotated", True, True),
        ("three tasks", True, True),
        ("beit", False, True),
        ("router", True, True),
    ],
)
def test_compiled_over_sizes(kind, fast, dynamic):
    """Blind spot: a graph for every size, until PyTorch gives up compiling; results of a graph of another size."""
    model = MODELS[kind]()
    if fast:
        dpt.accelerate(model, strict=True)
    backend = Counting()
    program = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    with torch.no_grad():
        for sides in ((5, 6), STORED, (3, 5)):
            assert agrees(program, model, sides, 2), sides
        assert backend.graphs <= 3 and backend.runs == 3
