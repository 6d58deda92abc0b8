"""What is made of parameters alone, kept between forward passes for as long as they stay as they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class KeptBySize:
    """The last `most` tensors made of one parameter, by size, while it is as it was: made again when it is another or has changed.

    On a CPU its values are compared, which is quick. On another device, which would have to be waited for, its memory
    and its version are: what is written there through `.data` is not seen, except that a forward that wants gradients forgets what is kept.
    Copies and pickles are empty.
    """

    MOST = 4

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._made_of: tuple[Tensor, int, Tensor] | None = None  # the parameter, its version, and its values or (no CPU) its memory
        self._kept: dict[Hashable, Tensor] = {}

    def __reduce__(self) -> tuple[type[KeptBySize], tuple[int]]:
        return KeptBySize, (self.most,)

    def forget(self) -> None:
        with self._lock:
            self._made_of, self._kept = None, {}

    def get(self, size: Hashable, parameter: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What `make()` returns for this size; made anew where a gradient is wanted, and only then one goes through it."""
        if torch.is_grad_enabled() and parameter.requires_grad:
            self.forget()
            return make()
        if not self._can_keep(parameter):
            return make()
        stream = torch.cuda.current_stream(parameter.device) if parameter.is_cuda else None  # another one would have to wait for it
        with self._lock, torch.inference_mode(False), torch.no_grad():  # for tensors that can be used in any mode
            if not self._is_as_it_was(parameter):
                values = parameter.detach()
                self._made_of, self._kept = (parameter, parameter._version, values.clone() if values.is_cpu else values), {}
            if (size, stream) not in self._kept:
                made = make()
                while len(self._kept) >= self.most:
                    del self._kept[next(iter(self._kept))]
                self._kept[size, stream] = made
            return self._kept[size, stream]

    def _is_as_it_was(self, parameter: Tensor) -> bool:
        if self._made_of is None or self._made_of[0] is not parameter or self._made_of[1] != parameter._version:
            return False
        values = self._made_of[2]
        if (values.dtype, values.device, values.shape) != (parameter.dtype, parameter.device, parameter.shape):
            return False
        return torch.equal(values, parameter) if values.is_cpu else values.data_ptr() == parameter.data_ptr()

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
