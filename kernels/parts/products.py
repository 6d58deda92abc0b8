"""The matrix products of the encoder's linear layers, with what stands behind them, and their weight gradients.

    linear           out = epilogue(x @ weight.T + bias)                  x (M, K), weight (N, K), out (M, N)
    weight_gradient  dweight = scale * grad.T @ activation(x)             grad (M, N), x (M, K), dweight (N, K)

Not an op by itself: ``layernorm_linear``, ``linear_residual`` and ``layernorm_mlp`` are made of these launches. 2*M*N*K FLOPs each; x,
weight and out are moved once through memory, x and weight once more per tile out of L2.

Of a tile's two operands BLOCK_M + BLOCK_N rows come out of L2 for BLOCK_M * BLOCK_N results: tiles of 128x256 need a quarter less than
128x128. ``GROUP`` row blocks are walked together, column block by column block, so that what neighbours read is still in L2. The epilogue
runs on ``PARTS`` pieces of a tile in turn, which keeps its temporaries out of the way of the accumulator. Where a program fills a
multiprocessor and there are more tiles than of these, ``persistent`` programs, one each, take a tile after the other, and the next does
not wait for a new program to begin.

"swiglu", the one activation of two matrices, is silu(gate) * value, whose rows of weight are the first and the second half: a tile of N
is one of each, multiplied together, and the pre-activation and its gradient are (M, 2, N).

Of queries, keys and values the first two may be turned (``rotation``), by the configuration's ``rotate`` in the epilogue: PARTS are one
head each then, and cosine and sine of a tile's rows are read once for all of them.

By the configuration's ``backend`` the product is cuBLAS's: with a bias alone in one launch, else with one of ours for the rest behind it.

``IN_REGISTERS``: whether the activation of the weight gradient's operand goes from registers straight to the tensor core (an operand of
wgmma may lie there), or is stored to shared memory again. The first is sm_90's way: half the traffic in shared memory, and the wgmma stays
asynchronous; where warps share rows (mma on sm_80, sm_89 and sm_120) it would repeat the activation in each of them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launch
from .activations import activate, activation_slope, silu, silu_slope
from .matrices import load_pair, load_tile, load_vector, store_tile
from .rotation import rotate

ACTIVATIONS = ("gelu", "gelu_tanh", "swiglu")  # the exact GELU, that by tanh, and silu(gate) * value


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a (ROWS, COLUMNS) tile."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _turned(tile, rotation, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One head's columns, their halves turned by (cosine, sine), (ROWS, COLUMNS / 2) each."""
    cosine, sine = rotation
    first, second = _halves(tile, ROWS, COLUMNS)
    turned = tl.join(first * cosine - second * sine, second * cosine + first * sine)
    return turned.permute(0, 2, 1).reshape(ROWS, COLUMNS)


