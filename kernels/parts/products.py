"""The matrix products of the encoder's linear layers, with what stands before and behind them, and their weight gradients.

    linear           out = epilogue(prologue(x) @ weight.T + bias)        x (M, K), weight (N, K), out (M, N)
    weight_gradient  dweight = scale * grad.T @ prologue(x)               grad (M, N), x (M, K), dweight (N, K)

Not an op by itself: ``layernorm_linear``, ``linear_residual`` and ``layernorm_mlp`` are made of these two launches. 2*M*N*K FLOPs each;
x, weight and out are moved once through memory, x once more per N tile out of L2.

LayerNorm is a prologue: a tile of x passes through registers between its load and the dot, (x - mean) * rstd * gamma + beta, rounded to x's
dtype as PyTorch rounds it. The algebraic alternative is an epilogue, rstd * (acc - mean * colsum(W')) + b' with W' = W * gamma, which keeps
both operands out of the registers; it needs W' and two column sums prepared anew after each optimiser step, and it cancels: with |mean| =
30 sigma a float32 accumulator loses five bits to a product that is then subtracted. The prologue serves inference and training, every dtype
and any mean with one form, and what it costs, four instructions per element and N tile against 2*BLOCK_N FLOPs, runs beside the tensor
cores.

The row statistics come from a first pass over the rows in the same launch (block means and squared deviations, merged as in Chan, Golub and
LeVeque 1983: no cancellation), once for every ``TILES`` tiles of N that a program computes. They are written out for the backward, by every
program of a row block alike: the same bits.

``IN_REGISTERS``: whether the prologue's result goes from registers straight to the tensor core (an operand of wgmma may lie there), or is
stored to shared memory again. The first is sm_90's way: half the traffic in shared memory, and the wgmma stays asynchronous; where warps
share rows (mma on sm_80, sm_89 and sm_120) it would repeat the prologue in each of them. The epilogue runs on the two halves of a tile in
turn, which keeps its temporaries out of the way of the accumulator: without it GELU costs the second CTA on the SM.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launch
from .activations import gelu, gelu_slope
from .matrices import load_tile, load_vector, store_tile
from .norms import LayerNorm, Statistics, normalise, row_statistics


@triton.jit
def _finish(
    tile, vectors, extra, out, pre, row, column, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPILOGUE: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """The epilogue of a (ROWS, COLUMNS) piece of the product, and its store."""
    bias, scale = vectors
    if bias is not None:
        tile += load_vector(bias, column, columns, COLUMNS)[None, :]
    if EPILOGUE == "gelu":
        if pre is not None:
            store_tile(pre, tile, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR)
        tile = gelu(tile)
    elif EPILOGUE == "gelu_gradient":
        tile *= gelu_slope(load_tile(extra, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR).to(tl.float32))
    elif EPILOGUE == "residual":
        if scale is not None:
            tile *= load_vector(scale, column, columns, COLUMNS)[None, :]
        tile += load_tile(extra, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR).to(tl.float32)
    store_tile(out, tile, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR)


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x,  # (rows, depth); this and the other matrices are pointers, or descriptors if DESCRIPTOR
    weight,  # (columns, depth); for the epilogue "gelu_gradient" (depth, columns)
    vectors,  # (bias, scale), (columns,) or None each; scale is for the epilogue "residual"
    extra,  # (rows, columns): the residual, or the pre-activation for "gelu_gradient"; else None
    out,  # (rows, columns)
    pre,  # (rows, columns): where "gelu" stores what it is applied to; or None
    norm,  # (weight (depth,), bias (depth,), mean and 1 / deviation (rows,) float32, which are written, eps); or None without LayerNorm
    rows,
    columns,
    depth,
    EPILOGUE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILES: tl.constexpr,
    STATISTICS_STAGES: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """One program: TILES neighbouring (BLOCK_M, BLOCK_N) tiles of a row block; neighbouring programs share the rows."""
    tl.assume(
        depth > 0
    )  # without a way around the loop, or ptxas sees the zeros that it starts from join the wgmmas' results, and serialises
    HALF: tl.constexpr = BLOCK_N // 2
    groups = tl.cdiv(columns, BLOCK_N * TILES)
    row = tl.program_id(0) // groups * BLOCK_M
    first = tl.program_id(0) % groups * (BLOCK_N * TILES)
    if norm is not None:
        norm_weight, norm_bias, mean_ptr, rstd_ptr, eps = norm
        mean, rstd = row_statistics(x, row, rows, depth, eps, BLOCK_M, BLOCK_K, STATISTICS_STAGES, DESCRIPTOR)
        i = row + tl.arange(0, BLOCK_M)
        tl.store(mean_ptr + i, mean, mask=i < rows)
        tl.store(rstd_ptr + i, rstd, mask=i < rows)
        if IN_REGISTERS:  # read back: the compiler moves an operand's layout up to its loads only where all it depends on are loads
            tl.debug_barrier()
            mean = tl.load(mean_ptr + i, mask=i < rows, other=0.0)
            rstd = tl.load(rstd_ptr + i, mask=i < rows, other=0.0)
    for tile in tl.static_range(TILES):
        column = first + tile * BLOCK_N
        accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, depth, BLOCK_K):
            a = load_tile(x, row, k, rows, depth, BLOCK_M, BLOCK_K, DESCRIPTOR)
            if norm is not None:
                gamma = load_vector(norm_weight, k, depth, BLOCK_K)
                a = normalise(a, mean, rstd, gamma, load_vector(norm_bias, k, depth, BLOCK_K))
            if EPILOGUE == "gelu_gradient":
                b = load_tile(weight, k, column, depth, columns, BLOCK_K, BLOCK_N, DESCRIPTOR)
            else:
                b = load_tile(weight, column, k, columns, depth, BLOCK_N, BLOCK_K, DESCRIPTOR).T
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
        left, right = accumulator.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        _finish(left, vectors, extra, out, pre, row, column, rows, columns, BLOCK_M, HALF, EPILOGUE, DESCRIPTOR)
        _finish(right, vectors, extra, out, pre, row, column + HALF, rows, columns, BLOCK_M, HALF, EPILOGUE, DESCRIPTOR)


@triton.jit(do_not_specialize=["rows"])
def weight_gradient_kernel(
    grad,  # (rows, columns); this and the other matrices are pointers, or descriptors if DESCRIPTOR
    x,  # (rows, depth)
    out,  # (columns, depth)
    norm,  # (weight (depth,), bias (depth,), mean and 1 / deviation (rows,) float32); None but for the prologue "layernorm"
    scale,  # (columns,) or None
    weight,  # (columns, depth), for the gradient of scale; or None
    scale_partial,  # (depth blocks, columns) float32: the share of each block of depth in sum_k weight * grad.T @ x; or None
    rows,
    columns,
    depth,
    PROLOGUE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """One program: a (BLOCK_N, BLOCK_K) tile of the gradient, over all rows in their order: reproducible."""
    tl.assume(rows > 0)  # as in linear_kernel
    blocks = tl.cdiv(depth, BLOCK_K)
    column = tl.program_id(0) // blocks * BLOCK_N
    k = tl.program_id(0) % blocks * BLOCK_K
    if PROLOGUE == "layernorm":
        norm_weight, norm_bias, mean_ptr, rstd_ptr = norm
        gamma = load_vector(norm_weight, k, depth, BLOCK_K)
        beta = load_vector(norm_bias, k, depth, BLOCK_K)
    if IN_REGISTERS:  # only the left operand of a dot may come from registers: the tile is computed transposed
        accumulator = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    else:
        accumulator = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for row in range(0, rows, BLOCK_M):
        g = load_tile(grad, row, column, rows, columns, BLOCK_M, BLOCK_N, DESCRIPTOR)
        a = load_tile(x, row, k, rows, depth, BLOCK_M, BLOCK_K, DESCRIPTOR)
        if PROLOGUE == "layernorm":
            a = normalise(a, load_vector(mean_ptr, row, rows, BLOCK_M), load_vector(rstd_ptr, row, rows, BLOCK_M), gamma, beta)
        elif PROLOGUE == "gelu":
            a = gelu(a.to(tl.float32)).to(a.dtype)
        if IN_REGISTERS:
            accumulator = tl.dot(a.T, g, accumulator, input_precision=PRECISION)
        else:
            accumulator = tl.dot(g.T, a, accumulator, input_precision=PRECISION)
    if IN_REGISTERS:
        accumulator = accumulator.T
    if scale is not None:
        j = column + tl.arange(0, BLOCK_N)
        weights = load_tile(weight, column, k, columns, depth, BLOCK_N, BLOCK_K, DESCRIPTOR).to(tl.float32)
        tl.store(scale_partial + k // BLOCK_K * columns + j, tl.sum(weights * accumulator, 1), mask=j < columns)
        accumulator *= load_vector(scale, column, columns, BLOCK_N)[:, None]
    store_tile(out, accumulator, column, k, columns, depth, BLOCK_N, BLOCK_K, DESCRIPTOR)


def check_linear(prefix: str, weight: torch.Tensor, bias: torch.Tensor | None, features: int, x: torch.Tensor) -> int:
    """The number of output features of a linear layer on ``features``, if its parameters are right."""
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.shape[0] == 0:
        found = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"{prefix} weight is {found}: it must be a tensor of shape (features out, {features})")
    launch.check_operand(f"{prefix} weight", weight, (weight.shape[0], features), x)
    launch.check_operand(f"{prefix} bias", bias, (weight.shape[0],), x, vector=True)
    return weight.shape[0]


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward can come, so that what it needs has to be kept."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """(..., C) as a contiguous (M, C): the tensor itself where it is contiguous, else a copy."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _configuration(name: str, x: torch.Tensor, columns: int, matrices: list[torch.Tensor | None], **shape: Any) -> dict[str, Any]:
    """The launch's configuration: the table's, without descriptors where TMA cannot address the matrices."""
    rows, depth = x.shape
    describable = launch.describable(*(matrix for matrix in matrices if matrix is not None))
    shape = {"rows": rows, "columns": columns, "depth": depth, "describable": int(describable), **shape}
    config = launch.config(name, launch.device_family(x.device), x.dtype, **shape)
    return {**config, "descriptor": config["descriptor"] and describable}


