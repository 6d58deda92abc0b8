"""The ops with the statistics of the batch against plain PyTorch: outputs, statistics, gradients, both ways of loading, both backends."""

import copy
import functools

import checks
import pytest
import torch
from both_passes import assert_op_parity
from torch import nn

import dpt
from dpt.config import DecoderConfig, HeadConfig
from dpt.fast.acceleration import decelerate
from dpt.fast.modules import fuses_batch_statistics
from dpt.kernels import launch
from dpt.kernels.conv_norm_relu import conv_norm_relu_training, conv_norm_relu_training_ref
from dpt.kernels.parts.batch_norm import batch_moments
from dpt.kernels.residual_conv import residual_conv_unit_training, residual_conv_unit_training_ref
from dpt.kernels.tools.parity import assert_parity
from dpt.nets.decoder import ResidualConvUnit
from dpt.nets.heads import SegmentationHead

pytestmark = pytest.mark.usefixtures("own_convolution")

EPS = 1e-5
UNIT_NAMES = ("x", "w1", "b1", "w2", "b2", "norm1 weight", "norm1 bias", "norm2 weight", "norm2 bias", "add")
HEAD_NAMES = ("x", "weight", "norm weight", "norm bias")


def unit(function, moments=False):
    """The output of ``function``, or its moments, by its inputs alone."""

    def called(x, w1, b1, w2, b2, norm1_weight, norm1_bias, norm2_weight, norm2_bias, add):
        norms = {"norm1": (norm1_weight, norm1_bias, EPS), "norm2": (norm2_weight, norm2_bias, EPS)}
        return function(x, w1, b1, w2, b2, **norms, add=add)[int(moments)]

    return called


def head(function, moments=False):
    def called(x, weight, norm_weight, norm_bias):
        return function(x, weight, norm=(norm_weight, norm_bias, EPS))[int(moments)]

    return called


def unit_inputs(shape, dtype, device, add=None, biases=False):
    batch, channels, *_ = shape
    random = functools.partial(torch.randn, device=device)
    weights = [random(channels, channels, 3, 3) / (9 * channels) ** 0.5 for _ in range(2)]
    maps = [random(shape), *weights, random(batch, channels, *add) if add else None]
    x, w1, w2, add = (None if t is None else t.to(dtype).contiguous(memory_format=torch.channels_last) for t in maps)
    b1, b2 = ((random(channels) * 0.5).to(dtype) if biases else None for _ in range(2))
    norms = [f(random(channels) * 0.3) for f in (lambda t: 1 + t, lambda t: t) * 2]
    return [x, w1, b1, w2, b2, *norms, add]


def head_inputs(shape, out, dtype, device):
    channels = shape[1]
    maps = torch.randn(shape, device=device), torch.randn(out, channels, 3, 3, device=device) / (9 * channels) ** 0.5
    x, weight = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in maps)
    return [x, weight, 1 + 0.3 * torch.randn(out, device=device), 0.3 * torch.randn(out, device=device)]


UNIT, UNIT_REF = unit(residual_conv_unit_training), unit(residual_conv_unit_training_ref)
HEAD, HEAD_REF = head(conv_norm_relu_training), head(conv_norm_relu_training_ref)


@pytest.mark.parametrize(("shape", "add"), [((2, 48, 5, 7), (3, 4)), ((1, 32, 12, 20), None), ((3, 96, 3, 1), (3, 1))], ids=str)
def test_unit_parity(shape, add, dtype, device, path):
    """Output and every gradient: partial tiles, channels that are no power of two, the sums over several tiles and pictures."""
    assert_op_parity(UNIT, UNIT_REF, unit_inputs(shape, dtype, device, add), UNIT_NAMES)


@pytest.mark.parametrize(("shape", "out"), [((2, 48, 5, 7), 24), ((1, 64, 12, 20), 64), ((3, 20, 1, 2), 36)], ids=str)
def test_head_parity(shape, out, dtype, device, path):
    """As above: more channels in than out, fewer, and beyond TMA's alignment."""
    assert_op_parity(HEAD, HEAD_REF, head_inputs(shape, out, dtype, device), HEAD_NAMES)


