"""dpt.kernels.layernorm_linear against PyTorch, by the rule of parity.py; what it shares with its siblings is in test_linear_ops.py."""

import math

import checks
import pytest
import torch
from linear_cases import EPS, layernorm_linear_case, layernorm_mlp_case

from dpt.kernels import launch
from dpt.kernels.layernorm_linear import layernorm_linear, layernorm_linear_ref

PARITY = {  # one row; rows that no 16-byte copy fits; several tiles of N and blocks of K, the last of each partial, and of M below
    "one row": dict(leading=(1,), depth=32, columns=48),
    "odd": dict(leading=(17,), depth=37, columns=51, activation="gelu"),
    "tiles": dict(leading=(5, 13), depth=104, columns=136, activation="gelu"),
    "no bias": dict(leading=(2, 17), depth=40, columns=72, bias=False),
    "gelu, no bias": dict(leading=(17,), depth=72, columns=40, bias=False, activation="gelu"),
    "gelu_tanh": dict(leading=(17,), depth=72, columns=136, activation="gelu_tanh"),
    "swiglu, odd": dict(leading=(17,), depth=37, columns=51, activation="swiglu"),
    "swiglu, tiles": dict(leading=(5, 13), depth=104, columns=136, activation="swiglu"),
    "swiglu, no bias": dict(leading=(17,), depth=72, columns=40, bias=False, activation="swiglu"),
    "vectors in float32": dict(leading=(17,), depth=40, columns=72, activation="gelu", vectors=torch.float32),
}


@pytest.mark.parametrize("name", PARITY)
def test_parity(name, dtype, device, path):
    """Output and every gradient: partial tiles in every dimension, each optional part with and without, both loading paths."""
    layernorm_linear_case(dtype=dtype, device=device, **PARITY[name]).assert_parity()


def test_one_channel(dtype, device, path):
    """Sides of 1: the norm of one channel is its bias, and the gradient of x a difference of equal terms, which a fused multiply-add makes
    not quite 0. Counted from these terms, times the 1 / sqrt(eps) that they are multiplied by; that of norm_bias from those of its sum."""
    case = layernorm_linear_case((17,), 1, 3, dtype, device)
    cotangent = torch.randn(17, 3, device=device).to(dtype)
    terms = (cotangent.double() @ case["weight"].double()).abs()
    largest = (terms * case["norm_weight"].double().abs()).max() * EPS**-0.5
    case.assert_parity(cotangent=cotangent, magnitudes={"x": largest.item(), "norm_bias": terms.sum().item()})


@pytest.mark.parametrize(("rows", "depth", "activation"), ((197, 40, "gelu"), (577, 24, None)))
def test_parity_many_rows(rows, depth, activation, device, path):
    """The token counts of 224 and 384 pixels: several blocks of rows, forward, and in the sums over rows of each gradient."""
    layernorm_linear_case((rows,), depth, 48, torch.float32, device, activation=activation).assert_parity()


def test_parity_deep_rows(device):
    """More than 512 and 1024 channels: the other configurations of LayerNorm, and more blocks of K than are ever under way."""
    layernorm_linear_case((37,), 520, 24, torch.float32, device).assert_parity()
    layernorm_linear_case((5,), 1032, 24, torch.float32, device).assert_parity()


@pytest.mark.parametrize("mean", (30.0, -1000.0))
def test_large_mean(mean, dtype, device, path):
    """|mean| far above the standard deviation: a variance from sums of squares, or a product with the mean left in, would cancel."""
    layernorm_linear_case((17,), 150, 40, dtype, device, mean=mean).assert_parity()


@pytest.mark.parametrize("eps", (1e-5, 1e-6))
def test_constant_rows(eps, dtype, device, path):
    """Variance 0, where eps alone decides and an ulp in the mean would be multiplied by 1 / sqrt(eps); beside rows that vary."""
    case = layernorm_linear_case((17,), 150, 40, dtype, device, eps=eps)
    for row, value in ((3, 0.0), (4, 3.3), (5, -700.7)):
        case["x"][row] = value
    case.assert_parity()


