"""dpt.kernels.conv_norm_relu against plain PyTorch. The kernel is residual_conv's, whose tests cover tiles, borders and offsets: here is
what only this op has, more channels in than out or fewer, the ReLU in the epilogue of one convolution, and its own backward."""

import contextlib

import checks
import pytest
import torch
from both_passes import assert_op_parity

from dpt.kernels import launch
from dpt.kernels.conv_norm_relu import conv_norm_relu, conv_norm_relu_conv1x1, conv_norm_relu_conv1x1_ref, conv_norm_relu_ref

pytestmark = pytest.mark.usefixtures("own_convolution")

NAMES = ("x", "weight", "bias", "norm weight", "norm bias")


def inputs(shape, out, dtype, device, bias=True, norm=True):
    """(x, weight, bias, norm's weight and bias), random."""
    _, channels, *_ = shape
    x, weight = torch.randn(shape, device=device), torch.randn(out, channels, 3, 3, device=device) / (9 * channels) ** 0.5
    maps = [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight)]
    shift = (torch.randn(out, device=device) * 0.5).to(dtype) if bias else None
    norms = [1 + 0.3 * torch.randn(out, device=device), 0.3 * torch.randn(out, device=device)] if norm else [None, None]
    return [*maps, shift, *norms]


def call(function, relu=True):
    """``function`` of the five inputs alone, with fixed statistics, in whatever dtype they come."""

    def called(x, weight, bias, norm_weight, norm_bias):
        if norm_weight is None:
            return function(x, weight, bias, relu=relu)
        mean, variance = (torch.linspace(*ends, len(weight)).to(norm_weight) for ends in ((-0.5, 0.5), (1.4, 0.4)))
        return function(x, weight, bias, norm=(norm_weight, norm_bias, mean, variance, 1e-5), relu=relu)

    return called


OP, REFERENCE = call(conv_norm_relu), call(conv_norm_relu_ref)
SMALL = ((1, 16, 3, 4), 24)


@pytest.mark.parametrize(
    ("shape", "out", "relu", "parts"),
    [
        ((2, 48, 5, 7), 24, False, {"norm": False}),  # a depth head's
        ((1, 64, 12, 20), 64, True, {"bias": False}),  # a segmentation head's
        ((1, 32, 33, 18), 96, True, {"norm": False}),
        ((3, 20, 1, 1), 36, True, {}),
        ((1, 128, 3, 1), 16, False, {"bias": False, "norm": False}),
    ],
    ids=str,
)
def test_parity(shape, out, relu, parts, dtype, device, path):
    """Output and every gradient, with and without each part, both ways of loading."""
    assert_op_parity(call(conv_norm_relu, relu), call(conv_norm_relu_ref, relu), inputs(shape, out, dtype, device, **parts), NAMES)


def test_parity_cudnn(exact_products, device):
    """The other backend: PyTorch's convolution with the epilogue kernel after it."""
    with launch.using("conv3x3", {"backend": "cudnn"}):
        assert_op_parity(OP, REFERENCE, inputs((2, 24, 5, 7), 40, torch.float32, device), NAMES)


def test_without_kernels(exact_products, device):
    """The norm folded into the convolution, which is what runs where there are no kernels."""
    with launch.only():
        assert_op_parity(OP, REFERENCE, inputs((2, 24, 5, 7), 40, torch.float32, device), NAMES)


@pytest.mark.parametrize("kernels", (True, False), ids=("kernels", "without"))
@pytest.mark.parametrize("norm", (True, False), ids=("norm", "bias"))
def test_a_convolution_behind_it(norm, kernels, exact_products, device):
    """A segmentation head's classifier: output and every gradient, with kernels and without."""

    def called(function):
        def call(x, weight, bias, norm_weight, norm_bias, last_weight, last_bias):
            statistics = (torch.zeros_like(norm_weight), torch.ones_like(norm_weight), 1e-5) if norm else None
            return function(x, weight, bias, last_weight, last_bias, norm=norm and (norm_weight, norm_bias, *statistics) or None)

        return call

    given = inputs((2, 24, 5, 7), 40, torch.float32, device, bias=not norm, norm=norm)
    given += [torch.randn(19, 40, 1, 1, device=device) / 40**0.5, torch.randn(19, device=device)]
    with contextlib.nullcontext() if kernels else launch.only():
        assert_op_parity(called(conv_norm_relu_conv1x1), called(conv_norm_relu_conv1x1_ref), given, (*NAMES, "last weight", "last bias"))


def test_one_launch(device, monkeypatch):
    """Norm and ReLU are in the convolution's launch; the backward is one more."""
    launches = checks.spied_launches(monkeypatch)
    leaves = [t.requires_grad_() for t in inputs(*SMALL, torch.float32, device)]
    out = OP(*leaves)
    assert len(launches) == 1
    torch.autograd.grad(out.sum(), leaves)
    assert len(launches) == 2


def test_saved_memory(device):
    """Saved for the backward: x, y and the parameters; no map before the norm."""
    given = inputs(*SMALL, torch.float32, device)
    maps = [shape for shape in checks.saved_shapes(OP, given) if len(shape) == 4 and shape[0] == 1]
    assert maps == [(1, 16, 3, 4), (1, 24, 3, 4)]


