"""dpt.kernels.residual_conv against plain PyTorch, by the rule of parity.py: forward, backward, both ways of loading, both backends."""

import functools

import checks
import pytest
import torch
import torch.nn.functional as F
from both_passes import assert_op_parity, values_in_both

from dpt.kernels import launch
from dpt.kernels.parts import conv3x3
from dpt.kernels.residual_conv import residual_conv_unit, residual_conv_unit_ref
from dpt.kernels.tools.parity import assert_parity

pytestmark = pytest.mark.usefixtures("own_convolution")

NAMES = ("x", "w1", "b1", "w2", "b2", "norm1 weight", "norm1 bias", "norm2 weight", "norm2 bias", "add")
CUDNN = {"backend": "cudnn"}


class Case:
    """Random arguments of a unit: the ten that take a gradient in ``inputs``, means and variances beside them."""

    def __init__(self, shape, dtype, device, biases=False, norms=False, add=None, variances=(0.3, 2.0), gain=1.0):
        batch, channels, *_ = shape
        random = functools.partial(torch.randn, device=device)
        low, high = variances
        self.constants = [(random(channels) * 0.3 * gain, torch.rand(channels, device=device) * (high - low) + low) for _ in range(2)]
        maps = [random(shape), random(batch, channels, *add) if add else None]
        weights = [random(channels, channels, 3, 3) * gain / (9 * channels) ** 0.5 for _ in range(2)]
        bias = [random(channels) * 0.5 if biases else None for _ in range(2)]
        norm = [random(channels) * 0.3 + 1 if norms else None for _ in range(2)]
        shift = [random(channels) * 0.3 if norms else None for _ in range(2)]
        cast = [None if t is None else t.to(dtype) for t in (maps[0], weights[0], bias[0], weights[1], bias[1])]
        cast = [t.contiguous(memory_format=torch.channels_last) if t is not None and t.dim() == 4 else t for t in cast]
        self.inputs = [*cast, norm[0], shift[0], norm[1], shift[1], None if maps[1] is None else maps[1].to(dtype)]

    def call(self, function):
        """``function`` as one of the ten inputs alone, in whatever dtype they come."""

        def called(x, w1, b1, w2, b2, norm1_weight, norm1_bias, norm2_weight, norm2_bias, add):
            norms = {}
            for name, weight, bias, constants in zip(
                ("norm1", "norm2"), (norm1_weight, norm2_weight), (norm1_bias, norm2_bias), self.constants, strict=True
            ):
                if weight is not None:
                    norms[name] = (weight, bias, *(c.to(weight.dtype) for c in constants), 1e-5)
            return function(x, w1, b1, w2, b2, **norms, add=add)

        return called

    def assert_parity(self):
        assert_op_parity(self.call(residual_conv_unit), self.call(residual_conv_unit_ref), self.inputs, NAMES)


PARITY = {  # odd, non-square maps; channels that are not powers of two; each part with and without the others
    "biases, smaller add": dict(shape=(2, 64, 5, 7), biases=True, add=(3, 4)),
    "norms, same add": dict(shape=(1, 48, 12, 20), norms=True, add=(12, 20)),
    "biases, add of another aspect": dict(shape=(1, 32, 33, 18), biases=True, add=(9, 40)),
    "one pixel": dict(shape=(3, 32, 1, 1), biases=True, norms=True),
    "biases and norms, add of one pixel": dict(shape=(1, 96, 5, 3), biases=True, norms=True, add=(1, 1)),
    "bare": dict(shape=(1, 128, 3, 4)),
    "one column": dict(shape=(1, 256, 3, 1), norms=True, add=(2, 3)),
}


@pytest.mark.parametrize("name", PARITY)
def test_parity(name, dtype, device, path):
    """Output and every gradient: partial tiles, masked channels, each optional part, the gather and its transpose, both loading paths."""
    Case(dtype=dtype, device=device, **PARITY[name]).assert_parity()


