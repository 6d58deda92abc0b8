"""The rule by which a kernel's output is judged, which the tuning command applies too, and helpers to apply it to both passes of an op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from dpt.kernels.workload import assert_parity


def values_and_gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor | None], cotangent: torch.Tensor, dtype: torch.dtype | None = None
) -> list[torch.Tensor | None]:
    """[function(*inputs), gradient of each input] for the given cotangent, computed in ``dtype`` (default: the inputs' own)."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = function(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(out, given, cotangent.to(out.dtype)))
    return [out.detach(), *(None if leaf is None else next(gradients) for leaf in leaves)]


def assert_op_parity(
    op: Callable[..., torch.Tensor],
    reference: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor | None],
    names: Sequence[str],
    cotangent: torch.Tensor | None = None,
    magnitudes: Mapping[str, float] | None = None,
) -> None:
    """The rule for ``op(*inputs)`` and for the gradient of every input, with a random cotangent unless one is given.

    ``reference`` runs twice: in float64, and in the inputs' own dtype. ``magnitudes``: of the inputs whose gradient is a small difference
    of large terms, what `assert_parity` counts from.
    """
    if cotangent is None:
        with torch.no_grad():
            cotangent = torch.randn_like(reference(*inputs))
    ours = values_and_gradients(op, inputs, cotangent)
    ref64 = values_and_gradients(reference, inputs, cotangent, torch.float64)
    same_dtype = values_and_gradients(reference, inputs, cotangent)
    for name, *tensors in zip((None, *names), ours, ref64, same_dtype, strict=True):
        if tensors[0] is not None:
            assert_parity(*tensors, name=f"gradient of {name}" if name else "output", magnitude=(magnitudes or {}).get(name))
