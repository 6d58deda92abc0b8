"""Non-causal self-attention on the packed output of the qkv projection, or on queries, keys and values apart.

    out[b, n, h] = sum_j softmax_j(scale * <q[b, n, h], k[b, j, h]> + bias[h, n, j]) v[b, j, h]     q, k, v = qkv[:, :, 0], [1], [2]

Shapes: qkv (B, N, 3, H, D) packed as (B, N, 3*H*D), out (B, N, H*D). Nothing is copied or transposed, and no N x N map is written: the keys
are read in blocks and the softmax is rescaled as its maximum grows (Dao et al. 2022, FlashAttention; Milakov and Gimelshein 2018, online
softmax). Work in base 2: scale * log2(e) is folded into one multiply-add, and exp2 is one instruction. A bias is read by the block too.
A rotation (of DINOv3) turns q and k before, in a launch of its own: each key is read by all N / BLOCK_M blocks of queries, and turned once.
Where one projection makes them, ``layernorm_linear`` turns them behind its product.

Forward: 4*B*H*N^2*D FLOPs and B*H*N^2 exponentials; 4*B*N*H*D elements moved, and H*N^2 of a bias. Saved for the backward: q, k and v as
they came, bias, out and the log-sum-exp (B, H, N). Backward: passes that write every gradient once, so it is reproducible bit for bit: one
over blocks of queries (dq, and delta = rowsum(dout * out)), one over blocks of keys (dk, dv), and of a bias one over its own blocks, summed
over the batch. 14*B*H*N^2*D FLOPs, with a bias 18: the two products that all passes need are computed in each. In TF32 the forward sums
what the tensor core reads of the weights, so that they are 1 together.

N is often 64k+1 (patches and a class token). The keys beyond the last full block are a tile of their own, 16 wide where that is
enough, so that the loop over full blocks needs no mask and the class token does not cost a whole block.

The kernels are in parts/attention.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .parts.attention import (
    LOG2_E,
    UNIT,
    attention_backward_dbias,
    attention_backward_dkv,
    attention_backward_dq,
    attention_forward,
)
from .parts.rotation import check_rotation, rotate, rotated_ref

SMALL_TAIL = 16  # the least width of a dot
MIN_SIZE, MAX_SIZE = 32, 128  # of a head


def attention_qkv_ref(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    rotation: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`attention_qkv` in plain PyTorch, any device and floating dtype: q, k, v (B, N, H, D) -> (B, N, H, D)."""
    if rotation is not None:
        q, k = rotated_ref(q, rotation), rotated_ref(k, rotation)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # each (B, H, N, D)
    return F.scaled_dot_product_attention(q, k, v, None if bias is None else bias[None], scale=scale).transpose(1, 2)