@pytest.mark.parametrize("name", ("biases, smaller add", "norms, same add", "bare"))
def test_parity_cudnn(name, dtype, exact_products, device):
    """The other backend: PyTorch's convolution with the epilogue kernel after it, in both passes."""
    if name.startswith("biases") and dtype != torch.float32:
        pytest.skip("the bare convolution is rounded before the bias, so that a ReLU may cut elsewhere than the reference's: float32 only")
    with launch.using("conv3x3", CUDNN):
        Case(dtype=dtype, device=device, **PARITY[name]).assert_parity()


SHIPPED = checks.shipped_configurations("conv3x3", backend="triton")


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_configuration(name, device):
    """Tiles that the table keeps for large maps or other GPUs compute the same: 48 channels leave each with partial blocks."""
    shipped = SHIPPED[name]
    case = Case((2, 48, 9, 13), shipped.dtype, device, biases=True, norms=True, add=(5, 6))
    with shipped.used():
        out = case.call(residual_conv_unit)(*case.inputs)
        assert_parity(out, *values_in_both(case.call(residual_conv_unit_ref), case.inputs))


def test_both_paths_ran(monkeypatch, device):
    """The fixture ``path`` and the backend of the table really switch between the three ways."""
    if device.type == "cuda":
        pytest.skip("a GPU runs its own family's path")
    launches = checks.spied_launches(monkeypatch)
    case = Case((1, 72, 3, 4), torch.float16, device)
    for family in ("sm_80", "sm_90"):
        monkeypatch.setenv(launch.INTERPRETED_FAMILY_VARIABLE, family)
        case.call(residual_conv_unit)(*case.inputs)
    with launch.using("conv3x3", CUDNN):
        case.call(residual_conv_unit)(*case.inputs)
    ran = [(kernel, keywords.get("DESCRIPTOR")) for kernel, keywords in launches]
    assert ran == [("conv3x3_kernel", False)] * 2 + [("conv3x3_kernel", True)] * 2 + [("conv3x3_epilogue", None)] * 2


def test_unaligned_channels(dtype, device, path):
    """20 channels: rows that are not a multiple of 16 bytes, which descriptors cannot address in half precision."""
    Case((1, 20, 4, 9), dtype, device, biases=True, add=(2, 5)).assert_parity()


def neighbours(size):
    """How many of the three taps fall inside, for every position of an axis."""
    return torch.tensor([float((i > 0) + 1 + (i < size - 1)) for i in range(size)])


@pytest.mark.parametrize("size", ((1, 1), (1, 6), (5, 7), (9, 17)), ids=str)
def test_border(size, device, dtype, path, monkeypatch):
    """All ones, and exact but for cuDNN's: each pixel counts its neighbours, then sums their counts; a wrong pad shows at the border."""
    channels = 32
    x = torch.ones(1, channels, *size, device=device, dtype=dtype)
    weight = torch.full((channels, channels, 3, 3), 1 / channels, device=device, dtype=dtype)
    counts = [neighbours(side) for side in size]
    sums = [F.conv1d(count[None, None], torch.ones(1, 1, 3), padding=1).flatten() for count in counts]
    expected = torch.outer(*sums).to(device, torch.float64) + 1
    launches = checks.spied_launches(monkeypatch)
    out = residual_conv_unit(x, weight, None, weight, None)
    if checks.by_cudnn(launches):  # it may transform the map, and round
        assert_parity(out, expected.expand_as(out), residual_conv_unit_ref(x, weight, None, weight, None))
    else:
        assert torch.equal(out.double(), expected.expand_as(out))


@pytest.mark.parametrize(
    ("size", "source"),
    [((12, 20), (6, 10)), ((5, 7), (9, 3)), ((1, 1), (4, 5)), ((7, 1), (3, 2)), ((33, 18), (1, 1)), ((6, 5), (6, 9))],
    ids=str,
)
def test_gather_is_interpolate(size, source, device, path):
    """The gather alone (weights and x zero) against F.interpolate in float64, to any size, and exact in the corners it aligns."""
    x = torch.zeros(2, 32, *size, device=device)
    weight = torch.zeros(32, 32, 3, 3, device=device)
    add = torch.randn(2, 32, *source, device=device)
    out = residual_conv_unit(x, weight, None, weight, None, add=add)
    resize = functools.partial(F.interpolate, size=size, mode="bilinear", align_corners=True)
    assert_parity(out, resize(add.double()), resize(add))
    assert torch.equal(out[..., 0, 0], add[..., 0, 0])
    if min(size) > 1:
        assert torch.equal(out[..., -1, -1], add[..., -1, -1])