def _tiles(tensor: torch.Tensor | None, block: list[int], descriptor: bool) -> torch.Tensor | TensorDescriptor | None:
    """How a kernel gets a matrix that it reads or writes in blocks."""
    return TensorDescriptor.from_tensor(tensor, block) if descriptor and tensor is not None else tensor


def _contiguous(*vectors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The vectors as the kernels read them: an expanded or sliced one is copied."""
    return tuple(None if vector is None else vector.contiguous() for vector in vectors)


def linear(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    precision: str,
    *,
    epilogue: str = "none",
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    extra: torch.Tensor | None = None,
    norm: LayerNorm | None = None,
    eps: float = 0.0,
    save_pre: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, Statistics | None]:
    """One launch of :func:`linear_kernel`: (out (M, N), the pre-activation (M, N) if ``save_pre``, the statistics if ``norm``).

    ``name``: of the configuration. All matrices contiguous, in x's dtype. ``epilogue``: "none" (bias), "gelu" (bias, GELU), "residual"
    (bias, scale, plus extra) or "gelu_gradient" (times GELU'(extra); the weight is (K, N)).
    """
    rows, depth = x.shape
    columns = weight.shape[1] if epilogue == "gelu_gradient" else weight.shape[0]
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    pre = torch.empty_like(out) if save_pre else None
    statistics = Statistics(*(torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))) if norm else None
    if rows == 0:
        return out, pre, statistics
    config = _configuration(name, x, columns, [x, weight, out, extra], precision=precision)
    descriptor = config.pop("descriptor")
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    weight_block = [block_k, block_n] if epilogue == "gelu_gradient" else [block_n, block_k]
    half = [block_m, block_n // 2]
    launch.launch(
        linear_kernel,
        (triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n * config["TILES"]),),
        _tiles(x, [block_m, block_k], descriptor),
        _tiles(weight, weight_block, descriptor),
        _contiguous(bias, scale),
        _tiles(extra, half, descriptor),
        _tiles(out, half, descriptor),
        _tiles(pre, half, descriptor),
        (*_contiguous(*norm), *statistics, eps) if norm else None,
        rows,
        columns,
        depth,
        EPILOGUE=epilogue,
        STATISTICS_STAGES=config["num_stages"] * (block_m + block_n) // block_m,  # as much shared memory as the products take
        DESCRIPTOR=descriptor,
        PRECISION=precision,
        **config,
    )
    return out, pre, statistics


def weight_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    precision: str,
    *,
    prologue: str = "none",
    norm: LayerNorm | None = None,
    statistics: Statistics | None = None,
    scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch of :func:`weight_gradient_kernel`: (dweight (N, K) in x's dtype, sum_k weight * grad.T @ prologue(x) (N,) float32 or
    None).

    grad (M, N) and x (M, K) contiguous, of one dtype. ``prologue``: "none", "layernorm" (with ``norm`` and ``statistics``) or "gelu". With
    ``scale`` the gradient is scaled by it, and the second result is the gradient of the scale, but for the bias's share in it.
    """
    (rows, columns), depth = grad.shape, x.shape[1]
    if rows == 0:
        return x.new_zeros((columns, depth)), None if scale is None else x.new_zeros(columns, dtype=torch.float32)
    out = torch.empty((columns, depth), dtype=x.dtype, device=x.device)
    config = _configuration("weight_gradient", x, columns, [grad, x, out, weight], precision=precision, prologue=prologue)
    descriptor = config.pop("descriptor")
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    blocks = triton.cdiv(depth, block_k)
    partial = None if scale is None else torch.empty((blocks, columns), dtype=torch.float32, device=x.device)
    launch.launch(
        weight_gradient_kernel,
        (triton.cdiv(columns, block_n) * blocks,),
        _tiles(grad, [block_m, block_n], descriptor),
        _tiles(x, [block_m, block_k], descriptor),
        _tiles(out, [block_n, block_k], descriptor),
        (*_contiguous(*norm), *statistics) if norm else None,
        *_contiguous(scale),
        _tiles(weight, [block_n, block_k], descriptor),
        partial,
        rows,
        columns,
        depth,
        PROLOGUE=prologue,
        DESCRIPTOR=descriptor,
        PRECISION=precision,
        **config,
    )
    return out, None if partial is None else partial.sum(0)


@torch.library.custom_op("dpt::linear_weight_gradient", mutates_args=())
def _weight_gradient_op(
    grad: torch.Tensor,
    x: torch.Tensor,
    prologue: str,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    normalised = prologue == "layernorm"
    gradient, scale_gradient = weight_gradient(
        grad,
        x,
        launch.input_precision(x.dtype),
        prologue=prologue,
        norm=LayerNorm(norm_weight, norm_bias) if normalised else None,
        statistics=Statistics(mean, rstd) if normalised else None,
        scale=scale,
        weight=None if weight is None else weight.contiguous(),
    )
    return gradient, grad.new_empty(0, dtype=torch.float32) if scale_gradient is None else scale_gradient


@_weight_gradient_op.register_fake
def _(grad, x, prologue, norm_weight, norm_bias, mean, rstd, scale, weight):
    columns = grad.shape[1]
    return x.new_empty((columns, x.shape[1])), x.new_empty(0 if scale is None else columns, dtype=torch.float32)
