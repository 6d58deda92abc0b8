"""An exported model run beside PyTorch's, on the pictures that come with the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .graphs import Graph

BOUND = 1e-3  # of a map's range: what another order of sums makes is below a tenth of it, an operator that computes otherwise above


class Differs(Exception):
    """An exported model does not give what PyTorch gives: it was not written."""


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of two maps as a part of the range of PyTorch's, `ours`, or of labels the part of pixels that have another.
    Infinite where shapes or dtypes differ, or numbers are not finite."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return torch.inf
    if not ours.is_floating_point():
        return (ours != theirs).double().mean().item()
    one, other = ours.double(), theirs.double()
    if not (one.isfinite().all() and other.isfinite().all()):
        return torch.inf
    extent = (one.max() - one.min()).item() or one.abs().max().item() or 1.0
    return (one - other).abs().max().item() / extent


def compared(graph: Graph, run: Callable[..., Any], bound: float = BOUND) -> list[tuple[tuple[int, int], int, float]]:
    """Of each of the graph's trials its size, its batch and the largest difference of its outputs.

    Args:
        run: the exported model, from input tensors to output tensors, in the graph's order or as the module has them.

    Raises:
        Differs: a difference is above the bound; the message says which.
    """
    found = []
    for size, batch in graph.trials():
        given = graph.examples(size, batch)
        ours, theirs = graph.run(given), graph.named(run(*given))
        apart = {name: difference(ours[name], theirs[name].to(ours[name].device)) for name in ours}
        name = max(apart, key=lambda name: apart[name])
        if not apart[name] <= bound:
            told = f"{name} of {batch} of {size[0]}x{size[1]} differs from PyTorch's by {apart[name]:.2g} of its range"
            raise Differs(f"{told}, more than {bound:g}: nothing is written")
        found.append((size, batch, apart[name]))
    return found