@pytest.mark.parametrize("variance", (1e-12, 1e6))
def test_extreme_variance(variance, dtype, device):
    """Dead channels (the variance vanishes beside eps) and exploding ones: scale, shift and their gradients keep the rule."""
    gain = 0.01 if variance < 1 else 1.0  # 316 times a larger map would overflow float16
    Case((2, 32, 5, 7), dtype, device, norms=True, variances=(variance, 2 * variance), gain=gain).assert_parity()


def test_zero_norm_weight(device):
    """A norm weight of exactly 0 has a gradient that no division by it can give."""
    case = Case((1, 32, 4, 5), torch.float32, device, norms=True)
    for index in (5, 7):
        case.inputs[index][::3] = 0.0
    case.assert_parity()


def test_nan_passes(dtype, device, path, monkeypatch):
    """NaN in, NaN out, where a tap sees it, and nowhere else: the ReLUs must not turn it into 0. cuDNN may fill the image."""
    launches = checks.spied_launches(monkeypatch)
    case = Case((2, 32, 9, 11), dtype, device)
    case.inputs[0][0, 3, 4, 4] = float("nan")
    out = case.call(residual_conv_unit)(*case.inputs)
    must = case.call(residual_conv_unit_ref)(*(t if t is None else t.cpu().double() for t in case.inputs)).isnan()
    image = must.flatten(1).any(1)[:, None, None, None].expand_as(must)
    checks.assert_nan(out, must, image if checks.by_cudnn(launches) else must)


def test_memory_formats(dtype, device, path):
    """Any layout of maps, weights and vectors is right (copied where the kernels could not read it), and the output is channels-last."""
    case = Case((2, 32, 5, 7), dtype, device, biases=True, norms=True, add=(3, 4))
    expected = case.call(residual_conv_unit)(*case.inputs)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    for layout in (lambda t: t.contiguous(), lambda t: torch.stack([t, t + 1], -1)[..., 0]):
        case.constants = [tuple(map(layout, pair)) for pair in case.constants]
        out = case.call(residual_conv_unit)(*map(layout, case.inputs))
        assert out.is_contiguous(memory_format=torch.channels_last) and torch.equal(out, expected)


def test_expanded_gradient(dtype, device):
    """Cotangents of stride 0 and of transposed memory."""
    case = Case((1, 32, 4, 5), dtype, device, add=(2, 2))
    checks.assert_expanded_gradient(case.call(residual_conv_unit), case.call(residual_conv_unit_ref), case.inputs)


class FarMaps:
    """Two images, each of more than 2^31 elements: zeros, but for the far corner of x and skip, and the constant that is added there."""

    side, channels = 2912, 256

    def __init__(self, far):
        assert self.side**2 * self.channels > 2**31
        shapes = [(2, self.channels, self.side - rows, self.side) for rows in (0, 0, 1)]
        self.x, self.skip, self.add = (far.zeros(shape, channels_last=True) for shape in shapes)
        self.add[-1, :, -3:, -24:] = 0.5
        self.corners = [t[-1:, :, -12:, -24:] for t in (self.x, self.skip)]
        for corner in self.corners:
            corner.copy_(torch.randn(corner.shape))

    def assert_parity(self, out, weight):
        """Of the part of the last row that every last program computes."""

        def expected(dtype):
            x, skip = (corner.to(dtype) for corner in self.corners)
            return F.conv2d(x, weight.to(dtype), padding=1) + skip + 0.5

        assert_parity(*(t[-1:, -32:, -1, -16:] for t in (out, expected(torch.float64), expected(torch.float16))))


def test_offsets_beyond_int32(far, path):
    """Offsets are 64 bits wide: x, skip and add are read, and the result written, at the far end."""
    maps = FarMaps(far)
    weight = (
        (torch.randn(maps.channels, maps.channels, 3, 3, device=maps.x.device) / 48).half().contiguous(memory_format=torch.channels_last)
    )
    maps.assert_parity(conv3x3.conv3x3(maps.x, weight, skip=maps.skip, add=maps.add), weight)


