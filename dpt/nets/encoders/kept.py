"""What is made of parameters alone, kept between forward passes for as long as they stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Seen = tuple[Tensor, int, Tensor]  # a parameter, its version, and its values or (no CPU) its memory


def _seen(parameter: Tensor) -> Seen:
    values = parameter.detach()
    return parameter, parameter._version, values.clone() if values.is_cpu else values


def _is_as_it_was(seen: Seen, parameter: Tensor) -> bool:
    before, version, values = seen
    if before is not parameter or version != parameter._version:
        return False
    if (values.dtype, values.device, values.shape) != (parameter.dtype, parameter.device, parameter.shape):
        return False
    return torch.equal(values, parameter) if values.is_cpu else values.data_ptr() == parameter.data_ptr()


class KeptBySize:
    """The last `most` tensors made of one parameter or several, by size, while these are as they were: made again when one is another or
    has changed.

    On a CPU its values are compared, which is quick. On another device, which would have to be waited for, its memory
    and its version are: what is written there through `.data` is not seen, except that a forward that wants gradients forgets what is kept.
    Copies and pickles are empty. Threads need no lock, which a process forked meanwhile would wait for: what is kept, and what it was made
    of, are exchanged together and never changed, and of two threads that make the same at once one has made it for itself.
    """

    MOST = 4

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.forget()

    def __reduce__(self) -> tuple[type[KeptBySize], tuple[int]]:
        return KeptBySize, (self.most,)

    def forget(self) -> None:
        self._state: tuple[tuple[Seen, ...], dict[Hashable, Tensor]] = (), {}

    @property
    def _kept(self) -> dict[Hashable, Tensor]:
        return self._state[1]

    def get(self, size: Hashable, parameters: Tensor | tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """What `make()` returns for this size; made anew where a gradient is wanted, and only then one goes through it."""
        parameters = parameters if isinstance(parameters, tuple) else (parameters,)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            self.forget()
            return make()
        if not all(map(self._can_keep, parameters)):
            return make()
        first = parameters[0]
        stream = torch.cuda.current_stream(first.device) if first.is_cuda else None  # another one would have to wait for it
        made_of, kept = self._state
        as_it_was = len(made_of) == len(parameters) and all(map(_is_as_it_was, made_of, parameters))
        if as_it_was and (size, stream) in kept:
            return kept[size, stream]
        with torch.inference_mode(False), torch.no_grad():  # for tensors that can be used in any mode
            if not as_it_was:
                made_of, kept = tuple(map(_seen, parameters)), {}
            made = make()
            self._state = made_of, dict([*kept.items(), ((size, stream), made)][-self.most :])
        return made

    @staticmethod
    def _can_keep(parameter: Tensor) -> bool:
        """Whether a tensor made now may be used later. Not of what stands in for a parameter under `torch.func`, a parametrization or
        fake tensors, nor of one without a version; not what a mode or a trace makes of it; and a CUDA graph has to own its memory."""
        return (
            type(parameter) is nn.Parameter
            and not parameter.is_inference()
            and not is_in_torch_dispatch_mode()
            and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
            and not (parameter.is_cuda and torch.cuda.is_current_stream_capturing())
        )
