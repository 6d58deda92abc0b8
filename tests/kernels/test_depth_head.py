"""dpt.kernels.depth_head against plain PyTorch, by the rule of parity.py: both passes, tiles and strips, borders, dead ReLUs."""

import contextlib
import functools

import checks
import exact_resize
import pytest
import torch
import torch.nn.functional as F
from both_passes import in_both, values_and_gradients, values_in_both

from dpt.kernels import depth_head as module
from dpt.kernels import launch
from dpt.kernels.depth_head import depth_head, depth_head_ref
from dpt.kernels.tools.parity import assert_parity, precision_in_force

NAMES = ("x", "w1", "b1", "w2", "b2")
SMALL_BLOCKS = {"backend": "triton", "BLOCK_H": 4, "BLOCK_W": 16, "num_warps": 4, "num_stages": 1}
CUDNN = {"backend": "cudnn", "BLOCK_H": 4, "BLOCK_W": 16, "num_warps": 4, "num_stages": 1}


def head(size, activation="relu", max_depth=1.0, function=depth_head):
    """The head as a function of its tensors alone; ``function``: the op, or the reference."""
    return lambda *tensors: function(*tensors, size, activation, max_depth)


reference = functools.partial(head, function=depth_head_ref)


def random_inputs(shape, hidden, dtype, device):
    """x and the parameters; about half of the ReLUs of either kind are dead."""
    channels = shape[1]
    shapes = (shape, (hidden, channels, 3, 3), (hidden,), (1, hidden, 1, 1), (1,))
    gains = (1, (9 * channels) ** -0.5, 0.3, hidden**-0.5, 0.3)
    inputs = [(gain * torch.randn(shape, device=device)).to(dtype) for shape, gain in zip(shapes, gains, strict=True)]
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs]


def assert_head_parity(shape, size, hidden, activation, dtype, device):
    """Output and every gradient of a random head."""
    arguments = (size, activation, 20.0 if activation == "sigmoid" else 1.0)
    inputs = random_inputs(shape, hidden, dtype, device)
    if dtype != torch.float32 or precision_in_force() == "tf32":
        decide_relus(inputs, activation)
    assert_parity_of(inputs, *arguments)


