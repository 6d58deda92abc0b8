"""dpt.kernels.upsample against F.interpolate, by the rule of parity.py: forward, backward, and the nine shifted gradients of the head."""

import functools
import itertools

import checks
import exact_resize
import pytest
import torch
import torch.nn.functional as F
from both_passes import assert_op_parity, values_and_gradients

from dpt.kernels import upsample
from dpt.kernels.argmax_upsample import upsample_argmax
from dpt.kernels.parts.maps import is_padded, padded, with_padding
from dpt.kernels.tools.parity import assert_parity
from dpt.kernels.upsample import conv1x1, upsample_backward, upsample_bilinear, upsample_bilinear_ref

ALIGN = pytest.mark.parametrize("align_corners", (True, False), ids=("corners", "centres"))


def resize(size, align_corners, function=upsample_bilinear):
    """The resize as a function of the map alone; ``function``: the op, or the reference."""
    return lambda x: function(x, size, align_corners)


def conv1x1_upsample(x, weight, bias, size, align_corners):
    """As a model's last fusion block ends."""
    return upsample_bilinear(conv1x1(x, weight, bias), size, align_corners)


def reference_function(x, size, align_corners):
    """PyTorch's, but in float64 the exact oracle."""
    return (exact_resize.resize if x.dtype == torch.float64 else upsample_bilinear_ref)(x, size, align_corners)


reference = functools.partial(resize, function=reference_function)


def random_map(shape, dtype, device):
    return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last)


PARITY = [  # (B, C, H, W) to (H', W'): larger, smaller, both at once, from and to sides of 1; partial blocks of pixels and of channels
    ((1, 32, 5, 7), (12, 20)),
    ((3, 48, 12, 20), (5, 7)),
    ((1, 64, 33, 18), (12, 20)),
    ((2, 20, 12, 5), (7, 33)),
    ((1, 128, 1, 1), (5, 7)),
    ((1, 256, 5, 7), (1, 1)),
    ((3, 96, 1, 9), (4, 1)),
    ((1, 1, 5, 7), (33, 18)),
    ((1, 33, 12, 20), (12, 20)),
]


@ALIGN
@pytest.mark.parametrize(("shape", "size"), PARITY, ids=str)
def test_parity(shape, size, align_corners, dtype, device):
    """Output and gradient: both rules of coordinates, every ratio, windows of the gradient that end at a border, masked channels."""
    assert_op_parity(resize(size, align_corners), reference(size, align_corners), [random_map(shape, dtype, device)], ["x"])


FORWARD, BACKWARD = (checks.shipped_configurations(kernel) for kernel in ("upsample_bilinear", "upsample_bilinear_backward"))


@ALIGN
@pytest.mark.parametrize("block", FORWARD)
def test_every_shipped_configuration(block, align_corners, device):
    """Blocks that the tables keep for other widths compute the same: 72 channels and 77 pixels leave each with partial ones."""
    shipped = FORWARD[block]
    with shipped.used():
        x = random_map((2, 72, 5, 7), shipped.dtype, device)
        out = upsample_bilinear(x, (7, 11), align_corners)
    assert_parity(out, *(reference((7, 11), align_corners)(values) for values in (x.double(), x)))


@ALIGN
@pytest.mark.parametrize("block", BACKWARD)
def test_every_shipped_configuration_backward(block, align_corners, device):
    """As above, for the gradient."""
    shipped, size = BACKWARD[block], (7, 11)
    x = torch.randn(2, 72, 5, 9, device=device).to(shipped.dtype)
    with shipped.used():
        assert_op_parity(resize(size, align_corners), reference(size, align_corners), [x], ["x"])


