"""dpt.kernels.argmax_upsample against interpolation, argmax and softmax in float64: labels, probabilities, ties, infinities and memory."""

import math

import checks
import exact_resize
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpt.kernels import argmax_upsample
from dpt.kernels.argmax_upsample import label_dtype, upsample_argmax, upsample_argmax_ref
from dpt.kernels.parts.maps import channels_last, padded, with_padding
from dpt.kernels.upsample import upsample_bilinear_ref

INF = float("inf")
ALIGN = pytest.mark.parametrize("align_corners", (True, False), ids=("corners", "centres"))
INTO = {"channels_last": channels_last, "contiguous": torch.Tensor.contiguous, "padded": lambda x: poisoned(padded(x))}
LAYOUT = pytest.mark.parametrize("layout", INTO)


def poisoned(x):
    """A padded map whose padding is NaN and infinity in turn, from one class to the next."""
    behind = with_padding(x)[:, x.shape[1] :]
    behind[:, ::2], behind[:, 1::2] = float("nan"), INF
    return x


def random_logits(shape, dtype, device, layout="channels_last", spread=3.0):
    return INTO[layout]((spread * torch.randn(shape, device=device)).to(dtype))


def assert_labels(labels, values):
    """The labels (B, H', W') are those of the resized float64 ``values`` (B, K, H', W'), but where two classes cannot be told apart: one
    is right too where its value is less than 8 units in float32's last place of the largest logit (four products and three sums, twice)
    below the best. At most one pixel in 500 may need that, beside those where float64 cannot tell the two apart either: the few numbers
    of bfloat16 tie often."""
    assert labels.dtype == label_dtype(values.shape[1]) and labels.shape == values[:, 0].shape
    values = torch.where(values.isnan(), INF, values)
    taken, best = values.gather(1, labels.long()[:, None])[:, 0], values.amax(1)
    gap = torch.where(taken == best, 0.0, best - taken)
    largest = torch.where(values.isfinite(), values, 0.0).abs().max()
    allowed = 8 * torch.finfo(torch.float32).eps * largest
    assert gap.max() <= allowed, f"a label {gap.max():.3e} below the best, allowed {allowed:.3e}"
    differ = (labels.long() != values.argmax(1)) & (gap > 8 * torch.finfo(torch.float64).eps * largest)
    assert 500 * differ.sum() <= differ.numel(), f"{differ.sum()} of {differ.numel()} labels differ"


def assert_right(logits, size, align_corners):
    """Labels as above; probabilities in float32, within 8 units of its last place of float64's softmax, or of PyTorch's own loss, twice."""
    labels, probability = upsample_argmax(logits, size, align_corners, return_probability=True)
    assert torch.equal(labels, upsample_argmax(logits, size, align_corners))
    values = exact_resize.resize(logits, size, align_corners)
    assert_labels(labels, values)
    expected = values.softmax(1).amax(1)
    _, theirs = upsample_argmax_ref(logits, size, align_corners, return_probability=True)
    assert probability.dtype == torch.float32 and probability.shape == labels.shape
    allowed = max(2 * (theirs - expected).abs().max(), 8 * torch.finfo(torch.float32).eps)
    assert (probability - expected).abs().max() <= allowed


CASES = [  # (B, K, h, w) to (H', W'): classes below, at and beyond the blocks and uint8; larger, smaller, from and to sides of 1
    ((1, 1, 5, 7), (12, 20), "channels_last"),
    ((3, 2, 12, 20), (5, 7), "contiguous"),
    ((1, 19, 33, 18), (12, 20), "channels_last"),
    ((1, 19, 5, 7), (12, 20), "contiguous"),
    ((2, 150, 5, 7), (9, 13), "channels_last"),
    ((2, 150, 5, 7), (9, 13), "padded"),
    ((1, 1, 4, 3), (7, 5), "padded"),
    ((2, 19, 5, 7), (9, 4), "padded"),
    ((1, 59, 5, 3), (9, 4), "padded"),
    ((2, 60, 1, 3), (4, 7), "padded"),
    ((1, 171, 3, 5), (7, 5), "padded"),
    ((1, 847, 3, 2), (5, 3), "padded"),
    ((1, 150, 5, 7), (7, 5), "contiguous"),
    ((1, 256, 1, 3), (5, 7), "channels_last"),
    ((1, 257, 4, 3), (4, 3), "channels_last"),
    ((3, 33, 12, 5), (1, 1), "contiguous"),
    ((1, 40, 1, 1), (7, 5), "channels_last"),
]