@triton.jit
def _finish(
    tile, value, vectors, extra, out, row, column, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """The epilogue of a (ROWS, COLUMNS) tile of the product, PARTS pieces of it in turn, and its store. ``value``: beside the gate, the
    other tile of "swiglu"; else None."""
    if PARTS > 1:
        HALF: tl.constexpr = COLUMNS // 2
        left, right = _halves(tile, ROWS, COLUMNS)
        if value is None:
            value_left, value_right = None, None
        else:
            value_left, value_right = _halves(value, ROWS, COLUMNS)
        _finish(
            left, value_left, vectors, extra, out, row, column, rows, columns,
            ROWS, HALF, PARTS // 2, EPILOGUE, ACTIVATION, DESCRIPTOR,
        )  # fmt: skip
        _finish(
            right, value_right, vectors, extra, out, row, column + HALF, rows, columns,
            ROWS, HALF, PARTS // 2, EPILOGUE, ACTIVATION, DESCRIPTOR,
        )  # fmt: skip
    else:
        bias, scale = vectors
        if bias is not None:
            tile += load_vector(bias, column, columns, COLUMNS)[None, :]
            if value is not None:
                value += load_vector(bias + columns, column, columns, COLUMNS)[None, :]
        if EPILOGUE == "residual":
            if scale is not None:
                tile *= load_vector(scale, column, columns, COLUMNS)[None, :]
            tile += load_tile(extra, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR).to(tl.float32)
        elif EPILOGUE == "activation":
            if value is None:
                if extra is not None:
                    store_tile(extra, tile, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR)
                tile = activate(tile, ACTIVATION)
            else:
                if extra is not None:
                    store_tile(extra, tile, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR, 0)
                    store_tile(extra, value, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR, 1)
                tile = silu(tile) * value
        elif EPILOGUE == "rotation":
            if column < columns // 3 * 2:  # queries and keys, not values
                tile = _turned(tile, extra, ROWS, COLUMNS)
        elif ACTIVATION == "swiglu":
            gate = load_tile(extra, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR, 0).to(tl.float32)
            factor = load_tile(extra, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR, 1).to(tl.float32)
            store_tile(out, tile * factor * silu_slope(gate), row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR, 0)
            store_tile(out, tile * silu(gate), row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR, 1)
        else:
            before = load_tile(extra, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR).to(tl.float32)
            tile *= activation_slope(before, ACTIVATION)
        if EPILOGUE != "gradient" or ACTIVATION != "swiglu":
            store_tile(out, tile, row, column, rows, columns, ROWS, COLUMNS, DESCRIPTOR)


@triton.jit
def _place(program, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """The first row and column of a program's tile: GROUP row blocks, one column block of all of them after the other."""
    width = GROUP * tl.cdiv(columns, BLOCK_N)
    first = program // width * GROUP
    size = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    return (first + program % width % size) * BLOCK_M, program % width // size * BLOCK_N


@triton.jit
def _multiplied(
    tile, x, weight, vectors, extra, out, rows, columns, depth, tokens,
    EPILOGUE: tl.constexpr, ACTIVATION: tl.constexpr, DESCRIPTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_M, BLOCK_N) tile of :func:`linear_kernel`; of "swiglu", whose gate and value share it, half as many columns."""
    GATED: tl.constexpr = ACTIVATION == "swiglu" and EPILOGUE == "activation"
    COLUMNS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    row, column = _place(tile, rows, columns, BLOCK_M, COLUMNS, GROUP)
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, depth, BLOCK_K):
        a = load_tile(x, row, k, rows, depth, BLOCK_M, BLOCK_K, DESCRIPTOR)
        if EPILOGUE == "gradient":
            b = load_tile(weight, k, column, depth, columns, BLOCK_K, BLOCK_N, DESCRIPTOR)
        elif GATED:
            b = load_pair(weight, column, k, columns, depth, COLUMNS, BLOCK_K, DESCRIPTOR).T
        else:
            b = load_tile(weight, column, k, columns, depth, BLOCK_N, BLOCK_K, DESCRIPTOR).T
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    if GATED:
        gate, value = _halves(accumulator, BLOCK_M, BLOCK_N)
        _finish(
            gate, value, vectors, extra, out, row, column, rows, columns,
            BLOCK_M, COLUMNS, PARTS, EPILOGUE, ACTIVATION, DESCRIPTOR,
        )  # fmt: skip
    elif EPILOGUE == "rotation":  # of all heads of the tile alike
        HALF: tl.constexpr = BLOCK_N // PARTS // 2
        at = extra + ((row + tl.arange(0, BLOCK_M)) % tokens)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        rotation = (tl.load(at), tl.load(at + tokens * HALF))
        _finish(
            accumulator, None, vectors, rotation, out, row, column, rows, columns,
            BLOCK_M, COLUMNS, PARTS, EPILOGUE, ACTIVATION, DESCRIPTOR,
        )  # fmt: skip
    else:
        _finish(
            accumulator, None, vectors, extra, out, row, column, rows, columns,
            BLOCK_M, COLUMNS, PARTS, EPILOGUE, ACTIVATION, DESCRIPTOR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tokens", "tiles"])
def linear_kernel(
    x,  # (rows, depth); this and the other matrices are pointers, or descriptors if DESCRIPTOR
    weight,  # (columns, depth); for "swiglu" (2, columns, depth); for the epilogue "gradient" (depth, columns)
    vectors,  # (bias, scale), (columns,) or None each; for "swiglu" the bias is (2 * columns,); scale is for the epilogue "residual"
    extra,  # (rows, columns): the residual that is read; or the pre-activation, written by "activation", read by "gradient", of "swiglu"
    #         (rows, 2, columns); or the pointer to the table of "rotation", (2, tokens, columns of a head / 2) float32; or None
    out,  # (rows, columns); for "gradient" of "swiglu" (rows, 2, columns)
    rows,
    columns,
    depth,
    tokens,  # of a picture, for "rotation"; else None
    tiles,  # how many there are where fewer programs share them; None where each has its own
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: a tile of :func:`_multiplied`, or every so-manieth of ``tiles``."""
    tl.assume(
        depth > 0
    )  # without a way around the loop, or ptxas sees the zeros that it starts from join the wgmmas' results, and serialises
    if tiles is None:
        _multiplied(
            tl.program_id(0), x, weight, vectors, extra, out, rows, columns, depth, tokens,
            EPILOGUE, ACTIVATION, DESCRIPTOR, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, GROUP,
        )  # fmt: skip
    else:
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            _multiplied(
                tile, x, weight, vectors, extra, out, rows, columns, depth, tokens,
                EPILOGUE, ACTIVATION, DESCRIPTOR, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, PARTS, GROUP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def linear_epilogue(
    product,  # (rows, columns); for "swiglu" (rows, 2, columns), but not for its gradient; and the rest as of linear_kernel
    vectors,
    extra,
    out,
    rows,
    columns,
    EPILOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What follows a product that another library computed. One program: a (BLOCK_M, BLOCK_N) tile."""
    row, column = _place(tl.program_id(0), rows, columns, BLOCK_M, BLOCK_N, 1)
    if ACTIVATION == "swiglu" and EPILOGUE == "activation":
        tile = load_tile(product, row, column, rows, columns, BLOCK_M, BLOCK_N, False, 0).to(tl.float32)
        value = load_tile(product, row, column, rows, columns, BLOCK_M, BLOCK_N, False, 1).to(tl.float32)
        _finish(
            tile, value, vectors, extra, out, row, column, rows, columns, BLOCK_M, BLOCK_N, 1, EPILOGUE, ACTIVATION, False
        )  # fmt: skip
    else:
        tile = load_tile(product, row, column, rows, columns, BLOCK_M, BLOCK_N, False).to(tl.float32)
        _finish(
            tile, None, vectors, extra, out, row, column, rows, columns, BLOCK_M, BLOCK_N, 1, EPILOGUE, ACTIVATION, False
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def weight_gradient_kernel(
    grad,  # (rows, columns); this and the other matrices are pointers, or descriptors if DESCRIPTOR
    x,  # (rows, depth); of "swiglu" (rows, 2, depth)
    out,  # (columns, depth)
    scale,  # (columns,) or None
    weight,  # (columns, depth), for the gradient of scale; or None
    scale_partial,  # (depth blocks, columns) float32: the share of each block of depth in sum_k weight * grad.T @ activation(x); or None
    rows,
    columns,
    depth,
    ACTIVATION: tl.constexpr,
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
    if IN_REGISTERS:  # only the left operand of a dot may come from registers: the tile is computed transposed
        accumulator = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    else:
        accumulator = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for row in range(0, rows, BLOCK_M):
        g = load_tile(grad, row, column, rows, columns, BLOCK_M, BLOCK_N, DESCRIPTOR)
        if ACTIVATION == "swiglu":
            gate = load_tile(x, row, k, rows, depth, BLOCK_M, BLOCK_K, DESCRIPTOR, 0)
            value = load_tile(x, row, k, rows, depth, BLOCK_M, BLOCK_K, DESCRIPTOR, 1).to(tl.float32)
            a = (silu(gate.to(tl.float32)) * value).to(gate.dtype)
        else:
            a = load_tile(x, row, k, rows, depth, BLOCK_M, BLOCK_K, DESCRIPTOR)
            if ACTIVATION != "none":
                a = activate(a.to(tl.float32), ACTIVATION).to(a.dtype)
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
    launch.check_operand(f"{prefix} weight", weight, (weight.shape[0], features), x, weight=True)
    launch.check_operand(f"{prefix} bias", bias, (weight.shape[0],), x, vector=True)
    return weight.shape[0]


def activated_columns(activation: str, columns: int) -> int:
    """How many columns the activation of (M, ``columns``) has."""
    return columns // 2 if activation == "swiglu" else columns


def needs_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether a backward can come, so that what it needs has to be kept."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def rows_of(tensor: torch.Tensor) -> torch.Tensor:
    """(..., C) as a contiguous (M, C): the tensor itself where it is contiguous, else a copy."""
    return tensor.reshape(-1, tensor.shape[-1]).contiguous()


def _configuration(name: str, x: torch.Tensor, columns: int, matrices: list[torch.Tensor | None], **shape: Any) -> dict[str, Any]:
    """The launch's configuration: the table's, without descriptors where TMA cannot address the matrices."""
    rows, depth = x.shape[0], x.shape[-1]
    describable = launch.describable(*(matrix for matrix in matrices if matrix is not None))
    shape = {"rows": rows, "columns": columns, "depth": depth, "describable": int(describable), **shape}
    config = launch.config(name, launch.device_family(x.device), x.dtype, **shape)
    return {**config, "descriptor": config["descriptor"] and describable} if "descriptor" in config else config


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
    epilogue: str = "activation",
    activation: str = "none",
    bias: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    extra: torch.Tensor | None = None,
    save_pre: bool = False,
    rotation: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch of :func:`linear_kernel`, or cuBLAS's product and what follows it: (out (M, N), the pre-activation if ``save_pre``).

    ``name``: of the configuration. x and extra contiguous, in one dtype, the weight in any. ``epilogue``: "activation" (bias, activation;
    of "swiglu" weight and bias have 2 * N rows), "residual" (bias, scale, plus extra), or "gradient" (times the activation's slope at
    extra; the weight is (K, N), and of "swiglu" extra and out are (M, 2 * N), as the pre-activation is). ``rotation`` (2, tokens, D / 2):
    the results without an activation are queries, keys and values, packed, and the first two are turned: in the epilogue where the
    configuration says "rotate", else by a launch of its own.
    """
    rows, gradient = x.shape[0], epilogue == "gradient"
    weight = weight.to(x.dtype).contiguous()
    gated, gated_weight = activation == "swiglu", activation == "swiglu" and not gradient
    columns = weight.shape[1] if gradient else activated_columns(activation, weight.shape[0])
    one, both = (rows, columns), (rows, 2, columns) if gated else (rows, columns)
    out = torch.empty(both if gradient else one, dtype=x.dtype, device=x.device)
    pre = torch.empty(both, dtype=x.dtype, device=x.device) if save_pre else None
    results = out.flatten(1), None if pre is None else pre.flatten(1)
    if rows == 0:
        return results
    extra = extra.view(both) if gradient else pre if save_pre else extra
    weight = weight.view(2, columns, -1) if gated_weight else weight
    head = 0 if rotation is None else 2 * rotation.shape[-1]
    config = _configuration(name, x, columns, [x, weight, out, extra], precision=precision, activation=activation, head=head)
    options = {"EPILOGUE": epilogue, "ACTIVATION": activation}
    vectors = _contiguous(bias, scale)
    turned = config.pop("rotate", False) and rotation is not None
    if config.pop("backend") == "cublas":
        _by_cublas(x, weight, vectors, extra, out, options, config)
    else:
        if turned:
            options["EPILOGUE"], extra = "rotation", rotation.contiguous()
        _by_kernel(x, weight, vectors, extra, out, rotation.shape[1] if turned else None, {"PRECISION": precision, **options}, config)
    if rotation is not None and not turned:
        q, k, _ = out.view(-1, rotation.shape[1], 3, columns // (3 * head), head).unbind(2)
        rotate(q, k, q, k, rotation)
    return results


def _by_cublas(
    x: torch.Tensor,
    weight: torch.Tensor,
    vectors: tuple[torch.Tensor | None, ...],
    extra: torch.Tensor | None,
    out: torch.Tensor,
    options: dict[str, str],
    config: dict[str, Any],
) -> None:
    """cuBLAS's product, and what is left to do by :func:`linear_epilogue`."""
    rows, columns = out.shape[0], out.shape[-1]
    if options == {"EPILOGUE": "activation", "ACTIVATION": "none"}:
        bias = vectors[0]
        torch.addmm(bias.to(x.dtype), x, weight.T, out=out) if bias is not None else torch.mm(x, weight.T, out=out)
        return
    product = x @ (weight if options["EPILOGUE"] == "gradient" else weight.flatten(0, -2).T)
    programs = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(columns, config["BLOCK_N"])
    launch.launch(linear_epilogue, (programs,), product, vectors, extra, out, rows, columns, **options, **config)


def _by_kernel(
    x: torch.Tensor,
    weight: torch.Tensor,
    vectors: tuple[torch.Tensor | None, ...],
    extra: torch.Tensor | None,
    out: torch.Tensor,
    tokens: int | None,
    options: dict[str, str],
    config: dict[str, Any],
) -> None:
    """:func:`linear_kernel`; with ``tokens`` extra is a rotation."""
    rows, columns = out.shape[0], out.shape[-1]
    descriptor, persistent = config.pop("descriptor"), config.pop("persistent", False)
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    gradient, gated = options["EPILOGUE"] == "gradient", options["ACTIVATION"] == "swiglu"
    tile_n = block_n // 2 if gated and not gradient else block_n
    piece = tile_n // config["PARTS"]
    if tokens is not None and piece != 2 * extra.shape[-1]:
        raise ValueError(f"a rotation of heads of {2 * extra.shape[-1]} columns in pieces of {piece}: they must be one head each")
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(columns, tile_n)
    programs = min(tiles, launch.multiprocessors(x.device)) if persistent else tiles
    weight_block = [block_k, block_n] if gradient else [2, tile_n, block_k] if gated else [block_n, block_k]
    launch.launch(
        linear_kernel,
        (programs,),
        _tiles(x, [block_m, block_k], descriptor),
        _tiles(weight, weight_block, descriptor),
        vectors,
        _tiles(extra, _piece(extra, block_m, piece), descriptor and tokens is None),
        _tiles(out, _piece(out, block_m, piece), descriptor),
        rows,
        columns,
        x.shape[1],
        tokens,
        tiles if persistent else None,
        DESCRIPTOR=descriptor,
        **options,
        **config,
    )


def _piece(tensor: torch.Tensor | None, rows: int, columns: int) -> list[int]:
    """The block of a piece of a tile of (rows, columns), or of one of two that stand side by side, (rows, 2, columns)."""
    return [rows, 1, columns] if tensor is not None and tensor.ndim == 3 else [rows, columns]


def weight_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    precision: str,
    *,
    activation: str = "none",
    scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One launch of :func:`weight_gradient_kernel`: (dweight (N, K) in x's dtype, sum_k weight * grad.T @ activation(x) (N,) float32 or
    None).

    grad (M, N) and x (M, K), of "swiglu" (M, 2 * K), contiguous, of one dtype; the weight in any. With ``scale`` the gradient is scaled by
    it, and the second result is the gradient of the scale, but for the bias's share in it.
    """
    (rows, columns), depth = grad.shape, activated_columns(activation, x.shape[1])
    if rows == 0:
        return x.new_zeros((columns, depth)), None if scale is None else x.new_zeros(columns, dtype=torch.float32)
    gated = activation == "swiglu"
    x = x.view(rows, 2, depth) if gated else x
    weight = None if weight is None else weight.to(x.dtype).contiguous()
    out = torch.empty((columns, depth), dtype=x.dtype, device=x.device)
    config = _configuration("weight_gradient", x, columns, [grad, x, out, weight], precision=precision, activation=activation)
    descriptor = config.pop("descriptor")
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    blocks = triton.cdiv(depth, block_k)
    partial = None if scale is None else torch.empty((blocks, columns), dtype=torch.float32, device=x.device)
    launch.launch(
        weight_gradient_kernel,
        (triton.cdiv(columns, block_n) * blocks,),
        _tiles(grad, [block_m, block_n], descriptor),
        _tiles(x, [block_m, 1, block_k] if gated else [block_m, block_k], descriptor),
        _tiles(out, [block_n, block_k], descriptor),
        *_contiguous(scale),
        _tiles(weight, [block_n, block_k], descriptor),
        partial,
        rows,
        columns,
        depth,
        ACTIVATION=activation,
        DESCRIPTOR=descriptor,
        PRECISION=precision,
        **config,
    )
    return out, None if partial is None else partial.sum(0)


@torch.library.custom_op("dpt::linear_weight_gradient", mutates_args=())
def _weight_gradient_op(
    grad: torch.Tensor, x: torch.Tensor, activation: str, scale: torch.Tensor | None, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    precision = launch.input_precision(x.dtype)
    gradient, scale_gradient = weight_gradient(grad, x, precision, activation=activation, scale=scale, weight=weight)
    return gradient, grad.new_empty(0, dtype=torch.float32) if scale_gradient is None else scale_gradient


@_weight_gradient_op.register_fake
def _(grad, x, activation, scale, weight):
    columns, depth = grad.shape[1], activated_columns(activation, x.shape[1])
    return x.new_empty((columns, depth)), x.new_empty(0 if scale is None else columns, dtype=torch.float32)
