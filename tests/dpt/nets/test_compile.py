"""Compiled and exported models: predicting runs what was compiled, and one graph holds for pictures of all sizes."""

import inspect
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from small import depth_anything, depth_anything_3, randomise, small, wide
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import dpt
from dpt.fast.acceleration import as_on_a_gpu
from dpt.inference.resizing import network_size
from dpt.kernels import launch
from dpt.model import DPT

PICTURE = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def forget() -> None:
    torch.compiler.reset()


@pytest.fixture
def one_convolution() -> Iterator[None]:
    """Without oneDNN, which PyTorch takes or leaves for a CPU's convolution by the size of a map, and makes that a rule of the graph. On a
    GPU there is no such rule. From 16 pictures on a CPU's convolution is another still."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


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


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 3), (True, 1)])
def test_predictions_of_many_sizes(dynamic, graphs, one_convolution):
    """Blind spot: a graph for every size of picture. PyTorch compiles the first size for itself unless told not to,
    then leaves open the side that differs, then both."""
    model, backend = dpt.accelerate(randomise(DPT(wide().config.with_("input", size=(160, 160))))), Counting()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    noise = np.random.default_rng(1)
    images = [noise.integers(0, 255, (50 + 7 * n, 160 - 9 * n, 3), dtype=np.uint8) for n in range(10)]
    sizes = {network_size(*image.shape[:2], model.config.input, 1.0) for image in images}
    predictions = compiled.predict(images)
    assert backend.graphs == graphs and backend.runs == 10 and len(sizes) >= 6
    for found, image in zip(predictions, images, strict=True):
        wanted = model.predict(image).depth
        np.testing.assert_allclose(found.depth, wanted, rtol=1e-4, atol=1e-4 * wanted.max())


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
    "prompt": lambda: wide("prompt-depth-anything-small"),
    "one size": lambda: small("midas-3.1-swin2-tiny-256"),
}
STORED = (4, 4)  # rows and columns of patches of the small models' own size
# Sides in patches: the own size, and odd and even ones; (2, 8), of as many patches as the own size has, is not resized by count.
SIDES = [STORED, (3, 8), (7, 5)]


def pictures(model: DPT, sides: tuple[int, int], batch: int) -> tuple[torch.Tensor, ...]:
    """What the model takes: pictures of so many patches, or of the model's one size, and prompts of odd sizes."""
    size = model.config.encoder.fixed_size or tuple(side * model.config.encoder.patch_size for side in sides)
    x = torch.randn(batch, 3, *size, dtype=next(model.parameters()).dtype)
    return (x, 1 + torch.rand(batch, sides[0] + 5, sides[1] + 7)) if model.config.decoder.prompt else (x,)


def open_shapes(model: DPT) -> tuple[dict[int, Any], ...]:
    """Batch, height and width left open, as `DPT.forward` says; a prompt's too."""
    patch = model.config.encoder.patch_size
    batch, rows, columns, height, width = (
        torch.export.Dim(name, min=1 if name == "b" else 3, max=64) for name in ("b", "h", "w", "m", "n")
    )
    sides = {} if model.config.encoder.fixed_size else {2: patch * rows, 3: patch * columns}
    return ({0: batch, **sides}, {0: batch, 1: height, 2: width})[: 1 + model.config.decoder.prompt]


def exported(model: DPT, sides: tuple[int, int], strict: bool = False) -> torch.export.ExportedProgram:
    return torch.export.export(model, pictures(model, sides, 2), dynamic_shapes=open_shapes(model), strict=strict)