@ALIGN
@pytest.mark.parametrize(("shape", "size", "layout"), CASES, ids=str)
def test_labels_and_probabilities(shape, size, layout, align_corners, dtype, device):
    """Every label and probability, over all orders in memory: masked classes and pixels, classes that share a lane, the switch to int16."""
    assert_right(random_logits(shape, dtype, device, layout), size, align_corners)


def test_label_dtype(device):
    """uint8 holds classes 0 to 255; the last class of each type comes out as itself."""
    for classes, dtype in ((1, torch.uint8), (256, torch.uint8), (257, torch.int16)):
        logits = torch.zeros(1, classes, 2, 2, device=device).contiguous(memory_format=torch.channels_last)
        logits[:, -1] = 1
        labels = upsample_argmax(logits, (3, 3), True)
        assert labels.dtype == dtype and (labels == classes - 1).all()


SHIPPED = checks.shipped_configurations("upsample_argmax")


@pytest.mark.parametrize("block", SHIPPED)
@LAYOUT
def test_every_shipped_configuration(block, layout, device):
    """Blocks that the tables keep for other numbers of classes or the other layout compute the same."""
    shipped = SHIPPED[block]
    with shipped.used():
        assert_right(random_logits((2, 21, 5, 7), shipped.dtype, device, layout), (11, 13), False)


@LAYOUT
def test_first_of_equals_wins(layout, device):
    """As in torch.argmax on a CPU, whichever lanes and blocks of classes the equals stand in, and when all are equal."""
    for equals in ((0, 1), (3, 3 + 32), (5, 36), (31, 32, 39), (39,), tuple(range(40))):
        logits = INTO[layout](torch.full((1, 40, 3, 4), -2.0, device=device))
        logits[:, list(equals)] = 1
        labels, probability = upsample_argmax(logits, (7, 5), False, return_probability=True)
        assert (labels == equals[0]).all()
        others = 40 - len(equals)
        torch.testing.assert_close(probability, torch.full_like(probability, 1 / (len(equals) + others * math.exp(-3))))


def test_float32_tells_apart_what_half_precision_rounds_together(device):
    """Interpolated logits are compared before any rounding to their dtype: 1 + 2^-11 is 1 in float16, and so PyTorch would say class 0."""
    logits = torch.ones(1, 2, 1, 2, device=device, dtype=torch.float16)
    logits[0, 1, 0, 1] += 2**-10
    labels = upsample_argmax(logits, (1, 3), True)
    assert labels.flatten().tolist() == [0, 1, 1]
    assert upsample_bilinear_ref(logits, (1, 3), True).argmax(1).flatten().tolist() == [0, 0, 1]


@LAYOUT
def test_huge_logits(layout, dtype, device):
    """Near the largest numbers of the dtype, both signs: no exponential overflows, and the winner's probability is 1."""
    huge = torch.finfo(dtype).max / 2
    logits = random_logits((2, 37, 4, 5), dtype, device, layout).sign() * torch.linspace(0.5, 1, 37, device=device)[:, None, None] * huge
    logits = INTO[layout](logits.to(dtype))
    labels, probability = upsample_argmax(logits, (4, 5), True, return_probability=True)
    assert torch.equal(labels.long(), logits.double().argmax(1)) and (probability == 1).all()
    labels, probability = upsample_argmax(INTO[layout](-logits.abs()), (4, 5), True, return_probability=True)
    assert (labels == 0).all() and (probability == 1).all()


@LAYOUT
@pytest.mark.parametrize(
    ("size", "align_corners"), [((4, 5), True), ((4, 5), False), ((7, 9), True), ((9, 12), False), ((3, 2), False)], ids=str
)
def test_infinities_and_nan(size, align_corners, layout, dtype, device):
    """They count where they have a weight; NaN as infinity, and the first of those wins. The probability of such a pixel is NaN."""
    logits = random_logits((2, 40, 4, 5), dtype, device, layout)
    logits[:, 3, 1, 1] = -INF
    logits[:, 7, 2, 3] = INF
    logits[:, 35, 2, 3] = INF
    logits[:, 38, 0, 2] = float("nan")
    logits[1, :, 3, 4] = -INF
    labels, probability = upsample_argmax(logits, size, align_corners, return_probability=True)
    values = exact_resize.resize_infinite(logits, size, align_corners)
    assert_labels(labels, values)
    infinite = (values.isnan() | (values == INF)).amax(1)
    first = torch.where(values.isnan(), INF, values).argmax(1)
    assert infinite.any() and torch.equal(labels.long()[infinite], first[infinite])
    expected = values.softmax(1).amax(1)
    torch.testing.assert_close(probability, expected.float(), equal_nan=True)
    assert expected.isnan().any() and not expected.isnan().all()


