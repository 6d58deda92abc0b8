"""What `fast=True` computes otherwise than PyTorch's layers on a CPU: Winograd's convolution, products, memory that is used again."""

import copy
import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from fractions import Fraction

import pytest
import small
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import dpt
from dpt.kernels.cpu import choices, convolution, memory, winograd
from dpt.kernels.cpu.linear import linear
from dpt.kernels.cpu.plain import are_plain
from dpt.zoo import CONFIGS

SIZES = [(1, 16, 24, 13, 9), (3, 8, 8, 5, 7), (2, 8, 16, 4, 4), (5, 8, 8, 1, 3), (1, 3, 5, 37, 41), (2, 8, 8, 16, 12)]


def last(*shape: int) -> Tensor:
    return torch.randn(shape).to(memory_format=torch.channels_last)


@pytest.fixture
def everywhere(monkeypatch):
    """Winograd's algorithm for maps of any size, and every buffer in memory that is used again."""
    monkeypatch.setattr(choices, "winograd", lambda *sizes: True)
    monkeypatch.setattr(memory, "SMALLEST", 1)


def test_transforms_are_exact():
    """Blind spot: an entry that is wrong by less than a tolerance. In rational numbers, of made-up integers."""
    at, g, bt = winograd.transforms()
    pixels, weight = [Fraction(n) for n in (3, -1, 4, 1, -5, 9)], [Fraction(n) for n in (2, -7, 1)]

    def product(matrix, vector):
        return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

    between = [a * b for a, b in zip(product(g, weight), product(bt, pixels), strict=True)]
    assert product(at, between) == [sum(weight[k] * pixels[i + k] for k in range(3)) for i in range(4)]