def again(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program, saved and loaded."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def by_task(found: Any) -> dict[str, torch.Tensor]:
    return found if isinstance(found, dict) else {"": found}


def agrees(program, model: DPT, sides: tuple[int, int], batch: int) -> bool:
    given = pictures(model, sides, batch)
    ours, theirs = by_task(program(*given)), by_task(model(*given))
    same = (ours[task].shape == maps.shape and (ours[task] - maps).abs().max() <= 2e-5 * maps.abs().max() for task, maps in theirs.items())
    return ours.keys() == theirs.keys() and all(same)


@pytest.mark.parametrize(
    ("kind", "fast", "example", "strict", "dtype"),
    [
        ("bilinear", False, STORED, False, torch.float32),
        ("bilinear", True, (6, 4), True, torch.bfloat16),
        ("by count", False, STORED, False, torch.float32),
        ("by count", True, (6, 4), False, torch.float32),
        ("resnetv2", True, STORED, False, torch.float32),
        ("offset", False, STORED, False, torch.float32),
        ("own size", True, (6, 4), False, torch.float32),
        ("rotated", False, STORED, False, torch.float32),
        ("rotated", True, (5, 3), False, torch.float16),
        ("beit", False, STORED, False, torch.float32),
        ("bins", True, STORED, False, torch.float32),
        ("router", True, (6, 4), False, torch.float32),
        ("prompt", False, STORED, False, torch.float32),
    ],
)
def test_one_exported_program_for_all_sizes(kind, fast, example, strict, dtype):
    """Tracing takes its time: a kind's fast form is traced without kernels either here or by torch.compile below, with them once more.
    Blind spot: a choice by the example's size that becomes a rule of the program: the stored positional embedding, or a skip that is
    resized where patches come in odd numbers. From three patches a side: PyTorch settles maps of one pixel."""
    model = MODELS[kind]().to(dtype)
    if fast:
        dpt.accelerate(model)
    with torch.no_grad():
        program = exported(model, example, strict)
        program = (program if fast and not strict else again(program)).module()  # what is fast is loaded with its kernels below
        for number, sides in enumerate(SIDES):
            assert agrees(program, model, sides, 1 + 2 * (number % 2)), sides


class Ops(TorchDispatchMode):
    """Counts the kernels' ops, by name, of what runs within it."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[str(function)] += function.namespace == "dpt"
        return function(*args, **(kwargs or {}))


def ops_of(graph: torch.fx.Graph) -> Counter[str]:
    return Counter(str(node.target) for node in graph.nodes if getattr(node.target, "namespace", "") == "dpt")


def launches(program, given: tuple[torch.Tensor, ...]) -> tuple[list[torch.Size], Counter[Any]]:
    """The shapes of what a program gives, and all that it launches, with whatever a kernel is told but the numbers in its tensors. Nothing
    is run."""
    found = []
    cases = launch.record("sm_90", "", lambda: found.append(program(*given)))
    return [maps.shape for maps in by_task(found[0]).values()], Counter((case.specialisation(), case.grid, case.moved) for case in cases)


@pytest.mark.parametrize(
    ("kind", "strict", "dtype"),
    [(kind, kind in ("sky", "prompt"), torch.float16 if kind in ("rotated", "offset") else torch.float32) for kind in MODELS],
)
def test_the_kernels_in_a_program(kind, strict, dtype):
    """Blind spot: an op that a trace takes apart into PyTorch's, or leaves out; an op whose shape without numbers settles a side. What is
    launched is recorded and not run: tests/kernels has the numbers."""
    model = dpt.accelerate(MODELS[kind]().to(dtype))
    with as_on_a_gpu(), torch.no_grad():
        program = exported(model, (5, 3), strict)
        with Ops() as eager:
            launches(model, pictures(model, (5, 3), 2))
        assert ops_of(program.graph) == +eager.seen and len(+eager.seen) >= 5
        loaded = again(program).module()
        for sides, batch in (((7, 5), 1), ((3, 9), 3)):
            given = pictures(model, sides, batch)
            assert launches(loaded, given) == launches(model, given)
        shapes, _ = launches(loaded, pictures(model, (4, 6), 2))
    assert shapes == [maps.shape for maps in by_task(model(*pictures(model, (4, 6), 2))).values()]


def test_by_count_in_a_program():
    """Blind spot: 3x12 patches on a stored 6x6 are not resized by mmsegmentation: the same number of patches. In the program neither."""
    model = wide("dpt-base-ade20k", pos_grid=(6, 6))
    rows, columns = (torch.export.Dim(name, min=3, max=64) for name in ("h", "w"))
    with torch.no_grad():
        position = model.encoder.position((3, 12))
        assert position is model.encoder.pos_embed
        program = torch.export.export(model.encoder, pictures(model, (4, 5), 1), dynamic_shapes=({2: 16 * rows, 3: 16 * columns},))
        for sides in ((3, 12), (12, 3), (4, 9), (6, 6), (3, 11)):
            (x,) = pictures(model, sides, 1)
            for ours, theirs in zip(program.module()(x), model.encoder(x), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "fast"),
    [
        ("hybrid", True),
        ("own size", False),
        ("sky", True),
        ("three tasks", True),
        ("beit", True),
        ("prompt", True),
    ],
)
def test_compiled_over_sizes(kind, fast, one_convolution):
    """Blind spot: a graph for every size, until PyTorch gives up compiling; results of a graph of another size."""
    model = MODELS[kind]()
    if fast:
        dpt.accelerate(model)
    backend = Counting()
    program = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    with torch.no_grad():
        for batch, sides in ((2, (5, 6)), (3, STORED), (2, (3, 5))):
            assert agrees(program, model, sides, batch), sides
    assert backend.graphs == 1 and backend.runs == 3


def test_kernels_compiled_over_sizes(one_convolution):
    """Blind spot: a graph for every size on the kernels, where the ops' shapes stand in the graph; an op that autograd's trace takes apart.
    A batch of one is a graph of its own: PyTorch settles sides of one."""
    model, graphs = dpt.accelerate(MODELS["bilinear"]()), []
    backend = aot_autograd(fw_compiler=lambda graph, inputs: (graphs.append(ops_of(graph.graph)), graph)[1])
    program = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
    with as_on_a_gpu(), torch.no_grad():
        with Ops() as eager:
            launches(model, pictures(model, (5, 3), 2))
        for batch, sides in ((2, (5, 7)), (3, (9, 5)), (2, (3, 11)), (1, (5, 5)), (1, (7, 3)), (4, (13, 5))):
            given = pictures(model, sides, batch)
            assert launches(program, given) == launches(model, given)
    assert graphs == [+eager.seen] * 2
