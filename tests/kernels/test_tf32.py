"""TF32: what a tensor core makes of float32 operands, the bound that follows from it, and that this bound can fail."""

import functools

import checks
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from both_passes import in_both, values_and_gradients, values_in_both
from linear_cases import layernorm_mlp_case

from dpt.kernels import launch
from dpt.kernels.attention import attention_ref
from dpt.kernels.parts import conv3x3
from dpt.kernels.residual_conv import residual_conv_unit_ref
from dpt.kernels.tools import parity, workload
from dpt.kernels.tools.parity import assert_parity, precision_in_force, reference_products, truncated


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, SIDE: tl.constexpr, PRECISION: tl.constexpr):
    offsets = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tl.store(out_ptr + offsets, tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), input_precision=PRECISION))


@pytest.mark.parametrize("precision", ("tf32", "ieee"))
def test_a_dot_truncates_its_operands(precision, device):
    """What the bound is built on: the last 13 bits are dropped, not rounded, on this GPU or by the interpreter in its stead; without TF32
    nothing is. Each sum has one term, the product of 11 digits and 11: exact."""
    a, b = (torch.randn(16, 16, device=device) for _ in range(2))
    b = torch.diag(b[0])
    out = torch.empty(16, 16, device=device)
    _product_kernel[(1,)](a, b, out, 16, precision)
    expected = truncated(a) @ truncated(b) if precision == "tf32" else a @ b
    assert torch.equal(out, expected)
    mantissa, exponent = torch.frexp(a)  # at least a half, below 1: of 11 digits, 2^-11 is the last
    assert torch.equal(truncated(a), torch.ldexp((mantissa * 2**11).trunc(), exponent - 11))


def seven_bits(tensor):
    """``tensor``, if float32, with seven of its 23 bits."""
    return (tensor.view(torch.int32) & -(2**16)).view(torch.float32) if tensor.dtype == torch.float32 else tensor


def as_bfloat16(tensor):
    return tensor.bfloat16().to(tensor.dtype) if tensor.dtype == torch.float32 else tensor


def rounded(tensor):
    """To TF32's ten bits, half up in magnitude: what cuDNN and cuBLAS do."""
    return truncated((tensor.view(torch.int32) + 2**12).view(torch.float32)) if tensor.dtype == torch.float32 else tensor


def mlp(device):
    case = layernorm_mlp_case((197,), 64, 128, torch.float32, device)
    return case.reference, case.inputs


def unit(device):
    x, w1, w2 = torch.randn(1, 32, 12, 12, device=device), *(torch.randn(2, 32, 32, 3, 3, device=device) / 17)
    return lambda x, w1, w2: residual_conv_unit_ref(x, w1, None, w2, None), [x, w1, w2]


def attended(device):
    return functools.partial(attention_ref, num_heads=2), [torch.randn(1, 65, 3 * 64, device=device)]


OPS = pytest.mark.parametrize("op", (mlp, unit, attended), ids=lambda op: op.__name__)


def with_operands(monkeypatch, change, function):
    """``function()``, every product's operands changed by ``change``."""
    with monkeypatch.context() as patch, reference_products("tf32"):
        patch.setattr(parity, "truncated", change)
        return function()


@OPS
def test_the_bound_can_fail(op, device, tf32, monkeypatch):
    """Operands of TF32, truncated or rounded, are within it. Those of bfloat16's digits, three less, are not, in the output and in some
    gradient. (One less is twice the error, which is just what the rule allows.)"""
    function, inputs = op(device)
    cotangent = torch.randn_like(function(*inputs))
    run = functools.partial(values_and_gradients, function, inputs, cotangent)
    exact, same_dtype = in_both(lambda dtype: run(dtype))
    for passes in (truncated, rounded):
        for parts in zip(with_operands(monkeypatch, passes, run), exact, same_dtype, strict=True):
            assert_parity(*parts)
    found = list(zip(with_operands(monkeypatch, seven_bits, run), exact, same_dtype, strict=True))
    for part in found[:1], found[1:]:
        with checks.refused("off by"):
            for parts in part:
                assert_parity(*parts)


@OPS
def test_the_bound_of_exact_products_is_another(op, device):
    """Truncated operands are far beyond what float32 loses when it is multiplied exactly: without TF32 nothing like them passes."""
    function, inputs = op(device)
    expected = values_in_both(function, inputs)
    with reference_products("tf32"):
        out = function(*inputs)
    with checks.refused("off by"):
        assert_parity(out, *expected)
    assert (out - expected[0]).abs().max() > 200 * (expected[1] - expected[0]).abs().max()


def assert_products(function, *operands, rest=()):
    """function(*operands, *rest), and its gradients, are those of truncated operands; ``rest`` is added, whole."""
    with reference_products("tf32"):
        out = function(*operands, *rest)
    with reference_products("ieee"):
        assert torch.equal(out, function(*map(truncated, operands), *rest))
        assert not torch.equal(out, function(*operands, *rest))