@pytest.mark.parametrize("depth", (50, 6))
def test_constant_rows_are_zero(depth, dtype, device, path):
    """The same, exactly: without norm_bias such a row gives the bias alone. In float32 the mean of six equal ones is often an ulp off."""
    case = layernorm_linear_case((3,), depth, 24, dtype, device)
    x = torch.cat([torch.tensor([0.1, 3.3, 1e4]), torch.randn(30)]).to(device, dtype)[:, None].expand(33, depth)
    case = case.replaced(x=x, norm_bias=torch.zeros_like(case["norm_bias"]))
    assert torch.equal(case.function(*case.inputs), case["bias"].expand(33, 24))


def test_outlier_channel(dtype, device, path):
    """One channel a thousand times the others, as in the activations of large ViTs: it must not take the others' digits."""
    case = layernorm_linear_case((17,), 150, 40, dtype, device)
    case["x"][:, 70] = 1000.0
    case.assert_parity()


ROTATED = {  # heads; columns of each; tokens
    "one head": (1, 64, 7),  # queries, keys and values in one tile
    "heads": (3, 64, 21),  # a boundary between keys and values within a tile
    "narrow": (2, 32, 21),
    "no power of two": (2, 40, 7),
}


@pytest.mark.parametrize("name", ROTATED)
def test_parity_rotated(name, dtype, device, path):
    """As the table says: queries and keys turned by their token, of several pictures, and values not; and the gradients."""
    heads, head, tokens = ROTATED[name]
    layernorm_linear_case((3, tokens), 40, 3 * heads * head, dtype, device, head=head).assert_parity()


@pytest.mark.parametrize("name", ("one head", "heads", "narrow"))
@pytest.mark.parametrize("persistent", (False, True))
@pytest.mark.parametrize("width", (64, 128))
def test_parity_rotated_in_the_epilogue(width, persistent, name, dtype, device, path, monkeypatch):
    """The same by one launch: pieces of one head each, tiles of several heads and pictures."""
    heads, head, tokens = ROTATED[name]
    case = layernorm_linear_case((3, tokens), 40, 3 * heads * head, dtype, device, head=head)
    blocks = {"backend": "triton", "BLOCK_M": 32, "BLOCK_N": width, "BLOCK_K": 32, "PARTS": width // head, "GROUP": 2}
    blocks |= {"num_warps": 4, "num_stages": 2, "descriptor": path != "pointers", "persistent": persistent, "rotate": True}
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 3)
    launches = checks.spied_launches(monkeypatch)
    with launch.using("layernorm_linear", blocks):
        case.assert_parity()
    assert [name for name, _ in launches] == ["layernorm_kernel", "linear_kernel", "rotate_kernel", "layernorm_backward_kernel"]


def test_rotated_in_the_epilogue_as_apart(device, monkeypatch):
    """Both ways give the same float32 numbers, to a rounding; pieces that are no head are refused."""
    case = layernorm_linear_case((2, 21), 40, 384, torch.float32, device, head=64)
    blocks = {"backend": "triton", "BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 32, "GROUP": 2, "descriptor": False}
    blocks |= {"num_warps": 4, "num_stages": 2}
    with launch.using("layernorm_linear", {**blocks, "PARTS": 2, "rotate": True}):
        inside = case.function(*case.inputs)
    with launch.using("layernorm_linear", {**blocks, "PARTS": 1}):
        torch.testing.assert_close(inside, case.function(*case.inputs), rtol=1e-6, atol=1e-6)
    with (
        launch.using("layernorm_linear", {**blocks, "PARTS": 1, "rotate": True}),
        pytest.raises(ValueError, match="a rotation of heads of 64 columns in pieces of 128: they must be one head each"),
    ):
        case.function(*case.inputs)


def test_rotated(device):
    """What else an op has to be: follows autocast, saves no more, compiles, takes strides, no pictures and no tokens."""
    case = layernorm_linear_case((2, 21), 40, 384, torch.float32, device, head=64)
    checks.assert_compiles(case.function, case.inputs)
    checks.assert_expanded_gradient(case.function, case.reference, case.inputs)
    checks.assert_reproducible(case.function, case.inputs)
    checks.assert_gradients_alone(case.function, case.inputs)
    inputs = [tuple(t.shape) for t in case.inputs]
    assert checks.saved_shapes(case.function, case.inputs) == sorted([*inputs, (2, 21, 32), (0,), (42,), (42,)])
    leaves = [t.clone().requires_grad_() for t in case.inputs]
    with torch.autocast(device.type, dtype=torch.float16):
        out = case.function(*leaves)
    assert torch.equal(out, case.function(*(t.half() if t.dim() > 1 else t for t in case.inputs)))
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(out.float().sum(), leaves))
    with launch.only():
        assert torch.equal(case.function(*case.inputs), case.reference(*case.inputs))
    for leading in ((0, 21), (2, 0)):
        empty = layernorm_linear_case(leading, 40, 384, torch.float32, device, head=64)
        leaves = [t.requires_grad_() for t in empty.inputs]
        out = empty.function(*leaves)
        assert out.shape == (*leading, 384) and not any(g.any() for g in torch.autograd.grad(out.sum(), leaves))