def test_gradients(dtype, device, path):
    """Alone as together, the same bits twice, for cotangents of any strides."""
    given = inputs(*SMALL, dtype, device)
    checks.assert_gradients_alone(OP, given)
    checks.assert_reproducible(OP, given)
    checks.assert_expanded_gradient(OP, REFERENCE, given)


def test_layouts(dtype, device, path):
    """Any layout is right, and the output is channels-last."""
    x, weight, *rest = inputs(*SMALL, dtype, device)
    expected = OP(x, weight, *rest)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    for make in (torch.Tensor.contiguous, lambda t: torch.stack([t, t], -1)[..., 0]):
        assert torch.equal(OP(make(x), make(weight), *rest), expected)


def test_nan_passes(dtype, device, path, monkeypatch):
    """NaN in, NaN out, where a tap sees it, and nowhere else. cuDNN may fill the image."""
    launches = checks.spied_launches(monkeypatch)
    given = inputs((2, 32, 9, 11), 32, dtype, device)
    given[0][0, 3, 4, 4] = float("nan")
    out = OP(*given)
    must = REFERENCE(*(t.cpu().double() for t in given)).isnan()
    image = must.flatten(1).any(1)[:, None, None, None].expand_as(must)
    checks.assert_nan(out, must, image if checks.by_cudnn(launches) else must)


def test_autocast_and_empty_batch(device):
    """Autocast's dtype is followed; nothing gives nothing."""
    leaves = [t.requires_grad_() for t in inputs(*SMALL, torch.float32, device)]
    with torch.autocast(device.type, dtype=torch.float16):
        out = OP(*leaves)
    halves = [t.detach().half() if t.dim() == 4 else t.detach() for t in leaves]  # the vectors keep their precision
    assert out.dtype == torch.float16 and torch.equal(out, OP(*halves))
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(out.float().sum(), leaves))
    checks.assert_empty_batch(OP, [t.detach() for t in leaves], (0, 24, 3, 4))


def test_autocast_keeps_the_weight(device):
    """Kept for the backward is the parameter itself, no copy in half precision."""
    checks.assert_autocast_keeps(OP, inputs(*SMALL, torch.float32, device), 1)


def test_opcheck(device, path):
    """PyTorch's own checks of both registrations."""
    x, weight, bias, norm_weight, norm_bias = (t.requires_grad_() for t in inputs(*SMALL, torch.float32, device))
    mean, variance = torch.zeros(24, device=device), torch.ones(24, device=device)
    torch.library.opcheck(torch.ops.dpt.conv_norm_relu.default, (x, weight, bias, norm_weight, norm_bias, mean, variance, 1e-5, True))
    grad = torch.randn(1, 24, 3, 4, device=device)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.dpt.conv_norm_relu_backward.default, (grad, x.detach(), weight.detach(), variance, *needs))


def test_compile_and_export(device):
    """One node, without a graph break, at any height."""
    given = inputs(*SMALL, torch.float32, device)
    checks.assert_compiles(OP, given)
    checks.assert_exports(lambda x: OP(x, *given[1:]), given[0], torch.randn(1, 16, 6, 4, device=device), 2, "dpt.conv_norm_relu")


@pytest.mark.parametrize(
    ("last", "error", "says"),
    [
        ((torch.zeros(3, 5, 1, 1), None), ValueError, r"last_weight is \(3, 5, 1, 1\) on cpu: must be \(any, 6, 1, 1\) on cpu"),
        ((torch.zeros(3, 6), None), ValueError, r"last_weight is \(3, 6\)"),
        ((torch.zeros(3, 6, 1, 1).half(), None), TypeError, "last_weight is torch.float16"),
        ((torch.zeros(3, 6, 1, 1), torch.ones(6)), ValueError, r"last_bias is \(6,\) on cpu: must be \(3,\)"),
    ],
)
def test_errors_of_a_convolution_behind_it(last, error, says):
    """Each wrong argument is refused by name, with and without kernels."""
    for context in (contextlib.nullcontext, launch.only):
        with context(), pytest.raises(error, match=says):
            conv_norm_relu_conv1x1(X, WEIGHT, None, *last)


X, WEIGHT, VECTOR = torch.zeros(2, 8, 3, 4), torch.zeros(6, 8, 3, 3), torch.ones(6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        ((X.double(), WEIGHT.double()), {}, TypeError, "x is torch.float64"),
        ((X[0], WEIGHT), {}, ValueError, r"x has shape \(8, 3, 4\)"),
        ((X, WEIGHT.half()), {}, TypeError, "weight is torch.float16"),
        ((X, WEIGHT[0]), {}, ValueError, r"weight has shape \(8, 3, 3\): must be \(O, C, 3, 3\)"),
        ((X, WEIGHT[:, :4]), {}, ValueError, r"weight is \(6, 4, 3, 3\) on cpu: must be \(6, 8, 3, 3\)"),
        ((X, WEIGHT, torch.ones(8)), {}, ValueError, r"bias is \(8,\) on cpu: must be \(6,\)"),
        ((X, WEIGHT), {"norm": (VECTOR, VECTOR, VECTOR, VECTOR)}, ValueError, "norm must be"),
        ((X, WEIGHT), {"norm": (VECTOR, VECTOR, torch.ones(8), VECTOR, 1e-5)}, ValueError, "norm's mean"),
    ],
)
def test_errors(arguments, options, error, says):
    """Each wrong argument is refused by name, with the rule."""
    with pytest.raises(error, match=says):
        conv_norm_relu(*arguments, **options)
