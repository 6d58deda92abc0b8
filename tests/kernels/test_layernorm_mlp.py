"""dpt.kernels.layernorm_mlp against PyTorch, by the rule of parity.py; what it shares with its siblings is in test_linear_ops.py."""

import math

import pytest
import torch
from linear_cases import layernorm_mlp_case

from dpt.kernels.layernorm_mlp import layernorm_mlp, layernorm_mlp_ref

PARITY = {  # one row; rows that no 16-byte copy fits; several tiles and blocks of both sizes, the last of each partial, and of M below
    "one row": dict(leading=(1,), depth=32, columns=48),
    "odd": dict(leading=(17,), depth=37, columns=51),
    "tiles": dict(leading=(5, 13), depth=72, columns=136),
    "no biases": dict(leading=(17,), depth=40, columns=72, bias=False),
    "no LayerScale": dict(leading=(2, 17), depth=72, columns=40, scale=False),
    "bare": dict(leading=(17,), depth=40, columns=72, bias=False, scale=False),
    "vectors in float32": dict(leading=(17,), depth=40, columns=72, vectors=torch.float32),
    "gelu_tanh": dict(leading=(17,), depth=40, columns=72, activation="gelu_tanh"),
    "swiglu, odd": dict(leading=(17,), depth=37, columns=51, activation="swiglu"),
    "swiglu, tiles": dict(leading=(5, 13), depth=72, columns=136, activation="swiglu"),
    "swiglu, bare": dict(leading=(17,), depth=72, columns=40, bias=False, scale=False, activation="swiglu"),
    "large mean": dict(leading=(17,), depth=72, columns=40, mean=30.0),
}


@pytest.mark.parametrize("name", PARITY)
def test_parity(name, dtype, device, path):
    """Output and every gradient: partial tiles in every dimension, each optional part with and without, both loading paths."""
    layernorm_mlp_case(dtype=dtype, device=device, **PARITY[name]).assert_parity()


@pytest.mark.parametrize(("rows", "depth", "columns"), ((197, 40, 72), (577, 24, 40)))
def test_parity_many_rows(rows, depth, columns, device, path):
    """The token counts of 224 and 384 pixels: several blocks of rows, forward, and in the sums over rows of each gradient."""
    layernorm_mlp_case((rows,), depth, columns, torch.float32, device).assert_parity()


def test_reference_is_the_formula():
    """The reference itself, against the formula written out: the tests above would pass with any mistake that both make."""
    x, w1, w2 = (torch.randn(*size, dtype=torch.float64) for size in ((2, 5, 12), (7, 12), (12, 7)))
    gamma, beta, b2, scale = torch.randn(4, 12, dtype=torch.float64)
    b1 = torch.randn(7, dtype=torch.float64)
    centred = x - x.sum(-1, keepdim=True) / 12
    normalised = centred / ((centred**2).sum(-1, keepdim=True) / 12 + 0.1).sqrt() * gamma + beta
    pre = torch.einsum("btk,nk->btn", normalised, w1) + b1
    mlp = torch.einsum("btk,nk->btn", 0.5 * pre * (1 + torch.special.erf(pre / math.sqrt(2))), w2) + b2
    torch.testing.assert_close(layernorm_mlp_ref(x, gamma, beta, w1, b1, w2, b2, 0.1), x + mlp)
    torch.testing.assert_close(layernorm_mlp_ref(x, gamma, beta, w1, b1, w2, b2, 0.1, scale), x + scale * mlp)
    gate = torch.einsum("btk,nk->btn", normalised, w1)[..., :3]
    hidden = gate / (1 + (-gate).exp()) * torch.einsum("btk,nk->btn", normalised, w1)[..., 3:6]
    gated = x + torch.einsum("btk,nk->btn", hidden, w2[:, :3])
    torch.testing.assert_close(layernorm_mlp_ref(x, gamma, beta, w1[:6], None, w2[:, :3], None, 0.1, None, "swiglu"), gated)


def arguments(**changed):
    norm = {"norm_weight": torch.ones(8), "norm_bias": torch.zeros(8), "eps": 1e-6}
    return {"x": torch.zeros(4, 8), **norm, "w1": torch.zeros(6, 8), "b1": None, "w2": torch.zeros(8, 6), "b2": None, **changed}


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"x": [1.0]}, TypeError, "x is a list: it must be a tensor"),
        ({"x": torch.zeros(4, 8, dtype=torch.float64)}, TypeError, "x is torch.float64"),
        ({"norm_weight": torch.zeros(6)}, ValueError, r"norm_weight has shape \(6,\): it must be \(8,\)"),
        ({"norm_bias": None}, TypeError, "norm_bias is None"),
        ({"eps": -1.0}, ValueError, "eps=-1.0"),
        ({"w1": torch.zeros(6, 7)}, ValueError, r"w1, b1: weight has shape \(6, 7\): it must be \(6, 8\)"),
        ({"b1": torch.zeros(8)}, ValueError, r"w1, b1: bias has shape \(8,\): it must be \(6,\)"),
        ({"w2": torch.zeros(8, 7)}, ValueError, r"w2, b2: weight has shape \(8, 7\): it must be \(8, 6\)"),
        ({"w2": torch.zeros(9, 6)}, ValueError, r"w2 has shape \(9, 6\): it must be \(8, 6\), for its output is added to x"),
        ({"b2": torch.zeros(6)}, ValueError, r"w2, b2: bias has shape \(6,\): it must be \(8,\)"),
        ({"activation": None}, ValueError, "activation=None: it must be 'gelu' or 'gelu_tanh' or 'swiglu'"),
        ({"activation": "swiglu"}, ValueError, r"w2, b2: weight has shape \(8, 6\): it must be \(8, 3\)"),
        ({"layer_scale": torch.zeros(6)}, ValueError, r"layer_scale has shape \(6,\): it must be \(8,\)"),
    ],
)
def test_errors(changed, error, says):
    """Each wrong argument is refused by name, with the rule."""
    with pytest.raises(error, match=says):
        layernorm_mlp(**arguments(**changed))
