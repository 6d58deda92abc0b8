"""The kernels of attention: online softmax over blocks of keys, both passes of its backward, and the gradient of its bias.

Tensors of heads are (B, N, H, D) with any strides that are multiples of UNIT; ``of_x`` is the pointer to x with its strides of B, N and H,
and ``operands`` are those of q, k and v, the last with None for strides that are k's, and the pointer to the bias (H, N, N), query by key,
or None.
Weights are taken in base 2: what the scores lack to the logarithm's argument is ``scale_log2``, and log2(e) for the bias.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
UNIT = tl.constexpr(8)  # elements that divide every stride, so that rows begin where 16-byte copies can
COUNTS = ["N", "H", "B", "stride_h", "stride_n"]  # nothing in the code depends on whether 16 divides them


@triton.jit
def _unpacked(operands):
    """The operands, v with the strides of k where it has none of its own: then the offsets of both are the same registers."""
    of_q, of_k, of_v, bias_ptr = operands
    if of_v[1] is None:
        strided = (of_v[0], of_k[1], of_k[2], of_k[3])
    else:
        strided = of_v
    return of_q, of_k, strided, bias_ptr


@triton.jit
def _first(tensor, batch, head, row):
    """The pointer to a row of a head of (B, N, H, D)."""
    ptr, stride_b, stride_n, stride_h = tensor
    before = tl.cast(batch, tl.int64) * (stride_b // UNIT) + tl.cast(row, tl.int64) * (stride_n // UNIT)
    return ptr + (before + tl.cast(head, tl.int64) * (stride_h // UNIT)) * UNIT


@triton.jit
def _load_rows(
    tensor,  # (pointer to (B, N, H, D), its strides of B, N and H)
    desc,  # descriptor of (B, H, N, D), block (1, 1, ROWS, BLOCK_D), or None
    batch,
    head,
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
        return desc.load([batch, head, start, 0]).reshape(ROWS, BLOCK_D)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    pointers = _first(tensor, batch, head, start) + rows[:, None] * (tensor[2] // UNIT * UNIT) + columns[None, :]
    if MASKED:
        if BLOCK_D == D:
            return tl.load(pointers, mask=(start + rows < N)[:, None], other=0.0)
        return tl.load(pointers, mask=(start + rows < N)[:, None] & (columns < D)[None, :], other=0.0)
    if BLOCK_D == D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)


@triton.jit
def _store_rows(tensor, values, batch, head, start, N, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store (ROWS, BLOCK_D) as rows start... of one head of (B, N, H, D)."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    pointers = _first(tensor, batch, head, start) + rows[:, None] * (tensor[2] // UNIT * UNIT) + columns[None, :]
    tl.store(pointers, values.to(tensor[0].dtype.element_ty), mask=(start + rows < N)[:, None] & (columns < D)[None, :])


@triton.jit
def _bias_pointers(ptr, stride_h, stride_n, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """To the block (ROWS, COLUMNS) of (H, N, N) at a row and a column of a head."""
    first = ptr + (tl.cast(head, tl.int64) * (stride_h // UNIT) + tl.cast(row, tl.int64) * (stride_n // UNIT)) * UNIT + column
    return first + tl.arange(0, ROWS)[:, None] * (stride_n // UNIT * UNIT) + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _in_bias(row, column, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which of a block lie in the memory of the bias, whose rows end at multiples of UNIT: copies of 16 bytes are made whole or not."""
    return (row + tl.arange(0, ROWS) < N)[:, None] & (column + tl.arange(0, COLUMNS) < tl.cdiv(N, UNIT) * UNIT)[None, :]


