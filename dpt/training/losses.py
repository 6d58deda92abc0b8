"""The training losses of depth, in which invalid pixels take no part.

Inverse depth: MiDaS' loss for mixed sources (Ranftl et al. 2020, "Towards Robust Monocular Depth Estimation", section 5); it is predicted
up to a scale and a shift, so both are fitted to each picture by least squares before anything is compared. Metres: the scale-invariant
logarithmic loss (Eigen et al. 2014, "Depth Map Prediction from a Single Image", section 3.2), as BTS and Depth Anything train.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..evaluation.alignment import align_least_squares, mean_per_picture


def _mean_over_valid(value: Tensor, mask: Tensor) -> Tensor:
    """The mean of value (B, H, W) over the valid pixels of the whole batch; 0 if there are none."""
    return (value * mask).sum() / mask.sum().clamp_min(1)


def squared(residual: Tensor, mask: Tensor) -> Tensor:
    """Half the mean squared residual (B, H, W) over valid pixels: MiDaS' rho_mse."""
    return _mean_over_valid(residual.square(), mask) / 2


def absolute(residual: Tensor, mask: Tensor) -> Tensor:
    """The mean absolute residual (B, H, W) over valid pixels: MiDaS' rho_mae."""
    return _mean_over_valid(residual.abs(), mask)


DATA_TERMS = {"squared": squared, "absolute": absolute}


def gradient_loss(residual: Tensor, mask: Tensor, scales: int = 4) -> Tensor:
    """Multi-scale gradient matching: mean |d/dx residual| + |d/dy residual|, summed over `scales` halvings.

    A difference counts where both of its pixels are valid; each scale takes every 2nd, 4th, 8th ... pixel, and its sum is divided
    by the number of its valid pixels. `residual` and `mask` are (B, H, W).
    """
    total = residual.new_zeros(())
    for scale in range(scales):
        step = 2**scale
        r, m = residual[:, ::step, ::step], mask[:, ::step, ::step]
        across = (r[:, :, 1:] - r[:, :, :-1]).abs() * (m[:, :, 1:] & m[:, :, :-1])
        down = (r[:, 1:] - r[:, :-1]).abs() * (m[:, 1:] & m[:, :-1])
        total = total + (across.sum() + down.sum()) / m.sum().clamp_min(1)
    return total


def scale_shift_invariant_loss(
    prediction: Tensor, target: Tensor, mask: Tensor, gradient_weight: float = 0.5, scales: int = 4, data_term: str = "squared"
) -> Tensor:
    """The scale-and-shift-invariant loss with multi-scale gradient matching; a scalar.

    Args:
        prediction: (B, H, W), the model's inverse depth, any scale and shift.
        target: (B, H, W), inverse depth; what stands where `mask` is False is ignored, NaN and infinity too.
        mask: (B, H, W), bool.
        gradient_weight: MiDaS' alpha, 0.5.
        scales: MiDaS' number of scales, 4.
        data_term: "squared" or "absolute", what is averaged of the residual.

    Raises:
        ValueError: the shapes differ or are not three-dimensional, or the data term is unknown.
    """
    if data_term not in DATA_TERMS:
        raise ValueError(f"data_term {data_term!r}: it must be one of {', '.join(DATA_TERMS)}")
    _check_shapes(prediction, target, mask)
    prediction, target = prediction.float(), torch.where(mask, target, 0).float()
    scale, shift = align_least_squares(prediction, target, mask)
    # A negative scale would let a prediction that is upside down pass as a good one; turned over, its error drives it back.
    upright = scale.abs()
    shift = shift + (scale - upright) * mean_per_picture(prediction, mask)[:, 0, 0]
    residual = torch.where(mask, upright[:, None, None] * prediction + shift[:, None, None] - target, 0)
    return DATA_TERMS[data_term](residual, mask) + gradient_weight * gradient_loss(residual, mask, scales)


def scale_invariant_log_loss(prediction: Tensor, target: Tensor, mask: Tensor, variance_focus: float = 0.5) -> Tensor:
    """SILog: sqrt(mean(e^2) - variance_focus * mean(e)^2) with e = ln prediction - ln target over the batch's valid pixels; a scalar.

    Args:
        prediction: (B, H, W), metres; what is below a millimetre counts as one.
        target: (B, H, W), metres; what stands where `mask` is False is ignored, NaN and infinity too.
        mask: (B, H, W), bool.
        variance_focus: from 0, where a wrong scale costs all, to 1, where it costs nothing. 0.5 is Depth Anything's, 0.85 BTS'.

    Raises:
        ValueError: the shapes differ or are not three-dimensional, or variance_focus is not from 0 to 1.
    """
    if not 0 <= variance_focus <= 1:
        raise ValueError(f"variance_focus {variance_focus}: it must be from 0 to 1")
    _check_shapes(prediction, target, mask)
    error = prediction.float().clamp_min(1e-3).log() - torch.where(mask, target, 1).float().log()
    error = torch.where(mask, error, 0)
    value = _mean_over_valid(error.square(), mask) - variance_focus * _mean_over_valid(error, mask).square()
    return value.clamp_min(1e-12).sqrt()  # whose gradient is infinite at 0


def _check_shapes(prediction: Tensor, target: Tensor, mask: Tensor) -> None:
    if not prediction.shape == target.shape == mask.shape or prediction.dim() != 3:
        shapes = tuple(prediction.shape), tuple(target.shape), tuple(mask.shape)
        raise ValueError(f"prediction, target and mask of shapes {shapes}: all must be the same (batch, height, width)")
