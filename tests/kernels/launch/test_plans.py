"""Plans: what an op does again without asking is what it does when it asks, and it asks where it has to."""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.cases.ops import ops
from dpt.kernels import launch
from dpt.kernels.attention import attention, attention_qkv
from dpt.kernels.conv_norm_relu import conv_norm_relu
from dpt.kernels.launch import plans, written
from dpt.kernels.layernorm_linear import layernorm_linear
from dpt.kernels.parts.maps import empty_channels_last
from dpt.kernels.parts.pointwise import pointwise
from dpt.kernels.upsample import upsample_bilinear

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def worked_out(monkeypatch) -> list[str]:
    """The ops of which a form was worked out, one after the other."""
    names, first = [], plans._first

    def counted(op, *rest):
        result, plan = first(op, *rest)
        names.extend([op.__name__] * (plan is not None))
        return result, plan

    monkeypatch.setattr(plans, "_first", counted)
    return names


def tensors_of(op, seed, device, dtype):
    generator = torch.Generator().manual_seed(seed)
    made = [argument.make(generator, device, dtype) for argument in op.arguments(op.toy)]
    return [
        tensor.to(memory_format=torch.channels_last) if argument.map else tensor
        for argument, tensor in zip(op.arguments(op.toy), made, strict=True)
    ]


@pytest.mark.parametrize("op", [op for op in ops() if "statistics" not in op.name], ids=lambda op: op.name)  # those are of training
@torch.no_grad()
def test_replays_are_what_is_worked_out(op, device, dtype, path, worked_out):
    """Blind spot: an argument that is kept from the first call, memory that is not written, a view of the wrong place."""
    for seed in range(3):
        tensors = tensors_of(op, seed, device, dtype)
        with launch.without_plans():
            wanted = op.call(op.toy, *tensors)
        found = op.call(op.toy, *tensors)
        assert torch.equal(found, wanted) and found.stride() == wanted.stride()
        if seed == 0:
            known = len(worked_out)
    assert 0 < known == len(worked_out), "the same form was worked out again"


def a_linear(device, tokens=5, **changes):
    made = {
        "x": torch.randn(2, tokens, 32, device=device),
        "norm_weight": torch.randn(32, device=device),
        "norm_bias": torch.randn(32, device=device),
        "weight": torch.randn(96, 32, device=device),
        "bias": torch.randn(96, device=device),
    }
    return {**made, "eps": 1e-6, **changes}


def same(found, wanted):
    return found.dtype == wanted.dtype and torch.equal(found, wanted)


@torch.no_grad()
def test_another_form_is_worked_out(device, worked_out):
    """Whatever an op's work rests on tells two forms apart."""

    def vector():
        return torch.randn(32, device=device)

    behind = torch.randn(1 + 2 * 5 * 32, device=device)[1:].view(2, 5, 32)  # an address that 16 does not divide
    changes = [
        {},
        {"x": torch.randn(3, 5, 32, device=device)},
        {"x": torch.randn(5, 2, 32, device=device).transpose(0, 1)},
        {"x": behind},
        {"bias": None},
        {"activation": "gelu"},
        {"activation": "gelu_tanh"},
        {"eps": 1e-3},
        {"weight": torch.randn(32, 96, device=device).T},
        {key: value.half() for key, value in a_linear(device).items() if key != "eps"},
        {"norm_weight": (shared := vector()), "norm_bias": shared},  # never planned
    ]
    for change in changes:
        for _ in range(2):
            arguments = a_linear(device, **change)
            with launch.without_plans():
                wanted = layernorm_linear(**arguments)
            assert same(layernorm_linear(**arguments), wanted), change
    assert len(worked_out) == len(changes) - 1


@torch.no_grad()
def test_switches(device, worked_out):
    """The precision of float32 products is asked in each call, that of matrices and that of convolutions."""
    from dpt.kernels.tools.parity import float32_products

    arguments = a_linear(device)
    x, weight = torch.randn(1, 32, 6, 6, device=device), torch.randn(32, 32, 3, 3, device=device)
    for number, call in enumerate((lambda: layernorm_linear(**arguments), lambda: conv_norm_relu(x, weight)), 1):
        exact = call()
        with float32_products("tf32"), launch.without_plans():
            wanted = call()
        for _ in range(2):
            with float32_products("tf32"):
                assert same(call(), wanted)
            assert same(call(), exact)
        assert len(worked_out) == 2 * number and not same(exact, wanted)


