"""Compiled and exported models: predicting runs what was compiled, and one graph holds for pictures of all sizes."""

import inspect

import numpy as np
import pytest
import torch
from small import wide

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


@pytest.mark.parametrize("compiled", [wrapped, in_place, accelerated])
@pytest.mark.parametrize("name", ["dpt-large-midas", "dpt-base-ade20k"])
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