@triton.jit
def _load_bias(
    ptr,  # (H, N, N), query by key, or None: there is no bias
    desc,  # descriptor of it, block (1, ROWS, COLUMNS), or None
    stride_h,
    stride_n,
    head,
    row,
    column,
    N,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """(ROWS, COLUMNS) of a head's bias; None where there is none. Beyond N keys comes what is in memory there, NaN perhaps."""
    if ptr is None:
        block: tl.constexpr = None
    elif DESCRIPTOR:
        block = desc.load([head, row, column]).reshape(ROWS, COLUMNS)
    else:
        inside = _in_bias(row, column, N, ROWS, COLUMNS)
        block = tl.load(_bias_pointers(ptr, stride_h, stride_n, head, row, column, ROWS, COLUMNS), mask=inside, other=0.0)
    return block


@triton.jit
def _exponents(scores, bias, scale_log2):
    """The scores as exponents of 2, with the bias where there is one."""
    exponents = scores * scale_log2
    if bias is not None:
        exponents += bias.to(tl.float32) * LOG2_E
    return exponents


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
def _attend(scores, v, bias, acc, top, total, scale_log2, keys_left, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax over a block of keys. ``top`` is the running maximum of the scaled scores, in base 2."""
    if bias is not None:
        scores = _exponents(scores, bias, scale_log2)
        scale_log2 = 1.0
    if MASKED:
        scores = tl.where((tl.arange(0, v.shape[0]) < keys_left)[None, :], scores, float("-inf"))
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
    operands,
    q_desc,  # (B, H, N, D), block (1, 1, BLOCK_M, BLOCK_D), or None
    k_desc,  # (B, H, N, D), block (1, 1, BLOCK_N, BLOCK_D), or None
    v_desc,  # the same of v
    bias_desc,  # (H, N, N), block (1, BLOCK_M, BLOCK_N), or None
    results,  # of_out and the log-sum-exp (B, H, N) float32, base 2
    stride_h,  # of the bias
    stride_n,
    N,
    H,
    scale_log2,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PIPELINED: tl.constexpr,  # the scores of the next block are computed before this block's softmax, which they then hide behind
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M queries of one head."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    of_q, of_k, of_v, bias_ptr = _unpacked(operands)
    of_out, lse_ptr = results
    head_of_batch, b, h, start_m = _own_block(N, H, BLOCK_M)
    q = _load_rows(of_q, q_desc, b, h, start_m, N, D, BLOCK_M, BLOCK_D, True, DESCRIPTOR)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = (N - 1) // BLOCK_N * BLOCK_N
    TAIL_DESCRIPTOR: tl.constexpr = DESCRIPTOR and TAIL == BLOCK_N
    tail_k = _load_rows(of_k, k_desc, b, h, full, N, D, TAIL, BLOCK_D, True, TAIL_DESCRIPTOR)
    tail_v = _load_rows(of_v, v_desc, b, h, full, N, D, TAIL, BLOCK_D, True, TAIL_DESCRIPTOR)
    tail_bias = _load_bias(bias_ptr, bias_desc, stride_h, stride_n, h, start_m, full, N, BLOCK_M, TAIL, TAIL_DESCRIPTOR)
    tail_scores = tl.dot(q, tl.trans(tail_k), input_precision=PRECISION)
    acc, top, total = _attend(tail_scores, tail_v, tail_bias, acc, top, total, scale_log2, N - full, True, PRECISION)
    if PIPELINED:
        k = _load_rows(of_k, k_desc, b, h, 0, N, D, BLOCK_N, BLOCK_D, True, DESCRIPTOR)
        ahead = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    for start in tl.range(0, full, BLOCK_N):
        if PIPELINED:
            scores = ahead
            following = tl.minimum(start + BLOCK_N, full - BLOCK_N)  # behind the last block comes that block again, and is not used
            k = _load_rows(of_k, k_desc, b, h, following, N, D, BLOCK_N, BLOCK_D, False, DESCRIPTOR)
            ahead = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        else:
            k = _load_rows(of_k, k_desc, b, h, start, N, D, BLOCK_N, BLOCK_D, False, DESCRIPTOR)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        v = _load_rows(of_v, v_desc, b, h, start, N, D, BLOCK_N, BLOCK_D, False, DESCRIPTOR)
        bias = _load_bias(bias_ptr, bias_desc, stride_h, stride_n, h, start_m, start, N, BLOCK_M, BLOCK_N, DESCRIPTOR)
        acc, top, total = _attend(scores, v, bias, acc, top, total, scale_log2, 0, False, PRECISION)
    _store_rows(of_out, acc / total[:, None], b, h, start_m, N, D, BLOCK_M, BLOCK_D)
    rows = start_m + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + tl.cast(head_of_batch, tl.int64) * N + rows, top + tl.log2(total), mask=rows < N)


@triton.jit
def _dq_step(q, dout, k, v, bias, lse, delta, dq, scale_log2, keys_left, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """dq += ds k for a block of keys. Masked weights are set to 0: exp2(0 - lse) of a key that is not there may be infinite."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    weights = tl.exp2(_exponents(scores, bias, scale_log2) - lse[:, None])
    if MASKED:
        weights = tl.where((tl.arange(0, k.shape[0]) < keys_left)[None, :], weights, 0.0)
    dscores = weights * (dweights - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_dq(
    operands,
    q_desc,  # (B, H, N, D), block (1, 1, BLOCK_M, BLOCK_D), or None
    k_desc,  # (B, H, N, D), block (1, 1, BLOCK_N, BLOCK_D), or None
    v_desc,  # the same of v
    bias_desc,  # (H, N, N), block (1, BLOCK_M, BLOCK_N), or None
    results,  # of_out and the log-sum-exp (B, H, N) float32, base 2
    gradients,  # of_dout; written: delta (B, H, N) float32, for the other passes, and of_dq
    stride_h,  # of the bias
    stride_n,
    N,
    H,
    scales,  # scale, and in base 2
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradient of BLOCK_M queries of one head, over all keys."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    of_q, of_k, of_v, bias_ptr = _unpacked(operands)
    of_out, lse_ptr = results
    of_dout, delta_ptr, of_dq = gradients
    scale, scale_log2 = scales
    head_of_batch, b, h, start_m = _own_block(N, H, BLOCK_M)
    q = _load_rows(of_q, q_desc, b, h, start_m, N, D, BLOCK_M, BLOCK_D, True, DESCRIPTOR)
    dout = _load_rows(of_dout, None, b, h, start_m, N, D, BLOCK_M, BLOCK_D, True, False)
    out = _load_rows(of_out, None, b, h, start_m, N, D, BLOCK_M, BLOCK_D, True, False)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    rows = start_m + tl.arange(0, BLOCK_M)
    row_of_head = tl.cast(head_of_batch, tl.int64) * N + rows
    tl.store(delta_ptr + row_of_head, delta, mask=rows < N)
    lse = tl.load(lse_ptr + row_of_head, mask=rows < N, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    full = (N - 1) // BLOCK_N * BLOCK_N
    TAIL_DESCRIPTOR: tl.constexpr = DESCRIPTOR and TAIL == BLOCK_N
    tail_k = _load_rows(of_k, k_desc, b, h, full, N, D, TAIL, BLOCK_D, True, TAIL_DESCRIPTOR)
    tail_v = _load_rows(of_v, v_desc, b, h, full, N, D, TAIL, BLOCK_D, True, TAIL_DESCRIPTOR)
    tail_bias = _load_bias(bias_ptr, bias_desc, stride_h, stride_n, h, start_m, full, N, BLOCK_M, TAIL, TAIL_DESCRIPTOR)
    dq = _dq_step(q, dout, tail_k, tail_v, tail_bias, lse, delta, dq, scale_log2, N - full, True, PRECISION)
    for start in tl.range(0, full, BLOCK_N):
        k = _load_rows(of_k, k_desc, b, h, start, N, D, BLOCK_N, BLOCK_D, False, DESCRIPTOR)
        v = _load_rows(of_v, v_desc, b, h, start, N, D, BLOCK_N, BLOCK_D, False, DESCRIPTOR)
        bias = _load_bias(bias_ptr, bias_desc, stride_h, stride_n, h, start_m, start, N, BLOCK_M, BLOCK_N, DESCRIPTOR)
        dq = _dq_step(q, dout, k, v, bias, lse, delta, dq, scale_log2, 0, False, PRECISION)
    _store_rows(of_dq, dq * scale, b, h, start_m, N, D, BLOCK_M, BLOCK_D)


@triton.jit
def _dkv_step(q, dout, k, v, bias, lse, delta, dk, dv, scale_log2, PRECISION: tl.constexpr):
    """dk += ds^T q and dv += p^T dout for a block of queries; transposed throughout, so that the products feed the next dot.

    The rows of keys that are not there may come out infinite; they mix with no other row and are not stored.
    """
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    dweights = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    if bias is not None:
        bias = tl.trans(bias)
    weights = tl.exp2(_exponents(scores, bias, scale_log2) - lse[None, :])
    dv = tl.dot(weights.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dscores = weights * (dweights - delta[None, :])
    dk = tl.dot(dscores.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_dkv(
    operands,
    q_desc,  # (B, H, N, D), block (1, 1, BLOCK_M, BLOCK_D), or None
    k_desc,  # (B, H, N, D), block (1, 1, BLOCK_N, BLOCK_D), or None
    v_desc,  # the same of v
    bias_desc,  # (H, N, N), block (1, BLOCK_M, BLOCK_N), or None
    dout_desc,  # (B, H, N, D), block (1, 1, BLOCK_M, BLOCK_D), or None
    known,  # of_dout, the log-sum-exp in base 2 and delta, (B, H, N) float32
    gradients,  # of_dk and of_dv
    stride_h,  # of the bias
    stride_n,
    N,
    H,
    scales,  # scale, and in base 2
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradients of BLOCK_N keys and values of one head, over all queries."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    of_q, of_k, of_v, bias_ptr = _unpacked(operands)
    of_dout, lse_ptr, delta_ptr = known
    of_dk, of_dv = gradients
    scale, scale_log2 = scales
    head_of_batch, b, h, start_n = _own_block(N, H, BLOCK_N)
    k = _load_rows(of_k, k_desc, b, h, start_n, N, D, BLOCK_N, BLOCK_D, True, DESCRIPTOR)
    v = _load_rows(of_v, v_desc, b, h, start_n, N, D, BLOCK_N, BLOCK_D, True, DESCRIPTOR)
    lse_ptr += tl.cast(head_of_batch, tl.int64) * N
    delta_ptr += tl.cast(head_of_batch, tl.int64) * N
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    full = (N - 1) // BLOCK_M * BLOCK_M
    TAIL_DESCRIPTOR: tl.constexpr = DESCRIPTOR and TAIL == BLOCK_M
    tail_q = _load_rows(of_q, q_desc, b, h, full, N, D, TAIL, BLOCK_D, True, TAIL_DESCRIPTOR)
    tail_dout = _load_rows(of_dout, dout_desc, b, h, full, N, D, TAIL, BLOCK_D, True, TAIL_DESCRIPTOR)
    tail_bias = _load_bias(bias_ptr, bias_desc, stride_h, stride_n, h, full, start_n, N, TAIL, BLOCK_N, TAIL_DESCRIPTOR)
    tail_rows = full + tl.arange(0, TAIL)
    tail_lse = tl.load(lse_ptr + tail_rows, mask=tail_rows < N, other=0.0)  # a query that is not there adds 0: its dout and delta are 0
    tail_delta = tl.load(delta_ptr + tail_rows, mask=tail_rows < N, other=0.0)
    dk, dv = _dkv_step(tail_q, tail_dout, k, v, tail_bias, tail_lse, tail_delta, dk, dv, scale_log2, PRECISION)
    for start in tl.range(0, full, BLOCK_M):
        q = _load_rows(of_q, q_desc, b, h, start, N, D, BLOCK_M, BLOCK_D, False, DESCRIPTOR)
        dout = _load_rows(of_dout, dout_desc, b, h, start, N, D, BLOCK_M, BLOCK_D, False, DESCRIPTOR)
        bias = _load_bias(bias_ptr, bias_desc, stride_h, stride_n, h, start, start_n, N, BLOCK_M, BLOCK_N, DESCRIPTOR)
        rows = start + tl.arange(0, BLOCK_M)
        lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
        dk, dv = _dkv_step(q, dout, k, v, bias, lse, delta, dk, dv, scale_log2, PRECISION)
    _store_rows(of_dk, dk * scale, b, h, start_n, N, D, BLOCK_N, BLOCK_D)
    _store_rows(of_dv, dv, b, h, start_n, N, D, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_dbias(
    operands,
    q_desc,  # (B, H, N, D), block (1, 1, BLOCK_M, BLOCK_D), or None
    k_desc,  # (B, H, N, D), block (1, 1, BLOCK_N, BLOCK_D), or None
    v_desc,  # the same of v
    bias_desc,  # (H, N, N), block (1, BLOCK_M, BLOCK_N), or None
    dout_desc,  # (B, H, N, D), block (1, 1, BLOCK_M, BLOCK_D), or None
    known,  # of_dout, the log-sum-exp in base 2 and delta, (B, H, N) float32
    dbias_ptr,  # (H, N, N), its rows as long as the next multiple of UNIT, one behind the other
    stride_h,  # of the bias
    stride_n,
    B,
    N,
    H,
    scale_log2,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: the gradient of a block of the bias, BLOCK_M queries by BLOCK_N keys of one head, over the batch."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D)
    of_q, of_k, of_v, bias_ptr = _unpacked(operands)
    of_dout, lse_ptr, delta_ptr = known
    row_length = tl.cdiv(N, UNIT) * UNIT
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks = tl.cdiv(N, BLOCK_M) * blocks_n
    h = tl.program_id(0) // blocks
    start_m = tl.program_id(0) % blocks // blocks_n * BLOCK_M
    start_n = tl.program_id(0) % blocks_n * BLOCK_N
    rows = start_m + tl.arange(0, BLOCK_M)
    bias = _load_bias(bias_ptr, bias_desc, stride_h, stride_n, h, start_m, start_n, N, BLOCK_M, BLOCK_N, DESCRIPTOR)
    bias = bias.to(tl.float32) * LOG2_E
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in tl.range(0, B):
        q = _load_rows(of_q, q_desc, b, h, start_m, N, D, BLOCK_M, BLOCK_D, True, DESCRIPTOR)
        k = _load_rows(of_k, k_desc, b, h, start_n, N, D, BLOCK_N, BLOCK_D, True, DESCRIPTOR)
        dout = _load_rows(of_dout, dout_desc, b, h, start_m, N, D, BLOCK_M, BLOCK_D, True, DESCRIPTOR)
        v = _load_rows(of_v, v_desc, b, h, start_n, N, D, BLOCK_N, BLOCK_D, True, DESCRIPTOR)
        row_of_head = (tl.cast(b, tl.int64) * H + h) * N + rows
        lse = tl.load(lse_ptr + row_of_head, mask=rows < N, other=0.0)
        delta = tl.load(delta_ptr + row_of_head, mask=rows < N, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dweights = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        dbias += tl.exp2(scores * scale_log2 + bias - lse[:, None]) * (dweights - delta[:, None])
    pointers = _bias_pointers(dbias_ptr, N * row_length, row_length, h, start_m, start_n, BLOCK_M, BLOCK_N)
    tl.store(pointers, dbias.to(dbias_ptr.dtype.element_ty), mask=_in_bias(start_m, start_n, N, BLOCK_M, BLOCK_N))