@ALIGN
@LAYOUT
def test_masked_classes(layout, align_corners, dtype, device):
    """Classes set to -inf everywhere change nothing but themselves: no label is theirs, at the borders and at aligned pixels neither, where
    PyTorch's 0 * -inf is NaN and wins; the probability is that of the softmax over the others."""
    logits = random_logits((1, 40, 4, 5), dtype, device, layout)
    logits[:, 1::2] = -INF
    for size in ((4, 5), (7, 9), (8, 10)):
        labels, probability = upsample_argmax(logits, size, align_corners, return_probability=True)
        expected, theirs = upsample_argmax(logits[:, ::2], size, align_corners, return_probability=True)
        assert torch.equal(labels, 2 * expected)
        torch.testing.assert_close(probability, theirs)


def test_nothing_but_minus_infinity(device):
    """The first class, and no probability: NaN as PyTorch's, not infinity."""
    logits = torch.full((1, 5, 3, 3), -INF, device=device)
    labels, probability = upsample_argmax(logits, (5, 5), False, return_probability=True)
    assert (labels == 0).all() and probability.isnan().all()


def test_strides(device):
    """Logits are read at their own strides: slices of classes and of pixels, expanded, turned, with and without dense classes."""
    base = random_logits((2, 20, 5, 8), torch.float32, device)
    for logits in (
        base[:, 1:18],
        base[:, ::2],
        base[:, :, 1::2, :-3],
        base.contiguous()[:, 2:, ::3],
        base.transpose(2, 3),
        base[:1].expand(3, -1, -1, -1),
        base[..., :1].expand(-1, -1, -1, 6),
    ):
        assert not logits.is_contiguous() and not logits.is_contiguous(memory_format=torch.channels_last)
        assert_right(logits, (7, 5), False)


def test_padding_is_read_for_wide_loads(device, monkeypatch):
    """What lies behind a padded pixel's classes is read with them, and what is no padding is not: the next pixel's, an offset view's."""
    launches = checks.spied_launches(monkeypatch)
    base = torch.randn(1, 4, 5, 32, device=device).permute(0, 3, 1, 2)
    for logits in (base[:, :19], base[:, :15], base[:, :32], base[:, 1:20], base.contiguous()[:, :19], base[:, :, 1:, :19]):
        upsample_argmax(logits, (5, 6), True)
    assert [options["READ"] for _, options in launches] == [32, 15, 32, 19, 19, 32]


class Allocations(TorchDispatchMode):
    """The shapes of all fresh, non-empty tensors that PyTorch's operators return, and of what shares no memory with an input."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.numel() and tensor.untyped_storage().data_ptr() not in known:
                self.shapes.append((tuple(tensor.shape), tensor.dtype))
        return result


@LAYOUT
def test_memory(layout, device):
    """Nothing is allocated but the results: no copy of the logits, no map of a number for each class."""
    logits = random_logits((2, 20, 5, 7), torch.float16, device, layout)[:, 1:]
    labels = ((2, 8, 10), torch.uint8)
    for probability in (False, True):
        with Allocations() as outside:  # the op is one operator here: what it returns, or is given
            upsample_argmax(logits, (8, 10), False, probability)
        with Allocations() as inside:
            argmax_upsample._forward(logits, 8, 10, False, probability)
        assert outside.shapes == inside.shapes == [labels, ((2, 8, 10), torch.float32)][: 1 + probability]


def test_no_gradients(device):
    """The results have none, though the logits do, and nothing is kept for a backward."""
    logits = random_logits((1, 5, 3, 4), torch.float32, device).requires_grad_()
    labels, probability = upsample_argmax(logits, (6, 8), False, return_probability=True)
    assert not labels.requires_grad and not probability.requires_grad
    assert checks.saved_shapes(lambda x: upsample_argmax(x, (6, 8), False), [logits]) == []


def test_autocast(device):
    """Autocast changes nothing: interpolation is in float32 whatever the logits are."""
    logits = random_logits((1, 5, 3, 4), torch.float32, device)
    expected = upsample_argmax(logits, (6, 8), False, return_probability=True)
    with torch.autocast(device.type, dtype=torch.float16):
        checks.assert_same(upsample_argmax(logits, (6, 8), False, return_probability=True), expected)


def test_reproducible(device):
    """The same call gives the same bits."""
    logits = random_logits((2, 150, 5, 7), torch.float32, device)
    checks.assert_same(*(upsample_argmax(logits, (9, 11), False, return_probability=True) for _ in range(2)))


def test_empty_batch(device):
    """A batch of nothing gives nothing, without a launch."""
    labels, probability = upsample_argmax(torch.zeros(0, 5, 3, 4, device=device), (6, 8), False, return_probability=True)
    assert labels.shape == probability.shape == (0, 6, 8) and labels.dtype == torch.uint8


@pytest.mark.parametrize("layout", ("channels_last", "contiguous"))
@pytest.mark.parametrize(("images", "side", "classes"), ((2, 2944, 300), (36, 512, 256)))
def test_offsets_beyond_int32(images, side, classes, layout, far):
    """Offsets are 64 bits wide: the far end is read of two images of more than 2^31 elements each, and of many small ones."""
    pixels = 16
    assert (images - 1) * side * side * classes >= 2**31
    logits = far.zeros((images, classes, side, side), channels_last=layout == "channels_last")
    row = logits[-1, :, -1, -pixels:]
    row.copy_(torch.randn(row.shape))
    row[-1, ::2] = 9
    labels = upsample_argmax(logits, (side, side), True)
    assert torch.equal(labels[-1, -1, -pixels:].long(), row.argmax(0)) and (labels[-1, -1, -pixels::2] == classes - 1).all()


def test_opcheck(device):
    """PyTorch's own checks of the registration: schema, fake kernel, compilation with static and dynamic shapes."""
    for classes, layout, probability in ((5, "channels_last", True), (300, "channels_last", False), (19, "padded", False)):
        arguments = (random_logits((1, classes, 3, 2), torch.float32, device, layout), 3, 4, True, probability)
        torch.library.opcheck(torch.ops.dpt.upsample_argmax.default, arguments)