def decide_relus(inputs, activation):
    """By biases: half of the hidden channels are far above 0 and half far below, and so is the last ReLU above. Where a product keeps few
    digits, a ReLU near 0 falls to either side, here and in the reference by chance, and the gradient jumps."""
    _, _, b1, _, b2 = inputs
    b1.copy_(torch.tensor([6.0, -6.0]).repeat(len(b1) // 2))
    if activation == "relu":
        b2.fill_(20)


def assert_parity_of(inputs, *arguments):
    """Output and every gradient, by the rule. The gradients of the biases are plain sums, over pixels, of terms that may cancel: ``tiny``
    counts from the terms, which no order of summation can round away."""
    x, size = inputs[0], arguments[0]
    cotangent = torch.randn(x.shape[0], *size, device=x.device).to(x.dtype)
    ours = values_and_gradients(head(*arguments), inputs, cotangent)
    expected = in_both(lambda dtype: values_and_gradients(reference(*arguments), inputs, cotangent, dtype))
    magnitudes = bias_terms(inputs, cotangent, *arguments)
    for name, *tensors in zip(("output", *NAMES), ours, *expected, strict=True):
        assert_parity(*tensors, name=name, magnitude=magnitudes.get(name))


def bias_terms(inputs, cotangent, size, activation="relu", max_depth=1.0):
    """The largest sum of magnitudes over the pixels of what a bias's gradient adds up, in float64."""
    x, w1, b1, w2, b2 = (t.double() for t in inputs)
    first = b1[:, None, None].expand(x.shape[0], -1, *size).clone().requires_grad_()
    hidden = F.relu(F.conv2d(exact_resize.resize(x, size, True), w1, padding=1) + first)
    second = b2[:, None, None].expand(x.shape[0], -1, *size).clone().requires_grad_()
    y = F.conv2d(hidden, w2) + second
    depth = {"relu": F.relu, "sigmoid": lambda y: max_depth * y.sigmoid(), "linear": lambda y: y}[activation](y)
    gradients = torch.autograd.grad(depth[:, 0], (first, second), cotangent.double())
    return {name: gradient.abs().sum((0, 2, 3)).max().item() for name, gradient in zip(("b1", "b2"), gradients, strict=True)}


PARITY = [  # (B, C, H, W) to (H', W'), F, activation: x2, odd ratios, the same size, from and to sides of 1, smaller; masked channels
    ((1, 32, 4, 5), (8, 10), 32, "relu"),
    ((2, 20, 3, 4), (5, 6), 16, "sigmoid"),
    ((1, 64, 3, 4), (7, 9), 32, "relu"),
    ((1, 128, 2, 2), (4, 4), 32, "sigmoid"),
    ((1, 256, 3, 1), (3, 1), 16, "relu"),
    ((2, 48, 1, 3), (2, 5), 32, "relu"),
    ((1, 32, 1, 1), (5, 7), 16, "sigmoid"),
    ((1, 96, 1, 1), (1, 1), 32, "sigmoid"),
    ((1, 32, 5, 7), (3, 12), 16, "relu"),
    ((2, 32, 5, 7), (2, 1), 16, "sigmoid"),
    ((2, 24, 3, 4), (7, 9), 32, "linear"),
]


@pytest.mark.parametrize(("shape", "size", "hidden", "activation"), PARITY, ids=str)
def test_parity(shape, size, hidden, activation, dtype, device):
    """Output and the gradient of x and of every parameter."""
    assert_head_parity(shape, size, hidden, activation, dtype, device)


@pytest.mark.parametrize(("shape", "size", "hidden", "activation"), PARITY, ids=str)
def test_parity_tf32(shape, size, hidden, activation, tf32, device):
    """As above, in TF32: the library's products, and the bound of truncated operands."""
    assert_head_parity(shape, size, hidden, activation, torch.float32, device)


@contextlib.contextmanager
def with_cudnn():
    """The other backend, in both passes."""
    with launch.using("depth_head", CUDNN), launch.using("depth_head_backward", CUDNN):
        yield


@pytest.mark.parametrize(("shape", "size", "hidden", "activation"), PARITY, ids=str)
def test_parity_cudnn(shape, size, hidden, activation, device):
    """PyTorch's resize and convolution with the epilogue kernel after them: output and every gradient."""
    with with_cudnn():
        assert_head_parity(shape, size, hidden, activation, torch.float32, device)


STRIPS = pytest.mark.parametrize(
    ("shape", "size"), [((1, 16, 5, 12), (9, 21)), ((1, 16, 6, 20), (6, 21)), ((2, 16, 5, 2), (9, 3))], ids=str
)


def assert_output_parity(inputs, size):
    assert_parity(head(size)(*inputs), *values_in_both(reference(size), inputs))


@STRIPS
def test_strips_and_tiles(shape, size, dtype, device):
    """Blocks of 4 rows by 16 columns: each pixel is made where strips and tiles meet."""
    for blocks in (SMALL_BLOCKS, CUDNN):
        with launch.using("depth_head", blocks):
            assert_output_parity(random_inputs(shape, 16, dtype, device), size)


@pytest.mark.parametrize("blocks", (SMALL_BLOCKS, CUDNN), ids=lambda blocks: blocks["backend"])
@STRIPS
def test_strips_and_tiles_backward(shape, size, blocks, device):
    """As above: each program's share of the gradients of w2 and b2, the rows and columns that only its neighbours own left out."""
    with launch.using("depth_head_backward", blocks):
        assert_head_parity(shape, size, 16, "sigmoid", torch.float32, device)


@pytest.mark.parametrize(("shape", "size"), [((1, 16, 37, 2), (70, 3)), ((1, 16, 2, 37), (3, 70))], ids=str)
def test_depth_anything_sizes(shape, size, dtype, device):
    """37 patches to 14 * 5 pixels, down and across: several strips, several column tiles, with the table's own blocks."""
    assert_output_parity(random_inputs(shape, 16, dtype, device), size)


FORWARD, BACKWARD = (checks.shipped_configurations(kernel) for kernel in ("depth_head", "depth_head_backward"))


@pytest.mark.parametrize("block", FORWARD)
def test_every_shipped_configuration(block, device):
    """The tables' blocks, of all families: 20 channels, two strips, two tiles, all of them partial."""
    shipped = FORWARD[block]
    with shipped.used():
        assert_output_parity(random_inputs((1, 20, 9, 34), 16, shipped.dtype, device), (17, 36))


@pytest.mark.parametrize("block", BACKWARD)
def test_every_shipped_configuration_backward(block, device):
    """As above, for the gradients."""
    shipped = BACKWARD[block]
    with shipped.used():
        assert_head_parity((1, 20, 9, 34), (17, 36), 16, "relu", shipped.dtype, device)


@pytest.mark.parametrize("size", ((8, 12), (5, 7), (1, 1), (9, 3)), ids=str)
def test_border(size, dtype, device):
    """A map of ones and a window of ones count the taps inside: a wrong pad shows at the border at once."""
    x = torch.ones(1, 32, 5, 3, device=device, dtype=dtype)
    w1, b1 = torch.full((16, 32, 3, 3), 1 / 32, device=device, dtype=dtype), torch.zeros(16, device=device, dtype=dtype)
    w2, b2 = torch.full((1, 16, 1, 1), 1 / 16, device=device, dtype=dtype), torch.zeros(1, device=device, dtype=dtype)
    rows, columns = (torch.tensor([float((i > 0) + 1 + (i < side - 1)) for i in range(side)]) for side in size)
    torch.testing.assert_close(depth_head(x, w1, b1, w2, b2, size)[0], torch.outer(rows, columns).to(x.device))


def test_constant_maps(dtype, device):
    """A constant map stays constant, but for the rounding of float32: the weights sum to 1, whatever the size. Two channels take the map
    and its negative, and subtract it: what is left, on either side, is the error."""
    w1 = torch.zeros(16, 16, 3, 3, device=device, dtype=dtype)
    b1 = torch.zeros(16, device=device, dtype=dtype)
    w2 = torch.zeros(1, 16, 1, 1, device=device, dtype=dtype)
    w1[3, 5, 1, 1], w1[4, 5, 1, 1] = 1, -1
    w2[0, 3:5] = 1
    for value in (0.1, 1 / 3, 999.5):
        x = torch.full((1, 16, 5, 7), value, device=device, dtype=torch.float16).to(dtype)
        b1[3:5] = torch.stack([-x[0, 0, 0, 0], x[0, 0, 0, 0]])
        for size in ((5, 13), (9, 7), (11, 31)):
            assert depth_head(x, w1, b1, w2, torch.zeros_like(b1[:1]), size).max() <= 4 * torch.finfo(torch.float32).eps * value


def test_dead_relus(device):
    """Hidden channels that are nowhere positive, one that is exactly 0, and an output that is not: gradients as PyTorch's, and where
    everything is dead, zeros."""
    inputs = random_inputs((1, 16, 2, 3), 16, torch.float32, device)
    _, w1, b1, _, b2 = inputs
    b1[:5] = -100
    w1[7], b1[7] = 0, 0
    assert_parity_of(inputs, (4, 5))
    b2 -= 100
    leaves = [t.requires_grad_() for t in inputs]
    out = depth_head(*leaves, (4, 5))
    assert not out.any() and not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), leaves))


