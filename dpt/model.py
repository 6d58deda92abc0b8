"""`DPT`, what `build` and `load` give: the network of `nets`, with `predict`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import nn

from .nets.dpt import DPTNetwork
from .system.forks import in_forked

if TYPE_CHECKING:  # at run time the image libraries are left to those who predict
    from typing_extensions import Unpack

    from .inference.images import Picture, Pictures
    from .inference.options import PredictOptions
    from .inference.prediction import Prediction


@in_forked
def _compute_alone() -> None:
    """A fork copies none of the threads that PyTorch computes with, and GNU's OpenMP would wait for them for ever: one needs none."""
    torch.set_num_threads(1)


class MethodOfWrapper:
    """A method that belongs to what it is asked of: the model, or `torch.compile(model)`.

    That wrapper compiles calls of itself and asks the model for every other name. A common method would then call the model, which is not
    compiled, without a word. Python does not tell a method through whom it was found, so the frame that asks is looked at: it is the
    wrapper's `__getattr__`.
    """

    if TYPE_CHECKING:
        __call__: Callable[..., Any]  # a type checker calls what it holds

    def __init__(self, function: Callable[..., Any]):
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, model: nn.Module | None, owner: type) -> Callable[..., Any]:
        if model is None:
            return self.function
        asks = sys._getframe(1).f_locals.get("self")
        wrapper = getattr(sys.modules.get("torch._dynamo"), "OptimizedModule", ())  # not imported by those who compile nothing
        return MethodType(self.function, asks if isinstance(asks, wrapper) and asks._orig_mod is model else model)


class DPT(DPTNetwork):
    """The Dense Prediction Transformer, and how it predicts. `dpt.build` makes the named ones; the arguments are `DPTNetwork`'s."""

    @overload  # a path of text is one picture, though text is an iterable of text
    def predict(self, images: Picture, **options: Unpack[PredictOptions]) -> Prediction: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, images: Pictures, **options: Unpack[PredictOptions]) -> list[Prediction]: ...

    @MethodOfWrapper
    def predict(self, images: Any, **options: Any) -> Any:
        """Pictures -> `dpt.Prediction`(s) at each picture's own size; `dpt.inference.prediction.predict` has the options.

        `torch.compile(model).predict` predicts compiled, and so does `model.predict` after `model.compile()`.
        """
        from .inference.prediction import predict  # the model does not need image libraries; predicting does

        return predict(self, images, **options)
