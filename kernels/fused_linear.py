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

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .workload import combinations, tiles

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _load_tile(source, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """A (ROWS, COLUMNS) tile of a contiguous (rows, columns) matrix; zeros beyond its edges."""
    if DESCRIPTOR:
        return source.load([row, column])
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        offsets = i.to(tl.int64)[:, None] * columns + j[None, :]
        return tl.load(source + offsets, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)


@triton.jit
def _store_tile(target, tile, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIPTOR: tl.constexpr):
    """The counterpart of :func:`_load_tile`; nothing is written beyond the edges."""
    if DESCRIPTOR:
        target.store([row, column], tile.to(target.dtype))
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        offsets = i.to(tl.int64)[:, None] * columns + j[None, :]
        tl.store(target + offsets, tile.to(target.dtype.element_ty), mask=(i < rows)[:, None] & (j < columns)[None, :])


@triton.jit
def _load_vector(source, start, length, BLOCK: tl.constexpr):
    """BLOCK elements as float32; zeros beyond the end."""
    i = start + tl.arange(0, BLOCK)
    return tl.load(source + i, mask=i < length, other=0.0).to(tl.float32)


@triton.jit
def _row_statistics(
    x, row, rows, depth, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, DESCRIPTOR: tl.constexpr
):  # fmt: skip
    """Mean and 1 / sqrt(variance + eps) of BLOCK_M rows, float32, with STAGES tiles under way."""
    mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for k in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        tile = _load_tile(x, row, k, rows, depth, BLOCK_M, BLOCK_K, DESCRIPTOR).to(tl.float32)
        count = tl.minimum(depth - k, BLOCK_K).to(tl.float32)
        share = tl.div_rn(count, k + count)  # of the first tile 1, exactly; a plain division is approximate on a GPU
        tile_mean = tl.sum(tile, 1) / count
        inside = k + tl.arange(0, BLOCK_K) < depth
        deviation = tl.where(inside[None, :], tile - tile_mean[:, None], 0.0)
        missed = tl.sum(deviation, 1) / count  # by the rounded mean: of a constant row an ulp, which 1 / sqrt(eps) would make visible
        step = tile_mean + missed - mean
        mean += step * share
        squares += tl.maximum(tl.sum(deviation * deviation, 1) - missed * missed * count, 0.0) + step * step * (k * share)
    return mean, tl.rsqrt(squares / depth + eps)


@triton.jit
def _normalise(tile, mean, rstd, gamma, beta):
    """LayerNorm of a tile, in its dtype. Columns beyond the edge give 0: their gamma and beta are."""
    normalised = (tile.to(tl.float32) - mean[:, None]) * rstd[:, None]
    return (normalised * gamma[None, :] + beta[None, :]).to(tile.dtype)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def _gelu_slope(x):
    return 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * tl.exp(-0.5 * x * x) * INVERSE_SQRT_TWO_PI


@triton.jit
def _finish(
    tile, vectors, extra, out, pre, row, column, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, EPILOGUE: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """The epilogue of a (ROWS, COLUMNS) piece of the product, and its store."""
    bias, scale = vectors
    if bias is not None:
        tile += _load_vector(bias, column, columns, COLUMNS)[None, :]
    if EPILOGUE == "gelu":
        if pre is not None:
            _store_tile(pre, tile, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR)
        tile = _gelu(tile)
    elif EPILOGUE == "gelu_gradient":
        tile *= _gelu_slope(_load_tile(extra, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR).to(tl.float32))
    elif EPILOGUE == "residual":
        if scale is not None:
            tile *= _load_vector(scale, column, columns, COLUMNS)[None, :]
        tile += _load_tile(extra, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR).to(tl.float32)
    _store_tile(out, tile, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR)


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
        mean, rstd = _row_statistics(x, row, rows, depth, eps, BLOCK_M, BLOCK_K, STATISTICS_STAGES, DESCRIPTOR)
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
            a = _load_tile(x, row, k, rows, depth, BLOCK_M, BLOCK_K, DESCRIPTOR)
            if norm is not None:
                gamma = _load_vector(norm_weight, k, depth, BLOCK_K)
                a = _normalise(a, mean, rstd, gamma, _load_vector(norm_bias, k, depth, BLOCK_K))
            if EPILOGUE == "gelu_gradient":
                b = _load_tile(weight, k, column, depth, columns, BLOCK_K, BLOCK_N, DESCRIPTOR)
            else:
                b = _load_tile(weight, column, k, columns, depth, BLOCK_N, BLOCK_K, DESCRIPTOR).T
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
        gamma = _load_vector(norm_weight, k, depth, BLOCK_K)
        beta = _load_vector(norm_bias, k, depth, BLOCK_K)
    if IN_REGISTERS:  # only the left operand of a dot may come from registers: the tile is computed transposed
        accumulator = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    else:
        accumulator = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for row in range(0, rows, BLOCK_M):
        g = _load_tile(grad, row, column, rows, columns, BLOCK_M, BLOCK_N, DESCRIPTOR)
        a = _load_tile(x, row, k, rows, depth, BLOCK_M, BLOCK_K, DESCRIPTOR)
        if PROLOGUE == "layernorm":
            a = _normalise(a, _load_vector(mean_ptr, row, rows, BLOCK_M), _load_vector(rstd_ptr, row, rows, BLOCK_M), gamma, beta)
        elif PROLOGUE == "gelu":
            a = _gelu(a.to(tl.float32)).to(a.dtype)
        if IN_REGISTERS:
            accumulator = tl.dot(a.T, g, accumulator, input_precision=PRECISION)
        else:
            accumulator = tl.dot(g.T, a, accumulator, input_precision=PRECISION)
    if IN_REGISTERS:
        accumulator = accumulator.T
    if scale is not None:
        j = column + tl.arange(0, BLOCK_N)
        weights = _load_tile(weight, column, k, columns, depth, BLOCK_N, BLOCK_K, DESCRIPTOR).to(tl.float32)
        tl.store(scale_partial + k // BLOCK_K * columns + j, tl.sum(weights * accumulator, 1), mask=j < columns)
        accumulator *= _load_vector(scale, column, columns, BLOCK_N)[:, None]
    _store_tile(out, accumulator, column, k, columns, depth, BLOCK_N, BLOCK_K, DESCRIPTOR)


class Norm(NamedTuple):
    """A LayerNorm's parameters, (K,) each, in x's dtype or float32."""

    weight: torch.Tensor
    bias: torch.Tensor


class Statistics(NamedTuple):
    """Of every row of x: its mean and 1 / sqrt(variance + eps), (M,) float32."""

    mean: torch.Tensor
    rstd: torch.Tensor


def check_input(name: str, x: torch.Tensor) -> None:
    """TypeError or ValueError unless ``x`` is (..., C) with C >= 1 in a dtype of the kernels."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: it must be a tensor")
    if x.dtype not in launch.DTYPES:
        raise TypeError(f"{name} is {x.dtype}: it must be float32, float16 or bfloat16")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be (..., C) with C at least 1")


def check_operand(name: str, tensor: torch.Tensor | None, shape: Sequence[int], x: torch.Tensor, vector: bool = False) -> None:
    """TypeError or ValueError unless ``tensor`` has ``shape`` and x's device and dtype; a ``vector`` may be float32 or None too."""
    if vector and tensor is None:
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: it must be a tensor")
    if tensor.dtype != x.dtype and not (vector and tensor.dtype == torch.float32):
        raise TypeError(
            f"{name} is {tensor.dtype} and the input {x.dtype}: it must be of the input's dtype{' or float32' if vector else ''}"
        )
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: it must be {tuple(shape)}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and the input on {x.device}: they must be on one device")


def check_linear(prefix: str, weight: torch.Tensor, bias: torch.Tensor | None, features: int, x: torch.Tensor) -> int:
    """The number of output features of a linear layer on ``features``, if its parameters are right."""
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or weight.shape[0] == 0:
        found = tuple(weight.shape) if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"{prefix} weight is {found}: it must be a tensor of shape (features out, {features})")
    check_operand(f"{prefix} weight", weight, (weight.shape[0], features), x)
    check_operand(f"{prefix} bias", bias, (weight.shape[0],), x, vector=True)
    return weight.shape[0]


def check_norm(norm_weight: torch.Tensor, norm_bias: torch.Tensor, eps: float, x: torch.Tensor) -> None:
    """TypeError or ValueError unless these are a LayerNorm's parameters for x (..., C)."""
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if tensor is None:
            raise TypeError(f"{name} is None: it must be a tensor")
        check_operand(name, tensor, x.shape[-1:], x, vector=True)
    if not 0 < eps < math.inf:  # not by isfinite, at which a graph breaks
        raise ValueError(f"eps={eps}: it must be finite and positive")


def compiled_variants() -> Iterator[tuple[torch.dtype, str, str, dict[str, bool]]]:
    """For the compile cases: (dtype, precision, their name, whether tensor cores must show) of every way to launch."""
    for dtype in launch.DTYPES:
        yield dtype, "ieee", str(dtype).removeprefix("torch."), {"tensor_cores": dtype != torch.float32}
    yield torch.float32, "tf32", "tf32", {"tensor_cores": True}


# Which of all shapes, dtypes and epilogues the encoder's linear ops compile, and what they leave out, for CI's time. Depths and widths
# enter the code only by whether 16 divides them: one aligned shape a dtype, and one that no 16-byte copy fits, stand for all. Rows do not
# enter it. bfloat16 has every epilogue and prologue; float16, the same code with another MMA, and float32 have what takes the most
# registers: the pre-activation saved, LayerScale. Vectors have x's dtype and a bias is there: float32 vectors and none are wider loads and
# fewer.
COMPILED_ROWS = (577, 9 * 1025)  # the second, many pictures', is a case of its own only where the table has another entry for it


def compiled_operands(
    compiled: Sequence[tuple[str, int, int, Sequence[str]]],
) -> Iterator[tuple[str, str, str, dict[str, Any], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Of (kind of product, K, N, launches), for each launch and number of rows: (launch, case's name, precision, what must show,
    (x (rows, K), weight (N, K), grad (rows, N)))."""
    kinds = {name: (dtype, precision, shows) for dtype, precision, name, shows in compiled_variants()}
    for kind, depth, columns, launches in compiled:
        dtype, precision, shows = kinds[kind]
        for rows, name in itertools.product(COMPILED_ROWS, launches):
            operands = tuple(torch.empty(s, dtype=dtype, device="meta") for s in ((rows, depth), (columns, depth), (rows, columns)))
            where = f"{name} {kind} M={rows} K={depth} N={columns}"
            yield name, where, precision, {**shows, "async_copies": depth % 8 == 0}, operands


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
    norm: Norm | None = None,
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
    norm: Norm | None = None,
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
        norm=Norm(norm_weight, norm_bias) if normalised else None,
        statistics=Statistics(mean, rstd) if normalised else None,
        scale=scale,
        weight=None if weight is None else weight.contiguous(),
    )
    return gradient, grad.new_empty(0, dtype=torch.float32) if scale_gradient is None else scale_gradient


@_weight_gradient_op.register_fake
def _(grad, x, prologue, norm_weight, norm_bias, mean, rstd, scale, weight):
    columns = grad.shape[1]
    return x.new_empty((columns, x.shape[1])), x.new_empty(0 if scale is None else columns, dtype=torch.float32)


# Up to so many rows (one picture's tokens) large tiles leave multiprocessors without work: entries of their own are proposed.
FEW_ROWS = 2048


def tuned_variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """For the workloads: (kind of product, their options) of every way to launch that has code of its own; tf32 gets its own entries."""
    for dtype, precision, kind, shows in compiled_variants():
        if dtype != torch.float16:
            narrow = {"precision": precision} if precision == "tf32" else {}
            yield kind, {"dtype": dtype, "precision": precision, "shows": shows, "narrow": narrow}


def linear_candidates(kind: str, prologue: bool) -> list[dict[str, Any]]:
    """Of :func:`linear`, by ``kind`` of product. Without a prologue nothing passes through registers, and no statistics are shared."""
    ways = tiles("TILES IN_REGISTERS", (1, True), (1, False), (2, True)) if prologue else tiles("TILES IN_REGISTERS", (1, False))
    names = "BLOCK_M BLOCK_N BLOCK_K num_warps"
    if kind == "float32":
        blocks = tiles(names, (32, 32, 32, 4), (32, 64, 32, 4), (64, 32, 32, 4), (64, 64, 16, 8), (64, 64, 32, 4), (64, 64, 32, 8))
        return combinations(blocks, **{"TILES": (1,), "IN_REGISTERS": (False,)}, num_stages=(2,), descriptor=(True, False))
    if kind == "tf32":
        blocks = tiles(names, (64, 64, 32, 4), (64, 128, 32, 4), (128, 64, 32, 4), (128, 128, 32, 8))
        return [{**way, **c} for way in ways[:2] for c in combinations(blocks, num_stages=(2, 3, 4), descriptor=(True,))]
    blocks = tiles(names, (64, 64, 64, 4), (64, 128, 64, 4), (128, 64, 64, 4), (128, 128, 64, 4), (128, 128, 64, 8), (128, 256, 64, 8))
    blocks += [] if prologue else tiles(names, (256, 128, 64, 8), (64, 64, 128, 4), (128, 128, 128, 8))
    found = [{**way, **c} for way in ways for c in combinations(blocks, num_stages=(3, 4), descriptor=(True,))]
    return found + combinations([{**blocks[0], **ways[0]}, {**blocks[3], **ways[0]}], num_stages=(3,), descriptor=(False,))


def weight_gradient_candidates(kind: str) -> list[dict[str, Any]]:
    """Of :func:`weight_gradient`, by ``kind`` of product."""
    names = "BLOCK_N BLOCK_K num_warps"
    if kind == "float32":
        blocks = tiles(names, (32, 32, 4), (32, 64, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8))
        return combinations(blocks, BLOCK_M=(16, 32), IN_REGISTERS=(False,), num_stages=(2,), descriptor=(True,))
    if kind == "tf32":
        blocks = tiles(names, (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8))
        return combinations(blocks, BLOCK_M=(32,), IN_REGISTERS=(False, True), num_stages=(2, 3), descriptor=(True,))
    blocks = tiles(names, (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8))
    found = combinations(blocks, BLOCK_M=(64,), IN_REGISTERS=(True, False), num_stages=(3, 4), descriptor=(True,))
    return found + combinations([blocks[0], blocks[2]], BLOCK_M=(128,), IN_REGISTERS=(True, False), num_stages=(2, 3), descriptor=(True,))