@ALIGN
@pytest.mark.parametrize(("source", "target"), [(32767, 32766), (32766, 32767), (32767, 3)], ids=str)
def test_largest_sides(source, target, align_corners, device):
    """At the largest side that is allowed, coordinates still fit the 32 bits in which they are computed, and weights are not rounded away.
    F.interpolate in float64 is off by 3e-3 here."""
    lower, upper, weight = exact_resize.neighbours(source, target, align_corners)
    blocks = {"BLOCK_P": 16384, "BLOCK_C": 1, "num_warps": 4, "num_stages": 1}
    x, grad = torch.randn(source, device=device), torch.randn(target, device=device)
    with checks.in_few_steps("upsample_bilinear", blocks):
        out = upsample_bilinear(x.view(1, 1, 1, -1), (1, target), align_corners).flatten().cpu()
    with checks.in_few_steps("upsample_bilinear_backward", blocks):
        gradient = upsample_backward(grad.view(1, 1, -1, 1), (source, 1), align_corners).flatten().cpu()
    x, grad = x.cpu().double(), grad.cpu().double()
    torch.testing.assert_close(out.double(), (1 - weight) * x[lower] + weight * x[upper], rtol=0, atol=1e-6)
    expected = torch.zeros(source, dtype=torch.float64).index_add_(0, lower, (1 - weight) * grad).index_add_(0, upper, weight * grad)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-6)


@ALIGN
@pytest.mark.parametrize("size", ((12, 20), (3, 2), (5, 7), (1, 33)), ids=str)
def test_constant_maps(size, align_corners, dtype, device):
    """A map of ones stays one, exactly, at the borders too: the weights sum to 1. In half precision so does a map of any number; in float32
    products with the weights are rounded, here as in PyTorch."""
    numbers = [1.0] * 3 if dtype == torch.float32 else [0.1, -1 / 3, 1000.7]
    x = torch.tensor(numbers, device=device, dtype=dtype)[:, None, None, None].expand(3, 40, 5, 7)
    out = upsample_bilinear(x, size, align_corners)
    assert torch.equal(out, x[:, :, :1, :1].expand_as(out))


@ALIGN
def test_gradient_of_ones(align_corners, device):
    """The weights of each target pixel sum to 1: a gradient of ones arrives whole. Seen by the nine taps, without what they push out."""
    ones = torch.ones(1, 32, 4, 6, device=device)
    for source in ((3, 4), (1, 1), (4, 6), (5, 6)):
        taps = upsample_backward(ones, source, align_corners, taps=3).view(9, 32, *source).sum((2, 3))
        kept = torch.tensor([[3, 4, 3]]).T * torch.tensor([[5, 6, 5]])
        torch.testing.assert_close(taps, kept.flatten()[:, None].expand(9, 32).to(taps))


def test_nothing_is_written_beyond_the_map(device, monkeypatch):
    """By either pass, in what follows the map in memory. 20 channels fill no block: inside the map a stray value is overwritten in time."""
    memory = torch.full((1000,), 7.0, device=device)
    shape = (1, 20, 5, 3)
    monkeypatch.setattr(upsample, "empty_channels_last", lambda *_: memory[:300].view(1, 5, 3, 20).permute(0, 3, 1, 2))
    x = random_map((1, 20, 2, 4), torch.float32, device)
    for write in (lambda: upsample._forward(x, *shape[2:], True), lambda: upsample_backward(x, shape[2:], True)):
        assert not torch.equal(write(), torch.full_like(memory[:300], 7).view(shape)) and (memory[300:] == 7).all()


def test_corners(dtype, device):
    """align_corners: the corners, and a map of the same size, are copied bit for bit."""
    x = random_map((2, 40, 5, 7), dtype, device)
    for size in ((12, 20), (2, 3), (33, 18)):
        out = upsample_bilinear(x, size, True)
        for y, x_ in itertools.product((0, -1), (0, -1)):
            assert torch.equal(out[..., y, x_], x[..., y, x_])
    for align_corners in (True, False):
        assert torch.equal(upsample_bilinear(x, (5, 7), align_corners), x)


@ALIGN
@pytest.mark.parametrize(("shape", "size"), PARITY, ids=str)
def test_gather_is_interpolate(shape, size, align_corners, device):
    """The oracle of the other tests is F.interpolate in float64, as far as that goes; and so, in float32, is the kernel."""
    x = torch.randn(shape, device=device, dtype=torch.float64)
    interpolated = upsample_bilinear_ref(x, size, align_corners)
    torch.testing.assert_close(exact_resize.resize(x, size, align_corners), interpolated, rtol=0, atol=1e-5)
    torch.testing.assert_close(upsample_bilinear(x.float(), size, align_corners).double(), interpolated, rtol=0, atol=1e-5)


