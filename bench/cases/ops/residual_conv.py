"""The residual convolution unit of a fusion block."""

from collections.abc import Callable

from torch import Tensor

from dpt.kernels.residual_conv import (
    residual_conv_unit,
    residual_conv_unit_ref,
    residual_conv_unit_training,
    residual_conv_unit_training_ref,
)

from ..shapes import EPS, FUSION, Argument, Map, bias, feature_map, norm, weight
from . import Op, both


def _map_and_weights(s: Map) -> list[Argument]:
    weights = [weight(s.channels, s.channels, 3, 3) for _ in range(2)]
    return [feature_map(s.batch, s.channels, s.side, s.side), *weights]


def _with_norms_and_add(function: Callable[..., Tensor], shape: Map, x: Tensor, w1: Tensor, w2: Tensor, *rest: Tensor) -> Tensor:
    """With batch norms and the previous level's map added, as in segmentation models; depth models have biases, and nothing to add."""
    return function(x, w1, None, w2, None, norm1=(*rest[:4], EPS), norm2=(*rest[4:8], EPS), add=rest[8])


def _with_batch_statistics(
    function: Callable[..., tuple[Tensor, Tensor]], shape: Map, x: Tensor, w1: Tensor, w2: Tensor, *rest: Tensor
) -> Tensor:
    """As a segmentation model's units train."""
    return function(x, w1, None, w2, None, norm1=(*rest[:2], EPS), norm2=(*rest[2:4], EPS), add=rest[4])[0]


OPS = (
    Op(
        "residual_conv_unit, biases",
        lambda s: [*_map_and_weights(s), bias(s.channels), bias(s.channels)],
        **both(residual_conv_unit, residual_conv_unit_ref, lambda f, s, x, w1, w2, b1, b2: f(x, w1, b1, w2, b2)),
        shapes=FUSION,
        toy=Map(2, 32, 6),
    ),
    Op(
        "residual_conv_unit, norms and add",
        lambda s: [
            *_map_and_weights(s),
            *(*norm(s.channels), *norm(s.channels)),
            feature_map(s.batch, s.channels, s.side // 2, s.side // 2),
        ],
        **both(residual_conv_unit, residual_conv_unit_ref, _with_norms_and_add),
        shapes=FUSION[:7],
        toy=Map(2, 32, 6),
    ),
    Op(
        "residual_conv_unit, batch statistics",
        lambda s: [
            *_map_and_weights(s),
            *(*norm(s.channels)[:2], *norm(s.channels)[:2]),
            feature_map(s.batch, s.channels, s.side // 2, s.side // 2),
        ],
        **both(residual_conv_unit_training, residual_conv_unit_training_ref, _with_batch_statistics),
        shapes=(Map(2, 256, 32), Map(2, 256, 128)),
        toy=Map(2, 32, 6),
    ),
)