def test_parity_cudnn(exact_products, device):
    """The statistics from the epilogue that follows PyTorch's convolution."""
    with launch.using("conv3x3", {"backend": "cudnn"}):
        assert_op_parity(HEAD, HEAD_REF, head_inputs((2, 24, 5, 7), 40, torch.float32, device), HEAD_NAMES)


def judged_moments(called, reference, inputs):
    """Mean and variance by the rule, of which PyTorch's in the dtype are those of its own convolution."""
    found = called(*inputs)
    exact = reference(*(None if t is None else t.double() for t in inputs))
    assert_parity(found, exact, reference(*inputs))


def test_moments(dtype, device, exact_path):
    """Of both convolutions; the bias is in the mean."""
    inputs = unit_inputs((2, 32, 9, 13), dtype, device, biases=True)
    judged_moments(unit(residual_conv_unit_training, True), unit(residual_conv_unit_training_ref, True), inputs)


@pytest.mark.parametrize("offset", (0.0, 1e4))
def test_moments_of_tiles(offset, device):
    """Combined over many tiles of different counts; a mean of ten thousand deviations leaves the variance what it is."""
    tiles = [torch.randn(count, 20, device=device, dtype=torch.float64) + offset for count in torch.randint(1, 60, (150,)).tolist()]
    partials = torch.stack([torch.stack((torch.full_like(t[0], len(t)), t.mean(0), (t - t.mean(0)).square().sum(0))) for t in tiles])
    variance, mean = torch.var_mean(torch.cat(tiles), 0, correction=0)
    found = batch_moments(partials.float())
    assert (found[0] - mean).abs().max() <= 2 * torch.finfo(torch.float32).eps * max(offset, 1.0)
    assert (found[1] / variance - 1).abs().max() <= (1e-5 if offset == 0 else 2e-3)


def test_a_large_mean(device, exact_path):
    """A constant beside which the deviation is small does not cancel: by sums of squares the variance would be lost, and its sign."""
    inputs = unit_inputs((2, 32, 5, 7), torch.float32, device, biases=True)
    inputs[2] = inputs[2] + 1e3
    judged_moments(unit(residual_conv_unit_training, True), unit(residual_conv_unit_training_ref, True), inputs)


def test_biases_have_no_effect(device):
    """The gradient of a bias in front of the norm is exactly 0, which PyTorch's is but for rounding."""
    leaves = [None if t is None else t.requires_grad_() for t in unit_inputs((1, 32, 4, 5), torch.float32, device, biases=True)]
    found = torch.autograd.grad(UNIT(*leaves).square().sum(), [leaves[2], leaves[4]])
    assert not any(gradient.any() for gradient in found)


def test_saved_memory(device):
    """Kept for the backward: x and the convolutions; under autocast the weights themselves."""
    saved = checks.saved_shapes(UNIT, unit_inputs((1, 32, 9, 11), torch.float32, device, add=(4, 5)))
    assert [shape for shape in saved if len(shape) == 4 and shape[0] == 1] == [(1, 32, 9, 11)] * 3
    given = head_inputs((1, 16, 3, 4), 24, torch.float32, device)
    maps = [shape for shape in checks.saved_shapes(HEAD, given) if len(shape) == 4 and shape[0] == 1]
    assert maps == [(1, 16, 3, 4), (1, 24, 3, 4)]
    checks.assert_autocast_keeps(UNIT, unit_inputs((1, 32, 4, 5), torch.float32, device), 1, 3)
    checks.assert_autocast_keeps(HEAD, given, 1)


def test_gradients(device, exact_path):
    """Alone as together, the same bits twice, for cotangents of any strides."""
    for op, reference, given in (
        (UNIT, UNIT_REF, unit_inputs((1, 32, 4, 5), torch.float32, device, add=(2, 3))),
        (HEAD, HEAD_REF, head_inputs((1, 16, 3, 4), 24, torch.float32, device)),
    ):
        checks.assert_gradients_alone(op, given)
        checks.assert_reproducible(op, given)
        checks.assert_expanded_gradient(op, reference, given)