def test_epilogue_offsets_beyond_int32(far):
    """As above, for the kernel that follows a convolution of cuDNN's: x stands for that, as if the window were a single 1."""
    maps = FarMaps(far)
    config = launch.config("conv3x3_epilogue", "sm_80", torch.float16, C=maps.channels, pixels=2 * maps.side**2)
    grid = (2 * maps.side**2 // config["BLOCK_M"], maps.channels // config["BLOCK_N"])
    sides = (maps.side, maps.side, maps.side - 1, maps.side)
    flags = {"CHANNELS": maps.channels, "RELU_OUTPUT": False}
    out = far.zeros(maps.x.shape, channels_last=True)
    out[-1:, :, -12:, -24:] = maps.corners[0]
    launch.launch(
        conv3x3.conv3x3_epilogue, grid, out, ((out, None), (None, None, None, maps.skip, None, maps.add)), *sides, **flags, **config
    )
    identity = torch.zeros(maps.channels, maps.channels, 3, 3, device=out.device)
    identity[:, :, 1, 1] = torch.eye(maps.channels)
    maps.assert_parity(out, identity)


def test_reproducible_gradients(dtype, device, path):
    """The same call gives the same bits, cuDNN's weight gradients included where PyTorch asks it for that, as all these tests do."""
    case = Case((2, 32, 9, 11), dtype, device, biases=True, norms=True, add=(4, 5))
    checks.assert_reproducible(case.call(residual_conv_unit), case.inputs)


def test_each_gradient_alone(dtype, device):
    """Whichever one input needs a gradient, it is the one it has when all do: what is skipped for the others is not what it needs. And
    where none does, nothing is recorded."""
    case = Case((1, 32, 4, 5), dtype, device, biases=True, norms=True, add=(2, 3))
    checks.assert_gradients_alone(case.call(residual_conv_unit), case.inputs)


def test_saved_memory(device):
    """Saved for the backward: x and one map between the convolutions, beside the parameters; nothing of add."""
    case = Case((1, 32, 9, 11), torch.float32, device, biases=True, norms=True, add=(4, 5))
    saved = checks.saved_shapes(case.call(residual_conv_unit), case.inputs)
    assert [shape for shape in saved if len(shape) == 4 and shape[0] == 1] == [(1, 32, 9, 11)] * 2


def test_autocast_is_followed(device):
    """Under autocast float32 maps and weights are taken in autocast's dtype, as PyTorch's convolutions take them; gradients are float32."""
    case = Case((1, 32, 4, 5), torch.float32, device, biases=True, norms=True, add=(2, 3))
    leaves = [t.requires_grad_() for t in case.inputs]
    with torch.autocast(device.type, dtype=torch.float16):
        out = case.call(residual_conv_unit)(*leaves)
    halves = [t.detach().half() if t.dim() == 4 else t.detach() for t in leaves]
    assert out.dtype == torch.float16 and torch.equal(out, case.call(residual_conv_unit)(*halves))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), leaves))


def test_autocast_keeps_the_weights(device):
    """Kept for the backward are the parameters themselves, no copies in half precision."""
    case = Case((1, 32, 4, 5), torch.float32, device, biases=True, norms=True, add=(2, 3))
    checks.assert_autocast_keeps(case.call(residual_conv_unit), case.inputs, 1, 3)


def test_empty_batch(device, path):
    """A batch of nothing gives nothing, forward and backward, without a launch."""
    case = Case((0, 32, 4, 5), torch.float32, device, biases=True, add=(2, 3))
    case.inputs[0].requires_grad_()
    out = case.call(residual_conv_unit)(*case.inputs)
    assert out.shape == (0, 32, 4, 5)
    assert torch.autograd.grad(out.sum(), case.inputs[0])[0].shape == (0, 32, 4, 5)


def operands(case):
    """The arguments of the registered op."""
    x, w1, b1, w2, b2, norm1_weight, norm1_bias, norm2_weight, norm2_bias, add = case.inputs
    (mean1, variance1), (mean2, variance2) = case.constants
    first = (w1, b1, norm1_weight, norm1_bias, mean1, variance1, 1e-5)
    return x, *first, w2, b2, norm2_weight, norm2_bias, mean2, variance2, 1e-5, add


