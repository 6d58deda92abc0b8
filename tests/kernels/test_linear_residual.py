"""dpt.kernels.linear_residual against PyTorch, by the rule of parity.py; what it shares with its siblings is in test_linear_ops.py."""

import pytest
import torch
from both_passes import lost_units
from linear_cases import layernorm_mlp_case, linear_residual_case

from dpt.kernels.linear_residual import linear_residual, linear_residual_ref

PARITY = {  # one row; rows that no 16-byte copy fits; several tiles of N and blocks of K, the last of each partial, and of M below
    "one row": dict(leading=(1,), depth=32, columns=48),
    "odd": dict(leading=(17,), depth=37, columns=51),
    "tiles": dict(leading=(5, 13), depth=104, columns=136),
    "no bias": dict(leading=(17,), depth=40, columns=72, bias=False),
    "no LayerScale": dict(leading=(2, 17), depth=72, columns=40, scale=False),
    "bare": dict(leading=(17,), depth=40, columns=72, bias=False, scale=False),
    "vectors in float32": dict(leading=(17,), depth=40, columns=72, vectors=torch.float32),
}


@pytest.mark.parametrize("name", PARITY)
def test_parity(name, dtype, device, path):
    """Output and every gradient: partial tiles in every dimension, each optional part with and without, both loading paths."""
    linear_residual_case(dtype=dtype, device=device, **PARITY[name]).assert_parity()


def test_one_channel(dtype, device, path):
    """Sides of 1. LayerScale's gradient is then one sum over the rows, of terms that cancel, without others among which PyTorch's own
    rounding of such a sum would show: its unit in the last place is counted from the terms, and from what their products lose."""
    case = linear_residual_case((17,), 1, 1, dtype, device)
    cotangent = torch.randn_like(case["residual"])
    terms = cotangent.double() * (case["x"].double() * case["weight"].double() + case["bias"].double())
    case.assert_parity(cotangent=cotangent, magnitudes={"layer_scale": lost_units(dtype) * terms.abs().sum().item()})


@pytest.mark.parametrize(("rows", "depth", "columns"), ((197, 72, 136), (577, 24, 48)))
def test_parity_many_rows(rows, depth, columns, dtype, device, path):
    """The token counts of 224 and 384 pixels: several blocks of rows, forward, and in the sums over rows of each gradient."""
    linear_residual_case((rows,), depth, columns, dtype, device).assert_parity()


@pytest.mark.parametrize("vectors", (None, torch.float32), ids=("as x", "float32"))
@pytest.mark.parametrize("make", (linear_residual_case, layernorm_mlp_case), ids=("linear_residual", "layernorm_mlp"))
def test_small_layer_scale(make, vectors, dtype, device):
    """1e-5, where DINOv2 and CaiT begin: a weight times it would be subnormal in float16, and the gradient of x without digits."""
    case = make((17,), 40, 72, dtype, device, vectors=vectors)
    case.replaced(layer_scale=case["layer_scale"] * 1e-5).assert_parity()


def test_residual_is_not_rounded_first(device, path):
    """The sum is rounded once: float16 has 2048 and 2050, and 2048 + (1 + 2^-12) is nearer to 2050; but 1 + 2^-12 rounded is 1, and then
    2049 goes to the even one, 2048."""
    x = torch.full((3, 32), 1.0, dtype=torch.float16, device=device)
    weight = torch.full((16, 32), 2**-17, dtype=torch.float16, device=device)
    bias = torch.full((16,), 1.0, dtype=torch.float16, device=device)
    residual = torch.full((3, 16), 2048.0, dtype=torch.float16, device=device)
    assert torch.equal(linear_residual(x, weight, bias, residual), residual + 2)


def test_reference_is_the_formula():
    """The reference itself, against the formula written out: the tests above would pass with any mistake that both make."""
    x, weight, residual = (torch.randn(*size, dtype=torch.float64) for size in ((2, 5, 12), (7, 12), (2, 5, 7)))
    bias, scale = torch.randn(2, 7, dtype=torch.float64)
    linear = torch.einsum("btk,nk->btn", x, weight)
    torch.testing.assert_close(linear_residual_ref(x, weight, None, residual), linear + residual)
    torch.testing.assert_close(linear_residual_ref(x, weight, bias, residual, scale), (linear + bias) * scale + residual)


def arguments(**changed):
    tensors = {"x": torch.zeros(4, 8), "weight": torch.zeros(6, 8), "bias": None, "residual": torch.zeros(4, 6)}
    return {**tensors, **changed}


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"x": [1.0]}, TypeError, "x is a list: it must be a tensor"),
        ({"x": torch.zeros(4, 8, dtype=torch.int32)}, TypeError, "x is torch.int32: it must be float32, float16 or bfloat16"),
        ({"x": torch.zeros(4, 0)}, ValueError, r"x has shape \(4, 0\)"),
        ({"weight": None}, ValueError, "the weight is NoneType"),
        ({"weight": torch.zeros(6, 7)}, ValueError, r"the weight has shape \(6, 7\): it must be \(6, 8\)"),
        ({"bias": torch.zeros(5)}, ValueError, r"the bias has shape \(5,\)"),
        ({"residual": None}, TypeError, "residual is a NoneType"),
        ({"residual": torch.zeros(4, 8)}, ValueError, r"residual has shape \(4, 8\): it must be \(4, 6\)"),
        ({"residual": torch.zeros(1, 6)}, ValueError, r"residual has shape \(1, 6\)"),
        ({"residual": torch.zeros(4, 6).half()}, TypeError, "residual is torch.float16 and the input torch.float32"),
        (
            {"residual": torch.zeros(4, 6, device="meta")},
            ValueError,
            "residual is on meta .* cpu: they must be on one device",
        ),
        ({"layer_scale": torch.zeros(8)}, ValueError, r"layer_scale has shape \(8,\): it must be \(6,\)"),
        ({"layer_scale": 0.1}, TypeError, "layer_scale is a float"),
        ({"layer_scale": torch.zeros(6).bfloat16()}, TypeError, "layer_scale is torch.bfloat16 .* input's dtype or float32"),
    ],
)
def test_errors(changed, error, says):
    """Each wrong argument is refused by name, with the rule."""
    with pytest.raises(error, match=says):
        linear_residual(**arguments(**changed))
