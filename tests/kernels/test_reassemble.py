"""dpt.kernels.reassemble against plain PyTorch, by the rule of parity.py: the readout projection and the transposed convolution."""

import contextlib
import functools
import math

import checks
import pytest
import torch
from both_passes import assert_op_parity

from dpt.kernels import launch, reassemble
from dpt.kernels.reassemble import readout_project, readout_project_ref, transposed_conv, transposed_conv_ref
from dpt.kernels.tools.parity import assert_parity

READOUT_NAMES = ("tokens", "weight", "bias")
CONV_NAMES = ("x", "weight", "bias")
READOUT_KERNELS = ("readout_project", "readout_project_backward")
CUBLAS = {"backend": "cublas", "BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


def readout_inputs(batch, patches, features, dtype, device, bias=True):
    """tokens (B, 1+N, D), weight (D, 2D), bias (D,) or None; pre-activations of about 1, on both sides of GELU."""
    random = functools.partial(torch.randn, device=device)
    tokens, weight = random(batch, 1 + patches, features), random(features, 2 * features) / (2 * features) ** 0.5
    return [t if t is None else t.to(dtype) for t in (tokens, weight, random(features) if bias else None)]


def conv_inputs(shape, channels, stride, dtype, device, bias=True):
    """x (B, C, H, W) channels-last, weight (C, O, s, s), bias (O,) or None."""
    random = functools.partial(torch.randn, device=device)
    weight = random(shape[1], channels, stride, stride) / shape[1] ** 0.5
    inputs = [random(shape).contiguous(memory_format=torch.channels_last), weight, random(channels) if bias else None]
    return [t if t is None else t.to(dtype) for t in inputs]


def assert_readout_parity(inputs, activation="gelu"):
    op, reference = (functools.partial(function, activation=activation) for function in (readout_project, readout_project_ref))
    assert_op_parity(op, reference, inputs, READOUT_NAMES)


def assert_conv_parity(inputs):
    """The bias's gradient, of one channel a single number, is a sum of terms that may cancel: ``tiny`` counts from the terms."""
    with torch.no_grad():
        cotangent = torch.randn_like(transposed_conv_ref(*inputs))
    terms = {"bias": cotangent.double().abs().sum((0, 2, 3)).max().item()}
    assert_op_parity(transposed_conv, transposed_conv_ref, inputs, CONV_NAMES, cotangent, terms)


READOUT = [  # B, N, D, bias: one patch; tiles that two images share; one token past a tile; partial tiles of features and of depth
    (1, 1, 32, True),
    (3, 17, 48, False),
    (2, 65, 96, True),
    (1, 197, 64, True),
    (3, 63, 20, True),
    (1, 5, 128, False),
]


@pytest.mark.parametrize(("batch", "patches", "features", "bias"), READOUT, ids=str)
def test_readout_parity(batch, patches, features, bias, dtype, device, path):
    """Output and every gradient, with and without bias, under the tables of both kinds of architecture."""
    assert_readout_parity(readout_inputs(batch, patches, features, dtype, device, bias))


@pytest.mark.parametrize("kernel", READOUT_KERNELS)
@pytest.mark.parametrize(("batch", "patches", "features", "bias"), READOUT, ids=str)
def test_readout_parity_cublas(batch, patches, features, bias, kernel, dtype, device):
    """The other backend: PyTorch's product with the epilogue kernel after it, in either pass."""
    with launch.using(kernel, CUBLAS):
        assert_readout_parity(readout_inputs(batch, patches, features, dtype, device, bias))


@pytest.mark.parametrize("kernel", ("", *READOUT_KERNELS))
def test_readout_by_tanh(kernel, dtype, device):
    """The other GELU in both passes of both backends; far out, where the slopes are 1 or 0, too."""
    with launch.using(kernel, CUBLAS) if kernel else contextlib.nullcontext():
        assert_readout_parity(readout_inputs(3, 17, 48, dtype, device), "gelu_tanh")
        tokens, weight, _ = readout_inputs(1, 6, 32, dtype, device, bias=False)
        assert_readout_parity([tokens * 20, weight.copy_(torch.eye(32, 64)), None], "gelu_tanh")


CONV = [  # (B, C, H, W), O, s, bias: each stride; fewer and more channels out than in; odd maps, one pixel; tiles that two images share
    ((1, 32, 5, 7), 48, 2, True),
    ((3, 48, 1, 1), 32, 4, True),
    ((2, 20, 3, 5), 33, 1, False),
    ((1, 96, 12, 20), 64, 2, False),
    ((3, 64, 5, 7), 20, 4, True),
    ((1, 256, 3, 2), 40, 2, True),
    ((1, 32, 33, 18), 8, 1, True),
    ((1, 1, 5, 7), 1, 3, True),  # dimensions of size 1, whose strides PyTorch leaves open
    ((2, 7, 1, 1), 1, 1, True),
]


@pytest.mark.parametrize(("shape", "channels", "stride", "bias"), CONV, ids=str)
def test_conv_parity(shape, channels, stride, bias, dtype, device, path):
    """Output and every gradient; where each tap's pixels go, and nothing between them is left out."""
    assert_conv_parity(conv_inputs(shape, channels, stride, dtype, device, bias))


@pytest.mark.parametrize(("shape", "channels", "stride", "bias"), CONV, ids=str)
def test_conv_parity_cudnn(shape, channels, stride, bias, dtype, device):
    """The other backend: PyTorch's convolution with the bias after it, channels-last whatever that gives."""
    inputs = conv_inputs(shape, channels, stride, dtype, device, bias)
    with launch.using("transposed_conv", {"backend": "cudnn"}):
        assert_conv_parity(inputs)
        assert transposed_conv(*inputs).is_contiguous(memory_format=torch.channels_last)


def test_backends(monkeypatch, device):
    """The table's backend really decides what runs, in each pass."""
    launches = checks.spied_launches(monkeypatch)
    tokens = [t.requires_grad_() for t in readout_inputs(1, 5, 32, torch.float32, device)]
    maps = conv_inputs((1, 32, 2, 3), 16, 2, torch.float32, device)
    for others in ({}, {**dict.fromkeys(READOUT_KERNELS, CUBLAS), "transposed_conv": {"backend": "cudnn"}}):
        with contextlib.ExitStack() as stack:
            for kernel, config in others.items():
                stack.enter_context(launch.using(kernel, config))
            readout_project(*tokens).sum().backward()
            transposed_conv(*maps)
    assert [name for name, _ in launches] == ["_project_kernel"] * 3 + ["_readout_epilogue"] * 2 + ["conv3x3_epilogue"]


SHIPPED_READOUT = {f"{kernel} {name}": c for kernel in READOUT_KERNELS for name, c in checks.shipped_configurations(kernel).items()}
SHIPPED_CONV = checks.shipped_configurations("transposed_conv")


@pytest.mark.parametrize("name", SHIPPED_READOUT)
def test_every_shipped_readout_configuration(name, device):
    """Blocks that the tables keep for other dtypes or GPUs compute the same: 40 features and 3 * 50 tokens leave each with partial ones."""
    shipped = SHIPPED_READOUT[name]
    with shipped.used():
        assert_readout_parity(readout_inputs(3, 50, 40, shipped.dtype, device))


@pytest.mark.parametrize("name", SHIPPED_CONV)
def test_every_shipped_conv_configuration(name, device):
    """As above: 3 * 35 pixels, 40 channels to 72."""
    shipped = SHIPPED_CONV[name]
    with shipped.used():
        assert_conv_parity(conv_inputs((3, 40, 5, 7), 72, 2, shipped.dtype, device))


def test_nan_stays_in_its_token(dtype, device, path):
    """20 features fill no block: what lies behind a token's last, the next token, takes no part."""
    tokens, weight, bias = readout_inputs(1, 6, 20, dtype, device)
    tokens[0, 4] = float("nan")
    assert readout_project(tokens, weight, bias).isnan().all(2).tolist() == [[False, False, False, True, False, False]]


def test_class_token(device):
    """It reaches every patch of its own image, and no other; its gradient is the sum of theirs; it has no row of its own in the output."""
    tokens, weight, bias = readout_inputs(2, 5, 32, torch.float32, device)
    out = readout_project(tokens, weight, bias)
    changed = tokens.clone()
    changed[0, 0] += 1
    difference = (readout_project(changed, weight, bias) - out).abs().amax(2)
    assert out.shape == (2, 5, 32) and (difference[0] > 0).all() and not difference[1].any()
    weight[:, 32:] = 0
    leaves = [t.detach().requires_grad_() for t in (tokens, weight, bias)]
    gradient, weight_gradient, bias_gradient = torch.autograd.grad(readout_project(*leaves).sum(), leaves)
    assert not gradient[:, 0].any() and gradient[:, 1:].any()
    class_part = torch.einsum("bo,bi->oi", readout_slopes(*leaves).sum(1), tokens[:, 0])
    torch.testing.assert_close(weight_gradient[:, 32:], class_part)
    torch.testing.assert_close(bias_gradient, readout_slopes(*leaves).sum((0, 1)))


def readout_slopes(tokens, weight, bias):
    """GELU's derivative at the pre-activation (B, N, D), from the error function."""
    tokens, weight, bias = (t.detach().double() for t in (tokens, weight, bias))
    features = tokens.shape[-1]
    pre = tokens[:, 1:] @ weight[:, :features].T + tokens[:, :1] @ weight[:, features:].T + bias
    return (0.5 * (1 + torch.erf(pre / math.sqrt(2))) + pre * torch.exp(-pre * pre / 2) / math.sqrt(2 * math.pi)).float()


def test_gelu_far_out(dtype, device, path):
    """Pre-activations of +-20 and beyond, exact ones: the identity or 0, slopes of 1 or 0, and no NaN."""
    tokens, weight, _ = readout_inputs(1, 6, 32, dtype, device, bias=False)
    weight.copy_(torch.eye(32, 64))
    assert_readout_parity([tokens * 20, weight, None])


@pytest.mark.parametrize("stride", (1, 2, 3, 4))
def test_conv_borders(stride, dtype, device):
    """A map of ones and a weight of ones: every pixel is C, exactly, to the last row and column."""
    x = torch.ones(2, 32, 5, 7, device=device, dtype=dtype)
    out = transposed_conv(x, torch.ones(32, 40, stride, stride, device=device, dtype=dtype))
    assert out.shape == (2, 40, 5 * stride, 7 * stride) and (out == 32).all()


def test_conv_of_one_pixel_is_its_taps(device):
    """One channel, one pixel: the output is the weight, row by row as it stands, beside zeros."""
    x = torch.zeros(1, 16, 3, 2, device=device)
    x[0, 5, 1, 1] = 1
    weight = torch.randn(16, 24, 4, 4, device=device)
    out = transposed_conv(x, weight)
    assert torch.equal(out[0, :, 4:8, 4:8], weight[5])
    out[0, :, 4:8, 4:8] = 0
    assert not out.any()


def test_readout_layouts(device, path):
    """Tokens and weights of any strides are right: sliced, transposed, expanded."""
    inputs = readout_inputs(3, 9, 32, torch.float32, device)
    expected = readout_project(*inputs)
    assert expected.is_contiguous()
    for layout in (
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.cat([t, t], -2)[..., : t.shape[-2], :] if t.dim() > 1 else t,
    ):
        changed = [layout(t) for t in inputs]
        assert not changed[0].is_contiguous() and torch.equal(readout_project(*changed), expected)
    tokens, weight, bias = inputs
    assert_readout_parity([tokens[:1].expand(3, -1, -1), weight, bias])


def test_conv_layouts(device, path):
    """A map and a weight of any strides are right, and the output is channels-last."""
    inputs = conv_inputs((2, 32, 5, 7), 24, 2, torch.float32, device)
    expected = transposed_conv(*inputs)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    for layout in (
        lambda t: t.contiguous(),
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    ):
        out = transposed_conv(*map(layout, inputs))
        assert torch.equal(out, expected) and out.is_contiguous(memory_format=torch.channels_last)


def test_expanded_gradients(device):
    """Cotangents of stride 0 and of transposed memory, for both ops."""
    checks.assert_expanded_gradient(readout_project, readout_project_ref, readout_inputs(2, 5, 32, torch.float32, device))
    for stride in (1, 2):
        checks.assert_expanded_gradient(transposed_conv, transposed_conv_ref, conv_inputs((2, 16, 3, 4), 24, stride, torch.float32, device))


def ops(device):
    """(op, inputs) of each, with and without bias."""
    for bias in (True, False):
        yield readout_project, readout_inputs(2, 5, 32, torch.float32, device, bias)
        yield transposed_conv, conv_inputs((2, 16, 3, 4), 24, 2, torch.float32, device, bias)


def test_reproducible_gradients(device, path):
    """The same call gives the same bits."""
    for op, inputs in ops(device):
        checks.assert_reproducible(op, inputs)


def test_each_gradient_alone(device):
    """Whichever input needs a gradient, it is the one it has when all do; and where none does, nothing is recorded."""
    for op, inputs in ops(device):
        checks.assert_gradients_alone(op, inputs)


def test_saved_memory(device):
    """Saved for the backward: the inputs; no pre-activation, no concatenated tokens, no gathered map."""
    for op, inputs in ops(device):
        assert checks.saved_shapes(op, inputs) == sorted(tuple(t.shape) for t in inputs if t is not None)


def test_autocast_is_followed(device):
    """Under autocast everything is taken in autocast's dtype, as PyTorch's products take it; gradients are float32."""
    for op, inputs in ops(device):
        checks.assert_follows_autocast(op, inputs)


def test_parameters_are_saved(device):
    """Blind spot: copies of the weights in autocast's dtype, kept from the forward to the backward."""
    for op, inputs in ops(device):
        checks.assert_parameters_are_saved(op, inputs)


def test_empty_batch(device):
    """A batch of nothing gives nothing, and gradients of zeros, without a launch of programs."""
    checks.assert_empty_batch(readout_project, readout_inputs(2, 5, 32, torch.float32, device), (0, 5, 32))
    checks.assert_empty_batch(transposed_conv, conv_inputs((2, 16, 3, 4), 24, 2, torch.float32, device), (0, 24, 6, 8))


@pytest.mark.parametrize(("matmul", "conv"), (("tf32", "ieee"), ("ieee", "tf32")))
def test_precision_follows_pytorch(matmul, conv, monkeypatch, device):
    """float32 in TF32 exactly where PyTorch's own switch says so: that for matmuls for the readout, that for convolutions for the other."""
    launches = checks.spied_launches(monkeypatch)
    torch.backends.cuda.matmul.fp32_precision = matmul  # the fixture `exact` sets them back
    torch.backends.cudnn.conv.fp32_precision = conv
    tokens, weight, bias = readout_inputs(1, 5, 32, torch.float32, device)
    readout_project(tokens.requires_grad_(), weight, bias).sum().backward()
    transposed_conv(*conv_inputs((1, 16, 3, 4), 24, 2, torch.float32, device))
    assert [options["PRECISION"] for _, options in launches] == [matmul] * 2 + [conv]


@pytest.mark.parametrize(("images", "patches"), ((2, 2**24 + 63), (3, 2**23 + 63)))
def test_readout_offsets_beyond_int32(images, patches, far):
    """Offsets are 64 bits wide: of a token in its image, which alone has more than 2^31 elements, and of an image behind others, whose
    stride by itself would fit 32 bits. The far end is read and written, in both passes."""
    features, rows = 128, 16
    assert (images - 1) * patches * features > 2**31
    tokens, grad = far.zeros((images, 1 + patches, features)), far.zeros((images, patches, features))
    for zeros in (tokens[:, 0], tokens[-1, -rows:], grad[-1, -rows:]):
        zeros.copy_(torch.randn(zeros.shape))
    _, weight, bias = readout_inputs(1, 1, features, torch.float16, tokens.device)
    columns = slice(-32, None)  # the narrowest block of any configuration
    for given in (None, grad):
        out = reassemble._readout(tokens, weight, bias, "ieee", "gelu", given)[-1, -rows:, columns]

        def expected(dtype, given=given):
            few = torch.cat([tokens[-1:, :1], tokens[-1:, -rows:]], 1).to(dtype)
            if given is None:
                return readout_project_ref(few, weight.to(dtype), bias.to(dtype))[0, :, columns]
            pre = few[:, 1:] @ weight[:, :features].T.to(dtype) + few[:, :1] @ weight[:, features:].T.to(dtype) + bias.to(dtype)
            pre.requires_grad_()
            return torch.autograd.grad(torch.nn.functional.gelu(pre), pre, given[-1:, -rows:].to(dtype))[0][0, :, columns]

        assert_parity(out, expected(torch.float64), expected(torch.float16))


@pytest.mark.parametrize(("images", "side"), ((2, 4112), (3, 2912)))
def test_conv_offsets_beyond_int32(images, side, far):
    """As above, for the transposed convolution: the map, and the result with as many channels in all."""
    depth, channels = 128, 32
    assert (images - 1) * side * side * depth > 2**31
    x = far.zeros((images, depth, side, side), channels_last=True)
    corner = x[-1:, :, -1:, -16:]
    corner.copy_(torch.randn(corner.shape))
    _, weight, bias = conv_inputs((1, depth, 1, 1), channels, 2, torch.float16, x.device)
    out = reassemble._transposed_conv(x, weight, bias, "ieee")[-1:, :, -1, -31::2]  # the last program's tap: odd rows, odd columns
    expected = [
        transposed_conv_ref(*(t.to(dtype) for t in (corner, weight, bias)))[..., -1, -31::2] for dtype in (torch.float64, torch.float16)
    ]
    assert_parity(out, *expected)


def test_opcheck(device):
    """PyTorch's own checks of the registrations: schema, fake kernels, autograd, compilation with static and dynamic shapes."""
    for op, inputs in ops(device):
        registered = torch.ops.dpt.readout_project if op is readout_project else torch.ops.dpt.transposed_conv
        if op is readout_project:
            grad = torch.randn(2, 5, 32, device=device)
            torch.library.opcheck(torch.ops.dpt.readout_project_backward.default, (grad, *inputs, "gelu_tanh"))
        leaves = tuple(t if t is None else t.requires_grad_() for t in inputs)
        torch.library.opcheck(registered.default, (*leaves, "gelu") if op is readout_project else leaves)


def test_compile_fullgraph(device):
    """torch.compile takes both ops whole, forward and backward, without a graph break."""
    for op, inputs in ops(device):
        checks.assert_compiles(op, inputs)


def test_export(device):
    """torch.export keeps each op as one node, with any number of tokens and at any height."""
    tokens, weight, bias = readout_inputs(1, 6, 32, torch.float32, device)
    other = torch.randn(1, 12, 32, device=device)
    checks.assert_exports(lambda x: readout_project(x, weight, bias), tokens, other, 1, "dpt.readout_project", least=3)
    x, kernel, shift = conv_inputs((1, 16, 3, 4), 24, 2, torch.float32, device)
    checks.assert_exports(lambda x: transposed_conv(x, kernel, shift), x, torch.randn(1, 16, 5, 4, device=device), 2, "dpt.transposed_conv")


TOKENS, WEIGHT = torch.zeros(2, 5, 8), torch.zeros(8, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((None, WEIGHT), TypeError, "tokens is a NoneType"),
        ((TOKENS.double(), WEIGHT), TypeError, "tokens is torch.float64: it must be float32, float16 or bfloat16"),
        ((TOKENS[0], WEIGHT), ValueError, r"tokens has shape \(5, 8\): it must be \(B, 1\+N, D\)"),
        ((TOKENS[:, :1], WEIGHT), ValueError, r"tokens has shape \(2, 1, 8\).*N at least 1"),
        ((TOKENS[..., :0], WEIGHT), ValueError, "C at least 1"),
        ((TOKENS, WEIGHT[:, :8]), ValueError, r"weight has shape \(8, 8\): it must be \(8, 16\)"),
        ((TOKENS, WEIGHT.half()), TypeError, "weight is torch.float16 and the input torch.float32"),
        ((TOKENS, None), TypeError, "weight is a NoneType"),
        ((TOKENS, WEIGHT, torch.zeros(16)), ValueError, r"bias has shape \(16,\): it must be \(8,\)"),
        ((TOKENS, WEIGHT, torch.zeros(8).half()), TypeError, "bias is torch.float16"),
        ((TOKENS, WEIGHT.to("meta")), ValueError, "weight is on meta and the input on cpu"),
        ((TOKENS, WEIGHT, None, "relu"), ValueError, "activation='relu': it must be 'gelu' or 'gelu_tanh'"),
    ],
)
def test_readout_errors(arguments, error, says):
    """Each wrong argument is refused by name, with the rule."""
    with pytest.raises(error, match=says):
        readout_project(*arguments)