def test_opcheck(device, path):
    """PyTorch's own checks of both registrations: schema, fake kernels, autograd, compilation with static and dynamic shapes."""
    case = Case((1, 32, 3, 4), torch.float32, device, biases=True, norms=True, add=(2, 3))
    x, w1, *_ = inputs = operands(case)
    y, hidden = torch.ops.dpt.residual_conv_unit(*inputs)
    for tensor in case.inputs:
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.dpt.residual_conv_unit.default, inputs)
    x, w1, scale = x.detach(), w1.detach(), case.constants[0][1]
    backward = (torch.randn_like(y), x, hidden, w1, scale, w1, None)
    for needs in ((True, True, True), (True, False, True)):
        torch.library.opcheck(torch.ops.dpt.residual_conv_unit_backward.default, (*backward, *needs))


def test_compile_fullgraph(device):
    """torch.compile takes the op whole, forward and backward, without a graph break."""
    case = Case((1, 32, 3, 4), torch.float32, device, biases=True, norms=True, add=(2, 3))
    checks.assert_compiles(case.call(residual_conv_unit), case.inputs)


def test_export(device):
    """torch.export keeps the op as one node, at any height."""
    case = Case((1, 32, 4, 5), torch.float32, device, biases=True)
    x, *parameters = case.inputs
    other = torch.randn(1, 32, 7, 5, device=device)
    checks.assert_exports(lambda x: residual_conv_unit(x, *parameters[:4]), x, other, 2, "dpt.residual_conv_unit")


def arguments(**changed):
    tensors = {"x": torch.zeros(2, 8, 3, 4), "w1": torch.zeros(8, 8, 3, 3), "b1": None, "w2": torch.zeros(8, 8, 3, 3), "b2": None}
    return {**tensors, **changed}


VECTOR = torch.ones(8)


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"x": torch.zeros(2, 8, 3, 4, dtype=torch.float64)}, TypeError, "x is torch.float64"),
        ({"x": torch.zeros(8, 3, 4)}, ValueError, r"x has shape \(8, 3, 4\)"),
        ({"x": torch.zeros(2, 8, 0, 4)}, ValueError, "H and W from 1 to 32767"),
        ({"w1": torch.zeros(8, 8, 3, 3).half()}, TypeError, "w1 is torch.float16: must be torch.float32"),
        ({"w2": torch.zeros(8, 4, 3, 3)}, ValueError, r"w2 is \(8, 4, 3, 3\) on cpu: must be \(8, 8, 3, 3\)"),
        ({"w2": torch.zeros(8, 8, 1, 1)}, ValueError, "w2 is"),
        ({"b1": torch.zeros(4)}, ValueError, r"b1 is \(4,\) on cpu: must be \(8,\)"),
        ({"b2": torch.zeros(8, dtype=torch.int32)}, TypeError, "b2 is torch.int32"),
        ({"norm1": (VECTOR, VECTOR, VECTOR, VECTOR)}, ValueError, "norm1 must be"),
        ({"norm1": (VECTOR, None, VECTOR, VECTOR, 1e-5)}, ValueError, "norm1 must be"),
        ({"norm2": (VECTOR, VECTOR[:4], VECTOR, VECTOR, 1e-5)}, ValueError, "norm2's bias"),
        ({"norm2": (VECTOR, VECTOR, VECTOR, VECTOR, -1.0)}, ValueError, "norm2's eps is -1.0"),
        ({"add": torch.zeros(1, 8, 3, 4)}, ValueError, r"add is \(1, 8, 3, 4\) on cpu: must be \(2, 8, any, any\)"),
        ({"add": torch.zeros(2, 8, 3, 0)}, ValueError, "add has shape"),
        ({"add": torch.zeros(2, 8, 3, 4).half()}, TypeError, "add is torch.float16"),
        ({"w1": torch.zeros(8, 8, 3, 3, device="meta")}, ValueError, "on meta: must be"),
    ],
)
def test_errors(changed, error, says):
    """Each wrong argument is refused by name, with the rule."""
    with pytest.raises(error, match=says):
        residual_conv_unit(**arguments(**changed))