def test_saturated_sigmoid(dtype, device):
    """Far out on both sides depth is max_depth or 0, gradients vanish, and nothing is NaN."""
    for b2, depth in ((300.0, 80.0), (-300.0, 0.0)):
        inputs = random_inputs((1, 16, 2, 3), 16, dtype, device)
        inputs[4].fill_(b2)
        leaves = [t.requires_grad_() for t in inputs]
        out = depth_head(*leaves, (3, 5), "sigmoid", 80.0)
        assert (out == depth).all() and not any(gradient.any() for gradient in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize(("size", "first"), (((3, 12), True), ((9, 4), True), ((5, 7), False)), ids=str)
def test_smaller_targets_are_resized_first(size, first, monkeypatch, device):
    """Where either side is smaller, in a launch of its own: a tile of few columns could need more of x than a program holds."""
    inputs = random_inputs((1, 32, 5, 7), 16, torch.float32, device)
    launches = checks.spied_launches(monkeypatch)
    head(size)(*inputs)
    assert ("_upsample_kernel" in [name for name, _ in launches]) == first


def test_nan_passes(device):
    """NaN in, NaN out, wherever it has a weight or PyTorch multiplies it by 0 (the ReLUs must not turn it into 0), and in no other row or
    image; cuDNN may fill the image. In the first column: that follows the row before in memory."""
    inputs = random_inputs((2, 16, 4, 5), 16, torch.float32, device)
    inputs[0][0, 3, 2, 0] = float("nan")
    must = reference((8, 10))(*(t.cpu().double() for t in inputs)).isnan()
    checks.assert_nan(head((8, 10))(*inputs), must, must.any(2, keepdim=True).expand_as(must))
    with with_cudnn():
        checks.assert_nan(head((8, 10))(*inputs), must, must.flatten(1).any(1)[:, None, None].expand_as(must))


def test_backends(monkeypatch, device):
    """The table's backend really decides what runs, in each pass."""
    launches = checks.spied_launches(monkeypatch)
    inputs = [t.requires_grad_() for t in random_inputs((1, 16, 2, 3), 16, torch.float32, device)]
    for backend in (contextlib.nullcontext(), with_cudnn()):
        with backend:
            head((4, 6))(*inputs).sum().backward()
    names = [name for name, _ in launches if name.startswith("_depth_head")]
    assert names == ["_depth_head_kernel"] * 2 + ["_depth_head_epilogue"] * 2


def test_memory_formats(device):
    """Any layout of the map and of every parameter is right: copied where it is not what the kernel reads."""
    inputs = random_inputs((2, 16, 2, 3), 16, torch.float32, device)
    expected = head((4, 3), "sigmoid")(*inputs)
    for layout in (lambda t: t.contiguous(), lambda t: torch.stack([t, t + 1], -1)[..., 0], lambda t: t.flip(0).flip(0)):
        assert torch.equal(head((4, 3), "sigmoid")(*map(layout, inputs)), expected)


def test_expanded_gradient(device):
    """Cotangents of stride 0 and of transposed memory."""
    checks.assert_expanded_gradient(head((4, 5)), reference((4, 5)), random_inputs((1, 16, 2, 3), 16, torch.float32, device))


def test_reproducible_gradients(device):
    """No atomics, and the shares of w2 and b2 are added in a fixed order."""
    with launch.using("depth_head_backward", SMALL_BLOCKS):
        checks.assert_reproducible(head((9, 21)), random_inputs((1, 16, 5, 12), 16, torch.float32, device))


def test_each_gradient_alone(device):
    """Whichever input needs a gradient, it is the one it has when all do; and where none does, nothing is recorded."""
    checks.assert_gradients_alone(head((2, 3)), random_inputs((1, 16, 1, 2), 16, torch.float32, device))


def test_saved_memory(device):
    """Saved for the backward: x, before its resize, and the parameters; no map of the target's size."""
    inputs = random_inputs((1, 16, 4, 5), 16, torch.float32, device)
    assert checks.saved_shapes(head((8, 10)), inputs) == sorted(tuple(t.shape) for t in inputs)


def test_no_large_map_is_made(device, monkeypatch):
    """The forward allocates y, and a map of the source's size: that of the target's size with C channels is never written."""
    inputs, allocated = random_inputs((1, 64, 12, 12), 16, torch.float32, device), []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, *args, **kwargs: allocated.append(tuple(shape)) or empty(shape, *args, **kwargs))
    head((24, 24))(*inputs)
    assert allocated == [(1, 24, 24)]