def attention_ref(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    rotation: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`attention` in plain PyTorch, any device and floating dtype: qkv (B, N, 3*H*D) -> (B, N, H*D)."""
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).unbind(2)  # each (B, N, H, D)
    return attention_qkv_ref(q, k, v, scale, bias, rotation).flatten(2)


@launch.planned
def attention(
    qkv: torch.Tensor,
    num_heads: int,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    rotation: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of every token to every token, without a mask.

    qkv: (B, N, 3*H*D), N >= 1, packed as the projection gives it: all of q, then k, then v, heads inside. Any strides: a layout whose last
    stride is 1, whose other strides are multiples of 8 and whose address is one of 16 bytes is read in place, others are copied first.
    float32, float16 or bfloat16; under autocast, autocast's dtype.
    num_heads: H; D must come out as a multiple of 8 from 32 to 128. scale: positive; default D**-0.5.
    bias: (H, N, N), query by key, finite, added to the scaled scores; in qkv's dtype. Read in place where its rows begin at multiples of 8
    numbers and 16 bytes, else copied first; differentiable.
    rotation: (2, N, D/2) float32: cosine and sine by which each token's queries and keys are turned, channel d with d + D/2; without
    gradient.
    Returns (B, N, H*D), contiguous, in qkv's dtype; differentiable once. float32 products are exact unless PyTorch's own switch allows
    tf32.
    Raises TypeError for a dtype or argument type, ValueError for a shape or value, naming it and the rule.
    """
    _check_packed(qkv, num_heads)
    scale = _check("qkv", qkv, (num_heads, qkv.shape[2] // (3 * num_heads)), scale, bias, rotation)
    (qkv, bias) = launch.autocast(qkv, bias)
    if not launch.runs_kernels(qkv, "attention"):
        return attention_ref(qkv, num_heads, scale, bias, rotation)
    return torch.ops.dpt.attention(qkv.unflatten(2, (3, num_heads, -1)), None, None, scale, bias, rotation)[0].flatten(2)


@launch.planned
def attention_qkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    bias: torch.Tensor | None = None,
    rotation: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`attention` of queries, keys and values that are tensors of their own, as transformers has them.

    q, k, v: (B, N, H, D), of one shape, dtype and device, each with strides of its own: (B, H, N, D) is read in place as its view
    ``.transpose(1, 2)``. All else as there. Returns (B, N, H, D), contiguous.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}: it must be a tensor")
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be (B, N, H, D)")
        launch.check_operand(name, x, q.shape, q)
    scale = _check("q", q, q.shape[2:], scale, bias, rotation)
    q, k, v, bias = launch.autocast(q, k, v, bias)
    if not launch.runs_kernels(q, "attention"):
        return attention_qkv_ref(q, k, v, scale, bias, rotation)
    return torch.ops.dpt.attention(q, k, v, scale, bias, rotation)[0]


def _check_packed(qkv: torch.Tensor, num_heads: int) -> None:
    if not isinstance(qkv, torch.Tensor):
        raise TypeError(f"qkv is a {type(qkv).__name__}: it must be a tensor")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads is {num_heads!r}: it must be an int")
    if qkv.ndim != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}: it must be (B, N, 3*H*D)")
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"num_heads={num_heads}: qkv's last size, {qkv.shape[2]}, must be 3 * num_heads * D")


def _check(
    name: str,
    q: torch.Tensor,
    heads: tuple[int, int],  # and the channels of each
    scale: float | None,
    bias: torch.Tensor | None,
    rotation: torch.Tensor | None,
) -> float:
    """The scale, if the arguments are right."""
    tokens, size = q.shape[1], heads[1]
    if q.dtype not in launch.DTYPES:
        raise TypeError(f"{name} is {q.dtype}: it must be float32, float16 or bfloat16")
    if tokens < 1:
        raise ValueError(f"{name} has shape {tuple(q.shape)}: N, its second size, must be at least 1")
    if size % UNIT.value or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(f"{name} has heads of D={size} channels: must be a multiple of {UNIT.value} from {MIN_SIZE} to {MAX_SIZE}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale}: it must be finite and positive")
    if bias is not None:
        launch.check_operand("bias", bias, (heads[0], tokens, tokens), q, weight=True)
    check_rotation(rotation, tokens, size, q)
    return size**-0.5 if scale is None else float(scale)


def _in_place(tensor: torch.Tensor) -> bool:
    """Whether the kernels read a tensor where it lies: its rows at multiples of 16 bytes, and TMA's rules hold."""
    return launch.describable(tensor) and all(stride % UNIT.value == 0 for stride in tensor.stride()[:-1])


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where the kernels can read it; else a copy whose rows begin at multiples of UNIT."""
    if _in_place(tensor):
        return tensor
    copy = _aligned_like(tensor)
    return copy.copy_(tensor)


def _aligned_like(tensor: torch.Tensor) -> torch.Tensor:
    """Fresh memory of the shape and dtype of ``tensor``, each row at a multiple of UNIT."""
    *outer, last = tensor.shape
    return tensor.new_empty((*outer, triton.cdiv(last, UNIT.value) * UNIT.value))[..., :last]


def _addressed(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """A tensor (B, N, H, D) as the kernels read it by pointers: with its strides of B, N and H."""
    return (tensor, *tensor.stride()[:3])


class _Operands(NamedTuple):
    """What attention reads: q, k, v (B, N, H, D) and the bias (H, N, N) or None, all as the kernels can read them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        bias: torch.Tensor | None,
        rotation: torch.Tensor | None,
    ) -> _Operands:
        """Of the op's arguments; q and k turned."""
        q, k, v = map(_readable, (q, k, v)) if k is not None else _readable(q).unbind(2)
        if rotation is not None:
            turned = q.new_empty((2, *q.shape))
            rotate(q, k, *turned, rotation)
            q, k = turned
        return cls(q, k, v, None if bias is None else _readable(bias))


