"""What layernorm_linear, linear_residual and layernorm_mlp must do alike; each op's own mathematics is tested in its own file.

Layouts, empty and polluted inputs, gradients one by one, what is saved, registration, compilation, export, the tables.
"""

import functools

import checks
import pytest
import torch
from both_passes import in_both, values_and_gradients
from linear_cases import CASES, EPS, layernorm_linear_case, layernorm_mlp_case, linear_residual_case

from dpt.kernels import launch
from dpt.kernels.parts import layernorm, products
from dpt.kernels.parts.layernorm import LayerNorm, Statistics
from dpt.kernels.tools.parity import assert_parity

OPS = pytest.mark.parametrize("op", CASES)


def transposed(tensor):
    """The same values, with the memory of the last two dimensions exchanged."""
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def at_odd_address(tensor):
    """The same values, contiguous, where no 16-byte copy can read them."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view_as(tensor)


def sliced(vector):
    """The same values, every other one of a longer vector."""
    return torch.stack([vector, vector], -1)[..., 0]


VECTORS = ("norm_weight", "norm_bias", "bias", "b1", "b2", "layer_scale")
MATRICES = ("x", "residual", "weight", "w1", "w2")
LAYOUTS = {  # the arguments that are changed, and how
    "strided": {**dict.fromkeys(MATRICES, transposed), **dict.fromkeys(VECTORS, sliced)},
    "expanded": {"x": lambda x: x[:1].expand_as(x), **dict.fromkeys(VECTORS, lambda vector: vector[:1].expand_as(vector))},
    "odd addresses": {"x": at_odd_address, "w2": at_odd_address},
    "weight at an odd address": {"weight": at_odd_address, "w1": at_odd_address},
}


@OPS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_contiguous(op, layout, device, path):
    """Any strides are right: what is not contiguous is copied, and what TMA cannot address is read through pointers."""
    case = CASES[op]((3, 7), 40, 72, torch.float16, device)
    case = case.replaced(**{name: change(case[name]) for name, change in LAYOUTS[layout].items() if name in case.names})
    case.assert_parity()
    assert case.function(*case.inputs).is_contiguous()


@OPS
def test_expanded_gradient(op, device):
    """A cotangent of stride 0 (the gradient of a sum) and a transposed one are read right."""
    case = CASES[op]((3, 7), 40, 72, torch.float32, device)
    checks.assert_expanded_gradient(case.function, case.reference, case.inputs)


def surrounded(tensor, by):
    """The same values at an aligned address, contiguous, with 4096 of ``by`` on both sides."""
    if tensor is None:
        return None
    wall = tensor.new_full((4096,), by)
    return torch.cat([wall, tensor.flatten(), wall])[4096 : 4096 + tensor.numel()].view_as(tensor)


@OPS
@pytest.mark.parametrize("leading", (21, 70))
def test_nothing_beyond_the_edges_is_used(op, leading, device, path):
    """Tiles that reach over an edge read what lies there as zeros: NaN around every operand changes no bit of output or gradients."""
    case = CASES[op]((leading,), 40, 72, torch.float32, device)
    cotangent = torch.randn_like(case.function(*case.inputs))
    expected = values_and_gradients(case.function, [surrounded(t, 0) for t in case.inputs], surrounded(cotangent, 0))
    polluted = values_and_gradients(case.function, [surrounded(t, float("nan")) for t in case.inputs], surrounded(cotangent, float("nan")))
    checks.assert_same(expected, polluted)


@OPS
def test_rows_are_independent(op, device, path):
    """NaN and infinity in a row of x reach all of that row's output and input gradient, and nothing of any other's."""
    case = CASES[op]((21,), 40, 72, torch.float32, device)
    cotangent = torch.randn_like(case.function(*case.inputs))
    x = case["x"].clone()
    x[3, 5], x[17, 39] = float("nan"), float("inf")
    clean = torch.tensor([row for row in range(21) if row not in (3, 17)], device=device)
    results = [values_and_gradients(case.function, c.inputs, cotangent)[:2] for c in (case, case.replaced(x=x))]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[clean], other[clean])
    assert results[1][0][3].isnan().all()
    assert torch.equal(results[1][0].isfinite(), case.reference(*case.replaced(x=x).inputs).isfinite())


@OPS
@pytest.mark.parametrize("leading", ((0,), (0, 5), (3, 0)), ids=str)
def test_empty(op, leading, device, monkeypatch):
    """No rows give no rows, and gradients of zero, without a launch."""
    case = CASES[op](leading, 40, 72, torch.float32, device)
    launches = checks.spied_launches(monkeypatch)
    leaves = [t.requires_grad_() for t in case.inputs]
    out = case.function(*leaves)
    assert out.shape == case.reference(*leaves).shape
    for leaf, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()
    assert not [name for name, _ in launches if not name.startswith("layernorm_")]  # launch.launch drops the empty grids of those


@OPS
def test_one_dimension(op, device):
    """x may be a single row without a leading dimension."""
    case = CASES[op]((), 40, 72, torch.float32, device)
    case.assert_parity()
    assert case.function(*case.inputs).dim() == 1


@OPS
def test_reproducible(op, device):
    """No atomics: the same call gives the same bits, output and gradients."""
    case = CASES[op]((70,), 40, 72, torch.float32, device)
    checks.assert_reproducible(case.function, case.inputs)


@pytest.mark.parametrize(
    ("op", "options"),
    [*((op, {}) for op in CASES), *(("linear_residual", {name: False}) for name in ("bias", "scale"))],
    ids=lambda value: value if isinstance(value, str) else "without " + " ".join(value) if value else "",
)
def test_gradients_alone(op, options, device):
    """Each input alone, the others frozen, equals what it is when all need one; nothing is recorded where nothing asks for it."""
    case = CASES[op]((5,), 40, 72, torch.float32, device, **options)
    checks.assert_gradients_alone(case.function, case.inputs)


@pytest.mark.parametrize(
    ("make", "extra"),  # besides the inputs, of 15 rows: the row statistics, and the pre-activation of GELU
    [
        (layernorm_linear_case, [(0,), (15,), (15,)]),
        (CASES["layernorm_linear"], [(15, 72), (15,), (15,)]),
        (linear_residual_case, []),
        (layernorm_mlp_case, [(15, 72), (15,), (15,)]),
        (CASES["layernorm_mlp swiglu"], [(15, 144), (15,), (15,)]),
    ],
    ids=("layernorm_linear", "layernorm_linear gelu", "linear_residual", "layernorm_mlp", "layernorm_mlp swiglu"),
)
def test_saved(make, extra, device):
    """Saved for the backward: inputs, statistics, pre-activation; not the residual, no normalised copy, no GELU output."""
    case = make((3, 5), 40, 72, torch.float32, device)
    inputs = [tuple(t.shape) for name, t in zip(case.names, case.inputs, strict=True) if name != "residual"]
    assert checks.saved_shapes(case.function, case.inputs) == sorted(inputs + extra)


@OPS
def test_saved_under_autocast(op, device):
    """Blind spot: a copy of a weight in autocast's dtype, kept for the backward. What is kept of the weights are the parameters."""
    case = CASES[op]((3, 5), 40, 72, torch.float32, device)
    leaves, saved = [t.clone().requires_grad_() for t in case.inputs], []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast(device.type, dtype=torch.float16),
    ):
        case.function(*leaves)
    weights = {leaf.data_ptr() for name, leaf in zip(case.names, leaves, strict=True) if name in ("weight", "w1", "w2")}
    kept = [t for t in saved if t.data_ptr() in weights]
    assert len(kept) == len(weights) and {t.dtype for t in kept} == {torch.float32}
    rest = [t for t in saved if t.data_ptr() not in weights and t.dim() > 1]
    assert all(t.shape[0] in (3, 15) and t.dtype == torch.float16 for t in rest)  # x, and the pre-activation


