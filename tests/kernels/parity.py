"""The rule by which a kernel's output is judged, and helpers to apply it to a forward and backward pass.

    max|out - ref64| <= 2 * max|torch_same_dtype - ref64| + tiny

``ref64`` is the reference computed in float64, ``torch_same_dtype`` the reference computed by PyTorch in the dtype under test: the kernel
may lose at most twice what PyTorch loses. ``tiny`` is one unit in the last place of the largest value, for results PyTorch happens to get
exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def assert_parity(
    out: torch.Tensor,
    ref64: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    name: str = "output",
    magnitude: float | None = None,
) -> None:
    """Fail unless ``out`` is as near to ``ref64`` as the rule demands, with the dtype, shape and finiteness of ``torch_same_dtype``.

    ``magnitude``: the largest value that ``tiny`` is counted from, where the result is a small difference of large terms; default
    max|ref64|.
    """
    assert out.dtype == torch_same_dtype.dtype, f"{name}: dtype {out.dtype}, expected {torch_same_dtype.dtype}"
    assert out.shape == ref64.shape == torch_same_dtype.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    assert ref64.dtype == torch.float64, f"{name}: the reference is {ref64.dtype}, it must be float64"
    eps = torch.finfo(out.dtype).eps
    out, ref64, torch_same_dtype = (t.detach().double().cpu() for t in (out, ref64, torch_same_dtype))
    assert ref64.isfinite().all(), f"{name}: the reference itself is not finite"
    assert out.isfinite().all(), f"{name}: {(~out.isfinite()).sum()} of {out.numel()} values are not finite"
    largest = ref64.abs().max().item() if magnitude is None else magnitude
    bound = 2 * (torch_same_dtype - ref64).abs().max().item() + eps * largest
    difference = (out - ref64).abs()
    worst = difference.max().item()
    if worst > bound:
        where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
        raise AssertionError(f"{name}: off by {worst:.3e} at {where}, allowed {bound:.3e}; {(difference > bound).sum()} values are beyond")


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
    magnitude: float | None = None,
) -> None:
    """The rule for ``op(*inputs)`` and for the gradient of every input, with a random cotangent.

    ``reference`` runs twice: in float64, and in the inputs' own dtype.
    """
    with torch.no_grad():
        cotangent = torch.randn_like(reference(*inputs))
    ours = values_and_gradients(op, inputs, cotangent)
    ref64 = values_and_gradients(reference, inputs, cotangent, torch.float64)
    same_dtype = values_and_gradients(reference, inputs, cotangent)
    for name, *tensors in zip(("output", *(f"gradient of {n}" for n in names)), ours, ref64, same_dtype, strict=True):
        if tensors[0] is not None:
            assert_parity(*tensors, name=name, magnitude=magnitude)