class _Plan:
    """What one launch of a kernel needs beyond its other tensors: configuration, constants, and the operands in each way they are read."""

    def __init__(self, kernel: str, operands: _Operands, precision: str):
        q, k, v, bias = operands
        batch, tokens, heads, size = q.shape
        config = launch.config(
            kernel, launch.device_family(q.device), q.dtype,
            D=size, N=tokens, B=batch, H=heads, queries=batch * heads * tokens, precision=precision, bias=int(bias is not None),
        )  # fmt: skip
        self.descriptor = config.pop("descriptor")
        self.constants = {
            **config,
            "D": size,
            "DESCRIPTOR": self.descriptor,
            "PRECISION": precision,
        }
        self.block_m, self.block_n = config["BLOCK_M"], config["BLOCK_N"]
        of_v = (v, None, None, None) if v.stride() == k.stride() else _addressed(v)
        self.pointers = (_addressed(q), _addressed(k), of_v, bias)
        bias_desc = None
        if self.descriptor and bias is not None:
            bias_desc = TensorDescriptor(bias, list(bias.shape), list(bias.stride()), [1, self.block_m, self.block_n])
        self.descriptors = (self.describe(q, self.block_m), self.describe(k, self.block_n), self.describe(v, self.block_n), bias_desc)
        self.bias_strides = (0, 0) if bias is None else bias.stride()[:2]
        self.tokens, self.heads_of_batch = tokens, batch * heads

    def describe(self, tensor: torch.Tensor, rows: int) -> TensorDescriptor | None:
        """(B, N, H, D) seen as (B, H, N, D): TMA fills with zeros beyond N and beyond D, and the unit sizes of a block lead."""
        if not self.descriptor:
            return None
        batch, tokens, heads, size = tensor.shape
        stride_b, stride_n, stride_h, _ = tensor.stride()
        return TensorDescriptor(
            tensor, [batch, heads, tokens, size], [stride_b, stride_h, stride_n, 1], [1, 1, rows, triton.next_power_of_2(size)]
        )

    def walk(self, owned: int, walked: int) -> tuple[tuple[int], dict[str, object]]:
        """(grid, constants) of programs that own so many rows of a head each, and walk over all of them by so many."""
        left = (self.tokens - 1) % walked + 1
        tail = SMALL_TAIL if left <= SMALL_TAIL else walked
        return (triton.cdiv(self.tokens, owned) * self.heads_of_batch,), {**self.constants, "TAIL": tail}