BY_CUBLAS = {"backend": "cublas", "BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}


@pytest.mark.parametrize("activation", (None, *products.ACTIVATIONS))
@pytest.mark.parametrize("op", ("layernorm_linear", "linear_residual", "layernorm_mlp"))
def test_parity_cublas(op, activation, dtype, device, monkeypatch):
    """The other backend: PyTorch's product, alone or with the epilogue kernel after it, in either pass."""
    options = {"activation": activation} if op == "layernorm_linear" or activation and op == "layernorm_mlp" else {}
    make = {"layernorm_linear": layernorm_linear_case, "linear_residual": linear_residual_case, "layernorm_mlp": layernorm_mlp_case}[op]
    case = make((5, 13), 40, 72, dtype, device, **options)
    launches = checks.spied_launches(monkeypatch)
    with (
        launch.using("layernorm_linear", BY_CUBLAS),
        launch.using("linear_residual", BY_CUBLAS),
        launch.using("activation_input_gradient", BY_CUBLAS),
    ):
        case.assert_parity()
    names = [name for name, _ in launches]
    assert "linear_kernel" not in names and ("linear_epilogue" in names) == (op != "layernorm_linear" or activation is not None)


@pytest.mark.parametrize("op", ("layernorm_linear", "layernorm_mlp"))
def test_pre_activation_is_written_only_for_a_backward(op, device, monkeypatch):
    """In inference, and with every input frozen, the second large output of the first launch does not exist."""
    case = CASES[op]((21,), 40, 72, torch.float32, device)
    kept = []
    linear = products.linear

    def spy(name, *args, **kwargs):
        result = linear(name, *args, **kwargs)
        kept.append(result[1] is not None)
        return result

    monkeypatch.setattr(products, "linear", spy)
    case.function(*case.inputs)
    leaves = [t.clone().requires_grad_() for t in case.inputs]
    with torch.no_grad():
        case.function(*leaves)
    inference = len(kept)
    case.function(*leaves)
    assert not any(kept[:inference]) and kept[inference] and not any(kept[inference + 1 :])


@OPS
def test_second_derivative_is_refused(op, device):
    """Differentiable once: a gradient of a gradient is right or an error, never silently without a part of it."""
    case = CASES[op]((5,), 40, 72, torch.float32, device)

    def seconds(function, dtype):
        """For each first gradient, those of the sum of its squares, zero where it depends on nothing; None where that is refused."""
        leaves = [t.to(dtype or t.dtype).detach().requires_grad_() for t in case.inputs]
        out = function(*leaves)
        for first in torch.autograd.grad(out, leaves, torch.ones_like(out).requires_grad_(), create_graph=True):
            try:
                yield torch.autograd.grad(first.square().sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
            except RuntimeError as error:
                assert "no autograd formula" in str(error)
                yield None

    ours = list(seconds(case.function, None))
    true, same_dtype = in_both(lambda dtype: list(seconds(case.reference, dtype)))
    assert None not in true and None in ours
    for found, *expected in zip(ours, true, same_dtype, strict=True):
        for tensors in zip(found, *expected, strict=True) if found else ():
            assert_parity(*tensors)


@OPS
def test_autocast_is_followed(op, device):
    """Under autocast matrices are taken in autocast's dtype and vectors as they are; gradients are of the inputs' own dtype."""
    case = CASES[op]((21,), 40, 72, torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in case.inputs]
    with torch.autocast(device.type, dtype=torch.float16):
        out = case.function(*leaves)
    assert out.dtype == torch.float16
    assert torch.equal(out, case.function(*(t.half() if t.dim() == 2 else t for t in case.inputs)))
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(out.float().sum(), leaves))


@OPS
def test_without_kernels(op, device, monkeypatch):
    """Where an op does not run its kernels (here because it is told not to) it is its reference; on a CPU but for a last bit, where
    nobody wants a gradient (``kernels.cpu.linear``)."""
    case = CASES[op]((21,), 40, 72, torch.float32, device)
    launches = checks.spied_launches(monkeypatch)
    with launch.only():
        torch.testing.assert_close(case.function(*case.inputs), case.reference(*case.inputs), rtol=1e-6, atol=1e-6)
        leaves = [t.clone().requires_grad_() for t in case.inputs]
        assert torch.equal(case.function(*leaves), case.reference(*leaves))
    assert not launches


LAUNCHES = {  # of the forward, and of the backward where everything needs a gradient
    "layernorm_linear": (["layernorm_kernel", "linear_kernel"], ["layernorm_backward_kernel"]),
    "linear_residual": (["linear_kernel"], ["weight_gradient_kernel"]),
    "layernorm_mlp": (
        ["layernorm_kernel", "linear_kernel", "linear_kernel"],
        ["weight_gradient_kernel", "linear_kernel", "layernorm_backward_kernel"],
    ),
}
LAUNCHES["layernorm_mlp swiglu"] = LAUNCHES["layernorm_mlp"]


@OPS
@pytest.mark.parametrize(("depth", "described"), ((40, True), (37, False)))
def test_launches(op, depth, described, monkeypatch, device):
    """How many launches each pass makes; and that both ways of loading run, descriptors only where TMA's rules hold."""
    if device.type == "cuda":
        pytest.skip("a GPU runs its own family's path")
    case = CASES[op]((21,), depth, 72, torch.float16, device)
    leaves = [t.requires_grad_() for t in case.inputs]
    launches = checks.spied_launches(monkeypatch)
    for family in ("sm_80", "sm_90"):
        monkeypatch.setenv(launch.INTERPRETED_FAMILY_VARIABLE, family)
        launches.clear()
        out = case.function(*leaves)
        assert [name for name, _ in launches] == LAUNCHES[op][0]
        torch.autograd.grad(out.sum(), leaves)
        assert [name for name, _ in launches] == LAUNCHES[op][0] + LAUNCHES[op][1]
        taken = {options["DESCRIPTOR"] for _, options in launches if "DESCRIPTOR" in options}
        assert taken == {described and family == "sm_90"}


def test_descriptors_need_tmas_alignment(monkeypatch, device):
    """Whatever a configuration says: rows of 37 halves do not begin at multiples of 16 bytes."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("descriptors need compute capability 9.0")
    launches = checks.spied_launches(monkeypatch)
    for depth in (40, 37):
        case = CASES["layernorm_linear"]((21,), depth, 72, torch.float16, device)
        with launch.using("layernorm_linear", {**LONG_ROWS, "BLOCK_K": 64, "descriptor": True}):
            case.function(*case.inputs)
    assert [options["DESCRIPTOR"] for name, options in launches if name == "linear_kernel"] == [True, False]


# Large blocks along what is long, for the interpreter's time is that of its steps; small ones on a GPU, where those would fit nowhere. The
# same for the whole and for its part, in which the last rows stand first in their block, so that both are added up in one order.
BLOCKS = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
LONG_ROWS = {"backend": "triton", **BLOCKS, "PARTS": 2, "GROUP": 2}
MANY_ROWS = {**BLOCKS, "IN_REGISTERS": False}
if launch.INTERPRETED:
    LONG_ROWS = {**LONG_ROWS, "BLOCK_M": 16, "BLOCK_K": 2048}
    MANY_ROWS = {**MANY_ROWS, "BLOCK_M": 2048, "BLOCK_K": 16}


def test_offsets_beyond_int32_of_inputs(device, far):
    """Offsets are 64 bits wide: rows that lie 2^31 elements into x are multiplied, and reach the weight's gradient."""
    rows, depth, columns, last = 2**16 + 5, 2**15, 24, slice(-5, None)
    x, grad = far.zeros((rows, depth)), far.zeros((rows, columns))
    x[last], grad[last] = torch.randn(5, depth), torch.randn(5, columns)
    weight = torch.randn(columns, depth, device=device).half() / depth**0.5
    with launch.using("layernorm_linear", {**LONG_ROWS, "descriptor": False}):
        whole, _ = products.linear("layernorm_linear", x, weight, "ieee")
        part, _ = products.linear("layernorm_linear", x[last].clone(), weight, "ieee")
    assert torch.equal(whole[last], part)
    with launch.using("weight_gradient", {**MANY_ROWS, "descriptor": False}):
        for activation in ("gelu", "swiglu"):
            whole, _ = products.weight_gradient(grad, x, "ieee", activation=activation)
            part, _ = products.weight_gradient(grad[last].clone(), x[last].clone(), "ieee", activation=activation)
            assert torch.equal(whole[:, -16:], part[:, -16:])


def test_offsets_beyond_int32_of_weights(device, far):
    """The same for the two halves of a gated layer's weight, of which the second begins beyond 2^31."""
    columns, depth = 2**16 + 5, 2**15
    x, weight = torch.randn(3, depth, device=device).half(), far.zeros((2 * columns, depth))
    weight[columns - 5 : columns], weight[-5:] = torch.randn(2, 5, depth) / depth**0.5
    few = torch.cat([weight[columns - 5 : columns], weight[-5:]])
    with launch.using("layernorm_linear", {**LONG_ROWS, "BLOCK_N": 32, "descriptor": False}):
        whole, _ = products.linear("layernorm_linear", x, weight, "ieee", activation="swiglu")
        part, _ = products.linear("layernorm_linear", x, few, "ieee", activation="swiglu")
    assert torch.equal(whole[:, -5:], part)


def test_offsets_beyond_int32_of_outputs(device, far):
    """The same where out and residual are the large ones: a tile at their far end is added and written."""
    rows, depth, columns = 2**16 + 5, 16, 2**15 + 24
    x, weight = torch.randn(rows, depth, device=device).half(), torch.randn(columns, depth, device=device).half()
    residual = far.zeros((rows, columns))
    residual[-5:, -24:] = torch.randn(5, 24)
    whole = products.linear("linear_residual", x, weight, "ieee", epilogue="residual", extra=residual)[0]
    corner = residual[-5:, -24:].clone()
    part = products.linear("linear_residual", x[-5:].clone(), weight[-24:].clone(), "ieee", epilogue="residual", extra=corner)[0]
    assert torch.equal(whole[-5:, -24:], part)


def test_offsets_beyond_int32_of_norms(device, far, monkeypatch):
    """The same for LayerNorm and its gradient, whose programs take whole rows."""
    monkeypatch.setattr(torch, "empty_like", lambda t: far.zeros(t.shape, t.dtype))
    rows, depth, last = 2**17 + 3, 2**14, slice(-3, None)
    grad, x, skip = (far.zeros((rows, depth)) for _ in range(3))
    for tensor in (grad, x, skip):
        tensor[last] = torch.randn(3, depth)
    norm = LayerNorm(*torch.randn(2, depth, device=device).half())
    whole, _ = layernorm.layer_norm(x, norm, EPS, False)
    part, _ = layernorm.layer_norm(x[last].clone(), norm, EPS, False)
    assert torch.equal(whole[last], part)
    statistics = Statistics(torch.randn(rows, device=device), torch.rand(rows, device=device))
    whole, _, again = layernorm.layernorm_backward(grad, x, statistics, norm, skip, True, False, True)
    few = [t[last].clone() for t in (grad, x, *statistics, skip)]
    part, _, part_again = layernorm.layernorm_backward(*few[:2], Statistics(*few[2:4]), norm, few[4], True, False, True)
    assert torch.equal(whole[last], part) and torch.equal(again[last], part_again)


def op_arguments(device):
    """Of every registered op: calls with every optional argument, and with none."""
    x, grad, pre, skip = (torch.randn(6, size, device=device) for size in (8, 16, 16, 8))
    weight, w2, vector, wide = (torch.randn(*size, device=device) for size in ((16, 8), (8, 16), (8,), (16,)))
    mean, rstd = torch.randn(6, device=device), torch.rand(6, device=device)
    packed, rotation = torch.randn(24, 8, device=device), torch.randn(2, 3, 4, device=device)
    leaf = functools.partial(torch.Tensor.requires_grad_)
    norm = [leaf(vector.clone()), leaf(vector.clone())]
    x_leaf = leaf(x.clone().view(2, 3, 8))
    mlp = [leaf(weight.clone()), leaf(wide.clone()), leaf(w2.clone()), leaf(vector.clone())]
    mlp_without = [leaf(weight.clone()), None, leaf(w2.clone()), None]
    gated = [leaf(weight.clone()), leaf(wide.clone()), leaf(w2[:, :8].clone()), None]
    return {
        "layernorm_linear": [
            (x_leaf, *norm, mlp[0], mlp[1], EPS, "gelu", None, True),
            (x_leaf, *norm, mlp[0], mlp[1], EPS, "swiglu", None, True),
            (x_leaf, *norm, mlp[0], None, EPS, "none", None, True),
            (x_leaf, *norm, leaf(packed.clone()), None, EPS, "none", rotation, True),
            (x, vector, vector, weight, wide, EPS, "gelu_tanh", None, False),
        ],
        "packed_rotation_gradient": [(torch.randn(2, 3, 24, device=device), rotation)],
        "linear_residual": [
            (x_leaf, mlp[0], mlp[1], leaf(grad.clone().view(2, 3, 16)), leaf(wide.clone())),
            (x, weight, None, grad, None),
        ],
        "layernorm_mlp": [
            (x_leaf, *norm, *mlp, EPS, leaf(vector.clone()), "gelu", True),
            (x_leaf, *norm, *mlp_without, EPS, None, "gelu_tanh", True),
            (x_leaf, *norm, *gated, EPS, None, "swiglu", True),
            (x, vector, vector, weight, wide, w2, vector, EPS, vector, "gelu", False),
        ],
        "linear_weight_gradient": [
            (skip, pre, "gelu", vector, w2),
            (skip, pre, "swiglu", vector, w2[:, :8].clone()),
            (grad, x, "none", None, None),
        ],
        "activation_gradient": [(grad, pre, "gelu"), (grad, pre, "gelu_tanh"), (skip, pre, "swiglu")],
        "activation_input_gradient": [(skip, w2, pre, "gelu"), (skip, w2[:, :8].clone(), pre, "swiglu")],
        "layernorm_backward": [
            (x, skip, mean, rstd, vector, vector, x, True, True, True),
            (x, skip, mean, rstd, vector, vector, None, True, False, False),
            (x, skip, mean, rstd, vector, vector, None, False, True, False),
            (None, skip, mean, rstd, vector, vector, None, False, False, True),
        ],
    }


@pytest.mark.parametrize("op", op_arguments("meta"))
def test_opcheck(op, device):
    """PyTorch's own checks of every registration: schema, fake kernels, autograd, compilation with static and dynamic shapes."""
    for arguments in op_arguments(device)[op]:
        torch.library.opcheck(getattr(torch.ops.dpt, op).default, arguments)


@OPS
def test_compile_fullgraph(op, device):
    """torch.compile takes the op whole, forward and backward, without a graph break, and computes the same bits."""
    case = CASES[op]((21,), 40, 72, torch.float32, device)
    checks.assert_compiles(case.function, case.inputs)


@OPS
def test_export(op, device):
    """torch.export keeps the op as one node, with any number of tokens."""
    case = CASES[op]((2, 18), 40, 40, torch.float32, device)
    rest = case.inputs[1:]
    x, other = case["x"], torch.randn(2, 35, 40, device=device)

    def call(x):
        return case.function(x, *(x if name == "residual" else t for name, t in zip(case.names[1:], rest, strict=True)))

    checks.assert_exports(call, x, other, 1, f"dpt.{op.split()[0]}.default")


def test_statistics(device, path):
    """What the forward keeps of each row is its mean and 1 / sqrt(variance + eps), over several blocks and a partial one."""
    x = torch.randn(21, 150, device=device) * 3 + 2
    vector, weight = torch.ones(150, device=device), torch.zeros(16, 150, device=device)
    _, _, mean, rstd = torch.ops.dpt.layernorm_linear(x, vector, vector, weight, None, 0.5, "none", None, True)
    double = x.double()
    assert_parity(mean, double.mean(1), x.mean(1), "mean")
    variances = [t.var(1, correction=0) + 0.5 for t in (double, x)]
    assert_parity(rstd, *(v.rsqrt() for v in variances), "rstd")