@ALIGN
def test_halves_and_doubles(align_corners, device):
    """By hand, not by F.interpolate: a ramp of two pixels to four, and of four to two."""
    ramp = torch.tensor([0.0, 1.0], device=device).expand(1, 8, 2, 2)
    expected = torch.tensor([0, 1 / 3, 2 / 3, 1] if align_corners else [0, 0.25, 0.75, 1], device=device)
    torch.testing.assert_close(upsample_bilinear(ramp, (2, 4), align_corners), expected.expand(1, 8, 2, 4))
    ramp = torch.arange(4.0, device=device).expand(1, 8, 4, 4)
    expected = torch.tensor([0.0, 3.0] if align_corners else [0.5, 2.5], device=device)
    torch.testing.assert_close(upsample_bilinear(ramp, (4, 2), align_corners), expected.expand(1, 8, 4, 2))


def nine_shifted(x, size, align_corners):
    """The sum over the taps of a 3x3 window of what each sees, of a map of its own (B, 9, C, H, W), resized and padded with zeros."""
    resized = [F.pad(upsample_bilinear_ref(tap, size, align_corners), (1, 1, 1, 1)) for tap in x.unbind(1)]
    return sum(
        tap[..., y : y + size[0], x : x + size[1]] for tap, (y, x) in zip(resized, itertools.product(range(3), repeat=2), strict=True)
    )


@ALIGN
@pytest.mark.parametrize(("source", "size"), [((3, 4), (6, 9)), ((5, 3), (2, 3)), ((1, 1), (2, 3)), ((4, 1), (1, 1))], ids=str)
def test_nine_taps(source, size, align_corners, dtype, device):
    """taps=3 against autograd of the composition written out: each tap's shift, and what it loses at each border."""
    grad = random_map((2, 40, *size), dtype, device)

    def gradient(dtype):
        x = torch.zeros(2, 9, 40, *source, device=device, dtype=dtype, requires_grad=True)
        return torch.autograd.grad(nine_shifted(x, size, align_corners), x, grad.to(dtype))[0]

    out = upsample_backward(grad, source, align_corners, taps=3)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_parity(out.view(2, 9, 40, *source), gradient(torch.float64), gradient(dtype))


@ALIGN
def test_conv1x1_upsample(align_corners, dtype, device):
    """The convolution first, on the smaller map, equals the convolution of the resized map, with every gradient."""
    inputs = [random_map((2, 48, 5, 7), dtype, device), torch.randn(32, 48, 1, 1, device=device) / 7, torch.randn(32, device=device)]
    inputs = [t.to(dtype) for t in inputs]

    def composed(x, weight, bias):
        return F.conv2d(upsample_bilinear_ref(x, (10, 13), align_corners), weight, bias)

    assert_op_parity(lambda *t: conv1x1_upsample(*t, (10, 13), align_corners), composed, inputs, ["x", "weight", "bias"])