def test_autocast_is_followed(device):
    """Under autocast the map and the parameters are taken in autocast's dtype; gradients are float32."""
    checks.assert_follows_autocast(head((4, 5)), random_inputs((1, 16, 2, 3), 16, torch.float32, device), torch.float32)


def test_parameters_are_saved(device):
    """Blind spot: copies of the weights in autocast's dtype, kept from the forward to the backward."""
    checks.assert_parameters_are_saved(head((4, 5)), random_inputs((1, 16, 2, 3), 16, torch.float32, device))


def test_empty_batch(device):
    """A batch of nothing gives nothing, and gradients of zeros, without a launch of programs."""
    checks.assert_empty_batch(head((4, 5)), random_inputs((1, 16, 2, 3), 16, torch.float32, device), (0, 4, 5))


def with_far_products(far, monkeypatch, x, corner, w1):
    """The products with the taps of a map that is 0 outside its far corner, of which on a CPU the corner's alone are computed."""
    if not x.is_cuda:
        products = far.zeros((2, 9 * len(w1), *x.shape[2:]), channels_last=True)
        products[-1:, :, -40:, -40:] = module._tap_products(corner, w1)
        monkeypatch.setattr(module, "_tap_products", lambda x, w1: products)


def test_offsets_beyond_int32(far, monkeypatch):
    """Offsets are 64 bits wide: the products of two images, more than 2^31 of each, are read at their far end."""
    side, hidden = 3872, 16  # whole blocks of 16 columns
    assert side * side * 9 * hidden > 2**31
    x = far.zeros((2, 16, side, side), channels_last=True)
    corner = x[-1:, :, -40:, -40:]
    corner.copy_(torch.randn(corner.shape))
    _, *parameters = random_inputs((1, 16, 1, 1), hidden, torch.float16, x.device)
    with_far_products(far, monkeypatch, x, corner, parameters[0])
    out = depth_head(x, *parameters, (side, side), "sigmoid")
    expected = [reference((40, 40), "sigmoid")(*(t.to(dtype) for t in (corner, *parameters))) for dtype in (torch.float64, torch.float16)]
    assert_parity(*(t[-1:, -8:, -8:] for t in (out, *expected)))