def _forward(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    scale: float,
    precision: str,
    bias: torch.Tensor | None = None,
    rotation: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (B, N, H, D), log2-sum-exp2 of the scaled scores (B, H, N) float32); q packed (B, N, 3, H, D) where k and v are None."""
    out, lse = _outputs(q)
    if q.shape[0] == 0:
        return out, lse
    operands = _Operands.of(q, k, v, bias, rotation)
    _, tokens, heads, _ = out.shape
    plan = _Plan("attention_forward", operands, precision)
    grid, constants = plan.walk(plan.block_m, plan.block_n)
    scalars = (*plan.bias_strides, tokens, heads, scale * LOG2_E.value)
    launch.launch(attention_forward, grid, plan.pointers, *plan.descriptors, (_addressed(out), lse), *scalars, **constants)
    return out, lse


def _outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory of the output and the log-sum-exp."""
    batch, tokens, heads, size = q.shape[0], q.shape[1], *q.shape[-2:]
    return q.new_empty((batch, tokens, heads, size)), q.new_empty((batch, heads, tokens), dtype=torch.float32)


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    precision: str,
    bias: torch.Tensor | None = None,
    rotation: torch.Tensor | None = None,
    of_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, packed (B, N, 3, H, D), and of the bias: empty unless it is wanted, ``of_bias``."""
    dqkv, dbias = _gradients(out, bias, of_bias)
    if out.shape[0] == 0:
        return dqkv, dbias.zero_()
    operands, dout = _Operands.of(q, k, v, bias, rotation), _readable(dout)
    batch, tokens, heads, _ = out.shape
    dq, dk, dv = dqkv.unbind(2)
    delta = torch.empty_like(lse)
    scales = scale, scale * LOG2_E.value
    plan = _Plan("attention_backward_dq", operands, precision)
    grid, constants = plan.walk(plan.block_m, plan.block_n)
    counts = (*plan.bias_strides, tokens, heads)
    gradients = (_addressed(dout), delta, _addressed(dq))
    results = (_addressed(out), lse)
    launch.launch(attention_backward_dq, grid, plan.pointers, *plan.descriptors, results, gradients, *counts, scales, **constants)
    plan = _Plan("attention_backward_dkv", operands, precision)
    grid, constants = plan.walk(plan.block_n, plan.block_m)
    known = (_addressed(dout), lse, delta)
    arguments = plan.pointers, *plan.descriptors, plan.describe(dout, plan.block_m), known
    launch.launch(attention_backward_dkv, grid, *arguments, (_addressed(dk), _addressed(dv)), *counts, scales, **constants)
    if of_bias:
        plan = _Plan("attention_backward_dbias", operands, precision)
        grid = (triton.cdiv(tokens, plan.block_m) * triton.cdiv(tokens, plan.block_n) * heads,)
        arguments = plan.pointers, *plan.descriptors, plan.describe(dout, plan.block_m), known
        counts = (*plan.bias_strides, batch, tokens, heads)
        launch.launch(attention_backward_dbias, grid, *arguments, dbias, *counts, scales[1], **plan.constants)
    if rotation is not None:
        rotate(dq, dk, dq, dk, rotation, inverse=True)
    return dqkv, dbias


def _gradients(out: torch.Tensor, bias: torch.Tensor | None, of_bias: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory of the gradients."""
    batch, tokens, heads, size = out.shape
    return out.new_empty((batch, tokens, 3, heads, size)), _aligned_like(bias) if of_bias else out.new_empty(0)


@torch.library.custom_op("dpt::attention", mutates_args=())
def _attention_op(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    scale: float,
    bias: torch.Tensor | None,
    rotation: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(q, k, v, scale, launch.input_precision(q.dtype), bias, rotation)


@_attention_op.register_fake
def _(q, k, v, scale, bias, rotation) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(q)


@torch.library.custom_op("dpt::attention_backward", mutates_args=())
def _attention_backward_op(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    rotation: torch.Tensor | None,
    of_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _backward(dout, q, k, v, out, lse, scale, launch.input_precision(q.dtype), bias, rotation, of_bias)


@_attention_backward_op.register_fake
def _(dout, q, k, v, out, lse, scale, bias, rotation, of_bias) -> tuple[torch.Tensor, torch.Tensor]:
    return _gradients(out, bias, of_bias)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, bias, rotation = inputs
    ctx.save_for_backward(q, k, v, *output, bias, rotation)


def _attention_grad(ctx, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """``dlse`` is of no one: the log-sum-exp does not leave :func:`attention`."""
    q, k, v, out, lse, bias, rotation = ctx.saved_tensors
    of_bias = ctx.needs_input_grad[4]
    dqkv, dbias = torch.ops.dpt.attention_backward(dout, q, k, v, out, lse, ctx.scale, bias, rotation, of_bias)
    dq, dk, dv = (dqkv, None, None) if k is None else dqkv.unbind(2)
    return dq, dk, dv, None, dbias if of_bias else None, None


_attention_op.register_autograd(_attention_grad, setup_context=_setup_context)
