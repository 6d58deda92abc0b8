"""The rule of kernels/tools/parity.py for both passes of an op: its output and the gradient of every input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dpt.kernels.tools.parity import assert_parity, precision_in_force, reference_products


def lost_units(dtype: torch.dtype) -> int:
    """By how many units in the last place an operand of a product may change: in TF32, 2^13 of float32's."""
    return 2**13 if dtype == torch.float32 and precision_in_force() == "tf32" else 1


def values_and_gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor | None], cotangent: torch.Tensor, dtype: torch.dtype | None = None
) -> list[torch.Tensor | None]:
    """[function(*inputs), gradient of each input] for the given cotangent, computed in ``dtype`` (default: the inputs' own)."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    out = function(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    gradients = iter(torch.autograd.grad(out, given, cotangent.to(out.dtype)))
    return [out.detach(), *(None if leaf is None else next(gradients) for leaf in leaves)]


def in_both(function: Callable[[torch.dtype | None], Any]) -> tuple[Any, Any]:
    """(function(torch.float64), function(None)), a reference's results in float64 and in its inputs' own dtype: the rule's yardsticks, the
    second with float32 products as the rule wants them in the precision in force."""
    with reference_products(precision_in_force()):
        return function(torch.float64), function(None)


def values_in_both(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`in_both` of function(*inputs)."""
    return in_both(lambda dtype: function(*(t if t is None else t.to(dtype or t.dtype) for t in inputs)))


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
    expected = in_both(lambda dtype: values_and_gradients(reference, inputs, cotangent, dtype))
    for name, *tensors in zip((None, *names), ours, *expected, strict=True):
        if tensors[0] is not None:
            assert_parity(*tensors, name=f"gradient of {name}" if name else "output", magnitude=(magnitudes or {}).get(name))