def test_gradient_offsets_beyond_int32(far, monkeypatch):
    """As above, for the gradient of the hidden map, which has more than 2^31 elements and is written at its far end."""
    side, hidden = 5944, 32
    assert 2 * side * side * hidden > 2**31
    x, grad = far.zeros((2, 16, side, side), channels_last=True), far.zeros((2, side, side))
    for zeros in (corner := x[-1:, :, -40:, -40:], grad_corner := grad[-1:, -40:, -40:]):
        zeros.copy_(torch.randn(zeros.shape))
    _, *parameters = inputs = random_inputs((1, 16, 1, 1), hidden, torch.float16, x.device)
    decide_relus(inputs, "relu")
    with_far_products(far, monkeypatch, x, corner, parameters[0])
    out, _ = module._launch(x, *parameters, (side, side), False, 1.0, grad)

    def expected(dtype):
        inner, w1, b1, w2, b2 = (t.to(dtype) for t in (corner, *parameters))
        map_before_relu = F.conv2d(inner, w1, b1, padding=1).requires_grad_()
        y = F.relu(F.conv2d(F.relu(map_before_relu), w2, b2))[:, 0]
        return torch.autograd.grad(y, map_before_relu, grad_corner.to(dtype))[0]

    assert_parity(*(t[-1:, :, -4:, -8:] for t in (out, expected(torch.float64), expected(torch.float16))))


def test_opcheck(device):
    """PyTorch's own checks of both registrations: schema, fake kernels, autograd, compilation with static and dynamic shapes."""
    inputs = random_inputs((1, 16, 1, 2), 16, torch.float32, device)
    torch.library.opcheck(torch.ops.dpt.depth_head_backward.default, (torch.randn(1, 2, 3, device=device), *inputs, "sigmoid", 5.0))
    leaves = [t.requires_grad_() for t in inputs]
    torch.library.opcheck(torch.ops.dpt.depth_head.default, (*leaves, 2, 3, "relu", 1.0))


def test_compile_fullgraph(device):
    """torch.compile takes the op whole, forward and backward, without a graph break; also where x is resized to a smaller map first."""
    checks.assert_compiles(head((2, 3), "sigmoid", 10.0), random_inputs((1, 16, 1, 2), 16, torch.float32, device))
    checks.assert_compiles(head((1, 2)), random_inputs((1, 16, 2, 2), 16, torch.float32, device))