MAP, KERNEL = torch.zeros(2, 8, 3, 4), torch.zeros(8, 6, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((MAP.double(), KERNEL), TypeError, "x is torch.float64"),
        ((MAP[0], KERNEL), ValueError, r"x has shape \(8, 3, 4\): must be \(B, C, H, W\)"),
        ((MAP[:, :, :0], KERNEL), ValueError, "x has shape"),
        ((MAP, KERNEL[:, :, :1]), ValueError, r"weight has shape \(8, 6, 1, 2\): it must be \(C, O, s, s\)"),
        ((MAP, KERNEL[0]), ValueError, r"weight has shape \(6, 2, 2\)"),
        ((MAP, KERNEL[:, :0]), ValueError, r"weight has shape \(8, 0, 2, 2\)"),
        ((MAP, KERNEL[:4]), ValueError, r"weight has shape \(4, 6, 2, 2\): it must be \(8, 6, 2, 2\)"),
        ((MAP, KERNEL.half()), TypeError, "weight is torch.float16"),
        ((MAP, KERNEL, torch.zeros(8)), ValueError, r"bias has shape \(8,\): it must be \(6,\)"),
        ((torch.zeros(1, 8, 1, 32768), KERNEL), ValueError, "H and W from 1 to 32767"),
    ],
)
def test_conv_errors(arguments, error, says):
    """Each wrong argument is refused by name, with the rule."""
    with pytest.raises(error, match=says):
        transposed_conv(*arguments)


def test_references_by_hand():
    """The references themselves, by sums written out: a mistake in the order of patch and class, or of rows and columns, passes above."""
    tokens, weight, bias = (t.double() for t in readout_inputs(2, 3, 4, torch.float32, "cpu"))
    expected = torch.empty(2, 3, 4, dtype=torch.float64)
    for b in range(2):
        for n in range(3):
            for d in range(4):
                pre = bias[d] + sum(weight[d, k] * tokens[b, 1 + n, k] + weight[d, 4 + k] * tokens[b, 0, k] for k in range(4))
                expected[b, n, d] = pre / 2 * (1 + math.erf(pre / math.sqrt(2)))
    torch.testing.assert_close(readout_project_ref(tokens, weight, bias), expected)
    x, kernel, shift = (t.double() for t in conv_inputs((2, 3, 2, 4), 5, 2, torch.float32, "cpu"))
    expected = torch.empty(2, 5, 4, 8, dtype=torch.float64)
    for row in range(4):
        for column in range(8):
            expected[:, :, row, column] = x[:, :, row // 2, column // 2] @ kernel[:, :, row % 2, column % 2] + shift
    torch.testing.assert_close(transposed_conv_ref(x, kernel, shift), expected)
