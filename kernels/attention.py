"""Non-causal self-attention on the packed output of the qkv projection.

    out[b, n, h] = sum_j softmax_j(scale * <q[b, n, h], k[b, j, h]>) v[b, j, h]          q, k, v = qkv[:, :, 0], [1], [2]

Shapes: qkv (B, N, 3, H, D) packed as (B, N, 3*H*D), out (B, N, H*D). Nothing is copied or transposed, and no N x N map is written: the keys
are read in blocks and the softmax is rescaled as its maximum grows (Dao et al. 2022, FlashAttention; Milakov and Gimelshein 2018, online
softmax). Work in base 2: scale * log2(e) is folded into one multiply-add, and exp2 is one instruction.

Forward: 4*B*H*N^2*D FLOPs and B*H*N^2 exponentials; 4*B*N*H*D elements moved. Saved for the backward: qkv, out and the log-sum-exp (B, H,
N). Backward: two passes that write every gradient once, so it is reproducible bit for bit: one over blocks of queries (dq, and
delta = rowsum(dout * out)), one over blocks of keys (dk, dv). 14*B*H*N^2*D FLOPs: the two products that both passes need are computed
twice. In TF32 the forward sums what the tensor core reads of the weights, so that they are 1 together.

N is often 64k+1 (patches and a class token). The keys beyond the last full block are a tile of their own, 16 wide where that is
enough, so that the loop over full blocks needs no mask and the class token does not cost a whole block.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch

LOG2_E = math.log2(math.e)
SMALL_TAIL = 16  # the least width of a dot
COUNTS = ["N", "H"]  # of tokens and heads: nothing in the code depends on whether 16 divides them


def attention_ref(qkv: torch.Tensor, num_heads: int, scale: float | None = None) -> torch.Tensor:
    """:func:`attention` in plain PyTorch, any device and floating dtype: qkv (B, N, 3*H*D) -> (B, N, H*D)."""
    batch, tokens, channels = qkv.shape
    q, k, v = qkv.reshape(batch, tokens, 3, num_heads, channels // (3 * num_heads)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(batch, tokens, channels // 3)


def attention(qkv: torch.Tensor, num_heads: int, scale: float | None = None) -> torch.Tensor:
    """Softmax attention of every token to every token, without a mask.

    qkv: (B, N, 3*H*D), N >= 1, packed as the projection gives it: all of q, then k, then v, heads inside. Any strides: a layout whose last
    stride is 1 is read in place, others are copied first. float32, float16 or bfloat16; under autocast, autocast's dtype.
    num_heads: H; D must come out as a multiple of 16 from 32 to 128. scale: positive; default D**-0.5.
    Returns (B, N, H*D), contiguous, in qkv's dtype; differentiable once. float32 products are exact unless PyTorch's own switch allows
    tf32.
    Raises TypeError for a dtype or argument type, ValueError for a shape or value, naming it and the rule.
    """
    head_dim = _check(qkv, num_heads, scale)
    scale = head_dim**-0.5 if scale is None else float(scale)
    (qkv,) = launch.autocast(qkv)
    if not launch.runs_kernels(qkv, "attention"):
        return attention_ref(qkv, num_heads, scale)
    return torch.ops.dpt.attention(qkv, num_heads, scale)[0]


def _check(qkv: torch.Tensor, num_heads: int, scale: float | None) -> int:
    """The head dimension, if the arguments are right."""
    if not isinstance(qkv, torch.Tensor):
        raise TypeError(f"qkv is a {type(qkv).__name__}: it must be a tensor")
    if qkv.dtype not in launch.DTYPES:
        raise TypeError(f"qkv is {qkv.dtype}: it must be float32, float16 or bfloat16")
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads is {num_heads!r}: it must be an int")
    if qkv.ndim != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}: it must be (B, N, 3*H*D)")
    if qkv.shape[1] < 1:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}: N, its second size, must be at least 1")
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(f"num_heads={num_heads}: qkv's last size, {qkv.shape[2]}, must be 3 * num_heads * D")
    head_dim = qkv.shape[2] // (3 * num_heads)
    if head_dim % 16 or not 32 <= head_dim <= 128:
        raise ValueError(
            f"qkv's last size {qkv.shape[2]} and num_heads={num_heads} give D={head_dim}: must be a multiple of 16 from 32 to 128"
        )
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale}: it must be finite and positive")
    return head_dim


@triton.jit
def _load_rows(
    tensor,  # (pointer to (B, N, channels/D, D), its strides of B and N)
    desc,  # descriptor of (B, channels/D, N, D), block (1, 1, ROWS, BLOCK_D), or None
    batch,
    channel,  # index of the D-wide group of channels: which of q, k, v, and the head
    start,
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,  # the rows from N on come as zeros; only the pointer path needs to be told
    DESCRIPTOR: tl.constexpr,
):
    """(ROWS, BLOCK_D): rows start... of one head; the columns from D on are zeros."""
    if DESCRIPTOR:
        return desc.load([batch, channel, start, 0]).reshape(ROWS, BLOCK_D)
    ptr, stride_b, stride_n = tensor
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    first = ptr + tl.cast(batch, tl.int64) * stride_b + channel * D + tl.cast(start, tl.int64) * stride_n
    pointers = first + rows[:, None] * stride_n + columns[None, :]
    if MASKED:
        if BLOCK_D == D:
            return tl.load(pointers, mask=(start + rows < N)[:, None], other=0.0)
        return tl.load(pointers, mask=(start + rows < N)[:, None] & (columns < D)[None, :], other=0.0)
    if BLOCK_D == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def _load_keys_values(
    qkv, desc, b, h, H, start, N,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """Rows start... of the keys and of the values of head ``h``, as of :func:`_load_rows`."""
    k = _load_rows(qkv, desc, b, H + h, start, N, D, ROWS, BLOCK_D, MASKED, DESCRIPTOR)
    v = _load_rows(qkv, desc, b, 2 * H + h, start, N, D, ROWS, BLOCK_D, MASKED, DESCRIPTOR)
    return k, v


@triton.jit
def _own_block(N, H, BLOCK: tl.constexpr):
    """(b * H + h, b, h, first row) of the block of one head that this program owns.

    The blocks of a head are neighbours, so that they share what they walk over in L2.
    """
    blocks = tl.cdiv(N, BLOCK)
    head_of_batch = tl.program_id(0) // blocks
    start = (tl.program_id(0) % blocks) * BLOCK
    return head_of_batch, head_of_batch // H, head_of_batch % H, start


@triton.jit
def _store_rows(ptr, values, batch, channel, start, N, channels, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store (ROWS, BLOCK_D) as rows start... of one D-wide group of channels of a contiguous (B, N, channels) tensor."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    first = ptr + (tl.cast(batch, tl.int64) * N + start) * channels + channel * D
    pointers = first + rows[:, None] * channels + columns[None, :]
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=(start + rows < N)[:, None] & (columns < D)[None, :])


@triton.jit
def _attend(q, k, v, acc, top, total, scale_log2, keys_left, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax over a block of keys. ``top`` is the running maximum of the scaled scores, in base 2."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where((tl.arange(0, k.shape[0]) < keys_left)[None, :], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_top[:, None])
    if PRECISION == "tf32":  # only what the tensor core will read of them is summed: divided by the sum, they are 1 together
        weights = (weights.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_top, total


@triton.jit(do_not_specialize=COUNTS)
def attention_forward(
    qkv,  # (pointer to (B, N, 3, H, D), its strides of B and N)
    q_desc,  # (B, 3H, N, D), block (1, 1, BLOCK_M, BLOCK_D), or None
    kv_desc,  # (B, 3H, N, D), block (1, 1, BLOCK_N, BLOCK_D), or None
    out_ptr,  # (B, N, H, D)
    lse_ptr,  # (B, H, N) float32, base 2
    N,
    H,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M queries of one head."""
    head_of_batch, b, h, start_m = _own_block(N, H, BLOCK_M)
    q = _load_rows(qkv, q_desc, b, h, start_m, N, D, BLOCK_M, BLOCK_D, True, DESCRIPTOR)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = (N - 1) // BLOCK_N * BLOCK_N
    TAIL_DESCRIPTOR: tl.constexpr = DESCRIPTOR and TAIL == BLOCK_N
    tail_k, tail_v = _load_keys_values(qkv, kv_desc, b, h, H, full, N, D, TAIL, BLOCK_D, True, TAIL_DESCRIPTOR)
    acc, top, total = _attend(q, tail_k, tail_v, acc, top, total, scale_log2, N - full, True, PRECISION)
    for start in tl.range(0, full, BLOCK_N):
        k, v = _load_keys_values(qkv, kv_desc, b, h, H, start, N, D, BLOCK_N, BLOCK_D, False, DESCRIPTOR)
        acc, top, total = _attend(q, k, v, acc, top, total, scale_log2, 0, False, PRECISION)
    _store_rows(out_ptr, acc / total[:, None], b, h, start_m, N, H * D, D, BLOCK_M, BLOCK_D)
    rows = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + tl.cast(head_of_batch, tl.int64) * N + rows, top + tl.log2(total), mask=rows < N)