def test_opcheck(device):
    """PyTorch's own checks of the registrations."""
    x, weight, norm_weight, norm_bias = (t.requires_grad_() for t in head_inputs((1, 16, 3, 4), 16, torch.float32, device))
    torch.library.opcheck(torch.ops.dpt.conv_norm_relu_training.default, (x, weight, norm_weight, norm_bias, EPS))
    arguments = (x, weight, None, norm_weight, norm_bias, EPS, weight, None, norm_weight, norm_bias, EPS, None)
    torch.library.opcheck(torch.ops.dpt.residual_conv_unit_training.default, arguments)


@pytest.mark.parametrize(
    ("norm", "shape", "words"),
    [
        ((torch.ones(8), torch.zeros(8)), (1, 8, 2, 2), "none of them None"),
        ((torch.ones(7), torch.zeros(8), EPS), (1, 8, 2, 2), "norm's weight"),
        ((torch.ones(8), torch.zeros(8), -1.0), (1, 8, 2, 2), "must not be negative"),
        ((torch.ones(8), torch.zeros(8), EPS), (1, 8, 1, 1), "more than one value"),
    ],
)
def test_errors(norm, shape, words):
    with pytest.raises(ValueError, match=words):
        conv_norm_relu_training(torch.zeros(shape), torch.zeros(8, 8, 3, 3), norm=norm)


def made_unit(norm=nn.BatchNorm2d, **options):
    unit = ResidualConvUnit(DecoderConfig((8, 8, 8, 8), features=32, batch_norm=True))
    unit.norm1, unit.norm2 = (norm(32, **options) for _ in range(2))
    return unit


def made_head(**options):
    head = SegmentationHead(32, HeadConfig("segmentation", classes=("a", "b"), palette=((0, 0, 0), (1, 1, 1)), dropout=0.0))
    head.norm = nn.BatchNorm2d(32, **options)
    return head


@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize("made", (made_unit, made_head))
def test_running_statistics(made, momentum, device, monkeypatch):
    """Blind spot: another momentum, a biased variance, statistics that stand still or that the evaluation form does not read; the average
    of all batches, where there is no momentum. Two steps, then evaluation, then training again."""
    plain = made(momentum=momentum).to(device)
    fast, exact = dpt.accelerate(copy.deepcopy(plain), strict=True), copy.deepcopy(plain).double()
    launches = checks.spied_launches(monkeypatch)
    for training in (True, True, False, True):
        x = torch.randn(2, 32, 5, 6, device=device).contiguous(memory_format=torch.channels_last)
        done = [module.train(training)(x.to(dtype), *size) for module, dtype, size in each(fast, exact, plain)]
        assert_parity(*done)
        for name, buffer in fast.named_buffers():
            others = exact.get_buffer(name), plain.get_buffer(name)
            assert torch.equal(buffer, others[0]) if "tracked" in name else assert_parity(buffer, *others) is None
    assert ("batch_moments_kernel" in [name for name, _ in launches]) and not dpt.fast_report(fast)[0].how.startswith("PyTorch")


def each(fast, exact, plain):
    size = [(5, 6)] if isinstance(plain, SegmentationHead) else []
    return ((module, dtype, size) for module, dtype in ((fast, torch.float32), (exact, torch.float64), (plain, torch.float32)))


def test_a_norm_that_is_alone(device):
    """A SyncBatchNorm in one process takes its statistics, as a BatchNorm does. Where one of two takes the batch's, PyTorch computes."""
    unit = dpt.accelerate(made_unit().to(device), strict=True)
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(unit))
    x = torch.randn(2, 32, 5, 6, device=device)
    assert torch.equal(shared(x), unit(x))
    assert all(torch.equal(value, unit.state_dict()[name]) for name, value in shared.state_dict().items())
    unit.norm2.eval()
    plain = decelerate(copy.deepcopy(unit))
    assert "PyTorch" in str(dpt.fast_report(unit)) and torch.equal(unit(x), plain(x))


def test_norms_that_processes_share(monkeypatch):
    """The statistics of several processes are PyTorch's to make: the kernels would take those of one."""
    norm, x = nn.SyncBatchNorm(8), torch.zeros(2, 8, 3, 3)
    assert fuses_batch_statistics(x, norm)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for processes in (1, 2):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None, processes=processes: processes)
        assert fuses_batch_statistics(x, norm) == (processes == 1)
    assert fuses_batch_statistics(x, nn.BatchNorm2d(8))
