"""The correctness gate: no contender is timed unless its output is as near to the exact one as it has to be.

    max|out - exact| <= 2 * max|plain - exact| + eps * max|exact|

``plain`` is plain PyTorch in the dtype that is measured: a contender may lose at most twice what that loses, and one unit in the last
place. Convolutions sum in another order in channels-last memory, and lose more or less by it: there the larger loss of the two counts.
``exact`` is plain PyTorch in float64 for float32 contenders, and in float32 (without TF32) for those of half precision.

Gradients of a whole model are judged by the root mean square instead of the maximum, and the worst tensor by plain PyTorch's worst: where
rounding moves a value across a ReLU's kink, single gradients change by as much as they are, in every implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

MULTIPLE = 2.0
# A tensor whose values are small beside those of its companions (a gradient that cancels) is judged by theirs.
COMPANIONS = 1e-2


@dataclass(frozen=True)
class Verdict:
    """``loss`` and ``allowed`` are relative to the largest value; ``problem`` is None where the gate is passed."""

    loss: float
    allowed: float
    problem: str | None = None


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the exact result is computed for contenders of ``dtype``."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def largest_difference(out: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], rms: bool = False) -> float:
    """The largest difference between two results, relative to the largest value of the tensor it is in (or root mean squares)."""
    return max(_losses(out, reference, rms))


def judge(
    out: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    dtype: torch.dtype,
    rms: bool = False,
    other_plain: Sequence[torch.Tensor] | None = None,
) -> Verdict:
    """Hold a result (its tensors in a fixed order) to the rule above; ``dtype`` is the one that is measured, ``other_plain`` is plain
    PyTorch's in its other memory format."""
    unusable = _unusable(out, exact, plain)
    if unusable:
        return Verdict(float("inf"), 0.0, unusable)
    losses, plain_losses = _losses(out, exact, rms), _losses(plain, exact, rms)
    if other_plain is not None:
        plain_losses = list(map(max, plain_losses, _losses(other_plain, exact, rms)))
    if rms:
        plain_losses = [max(plain_losses)] * len(losses)
    allowed = [MULTIPLE * loss + torch.finfo(dtype).eps for loss in plain_losses]
    worst = max(range(len(losses)), key=lambda index: losses[index] / allowed[index])
    return Verdict(losses[worst], allowed[worst], _problem(losses, allowed, worst, rms))


def _problem(losses: Sequence[float], allowed: Sequence[float], worst: int, rms: bool) -> str | None:
    if losses[worst] <= allowed[worst]:
        return None
    where = f"output {worst}: " if len(losses) > 1 else ""
    of = "root mean square" if rms else "largest value"
    return f"{where}off by {losses[worst]:.2e} of the {of}, allowed {allowed[worst]:.2e} ({MULTIPLE:g} times plain PyTorch's)"


def _losses(out: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], rms: bool) -> list[float]:
    return [_size(ours, true, rms) / scale for ours, true, scale in zip(out, reference, _scales(reference, rms), strict=True)]


def _unusable(out: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]) -> str | None:
    """What makes a comparison impossible or empty."""
    if not len(out) == len(exact) == len(plain) or not exact:
        return f"{len(out)} outputs, expected {len(exact)}"
    for ours, true, theirs in zip(out, exact, plain, strict=True):
        if ours.shape != true.shape:
            return f"shape {tuple(ours.shape)}, expected {tuple(true.shape)}"
        if ours.dtype != theirs.dtype:
            return f"dtype {ours.dtype}, expected {theirs.dtype}"
        if not (true.isfinite().all() and theirs.isfinite().all()):
            return "the reference itself is not finite: nothing can be judged by it"
        if not ours.isfinite().all():
            return f"{int((~ours.isfinite()).sum())} of {ours.numel()} values are not finite"
    first = exact[0]
    if first.numel() > 1 and not (first.amax() - first.amin()).item() > 1e-3 * first.abs().amax().item():
        return "the reference is constant: nothing can be judged by it"
    return None


def _scales(tensors: Sequence[torch.Tensor], rms: bool) -> list[float]:
    own = [_size(tensor, None, rms) for tensor in tensors]
    floor = max(COMPANIONS * max(own), torch.finfo(torch.float32).tiny)
    return [max(value, floor) for value in own]


def _size(one: torch.Tensor, minus: torch.Tensor | None, rms: bool) -> float:
    """The largest absolute value, or the root mean square, of a tensor or of a difference."""
    if not one.numel():
        return 0.0
    wide = torch.float64 if minus is None or torch.float64 in (one.dtype, minus.dtype) else torch.float32
    value = one.to(wide) if minus is None else one.to(minus.device, wide) - minus.to(wide)
    return (value.square().mean().sqrt() if rms else value.abs().amax()).item()