@triton.jit
def _dq_step(q, dout, k, v, lse, delta, dq, scale_log2, keys_left, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """dq += ds k for a block of keys. Masked weights are set to 0: exp2(0 - lse) of a key that is not there may be infinite."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - lse[:, None])
    if MASKED:
        weights = tl.where((tl.arange(0, k.shape[0]) < keys_left)[None, :], weights, 0.0)
    dscores = weights * (dweights - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_dq(
    qkv,  # (pointer to (B, N, 3, H, D), its strides of B and N)
    q_desc,  # (B, 3H, N, D), block (1, 1, BLOCK_M, BLOCK_D), or None
    kv_desc,  # (B, 3H, N, D), block (1, 1, BLOCK_N, BLOCK_D), or None
    dout,  # (pointer to (B, N, H, D), its strides of B and N)
    out_ptr,  # (B, N, H, D), contiguous
    lse_ptr,  # (B, H, N) float32, base 2
    delta_ptr,  # (B, H, N) float32, written here for the other pass
    dqkv_ptr,  # (B, N, 3, H, D), contiguous
    N,
    H,
    scale,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradient of BLOCK_M queries of one head, over all keys."""
    head_of_batch, b, h, start_m = _own_block(N, H, BLOCK_M)
    of_out = (out_ptr, tl.cast(N, tl.int64) * (H * D), H * D)
    q = _load_rows(qkv, q_desc, b, h, start_m, N, D, BLOCK_M, BLOCK_D, True, DESCRIPTOR)
    own_dout = _load_rows(dout, None, b, h, start_m, N, D, BLOCK_M, BLOCK_D, True, False)
    out = _load_rows(of_out, None, b, h, start_m, N, D, BLOCK_M, BLOCK_D, True, False)
    delta = tl.sum(own_dout.to(tl.float32) * out.to(tl.float32), 1)
    rows = start_m + tl.arange(0, BLOCK_M)
    row_of_head = tl.cast(head_of_batch, tl.int64) * N + rows
    tl.store(delta_ptr + row_of_head, delta, mask=rows < N)
    lse = tl.load(lse_ptr + row_of_head, mask=rows < N, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = (N - 1) // BLOCK_N * BLOCK_N
    TAIL_DESCRIPTOR: tl.constexpr = DESCRIPTOR and TAIL == BLOCK_N
    tail_k, tail_v = _load_keys_values(qkv, kv_desc, b, h, H, full, N, D, TAIL, BLOCK_D, True, TAIL_DESCRIPTOR)
    dq = _dq_step(q, own_dout, tail_k, tail_v, lse, delta, dq, scale_log2, N - full, True, PRECISION)
    for start in tl.range(0, full, BLOCK_N):
        k, v = _load_keys_values(qkv, kv_desc, b, h, H, start, N, D, BLOCK_N, BLOCK_D, False, DESCRIPTOR)
        dq = _dq_step(q, own_dout, k, v, lse, delta, dq, scale_log2, 0, False, PRECISION)
    _store_rows(dqkv_ptr, dq * scale, b, h, start_m, N, 3 * H * D, D, BLOCK_M, BLOCK_D)


@triton.jit
def _dkv_step(q, dout, k, v, lse, delta, dk, dv, scale_log2, PRECISION: tl.constexpr):
    """dk += ds^T q and dv += p^T dout for a block of queries; transposed throughout, so that the products feed the next dot.

    The rows of keys that are not there may come out infinite; they mix with no other row and are not stored.
    """
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    weights = tl.exp2(scores * scale_log2 - lse[None, :])
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dscores = weights * (dweights - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_dkv(
    qkv,  # (pointer to (B, N, 3, H, D), its strides of B and N)
    q_desc,  # (B, 3H, N, D), block (1, 1, BLOCK_M, BLOCK_D), or None
    kv_desc,  # (B, 3H, N, D), block (1, 1, BLOCK_N, BLOCK_D), or None
    dout,  # (pointer to (B, N, H, D), its strides of B and N)
    dout_desc,  # (B, H, N, D), block (1, 1, BLOCK_M, BLOCK_D), or None
    lse_ptr,  # (B, H, N) float32, base 2
    delta_ptr,  # (B, H, N) float32
    dqkv_ptr,  # (B, N, 3, H, D), contiguous
    N,
    H,
    scale,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of BLOCK_N keys and values of one head, over all queries."""
    head_of_batch, b, h, start_n = _own_block(N, H, BLOCK_N)
    k, v = _load_keys_values(qkv, kv_desc, b, h, H, start_n, N, D, BLOCK_N, BLOCK_D, True, DESCRIPTOR)
    lse_ptr += tl.cast(head_of_batch, tl.int64) * N
    delta_ptr += tl.cast(head_of_batch, tl.int64) * N
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    full = (N - 1) // BLOCK_M * BLOCK_M
    TAIL_DESCRIPTOR: tl.constexpr = DESCRIPTOR and TAIL == BLOCK_M
    tail_q = _load_rows(qkv, q_desc, b, h, full, N, D, TAIL, BLOCK_D, True, TAIL_DESCRIPTOR)
    tail_dout = _load_rows(dout, dout_desc, b, h, full, N, D, TAIL, BLOCK_D, True, TAIL_DESCRIPTOR)
    tail_rows = full + tl.arange(0, TAIL)
    tail_lse = tl.load(lse_ptr + tail_rows, mask=tail_rows < N, other=0.0)  # a query that is not there adds 0: its dout and delta are 0
    tail_delta = tl.load(delta_ptr + tail_rows, mask=tail_rows < N, other=0.0)
    dk, dv = _dkv_step(tail_q, tail_dout, k, v, tail_lse, tail_delta, dk, dv, scale_log2, PRECISION)
    for start in tl.range(0, full, BLOCK_M):
        q = _load_rows(qkv, q_desc, b, h, start, N, D, BLOCK_M, BLOCK_D, False, DESCRIPTOR)
        own_dout = _load_rows(dout, dout_desc, b, h, start, N, D, BLOCK_M, BLOCK_D, False, DESCRIPTOR)
        rows = start + tl.arange(0, BLOCK_M)
        dk, dv = _dkv_step(q, own_dout, k, v, tl.load(lse_ptr + rows), tl.load(delta_ptr + rows), dk, dv, scale_log2, PRECISION)
    _store_rows(dqkv_ptr, dk * scale, b, H + h, start_n, N, 3 * H * D, D, BLOCK_N, BLOCK_D)
    _store_rows(dqkv_ptr, dv, b, 2 * H + h, start_n, N, 3 * H * D, D, BLOCK_N, BLOCK_D)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if its last stride is 1, which the kernels need; else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _addressed(tensor: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """A tensor (B, N, channels) as the kernels read it by pointers: with its strides of B and N."""
    return (tensor, *tensor.stride()[:2])


def _descriptor(tensor: torch.Tensor, head_dim: int, rows: int, block_d: int) -> TensorDescriptor:
    """(B, N, G*D) seen as (B, G, N, D): TMA fills with zeros beyond N and beyond D, and the unit sizes of a block lead."""
    batch, tokens, channels = tensor.shape
    stride_b, stride_n, _ = tensor.stride()
    shape = [batch, channels // head_dim, tokens, head_dim]
    return TensorDescriptor(tensor, shape, [stride_b, head_dim, stride_n, 1], [1, 1, rows, block_d])


class _Plan:
    """What one launch of a kernel needs beyond its other tensors: configuration, constants, grid, and qkv in each way that it is read."""

    def __init__(self, kernel: str, qkv: torch.Tensor, num_heads: int, precision: str, describable: bool):
        batch, tokens, channels = qkv.shape
        self.head_dim = channels // (3 * num_heads)
        family = launch.device_family(qkv.device)
        config = launch.config(
            kernel, family, qkv.dtype, D=self.head_dim, N=tokens, B=batch, H=num_heads, precision=precision, describable=int(describable)
        )
        self.block_m, self.block_n = config["BLOCK_M"], config["BLOCK_N"]
        self.descriptor = config["descriptor"] and describable
        self.block_d = triton.next_power_of_2(self.head_dim)
        owned, walked = (self.block_n, self.block_m) if kernel == "attention_backward_dkv" else (self.block_m, self.block_n)
        self.grid = (triton.cdiv(tokens, owned) * batch * num_heads,)
        left = (tokens - 1) % walked + 1
        self.constants = {
            "D": self.head_dim,
            "BLOCK_D": self.block_d,
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "TAIL": SMALL_TAIL if left <= SMALL_TAIL else walked,
            "DESCRIPTOR": self.descriptor,
            "PRECISION": precision,
            "num_warps": config["num_warps"],
            "num_stages": config["num_stages"],
        }
        self.qkv = _addressed(qkv), self.describe(qkv, self.block_m), self.describe(qkv, self.block_n)

    def describe(self, tensor: torch.Tensor, rows: int) -> TensorDescriptor | None:
        return _descriptor(tensor, self.head_dim, rows, self.block_d) if self.descriptor else None


def _forward(qkv: torch.Tensor, num_heads: int, scale: float, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (B, N, H*D), log2-sum-exp2 of the scaled scores (B, H, N) float32)."""
    qkv = _readable(qkv)
    batch, tokens, channels = qkv.shape
    out = torch.empty((batch, tokens, channels // 3), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((batch, num_heads, tokens), dtype=torch.float32, device=qkv.device)
    if batch == 0:
        return out, lse
    plan = _Plan("attention_forward", qkv, num_heads, precision, launch.describable(qkv))
    launch.launch(attention_forward, plan.grid, *plan.qkv, out, lse, tokens, num_heads, scale * LOG2_E, **plan.constants)
    return out, lse


def _backward(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, num_heads: int, scale: float, precision: str
) -> torch.Tensor:
    """The gradient of qkv, (B, N, 3*H*D), contiguous."""
    qkv, dout = _readable(qkv), _readable(dout)
    tokens = qkv.shape[1]
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if qkv.shape[0] == 0:
        return dqkv
    delta = torch.empty_like(lse)
    of_dout, scalars = _addressed(dout), (tokens, num_heads, scale, scale * LOG2_E)
    plan = _Plan("attention_backward_dq", qkv, num_heads, precision, launch.describable(qkv))
    launch.launch(attention_backward_dq, plan.grid, *plan.qkv, of_dout, out, lse, delta, dqkv, *scalars, **plan.constants)
    plan = _Plan("attention_backward_dkv", qkv, num_heads, precision, launch.describable(qkv, dout))
    dout_desc = plan.describe(dout, plan.block_m)
    launch.launch(attention_backward_dkv, plan.grid, *plan.qkv, of_dout, dout_desc, lse, delta, dqkv, *scalars, **plan.constants)
    return dqkv


@torch.library.custom_op("dpt::attention", mutates_args=())
def _attention_op(qkv: torch.Tensor, num_heads: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(qkv, num_heads, scale, launch.input_precision(qkv.dtype))


@_attention_op.register_fake
def _(qkv: torch.Tensor, num_heads: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    batch, tokens, channels = qkv.shape
    return qkv.new_empty((batch, tokens, channels // 3)), qkv.new_empty((batch, num_heads, tokens), dtype=torch.float32)


@torch.library.custom_op("dpt::attention_backward", mutates_args=())
def _attention_backward_op(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, num_heads: int, scale: float
) -> torch.Tensor:
    return _backward(dout, qkv, out, lse, num_heads, scale, launch.input_precision(qkv.dtype))


@_attention_backward_op.register_fake
def _(dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, num_heads: int, scale: float) -> torch.Tensor:
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output) -> None:
    qkv, ctx.num_heads, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)


def _attention_grad(ctx, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    """``dlse`` is of no one: the log-sum-exp does not leave :func:`attention`."""
    return torch.ops.dpt.attention_backward(dout, *ctx.saved_tensors, ctx.num_heads, ctx.scale), None, None


_attention_op.register_autograd(_attention_grad, setup_context=_setup_context)