def test_export(device):
    """torch.export keeps the op as one node, at any height."""
    x, *parameters = random_inputs((1, 16, 3, 2), 16, torch.float32, device)
    other = torch.randn(1, 16, 5, 2, device=device)
    checks.assert_exports(lambda x: depth_head(x, *parameters, (2 * x.shape[2], 4)), x, other, 2, "dpt.depth_head")


def arguments(**changed):
    shapes = {"x": (2, 8, 3, 4), "w1": (16, 8, 3, 3), "b1": (16,), "w2": (1, 16, 1, 1), "b2": (1,)}
    return {**{name: torch.zeros(shape) for name, shape in shapes.items()}, "size": (6, 8), **changed}


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"x": torch.zeros(2, 8, 3, 4, dtype=torch.float64)}, TypeError, "x is torch.float64"),
        ({"x": torch.zeros(8, 3, 4)}, ValueError, r"x has shape \(8, 3, 4\)"),
        ({"w1": torch.zeros(24, 8, 3, 3)}, ValueError, r"w1 is \(24, 8, 3, 3\): must be \(F, C, 3, 3\) with F one of 16, 32"),
        ({"w1": torch.zeros(16, 8)}, ValueError, r"w1 is \(16, 8\)"),
        ({"w1": torch.zeros(16, 4, 3, 3)}, ValueError, r"w1 is \(16, 4, 3, 3\) on cpu: must be \(16, 8, 3, 3\) on cpu"),
        ({"w1": torch.zeros(16, 8, 1, 1)}, ValueError, r"must be \(16, 8, 3, 3\)"),
        ({"w1": torch.zeros(16, 8, 3, 3).half()}, TypeError, "w1 is torch.float16: must be torch.float32, as x is"),
        ({"b1": torch.zeros(8)}, ValueError, r"b1 is \(8,\) on cpu: must be \(16\)"),
        ({"b1": torch.zeros(16, device="meta")}, ValueError, r"b1 is \(16,\) on meta: must be \(16\) on cpu"),
        ({"w2": torch.zeros(16, 16, 1, 1)}, ValueError, r"w2 is \(16, 16, 1, 1\) on cpu: must be \(1, 16, 1, 1\)"),
        ({"b2": torch.zeros(2)}, ValueError, r"b2 is \(2,\)"),
        ({"b2": torch.zeros(1).bfloat16()}, TypeError, "b2 is torch.bfloat16"),
        ({"size": (6,)}, ValueError, r"size=\(6,\): must be \(height, width\)"),
        ({"size": (6, 40000)}, ValueError, "each from 1 to 32767"),
        ({"activation": "gelu"}, ValueError, "activation='gelu': must be one of relu, sigmoid, linear"),
    ],
)
def test_errors(changed, error, says):
    """Each wrong argument is refused by name, with the rule."""
    with pytest.raises(error, match=says):
        depth_head(**arguments(**changed))


@pytest.mark.parametrize("activation", ("relu", "sigmoid", "linear"))
def test_reference_by_hand(activation):
    """The reference itself, written out: the exact resize, nine products of shifted maps, a ReLU, and the activation."""
    x, w1, b1, w2, b2 = (t.double() for t in random_inputs((2, 8, 3, 4), 16, torch.float32, "cpu"))
    padded = F.pad(exact_resize.resize(x, (5, 7), True), (1, 1, 1, 1))
    taps = [torch.einsum("fc,bchw->bfhw", w1[:, :, y, z], padded[..., y : y + 5, z : z + 7]) for y in range(3) for z in range(3)]
    hidden = (sum(taps) + b1[:, None, None]).clamp(min=0)
    y = (hidden * w2[0]).sum(1) + b2
    expected = {"relu": y.clamp(min=0), "sigmoid": 7 / (1 + (-y).exp()), "linear": y}[activation]
    torch.testing.assert_close(depth_head_ref(x, w1, b1, w2, b2, (5, 7), activation, 7.0), expected)