@pytest.mark.parametrize("tiles", [1, 6, 128])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_winograd_is_the_convolution(sizes, tiles, monkeypatch):
    """Blind spot: strips of some rows, of several pictures, or with a last one that is shorter; sides that are no whole tiles; what stands
    around the convolution, with or without a bias."""
    monkeypatch.setattr(winograd, "TILES", tiles)
    monkeypatch.setattr(winograd, "NUMBERS", 1)
    batch, channels, outputs, height, width = sizes
    torch.manual_seed(0)
    x, skip = last(batch, channels, height, width), last(batch, outputs, height, width)
    weight, end = torch.randn(outputs, channels, 3, 3) / (3 * channels**0.5), (torch.randn(5, outputs, 1, 1) / outputs**0.5, torch.randn(5))
    for relu_input, bias, scale in itertools.product((False, True), (None, torch.randn(outputs)), (None, torch.rand(outputs) + 0.5)):
        wide = weight.double() if scale is None else weight.double() * scale.double()[:, None, None, None]
        source = x.relu() if relu_input else x
        plain = F.conv2d(source.double(), wide, None if bias is None else bias.double(), padding=1)
        wanted = {
            "": plain,
            "relu": plain.relu(),
            "skip": plain + skip,
            "then": F.conv2d(plain.relu(), end[0].double(), end[1].double()),
        }
        more = {"": {}, "relu": {"relu": True}, "skip": {"skip": skip}, "then": {"relu": True, "then": end}}
        for name, expected in wanted.items():
            found = winograd.conv3x3(x, weight, bias, scale=scale, relu_input=relu_input, **more[name])
            assert found.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_winograd_rounds_less_than_nnpack():
    """Blind spot: other points, whose sums cancel; both may be off by 1e-5 of the largest value."""
    torch.manual_seed(0)
    x, weight = last(1, 256, 24, 24), torch.randn(32, 256, 3, 3) / 48
    exact = F.conv2d(x.double(), weight.double(), padding=1)

    def error(found: Tensor) -> float:
        return ((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()

    ours, direct = error(winograd.conv3x3(x, weight)), error(F.conv2d(x, weight, padding=1))
    assert ours < 2 * direct
    assert (winograd.conv3x3(x, weight).double() - exact).abs().max() < 1e-5 * exact.abs().max()
    if torch._nnpack_available():
        assert ours < 0.3 * error(torch._nnpack_spatial_convolution(x.contiguous(), weight, None, 1, 1))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_are_the_convolutions(sizes, everywhere):
    """Blind spot: odd sides; a bias left out; taps in another order."""
    batch, channels, outputs, height, width = sizes
    x, bias = last(batch, channels, height, width), torch.randn(outputs)
    for some in (None, bias):
        weight = torch.randn(outputs, channels, 3, 3)
        torch.testing.assert_close(
            convolution.halved(x, weight, some), F.conv2d(x, weight, some, stride=2, padding=1), atol=1e-4, rtol=1e-4
        )
        for side in (2, 4):
            weight = torch.randn(channels, outputs, side, side)
            wanted = F.conv_transpose2d(x, weight, some, stride=side)
            torch.testing.assert_close(convolution.spread(x, weight, some), wanted, atol=1e-4, rtol=1e-4)
    for corners in (False, True):
        wanted = F.interpolate(x, size=(7, 11), mode="bilinear", align_corners=corners)
        found = convolution.resized(x, (7, 11), corners)
        assert torch.equal(found, wanted) and found.stride() == wanted.stride()


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (0,), (1, 1)], ids=str)
def test_linear(activation, rows, everywhere):
    """Blind spot: a bias or a scale left out; a residual that is written over; rows that lie apart; no rows at all."""
    x, weight, bias, scale = torch.randn(*rows, 8), torch.randn(1024, 8), torch.randn(1024), torch.rand(1024)
    residual = torch.randn(*rows, 1024)
    before = residual.clone()
    for some in (None, bias):
        pre = F.linear(x, weight, some)
        gate, value = pre.chunk(2, dim=-1)
        wanted = {
            None: pre,
            "gelu": F.gelu(pre),
            "gelu_tanh": F.gelu(pre, approximate="tanh"),
            "swiglu": F.silu(gate) * value,
        }[activation]
        for apart in (False, True):
            torch.testing.assert_close(linear(x, weight, some, activation, apart=apart), wanted)
        if activation is None:
            torch.testing.assert_close(linear(x, weight, some, residual=residual), residual + pre)
            torch.testing.assert_close(linear(x, weight, some, residual=residual, scale=scale), residual + pre * scale)
            torch.testing.assert_close(linear(x, weight, some, scale=scale), pre * scale)
    assert torch.equal(residual, before)


def test_rows_lie_apart_where_they_would_share_a_set_of_the_cache():
    """Blind spot: rows of 4096 bytes, which attention reads down a column; others, which lie side by side."""
    x = torch.randn(3, 8)
    for columns, between in ((1024, 1040), (1000, 1000)):
        assert linear(x, torch.randn(columns, 8), apart=True).stride() == (between, 1)
        assert linear(x, torch.randn(columns, 8)).stride() == (columns, 1)


@pytest.fixture
def arena():
    """As in a process that has used none of its memory yet."""
    gc.collect()  # models of other tests, whose end gives the memory back, have theirs now and not in the midst of this one
    memory.release()
    yield torch.empty(0, dtype=torch.uint8)
    memory.release()


def test_memory_is_used_again_when_nobody_has_it(arena):
    """Blind spot: numbers written over while a view has them, in whatever thread it dies; memory that is never given back."""
    first = memory.empty((2048, 1024), torch.empty(0))
    place, view = first.data_ptr(), first.t()[3:, 5:]
    del first
    gc.collect()
    assert memory.empty((2048, 1024), torch.empty(0)).data_ptr() != place
    given = [view]
    del view
    thread = threading.Thread(target=given.clear)
    thread.start()
    thread.join()
    assert memory.empty((2048, 1024), torch.empty(0)).data_ptr() == place
    assert memory.reached() == 2 * 2048 * 1024 * 4