def test_compile_fullgraph(device):
    """torch.compile takes the op whole, without a graph break."""

    def predict(x):
        return upsample_argmax(x * 2, (6, 9), False, return_probability=True)

    logits = random_logits((1, 19, 4, 5), torch.float32, device)
    checks.assert_same(torch.compile(predict, fullgraph=True, backend="aot_eager")(logits), predict(logits))


def test_export(device):
    """torch.export keeps the op as one node, at any height."""
    x, other = random_logits((1, 19, 4, 5), torch.float32, device), random_logits((1, 19, 7, 5), torch.float32, device)
    checks.assert_exports(lambda x: upsample_argmax(x, (6, 9), True), x, other, 2, "dpt.upsample_argmax")
    checks.assert_exports(lambda x: upsample_argmax(x, (4 * x.shape[2], 20), False), x, other, 2, "dpt.upsample_argmax")


@pytest.mark.parametrize(
    ("logits", "size", "error", "says"),
    [
        (torch.zeros(2, 8, 3, 4, dtype=torch.float64), (5, 6), TypeError, "logits is torch.float64"),
        (torch.zeros(8, 3, 4), (5, 6), ValueError, r"logits has shape \(8, 3, 4\): must be \(B, C, H, W\)"),
        (torch.zeros(2, 0, 3, 4), (5, 6), ValueError, r"logits has shape \(2, 0, 3, 4\)"),
        (torch.zeros(2, 8, 3, 0), (5, 6), ValueError, r"logits has shape \(2, 8, 3, 0\)"),
        (torch.zeros(1, 32768, 1, 1), (5, 6), ValueError, "32768 classes: int16 labels allow at most 32767"),
        (torch.zeros(2, 8, 3, 4), (5, 6, 7), ValueError, r"size=\(5, 6, 7\): must be \(height, width\)"),
        (torch.zeros(2, 8, 3, 4), (0, 6), ValueError, r"size=\(0, 6\)"),
        (torch.zeros(2, 8, 3, 4), (5, 6.0), TypeError, r"size=\(5, 6.0\): must be two integers"),
    ],
)
def test_errors(logits, size, error, says):
    """Each wrong argument is refused by name, with the rule."""
    with pytest.raises(error, match=says):
        upsample_argmax(logits, size, True)


def test_reference_by_hand():
    """The reference itself: three classes of one row, written out."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.4, 1.4]])[None, :, None]  # (1, 3, 1, 2)
    labels, probability = upsample_argmax_ref(logits, (1, 3), True, return_probability=True)
    assert labels.flatten().tolist() == [0, 1, 1] and labels.dtype == torch.uint8
    middle = 1 / (1 + torch.exp(torch.tensor(1.0 - 1.5)) + torch.exp(torch.tensor(1.4 - 1.5)))
    torch.testing.assert_close(probability[0, 0, 1], middle)