@ALIGN
@pytest.mark.parametrize("channels", (16, 19, 33, 150))
def test_padded(channels, align_corners, dtype, device):
    """A map whose pixels are a multiple of 16 channels apart gives such a map, the bits of the dense one, and no sight of its padding; its
    gradient too, whatever the cotangent's memory."""
    x = random_map((2, channels, 3, 4), dtype, device)
    ours = padded(x)
    with_padding(ours)[:, channels:] = float("nan")
    (out, gradient), (expected, expected_gradient) = (
        values_and_gradients(resize((5, 7), align_corners), [t], torch.ones(2, channels, 5, 7, device=device, dtype=dtype).cumsum(3))
        for t in (ours, x)
    )
    checks.assert_same([out, gradient], [expected, expected_gradient])
    assert with_padding(out).data_ptr() == out.data_ptr() and with_padding(out).shape[1] == -(-channels // 16) * 16
    assert is_padded(out) == (channels != 16) and is_padded(gradient) == (channels != 16)


def test_memory_that_ends_with_the_last_pixel(device):
    """The strides of a padded map, without its last padding, as a compiler makes such memory: copied once, and padded on."""
    x = random_map((2, 19, 3, 4), torch.float32, device)
    short = torch.empty_strided(x.shape, padded(x).stride(), device=device).copy_(x)
    assert is_padded(short) and short.untyped_storage().nbytes() < padded(x).untyped_storage().nbytes()
    out = upsample_bilinear(short, (5, 7), True)
    assert is_padded(out) and torch.equal(out, upsample_bilinear(x, (5, 7), True))
    assert torch.equal(upsample_argmax(short, (5, 7), True), upsample_argmax(x, (5, 7), True))


def test_views_of_padded_maps(device):
    """Some images, rows or channels of one, at any offset: what is no padded map is copied, and all are right."""
    whole = padded(random_map((4, 40, 5, 6), torch.float32, device))
    for view in (whole[::2], whole[1:3], whole[:, :, 1:], whole[:, :, :, :4], whole[:, 1:], whole[:, :35], whole[1:2, 2:37]):
        assert torch.equal(upsample_bilinear(view, (7, 8), True), upsample_bilinear(view.contiguous(), (7, 8), True))


def test_few_channels_are_not_padded(device):
    """16 times the memory for one class would gain nothing."""
    for channels in (1, 9, 15):
        x = random_map((1, channels, 3, 4), torch.float32, device)
        assert padded(x).is_contiguous(memory_format=torch.channels_last) and not is_padded(padded(x))
        assert upsample_bilinear(padded(x), (5, 6), True).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("classes", (1, 19, 59, 60, 150, 171, 847))
def test_padded_logits(classes, dtype, device):
    """The classifier's result and all its gradients, as those of PyTorch's convolution, of every published number of classes; upsampled,
    it stays padded, and `contiguous` puts them side by side."""
    weight, bias = torch.randn(classes, 32, 1, 1, device=device) / 6, torch.randn(classes, device=device)
    inputs = [random_map((2, 32, 3, 4), dtype, device), weight.to(dtype), bias.to(dtype)]
    assert_op_parity(lambda *t: conv1x1(*t, padded=True), F.conv2d, inputs, ["x", "weight", "bias"])
    logits = conv1x1(*inputs, padded=True)
    assert is_padded(logits) == (classes > 16) and is_padded(upsample_bilinear(logits, (6, 8), False)) == (classes > 16)
    assert torch.equal(logits.contiguous(), logits) and logits.contiguous().is_contiguous()
    checks.assert_same([conv1x1(inputs[0], inputs[1], None, padded=True)], [conv1x1(inputs[0], inputs[1], None)])


def test_padded_logits_compile_and_export(device):
    """As the head makes them, forward and backward, with the strides that the fake says; and at any height."""
    x, weight, bias = (
        random_map((1, 32, 4, 5), torch.float32, device),
        torch.randn(19, 32, 1, 1, device=device),
        torch.randn(19, device=device),
    )

    def head(x, weight, bias):
        return upsample_bilinear(conv1x1(x, weight, bias, padded=True), (6, 9), True)

    checks.assert_compiles(head, [x, weight, bias])
    assert torch.compile(head, fullgraph=True, backend="aot_eager")(x, weight, bias).stride() == head(x, weight, bias).stride()
    other = random_map((1, 32, 7, 5), torch.float32, device)
    checks.assert_exports(lambda x: head(x, weight, bias), x, other, 2, "dpt.pointwise")
    leaves = [t.requires_grad_() for t in (x.permute(0, 2, 3, 1), weight.flatten(1), bias)]
    torch.library.opcheck(torch.ops.dpt.pointwise.default, (*leaves, True))


def test_parameters_are_saved(device):
    """Under autocast the backward keeps x in its dtype and the parameters as they are."""
    x, weight, bias = torch.randn(2, 32, 4, 5, device=device), torch.randn(19, 32, 1, 1, device=device), torch.randn(19, device=device)
    checks.assert_parameters_are_saved(lambda *t: conv1x1_upsample(*t, (6, 9), True), [x, weight, bias])


def test_parameters_of_another_dtype(device):
    """Without autocast they are refused, by name, as those of another shape are."""
    x, weight, bias = torch.zeros(1, 8, 3, 4), torch.zeros(4, 8, 1, 1), torch.zeros(4)
    for parameters, error, says in (
        ((weight.half(), bias), TypeError, "weight is torch.float16 and the input torch.float32"),
        ((weight, bias.half()), TypeError, "bias is torch.float16"),
        ((weight[:, :7], bias), ValueError, r"weight has shape \(4, 7\): it must be \(4, 8\)"),
        ((weight, bias[:3]), ValueError, r"bias has shape \(3,\): it must be \(4,\)"),
    ):
        with pytest.raises(error, match=says):
            conv1x1(x, *parameters)


def test_memory_formats(dtype, device):
    """Any layout is right, sides of 1 and single channels included, and the output is channels-last."""
    for shape in ((2, 40, 5, 7), (2, 40, 1, 1), (2, 1, 5, 7)):
        x = random_map(shape, dtype, device)
        expected = upsample_bilinear(x, (6, 9), False)
        for other in (x.contiguous(), torch.stack([x, x], -1)[..., 0], x.flip(0).flip(0), torch.cat([x, x], 1)[:, : shape[1]]):
            out = upsample_bilinear(other, (6, 9), False)
            assert torch.equal(out, expected) and out.is_contiguous(memory_format=torch.channels_last)


@ALIGN
@pytest.mark.parametrize("size", ((5, 7), (12, 20), (9, 13), (3, 4)), ids=str)
def test_infinite_values(size, align_corners, dtype, device):
    """NaN and infinity reach the pixels in which they have a weight, and no other pixel, channel or image: not by a product with 0."""
    x = random_map((2, 40, 5, 7), dtype, device)
    for value, where in zip((float("nan"), float("inf"), float("-inf")), ((0, 3, 2, 2), (1, 4, 0, 6), (1, 4, 4, 1)), strict=True):
        x[where] = value
    out = upsample_bilinear(x, size, align_corners)
    expected = exact_resize.resize_infinite(x, size, align_corners)
    torch.testing.assert_close(out, expected.to(dtype), equal_nan=True)
    assert not out[0, :3].isnan().any() and not out.isfinite().all()


def test_expanded_gradient(device):
    """Cotangents of stride 0 and of transposed memory."""
    checks.assert_expanded_gradient(resize((6, 9), False), reference((6, 9), False), [torch.randn(1, 32, 4, 5, device=device)])


def test_reproducible_gradients(dtype, device):
    """No atomics: the same call gives the same bits."""
    checks.assert_reproducible(resize((9, 11), True), [random_map((2, 40, 5, 7), dtype, device)])


def test_gradient_only_where_required(device):
    """Without requires_grad nothing is recorded, and under no_grad neither."""
    checks.assert_gradients_alone(resize((9, 11), True), [torch.randn(2, 32, 5, 7, device=device)])


def test_nothing_is_saved(device):
    """The gradient needs the sides alone."""
    assert checks.saved_shapes(resize((9, 11), True), [torch.randn(2, 32, 5, 7, device=device)]) == []


def test_autocast(device):
    """The resize keeps its map's dtype, as PyTorch's does; the convolution before it follows autocast."""
    x, weight = torch.randn(1, 32, 4, 5, device=device), torch.randn(16, 32, 1, 1, device=device)
    with torch.autocast(device.type, dtype=torch.float16):
        assert upsample_bilinear(x, (5, 6), True).dtype == upsample_bilinear_ref(x, (5, 6), True).dtype == torch.float32
        assert upsample_bilinear(x.half(), (5, 6), True).dtype == torch.float16
    checks.assert_follows_autocast(lambda x, weight: conv1x1_upsample(x, weight, None, (5, 6), True), [x, weight])


def test_empty_batch(device):
    """A batch of nothing gives nothing, forward and backward, without a launch."""
    checks.assert_empty_batch(resize((9, 11), True), [torch.randn(2, 32, 5, 7, device=device)], (0, 32, 9, 11))


def test_offsets_beyond_int32(far):
    """Offsets are 64 bits wide: two images, each of more than 2^31 elements, are read and written at their far end."""
    side, channels = 2912, 256  # whole blocks of 32 pixels
    assert side * side * channels > 2**31
    x = far.zeros((2, channels, side, side), channels_last=True)
    corner = x[-1:, :, -4:, -40:]
    corner.copy_(torch.randn(corner.shape))
    out = upsample_bilinear(x, (2 * side, side), False)  # the last program's 32 pixels of the last row, 64 channels
    expected = (reference((8, 40), False)(t)[..., -1, -32:] for t in (corner.double(), corner))
    assert_parity(*(t[:, -64:] for t in (out[-1:, :, -1, -32:], *expected)))


def test_gradient_offsets_beyond_int32(far):
    """As above, for the gradient: of a map of the same size, and so equal to what comes in."""
    side, channels = 2912, 256  # whole blocks of 32 pixels
    grad = far.zeros((2, channels, side, side), channels_last=True)
    row = grad[-1, :, -1, -32:]
    row.copy_(torch.randn(row.shape))
    out = upsample_backward(grad, (side, side), True)
    assert torch.equal(out[-1, -64:, -1, -32:], row[-64:])


def test_opcheck(device):
    """PyTorch's own checks of both registrations: schema, fake kernels, autograd, compilation with static and dynamic shapes."""
    for shape in ((2, 32, 3, 4), (1, 32, 1, 1)):
        x = torch.randn(shape, device=device, requires_grad=True)
        torch.library.opcheck(torch.ops.dpt.upsample_bilinear.default, (x, 5, 7, True))
        torch.library.opcheck(torch.ops.dpt.upsample_bilinear_backward.default, (x.detach(), 2, 5, False))


def test_compile_fullgraph(device):
    """torch.compile takes the op whole, also after a convolution, forward and backward."""
    x, weight = torch.randn(1, 32, 4, 5, device=device), torch.randn(16, 32, 1, 1, device=device)
    checks.assert_compiles(resize((6, 9), True), [x])
    checks.assert_compiles(lambda x, weight: conv1x1_upsample(x, weight, None, (6, 9), False), [x, weight])


def test_export(device):
    """torch.export keeps the op as one node at any height, to a size that is fixed or follows the input's."""
    x, other = torch.randn(1, 32, 4, 5, device=device), torch.randn(1, 32, 7, 5, device=device)
    checks.assert_exports(resize((6, 9), True), x, other, 2, "dpt.upsample_bilinear")
    checks.assert_exports(lambda x: upsample_bilinear(x, (2 * x.shape[2], 9), True), x, other, 2, "dpt.upsample_bilinear")


@pytest.mark.parametrize(
    ("x", "size", "error", "says"),
    [
        (torch.zeros(2, 8, 3, 4, dtype=torch.float64), (5, 6), TypeError, "x is torch.float64: must be one of torch.float32"),
        (torch.zeros(8, 3, 4), (5, 6), ValueError, r"x has shape \(8, 3, 4\): must be \(B, C, H, W\)"),
        (torch.zeros(2, 0, 3, 4), (5, 6), ValueError, r"x has shape \(2, 0, 3, 4\)"),
        (torch.zeros(2, 8, 0, 4), (5, 6), ValueError, r"x has shape \(2, 8, 0, 4\)"),
        (torch.zeros(1, 1, 1, 32768), (5, 6), ValueError, r"x has shape \(1, 1, 1, 32768\).*1 to 32767"),
        (torch.zeros(2, 8, 3, 4), (5,), ValueError, r"size=\(5,\): must be \(height, width\), each from 1 to 32767"),
        (torch.zeros(2, 8, 3, 4), (5, 0), ValueError, r"size=\(5, 0\)"),
        (torch.zeros(2, 8, 3, 4), (32768, 5), ValueError, r"size=\(32768, 5\)"),
        (torch.zeros(2, 8, 3, 4), (5.5, 6), TypeError, r"size=\(5.5, 6\): must be two integers"),
    ],
)
def test_errors(x, size, error, says):
    """Each wrong argument is refused by name, with the rule."""
    with pytest.raises(error, match=says):
        upsample_bilinear(x, size, True)