def test_every_product_is_truncated(device):
    """In each of PyTorch's ways to write one, in inference mode too, where they arrive whole; what is added is not."""
    x, y, w = (torch.randn(3, 4, 4, device=device) for _ in range(3))
    image, window = torch.randn(1, 3, 5, 6, device=device), torch.randn(4, 3, 3, 3, device=device)
    turned = window.transpose(0, 1).contiguous()
    bias = torch.randn(4, device=device)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_products(torch.matmul, x, y)
            assert_products(torch.matmul, x[0], y[0])
            assert_products(lambda x, w, b: F.linear(x, w, b), x, w[0], rest=[bias])
            assert_products(lambda a, b, c: torch.baddbmm(c, a, b), x, y, rest=[w])
            assert_products(lambda a, b: torch.einsum("bij,bkj->bik", a, b), x, y)
            assert_products(lambda x, w, b: F.conv2d(x, w, b, padding=1), image, window, rest=[bias])
            assert_products(lambda x, w, b: F.conv_transpose2d(x, w, b), image, turned.transpose(0, 1).flip(0)[:3], rest=[bias[:3]])


def test_gradients_of_truncated_products(device):
    """The backward's products are truncated as the forward's; the bias's gradient is a sum, in float32."""
    x, w, b = torch.randn(2, 3, 5, 6, device=device), torch.randn(4, 3, 3, 3, device=device), torch.randn(4, device=device)
    cotangent = torch.randn(2, 4, 3, 4, device=device)
    with reference_products("tf32"):
        _, x_grad, w_grad, b_grad = values_and_gradients(F.conv2d, [x, w, b], cotangent)
    _, x_other, w_other, _ = values_and_gradients(F.conv2d, [truncated(x), truncated(w), b], truncated(cotangent))
    assert torch.equal(x_grad, x_other) and torch.equal(w_grad, w_other)
    torch.testing.assert_close(b_grad, cotangent.sum((0, 2, 3)))
    assert not torch.allclose(truncated(cotangent).sum((0, 2, 3)), b_grad)


def test_other_dtypes_are_left_alone(device):
    """float64, which is the truth, and half precision."""
    for dtype in (torch.float64, torch.float16):
        x = torch.randn(4, 4, device=device).to(dtype)
        with reference_products("tf32"):
            out = x @ x
        assert torch.equal(out, x @ x) and truncated(x) is x


def test_a_product_that_is_not_known(device):
    """It would pass untruncated: an error, not a yardstick that is too good."""
    with reference_products("tf32"), pytest.raises(NotImplementedError, match="aten.mv.default: its operands would not be truncated"):
        torch.randn(3, 3, device=device) @ torch.randn(3, device=device)


def test_one_precision(device):
    """The rule knows one for both kinds of products; a test that sets them apart cannot ask it."""
    assert precision_in_force() == "ieee"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    with pytest.raises(ValueError, match="TF32 for matmuls: False, for convolutions: True"):
        precision_in_force()


@pytest.mark.parametrize("allowed", (True, False))
@pytest.mark.parametrize("switch", ("allow_tf32", "fp32_precision"))
def test_convolutions_follow_pytorch(switch, allowed):
    """float32 is multiplied in TF32 exactly where PyTorch's own convolutions are; where not, the table hands it to cuDNN. Both of PyTorch's
    switches are heard; the fixture `exact` sets them back."""
    if switch == "allow_tf32":
        torch.backends.cudnn.allow_tf32 = allowed
    else:
        torch.backends.cudnn.conv.fp32_precision = "tf32" if allowed else "ieee"
    assert conv3x3.input_precision(torch.float32) == ("tf32" if allowed else "ieee")
    assert conv3x3.input_precision(torch.bfloat16) == "ieee"
    x = torch.empty(1, 64, 8, 8, device="meta").contiguous(memory_format=torch.channels_last)
    weight = torch.empty(64, 64, 3, 3, device="meta").contiguous(memory_format=torch.channels_last)
    for family in checks.FAMILIES:
        (case,) = launch.record(family, "", conv3x3.conv3x3, x, weight)
        assert case.kwargs.get("PRECISION") == ("tf32" if allowed else None)


def test_tuning_uses_the_bound(device):
    """A workload in TF32 is judged by it: truncated operands pass, those of bfloat16 do not; and without TF32 neither does."""

    def product(change):
        return lambda a, b: change(a) @ change(b)

    def trial(change, precision):
        work = workload.Workload(
            "a product", product(change), arguments=lambda inputs: {"a": inputs.normal(64, 96), "b": inputs.normal(96, 64)},
            reference=lambda a, b: a @ b, candidates={}, sizes={}, small={}, dtype=torch.float32, precision=precision,
        )  # fmt: skip
        return workload.Trial(work, device)

    trial(truncated, "tf32").check()
    for change, precision in ((as_bfloat16, "tf32"), (truncated, "ieee")):
        with checks.refused("a product  ?[a-z0-9]+, result 0: off by"):
            trial(change, precision).check()