EXTREMES = {
    "the bend": torch.linspace(-8, 8, 72),
    "far out": torch.tensor([-6e4, -1e3, -50, -12, 12, 50, 1e3, 6e4]).repeat(9),
}


@pytest.mark.parametrize("values", EXTREMES)
@pytest.mark.parametrize("activation", ("gelu", "gelu_tanh", "swiglu"))
@pytest.mark.parametrize("make", (layernorm_linear_case, layernorm_mlp_case), ids=("layernorm_linear", "layernorm_mlp"))
def test_activations(make, activation, values, dtype, device, path):
    """An activation and its slope where they bend, and where erf and tanh are 1 and exp is 0: no NaN from infinity times 0. The weight is
    zero, so the pre-activation is the bias, and the bias's gradient is the slope."""
    case = make((17,), 40, 72, dtype, device, activation=activation)
    weight, bias = ("weight", "bias") if make is layernorm_linear_case else ("w1", "b1")
    spread = EXTREMES[values].to(device, dtype)
    if activation == "swiglu":
        spread = torch.cat([spread, torch.linspace(-1, 1, 72, device=device).to(dtype)])  # gates, and what they are multiplied with
    case = case.replaced(**{weight: torch.zeros_like(case[weight]), bias: spread})
    if make is layernorm_mlp_case:
        case["w2"].mul_(2**-8)  # or the product overflows float16, in PyTorch too
        case["layer_scale"].mul_(2**-4)  # or the gradient of w2 does
    case.assert_parity(cotangent=torch.randn_like(case.function(*case.inputs)) / 16)  # or that of a value times 6e4


