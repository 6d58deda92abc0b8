"""What every op asks of its arguments, and how it takes them: dtypes, autocast, shapes, addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def input_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s ``input_precision``: "ieee", or "tf32" for float32 where PyTorch's own switch for matmuls allows it.

    The switch is ``torch.backends.cuda.matmul.fp32_precision``, which ``allow_tf32`` and ``set_float32_matmul_precision`` set too.
    """
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in autocast's dtype where autocast is on, as PyTorch's own matmuls take theirs; else as they are."""
    dtype = next((_autocast_dtype(t.device.type) for t in tensors if t is not None), None)
    if dtype is None:
        return tensors
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """The dtype in which a product takes ``weight``: autocast's where autocast is on, else its own.

    An op takes its weights as they are and converts them inside, in the forward and again in the backward: what it saves for the backward
    is then the parameter itself, and no copy of it.
    """
    return _autocast_dtype(weight.device.type) or weight.dtype


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    """None where autocast is off, or there is none, as for the meta device."""
    follows = torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if follows else None


def describable(*tensors: torch.Tensor) -> bool:
    """Whether TMA can address every tensor: the base and all strides but the last multiples of 16 bytes, the last stride 1, none 0."""
    return all(_describable(tensor) for tensor in tensors)


def _describable(tensor: torch.Tensor) -> bool:
    *outer, last = tensor.stride()
    return tensor.data_ptr() % 16 == 0 and last == 1 and all(s > 0 and s * tensor.element_size() % 16 == 0 for s in outer)


MAX_SIDE = 32767  # 2 * side * side stays below 2^31, in which the kernels compute source coordinates


def check_size(name: str, size: Sequence[int]) -> tuple[int, int]:
    """``size`` as (height, width); TypeError unless it holds integers, ValueError unless it is two sides of 1 to 32767."""
    if not all(isinstance(side, (int, torch.SymInt)) for side in size):  # not converted: an exported graph keeps its sides open
        raise TypeError(f"{name}={tuple(size)}: must be two integers")
    if len(size) != 2 or not all(1 <= side <= MAX_SIDE for side in size):
        raise ValueError(f"{name}={tuple(size)}: must be (height, width), each from 1 to {MAX_SIDE}")
    return size[0], size[1]


def check_map(name: str, x: torch.Tensor) -> None:
    """TypeError unless ``x`` has a dtype of the kernels, ValueError unless it is (B, C, H, W) with C >= 1 and sides of 1 to 32767."""
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}: must be one of {', '.join(map(str, DTYPES))}")
    # Compared, not converted to int: an exported graph keeps its sides open.
    if x.dim() != 4 or x.shape[1] == 0 or not all(1 <= side <= MAX_SIDE for side in x.shape[2:]):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: must be (B, C, H, W), C at least 1, H and W from 1 to {MAX_SIDE}")


def check_input(name: str, x: torch.Tensor) -> None:
    """TypeError or ValueError unless ``x`` is (..., C) with C >= 1 in a dtype of the kernels."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: it must be a tensor")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}: it must be float32, float16 or bfloat16")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be (..., C) with C at least 1")


def check_operand(
    name: str, tensor: torch.Tensor | None, shape: Sequence[int], x: torch.Tensor, vector: bool = False, weight: bool = False
) -> None:
    """TypeError or ValueError unless ``tensor`` has ``shape`` and x's device and dtype; a ``vector`` may be float32 or None too, and of a
    ``weight`` what counts is the dtype that its product takes it in (:func:`product_dtype`).
    """
    if vector and tensor is None:
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: it must be a tensor")
    dtype = product_dtype(tensor) if weight else tensor.dtype
    if dtype != x.dtype and not (vector and dtype == torch.float32):
        raise TypeError(
            f"{name} is {tensor.dtype} and the input {x.dtype}: it must be of the input's dtype{' or float32' if vector else ''}"
        )
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be {tuple(shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and the input on {x.device}: they must be on one device")


def check_vector(name: str, vector: torch.Tensor | None, weight: torch.Tensor) -> None:
    """TypeError or ValueError unless ``vector`` is None or holds a floating-point number for each output channel of ``weight``."""
    if vector is None:
        return
    if not vector.is_floating_point():
        raise TypeError(f"{name} is {vector.dtype}: must be floating-point")
    if tuple(vector.shape) != weight.shape[:1] or vector.device != weight.device:
        wanted = f"({weight.shape[0]},) on {weight.device}"
        raise ValueError(f"{name} is {tuple(vector.shape)} on {vector.device}: must be {wanted}, one for each channel that comes out")


def check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int | None, ...], x: torch.Tensor, weight: bool = False) -> None:
    """TypeError or ValueError unless ``tensor`` has ``shape`` (None: any) and the dtype and device of ``x``; of a ``weight`` what counts is
    the dtype that its product takes it in (:func:`product_dtype`).
    """
    if (product_dtype(tensor) if weight else tensor.dtype) != x.dtype:
        raise TypeError(f"{name} is {tensor.dtype}: must be {x.dtype}, as x is")
    fits = tensor.dim() == len(shape) and all(want is None or want == side for want, side in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.device != x.device:
        wanted = ", ".join("any" if side is None else str(side) for side in shape)
        raise ValueError(f"{name} is {tuple(tensor.shape)} on {tensor.device}: must be ({wanted}) on {x.device}")