@pytest.mark.parametrize("seed", range(4))
def test_no_two_buffers_share_a_byte(seed, arena):
    """Blind spot: what comes back in any order beside what is in use: holes split and joined again, until all is one."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[int, Tensor] = {}
    most = 0
    for turn in range(200):
        drawn = int(torch.randint(1 << 20, (), generator=generator))
        if kept and drawn % 2:
            del kept[sorted(kept)[drawn // 2 % len(kept)]]
        else:
            kept[turn] = memory.empty((memory.SMALLEST + drawn * 16,), arena)
        most = max(most, sum(y.numel() for y in kept.values()))
        spans = sorted((y.data_ptr(), y.data_ptr() + y.numel()) for y in kept.values())
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert all(start % memory.GRAIN == 0 for start, _ in spans)
    assert most <= memory.reached() <= 1.5 * most
    places = [min(y.data_ptr() for y in kept.values())]
    kept.clear()
    assert memory.empty((int(0.9 * memory.LIMIT),), arena).data_ptr() <= places[0]


def test_memory_has_a_limit(arena, monkeypatch):
    """Blind spot: pictures of ever other sizes, each of which leaves its buffers; more than there is room for; a system without room."""
    monkeypatch.setattr(memory, "LIMIT", 4 * memory.SMALLEST)
    kept = [memory.empty((rows, memory.SMALLEST), arena) for rows in (1, 2, 3)]
    assert memory.reached() == 3 * memory.SMALLEST and kept[2].shape == (3, memory.SMALLEST)
    memory.release()

    def refused(size: int, dtype: type) -> None:
        raise MemoryError

    monkeypatch.setattr(memory.np, "empty", lambda size, dtype, real=memory.np.empty: refused(size, dtype) if size else real(size, dtype))
    assert memory.empty((memory.SMALLEST,), arena).shape == (memory.SMALLEST,) and memory.reached() == 0


def test_memory_given_back_while_someone_has_it(arena):
    """Blind spot: numbers that go with the memory; a model that dies while a buffer is taken, which holds the lock."""
    kept = memory.empty((memory.SMALLEST,), arena).fill_(7)
    thread = threading.Thread(target=memory.release, daemon=True)
    with memory._lock:
        thread.start()
        thread.join(20)
        assert not thread.is_alive()
    other = memory.empty((memory.SMALLEST,), arena).fill_(1)
    assert kept.min() == 7 and memory.reached() == memory.SMALLEST and kept.data_ptr() != other.data_ptr()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_memory_in_threads_and_in_a_fork(arena):
    """Blind spot: two threads that get one buffer; a child process that waits for a lock which nobody holds there."""
    wrong = []

    def use(number: int) -> None:
        for turn in range(300):
            mine = memory.empty((memory.SMALLEST + turn,), arena)
            mine[::4096] = number
            wrong.extend([number] * int((mine[::4096] != number).any()))

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    children = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(int(memory.empty((memory.SMALLEST,), arena).numel() != memory.SMALLEST))
        children.append(child)
    for thread in threads:
        thread.join()
    assert not wrong and [os.waitpid(child, 0)[1] for child in children] == [0] * 20


def test_who_wants_more_than_the_result_gets_pytorchs_layers():
    """Blind spot: a gradient, a trace, a mode or a compiler that meets memory which is used again."""
    x, parameter = torch.randn(4), torch.nn.Parameter(torch.randn(4))
    assert are_plain(x, None) and not are_plain(x, parameter) and not are_plain(x, x.double()) and not are_plain(x.long())
    assert not are_plain(torch.empty(4, device="meta"))
    with torch.no_grad():
        assert are_plain(x, parameter)
        with torch.autocast("cpu"):
            assert not are_plain(x)
        with FlopCounterMode(display=False):
            assert not are_plain(x)
        found = []
        torch.func.vmap(lambda row: (found.append(are_plain(row)), row)[1])(x[None])
        torch.jit.trace(lambda y: (found.append(are_plain(y)), y + 1)[1], x, check_trace=False)
        torch.compile(lambda y: y + 1 if are_plain(y) else y - 1, backend="eager", fullgraph=True)(x)
        assert found == [False, False]


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_models_map_is_as_exact_as_plain(name, everywhere):
    """Blind spot: what rounding costs where all convolutions are Winograd's: at most twice the plain model's distance from float64."""
    torch.manual_seed(0)
    model = small.randomise(dpt.build(small.config(name)).eval())
    side = 4 * model.config.encoder.patch_size
    size = model.config.encoder.fixed_size or (side, side)
    x = torch.randn(8, 3, *size)
    more = (torch.rand(8, 8, 8) + 1,) if model.config.decoder.prompt else ()
    quick = dpt.accelerate(copy.deepcopy(model))
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(x.double(), *(m.double() for m in more))
        plain, fast, again = model(x, *more), quick(x, *more), quick(x, *more)
    for key in exact if isinstance(exact, dict) else [None]:
        truth, theirs, ours, twice = (y if key is None else y[key] for y in (exact, plain, fast, again))
        assert torch.equal(ours, twice)

        def distance(y: Tensor, truth: Tensor = truth) -> float:
            return (y.double() - truth).square().mean().sqrt().item()

        assert distance(ours) <= 2 * distance(theirs) + 1e-7 * truth.abs().max().item(), (key, distance(ours), distance(theirs))


@pytest.mark.parametrize("name", ["dpt-base-ade20k", "dpt-large-midas", "depth-anything-v2-small"])
def test_bfloat16_is_pytorchs(name, everywhere):
    """Blind spot: float32's ways taken for another dtype, or another dtype's products rounded once more."""
    torch.manual_seed(0)
    model = small.randomise(dpt.build(small.config(name)).eval())
    x = torch.randn(2, 3, *2 * [4 * model.config.encoder.patch_size])
    with torch.inference_mode():
        exact, half = copy.deepcopy(model).double()(x.double()), model.bfloat16()
        plain, fast = half(x.bfloat16()), dpt.accelerate(copy.deepcopy(half))(x.bfloat16())
    assert fast.dtype == plain.dtype
    theirs, ours = ((y.double() - exact).square().mean().sqrt().item() for y in (plain, fast))
    assert 0 < ours <= 1.5 * theirs


def test_pictures_of_a_batch_are_those_alone(everywhere):
    """Blind spot: a strip of several pictures that mixes them."""
    quick = dpt.accelerate(small.randomise(dpt.build(small.config("dpt-large-ade20k")).eval()))
    x = torch.randn(3, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(quick(x), torch.cat([quick(picture[None]) for picture in x]))


@pytest.mark.parametrize("capability", choices.MEASURED)
def test_the_table_has_what_was_measured_to_be_faster(capability):
    """Blind spot: an entry that no measurement stands behind, or one that was overtaken. By a twentieth either way nobody loses."""
    rows = json.loads(choices.measured_file(capability).read_text())["rows"]
    assert len(rows) > 100
    wrong = []
    for row in rows:
        chosen = choices.algorithm(row["C"], row["O"], row["side"] ** 2, capability)
        if (chosen == "winograd" and row["gain"] < 0.95) or (chosen == "direct" and row["gain"] > 1.3):
            wrong.append((chosen, row))
    assert not wrong


def test_a_machine_that_was_not_measured(monkeypatch):
    """Blind spot: an error, or silence, on an Arm."""
    monkeypatch.setattr(choices, "capability", lambda: "NEON")
    assert choices.winograd(1, 256, 128, 128, 256) and "for AVX2, since NEON was not" in choices.told()
    report = str(dpt.fast_report(dpt.accelerate(dpt.build(small.config()).eval())))
    assert "NEON" in report


def test_constants_are_on_the_cpu():
    """Blind spot: a module that is imported where somebody has set another device, and then keeps its tensors there."""
    program = """
import sys, torch
with torch.device("meta"):
    import dpt, dpt.fast.acceleration
modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "dpt"]
tensors = [value for module in modules for value in vars(module).values() if isinstance(value, torch.Tensor)]
print(len(tensors), {str(tensor.device) for tensor in tensors})
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300).stdout
    count, devices = said.split()
    assert int(count) >= 6 and devices == "{'cpu'}"
