"""Segmentation maps at the picture's own size: bilinear resize of the logits and argmax over the classes in one kernel.

    label[b, i, j] = argmax over k of resize(logits)[b, k, i, j]
    probability[b, i, j] = max over k of softmax over k of the same = 1 / sum over k of exp(value_k - value_label)

logits (B, K, h, w) of any strides -> labels (B, H', W') uint8 for K <= 256, else int16; probability float32. Loads are wide where the
pixels lie a multiple of 16 classes apart (``upsample.conv1x1`` pads them): the numbers between them are read too, and no class of theirs
wins. Each pixel keeps a running maximum (and, for the probability, a running sum, as online softmax does) over blocks of classes, so the
resized logits are never written: 150 float32 maps of 2000x3000 would be 3.6 GB, the labels are 6 MB. Reads B*K*h*w elements from DRAM, and
each about 4 H' W' / (h w) times from the caches; writes B*H'*W' bytes (5 with the probability); 8 K FLOPs a pixel.

Interpolation is in float32 for every dtype, so that two classes that half precision would round to a tie are still told apart. Among
equal values the first class wins, as in ``torch.argmax`` on a CPU. A neighbour whose weight is 0 does not count, so a class masked with
-inf never wins over one that is not (in PyTorch it does where 0 * -inf is NaN). NaN counts as infinity; the probability of a pixel at
which a class is infinite or NaN, or all are -inf, is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import launch
from .parts.bilinear import bilinear_source, gather_bilinear
from .parts.maps import readable_channels
from .upsample import SIDES, upsample_bilinear_ref

MAX_CLASSES = 32767  # of int16
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def upsample_argmax_ref(
    logits: torch.Tensor, size: Sequence[int], align_corners: bool, return_probability: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch, with the resized float32 logits in memory. Arguments and results as of :func:`upsample_argmax`."""
    values = upsample_bilinear_ref(logits if logits.dtype == torch.float64 else logits.float(), size, align_corners)
    labels = values.argmax(1).to(label_dtype(logits.shape[1]))
    return (labels, values.softmax(1).amax(1)) if return_probability else labels


def label_dtype(classes: int) -> torch.dtype:
    """uint8 where it can count the classes, else int16."""
    return torch.uint8 if classes <= 256 else torch.int16