@torch.no_grad()
def test_weights_are_looked_at_in_each_call(device, worked_out):
    """In place, by `.data` and by another parameter: a plan keeps nothing of what it was made from."""
    arguments = a_linear(device, weight=torch.nn.Parameter(torch.randn(96, 32, device=device)))
    layernorm_linear(**arguments)
    for change in (
        lambda weight: weight.mul_(2),
        lambda weight: setattr(weight, "data", torch.randn(96, 32, device=device)),
        lambda weight: arguments.update(weight=torch.nn.Parameter(torch.randn(96, 32, device=device))),
    ):
        change(arguments["weight"])
        with launch.without_plans():
            wanted = layernorm_linear(**arguments)
        assert same(layernorm_linear(**arguments), wanted)
    assert len(worked_out) == 1


@torch.no_grad()
def test_memory_behind_a_map(device, worked_out):
    """A padded map whose last pixel ends the memory is copied before it is read; one of the same form with memory behind it is not."""
    whole = empty_channels_last(torch.empty(1, 1, device=device), 32, 4, 4).normal_()[:, :20]
    cut = torch.empty(whole.untyped_storage().nbytes() // 4 - 12, device=device).as_strided(whole.shape, whole.stride()).copy_(whole)
    for x in (whole, cut, whole, cut):
        with launch.without_plans():
            wanted = upsample_bilinear(x, (8, 8), True)
        assert same(upsample_bilinear(x, (8, 8), True), wanted)
    assert len(worked_out) == 2


def test_gradients(device, worked_out):
    """Where a gradient is wanted the op is registered with autograd; where none is, there is a plan, also with gradients enabled."""
    arguments = a_linear(device)
    plain = layernorm_linear(**arguments)
    assert worked_out == ["layernorm_linear"] and not plain.requires_grad
    arguments["weight"].requires_grad_()
    found = layernorm_linear(**arguments)
    found.sum().backward()
    assert same(found.detach(), plain) and arguments["weight"].grad is not None and len(worked_out) == 1
    with torch.no_grad():
        assert same(layernorm_linear(**arguments), plain)
    with torch.inference_mode():
        assert same(layernorm_linear(**arguments), plain) and layernorm_linear(**arguments).is_inference()


@torch.no_grad()
def test_who_looks_on_sees_the_op(device, worked_out):
    """Modes, transforms, traces, autocast, subclasses and recorded launches get the op itself, also after it has a plan."""
    qkv = torch.randn(1, 5, 3 * 32, device=device)
    plain = attention(qkv, 1)
    known = len(worked_out)
    with FlopCounterMode(display=False) as counter:
        assert same(attention(qkv, 1), plain)
    assert any("dpt" in str(op) for ops_ in counter.flop_counts.values() for op in ops_) or counter.get_total_flops() == 0
    seen = []

    class Looking(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._schema.name)
            return func(*args, **kwargs or {})

    with Looking():
        assert same(attention(qkv, 1), plain)
    assert "dpt::attention" in seen
    with torch.autocast(device.type, dtype=torch.float16):
        assert attention(qkv, 1).dtype == torch.float16 and pointwise(qkv, torch.randn(4, 96, device=device)).dtype == torch.float16
    assert attention(qkv, 1).dtype == torch.float32
    with launch.without_plans():
        assert same(attention(qkv, 1), plain)
    traced = torch.jit.trace(lambda x: attention(x, 1), qkv, check_trace=False)
    assert same(traced(2 * qkv), attention(2 * qkv, 1))

    class Own(torch.Tensor):
        pass

    assert type(attention(qkv.as_subclass(Own), 1)) is Own
    with torch._subclasses.FakeTensorMode() as mode:
        assert isinstance(attention(mode.from_tensor(qkv), 1), torch._subclasses.FakeTensor)
    assert len(launch.record("sm_90", "", attention, qkv, 1)) == 1
    assert len(worked_out) == known, "what is looked at was recorded"


@torch.no_grad()
def test_an_error_is_the_ops_own(device, worked_out):
    """Bad input is refused with the op's sentence, before and after good input of the same key, and leaves no plan."""
    arguments = a_linear(device)
    for _ in range(2):
        layernorm_linear(**arguments)
        with pytest.raises(ValueError, match="norm_bias has shape"):
            layernorm_linear(**{**arguments, "norm_bias": torch.randn(31, device=device)})
        with pytest.raises(TypeError, match="a list"):
            layernorm_linear(**{**arguments, "x": [1.0]})
        with pytest.raises(ValueError, match="activation='relu'"):
            layernorm_linear(**{**arguments, "activation": "relu"})


@torch.no_grad()
def test_an_exhausted_cache(device, worked_out, monkeypatch):
    """Beyond so many forms all are forgotten, and worked out again."""
    monkeypatch.setattr(plans, "MOST", 3)
    for tokens in (3, 4, 5, 6, 7, 3, 4):
        arguments = a_linear(device, tokens)
        with launch.without_plans():
            wanted = layernorm_linear(**arguments)
        assert same(layernorm_linear(**arguments), wanted)
    assert len(worked_out) == 7
    layernorm_linear(**a_linear(device, 4))
    assert len(worked_out) == 7


@torch.no_grad()
def test_threads(device, worked_out):
    """Threads that work out and replay forms of one op at the same time; the op is PyTorch's, for the interpreter has one thread."""
    weights = [torch.randn(16, 8 * width, device=device) for width in range(1, 5)]
    xs = [torch.randn(3, 8 * width, device=device) for width in range(1, 5)]
    wanted = [torch.nn.functional.linear(x, weight) for x, weight in zip(xs, weights, strict=True)]
    wrong, begin = [], threading.Barrier(4)

    def work(offset):
        begin.wait()
        with torch.no_grad():
            for turn in range(400):
                place = (turn + offset) % 4
                if not same(pointwise(xs[place], weights[place]), wanted[place]):
                    wrong.append(place)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(worked_out) <= 16


@torch.no_grad()
def test_views_that_share_memory(device, worked_out):
    """q, k and v of one projection, and then of three: where one tensor begins is not told by where another does."""
    packed = torch.randn(1, 5, 3, 1, 32, device=device)
    apart = [torch.randn_like(packed)[:, :, 0] for _ in range(3)]
    for q, k, v in (packed.unbind(2), apart, packed.flip(2).unbind(2)):
        with launch.without_plans():
            wanted = attention_qkv(q, k, v)
        assert same(attention_qkv(q, k, v), wanted)
    assert len(worked_out) == 1


@torch.no_grad()
def test_misaligned(device, worked_out, monkeypatch):
    """Triton compiles other code for an address that 16 does not divide: after a call with one that it does, too."""
    plain, behind = torch.randn(2, 5, 32, device=device), torch.randn(1 + 2 * 5 * 32, device=device)[1:].view(2, 5, 32)
    seen, launched = [], launch.launch
    arguments = a_linear(device)
    for x in (plain, behind, plain, behind):
        layernorm_linear(**{**arguments, "x": x})
    assert len(worked_out) == 2
    monkeypatch.setattr(launch, "launch", lambda kernel, *rest, **options: seen.append(kernel) or launched(kernel, *rest, **options))
    layernorm_linear(**{**arguments, "x": plain})
    assert not seen
    layernorm_linear(**{**arguments, "x": behind})
    assert seen, "a plan ran on an address that it was not made for"


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the second GPU."""

    device = torch.device("cuda", 1)


def test_a_plan_is_of_its_device(monkeypatch):
    """Called while another device is the current one, a plan makes its own current, allocates there, and leaves what was current; its
    memory has to be where its arguments are. Stand-ins: there are no two devices here."""
    current, allocated = [0], []

    @contextlib.contextmanager
    def switched(index):
        current.append(index)
        yield
        current.pop()

    def empty(shape, strides, dtype):
        allocated.append(current[-1])
        return torch.full(shape, 7, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "device", switched)
    monkeypatch.setattr(written.driver, "_active", SimpleNamespace(get_current_device=lambda: current[-1]))
    monkeypatch.setitem(written.EMPTY, "cuda", empty)
    given, made, filled = torch.zeros(4).as_subclass(Elsewhere), torch.zeros(4).as_subclass(Elsewhere), torch.ops.aten.copy_.default
    tape = written.Tape([given])
    tape.called(torch.ops.aten.empty.memory_format, (), {}, made)
    tape.called(filled, (made, given), {}, made)
    replay = written.replay_of(tape, made)
    for index in (0, 1):
        current[:] = [index]
        assert replay(torch.arange(4.0)).tolist() == [0, 1, 2, 3]
        assert current == [index]
    assert allocated == [1, 1]
    tape.called(torch.ops.aten.empty.memory_format, (), {}, elsewhere := torch.zeros(4))
    with pytest.raises(written.Unplannable, match="memory on cpu beside arguments on cuda:1"):
        written.replay_of(tape, elsewhere)


@torch.no_grad()
def test_kernels_in_threads(device):
    """The interpreter is one for all threads: two that run kernels at once, anew and by plans, take turns."""
    qkvs = [torch.randn(1, 17 + 3 * place, 96, device=device) for place in range(3)]
    wanted = [attention(qkv, 1) for qkv in qkvs]
    found, begin = {}, threading.Barrier(3)

    def work(place):
        begin.wait()
        with torch.no_grad(), launch.without_plans() if place == 0 else contextlib.nullcontext():
            found[place] = [attention(qkvs[place], 1) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(each, wanted[place]) for place in range(3) for each in found[place])


def test_the_environment_switches_them_off():
    """For a card on which a plan is suspected: read when the kernels are imported."""
    code = "from dpt.kernels.launch import plans; print(plans._off.get())"
    for value, expected in (("0", "True"), ("1", "False")):
        environment = {**os.environ, "DPT_KERNELS_PLANS": value}
        told = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
        assert told.stdout.strip() == expected