def test_reference_is_the_formula():
    """The reference itself, against the formula written out: the tests above would pass with any mistake that both make."""
    x, weight = torch.randn(2, 5, 12, dtype=torch.float64) * 3 + 1, torch.randn(7, 12, dtype=torch.float64)
    gamma, beta, bias = (torch.randn(size, dtype=torch.float64) for size in (12, 12, 7))
    centred = x - x.sum(-1, keepdim=True) / 12
    normalised = centred / ((centred**2).sum(-1, keepdim=True) / 12 + 0.1).sqrt() * gamma + beta
    linear = torch.einsum("btk,nk->btn", normalised, weight)
    gelu = 0.5 * (linear + bias) * (1 + torch.special.erf((linear + bias) / math.sqrt(2)))
    torch.testing.assert_close(layernorm_linear_ref(x, gamma, beta, weight, None, 0.1), linear)
    torch.testing.assert_close(layernorm_linear_ref(x, gamma, beta, weight, bias, 0.1), linear + bias)
    torch.testing.assert_close(layernorm_linear_ref(x, gamma, beta, weight, bias, 0.1, "gelu"), gelu)
    pre = linear + bias
    by_tanh = 0.5 * pre * (1 + (math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3)).tanh())
    torch.testing.assert_close(layernorm_linear_ref(x, gamma, beta, weight, bias, 0.1, "gelu_tanh"), by_tanh)
    gated = linear[..., :3] / (1 + (-linear[..., :3]).exp()) * linear[..., 3:6]
    torch.testing.assert_close(layernorm_linear_ref(x, gamma, beta, weight[:6], None, 0.1, "swiglu"), gated)
    angles = torch.rand(5, 1, dtype=torch.float64)  # one head of two channels, as complex numbers
    turned = torch.view_as_complex(linear[..., :4].unflatten(-1, (2, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    rotated = torch.cat([torch.view_as_real(turned).flatten(-2), linear[..., 4:6]], -1)
    table = torch.stack((angles.cos(), angles.sin()))
    torch.testing.assert_close(layernorm_linear_ref(x, gamma, beta, weight[:6], None, 0.1, rotation=table), rotated)


def rotating(**changed):
    """Arguments that a rotation goes with: two tokens, one head of 8 channels."""
    return {"x": torch.zeros(1, 2, 8), "weight": torch.zeros(24, 8), "bias": None, "rotation": torch.zeros(2, 2, 4), **changed}


def arguments(**changed):
    tensors = {"x": torch.zeros(4, 8), "norm_weight": torch.ones(8), "norm_bias": torch.zeros(8), "weight": torch.zeros(6, 8)}
    return {**tensors, "bias": torch.zeros(6), "eps": 1e-6, **changed}


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"x": None}, TypeError, "x is a NoneType: it must be a tensor"),
        ({"x": [1.0]}, TypeError, "x is a list"),
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, TypeError, "x is torch.float64: it must be float32, float16 or bfloat16"),
        ({"x": torch.zeros(4, 0)}, ValueError, r"x has shape \(4, 0\): it must be \(..., C\) with C at least 1"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x has shape \(\)"),
        ({"norm_weight": None}, TypeError, "norm_weight is None"),
        ({"norm_weight": 1.0}, TypeError, "norm_weight is a float: it must be a tensor"),
        ({"norm_bias": torch.zeros(7)}, ValueError, r"norm_bias has shape \(7,\): it must be \(8,\)"),
        ({"norm_bias": torch.zeros(8).half()}, TypeError, "norm_bias is torch.float16 .* it must be of the input's dtype or float32"),
        ({"eps": 0.0}, ValueError, "eps=0.0: it must be finite and positive"),
        ({"eps": float("nan")}, ValueError, "eps=nan"),
        ({"eps": float("inf")}, ValueError, "eps=inf"),
        ({"weight": None}, ValueError, r"the weight is NoneType: it must be a tensor of shape \(features out, 8\)"),
        ({"weight": torch.zeros(8)}, ValueError, r"the weight is \(8,\)"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"the weight is \(0, 8\)"),
        ({"weight": torch.zeros(6, 7)}, ValueError, r"the weight has shape \(6, 7\): it must be \(6, 8\)"),
        ({"weight": torch.zeros(6, 8).half()}, TypeError, "the weight is torch.float16 and the input torch.float32.*input's dtype$"),
        ({"weight": torch.zeros(6, 8, device="meta")}, ValueError, "the weight is on meta and the input on cpu"),
        ({"bias": torch.zeros(5)}, ValueError, r"the bias has shape \(5,\): it must be \(6,\)"),
        ({"bias": torch.zeros(6, dtype=torch.int64)}, TypeError, "the bias is torch.int64"),
        ({"activation": "relu"}, ValueError, "activation='relu': it must be None or 'gelu' or 'gelu_tanh' or 'swiglu'"),
        (
            {"weight": torch.zeros(5, 8), "bias": None, "activation": "swiglu"},
            ValueError,
            "activation='swiglu' of 5 features: they must be even, half of them the gate",
        ),
        (rotating(activation="gelu"), ValueError, "activation='gelu' and a rotation: only one of them may be"),
        (rotating(x=torch.zeros(2, 8)), ValueError, r"x has shape \(2, 8\): with a rotation it must be \(B, T, D\)"),
        (rotating(rotation=[1.0]), TypeError, "rotation is a list: it must be a tensor"),
        (rotating(rotation=torch.zeros(2, 2, 4).half()), TypeError, "rotation is torch.float16: it must be float32"),
        (rotating(rotation=torch.zeros(2, 3, 4)), ValueError, r"rotation has shape \(2, 3, 4\): it must be \(2, 2, D/2\)"),
        (rotating(rotation=torch.zeros(2, 2, 0)), ValueError, r"rotation has shape \(2, 2, 0\)"),
        (rotating(rotation=torch.zeros(2, 2, 4, requires_grad=True)), ValueError, "rotation requires a gradient, and has none"),
        (rotating(rotation=torch.zeros(2, 2, 4, device="meta")), ValueError, "rotation is on meta and the input on cpu"),
        (
            rotating(rotation=torch.zeros(2, 2, 2)),
            ValueError,
            "rotation turns heads of 4 channels: they must be a multiple of 8, and the weight's 24 rows 3 \\* H \\* that",
        ),
        (rotating(rotation=torch.zeros(2, 2, 8)), ValueError, "rotation turns heads of 16 channels"),
    ],
)
def test_errors(changed, error, says):
    """Each wrong argument is refused by name, with the rule."""
    with pytest.raises(error, match=says):
        layernorm_linear(**arguments(**changed))