@triton.jit(do_not_specialize=[*SIDES, "stride_b", "stride_y"], do_not_specialize_on_alignment=["stride_k"])
def _upsample_argmax_kernel(
    logits_ptr,  # (B, K, h, w)
    labels_ptr,  # (B, H', W')
    probability_ptr,  # (B, H', W') float32, or None
    stride_b,
    stride_k,
    stride_y,
    stride_x,
    source_height,
    source_width,
    target_height,
    target_width,
    CLASSES: tl.constexpr,
    READ: tl.constexpr,  # how many classes are read of a pixel: of padded memory, for wide loads, as many as pixels are apart
    ALIGN_CORNERS: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides of images, rows and pixels: 16 where that divides them, else 1
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # What divides the strides is not left to Triton's own look at each argument: that would compile again for other widths.
    stride_b *= UNIT
    stride_y *= UNIT
    stride_x *= UNIT
    pixels = target_height * target_width
    blocks = tl.cdiv(pixels, BLOCK_P)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    nearest = tl.minimum(pixel, pixels - 1)  # keeps the integers of the padding in range
    source_y = bilinear_source(nearest // target_width, source_height, target_height, ALIGN_CORNERS)
    source_x = bilinear_source(nearest % target_width, source_width, target_width, ALIGN_CORNERS)
    logits_ptr += image * stride_b
    # Each lane keeps its own best of every BLOCK_K-th class: one reduction over the lanes at the end. The floor is finite, for -inf - -inf.
    best = tl.full((BLOCK_P, BLOCK_K), LOWEST, dtype=tl.float32)
    label = tl.zeros((BLOCK_P, BLOCK_K), dtype=tl.int32)
    total = tl.zeros((BLOCK_P, BLOCK_K), dtype=tl.float32)
    for first in range(0, CLASSES, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        mask = (pixel < pixels)[:, None] & (k < READ)[None, :]
        value = gather_bilinear(logits_ptr, source_y, source_x, stride_y, stride_x, k.to(tl.int64) * stride_k, mask)
        value = tl.where(value == value, value, float("inf"))
        value = tl.where((k < CLASSES)[None, :], value, float("-inf"))
        larger = value > best  # not >=: of equals, the earlier class stays
        if probability_ptr is not None:
            new_best = tl.where(larger, value, best)
            total = total * tl.exp(best - new_best) + tl.exp(value - new_best)
        label = tl.where(larger, k[None, :], label)
        best = tl.where(larger, value, best)
    offset = image * pixels + pixel
    highest = tl.max(best, axis=1)
    winner = tl.min(tl.where(best == highest[:, None], label, CLASSES), axis=1)
    tl.store(labels_ptr + offset, winner.to(labels_ptr.dtype.element_ty), mask=pixel < pixels)
    if probability_ptr is not None:
        total = tl.sum(total * tl.exp(best - highest[:, None]), axis=1)
        tl.store(probability_ptr + offset, tl.where(total > 0, 1.0 / total, float("nan")), mask=pixel < pixels)


def _forward(logits: torch.Tensor, height: int, width: int, align_corners: bool, probability: bool) -> tuple[torch.Tensor, torch.Tensor]:
    batch, classes, source_height, source_width = logits.shape
    labels = torch.empty((batch, height, width), dtype=label_dtype(classes), device=logits.device)
    confidence = torch.empty((batch, height, width) if probability else (0,), dtype=torch.float32, device=logits.device)
    stride_b, stride_k, stride_y, stride_x = logits.stride()
    unit = 16 if all(stride % 16 == 0 for stride in (stride_b, stride_y, stride_x)) else 1
    # Neighbouring threads should read neighbouring memory: classes of a pixel, or one class of neighbouring pixels.
    classes_last = stride_k == 1
    options = launch.config("upsample_argmax", launch.device_family(logits.device), logits.dtype, K=classes, classes_last=classes_last)
    grid = (batch * triton.cdiv(height * width, options["BLOCK_P"]),)
    sides = (source_height, source_width, height, width)
    launch.launch(
        _upsample_argmax_kernel,
        grid,
        logits,
        labels,
        confidence if probability else None,
        stride_b // unit,
        stride_k,
        stride_y // unit,
        stride_x // unit,
        *sides,
        CLASSES=classes,
        READ=readable_channels(logits),
        ALIGN_CORNERS=align_corners,
        UNIT=unit,
        **options,
    )
    return labels, confidence


@torch.library.custom_op("dpt::upsample_argmax", mutates_args=())
def _upsample_argmax(
    logits: torch.Tensor, height: int, width: int, align_corners: bool, probability: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(logits, height, width, align_corners, probability)


@_upsample_argmax.register_fake
def _(logits, height, width, align_corners, probability):
    labels = logits.new_empty((logits.shape[0], height, width), dtype=label_dtype(logits.shape[1]))
    return labels, logits.new_empty(labels.shape if probability else (0,), dtype=torch.float32)


@launch.planned
def upsample_argmax(
    logits: torch.Tensor, size: Sequence[int], align_corners: bool, return_probability: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The class of each pixel of ``logits`` (B, K, h, w) resized bilinearly to ``size`` = (H', W'): (B, H', W').

    Labels are uint8 for K <= 256, else int16; ties go to the first class. With ``return_probability`` also the softmax probability of
    that class, (B, H', W') float32. Reads the logits at their own strides, without a copy; allocates the results only. No gradients.

    Raises:
        TypeError: ``logits`` are not float32, float16 or bfloat16.
        ValueError: ``logits`` are not (B, K, h, w), K is not from 1 to 32767, or a side is not from 1 to 32767.
    """
    launch.check_map("logits", logits)
    height, width = launch.check_size("size", size)
    if logits.shape[1] > MAX_CLASSES:
        raise ValueError(f"{logits.shape[1]} classes: int16 labels allow at most {MAX_CLASSES}")
    logits = logits.detach()
    if not launch.runs_kernels(logits, "argmax_upsample"):
        return upsample_argmax_ref(logits, (height, width), align_corners, return_probability)
    labels, probability = _upsample_argmax(logits, height, width, align_corners, return_probability)
    return (labels, probability) if return_probability else labels
