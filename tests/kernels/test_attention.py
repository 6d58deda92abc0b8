"""dpt.kernels.attention against PyTorch's attention, by the rule of parity.py: forward, backward, both ways of loading, and its edges."""

import checks
import pytest
import torch
import triton
import triton.language as tl
from both_passes import assert_op_parity, in_both, lost_units, values_and_gradients
from linear_cases import turning

from dpt.kernels import launch
from dpt.kernels.attention import attention, attention_qkv, attention_qkv_ref, attention_ref
from dpt.kernels.parts.attention import _load_rows, _store_rows
from dpt.kernels.parts.rotation import rotated_ref
from dpt.kernels.tools.parity import assert_parity


def packed(batch, tokens, heads, dim, dtype, device, spread=1.0):
    """Random qkv (B, N, 3*H*D); ``spread`` scales q and k, and so, squared, the logits."""
    qkv = torch.randn(batch, tokens, 3, heads * dim, device=device)
    qkv[:, :, :2] *= spread
    return qkv.reshape(batch, tokens, -1).to(dtype)


def assert_attention_parity(qkv, heads, scale=None, bias=None, rotation=None, apart=False):
    """Output, dq, dk and dv, and the gradient of the bias, each by the rule; with ``apart``, of three tensors q, k and v. The terms
    of dq and dk cancel (entirely, for one token): ``tiny`` counts from the terms."""
    cotangent = torch.randn(*qkv.shape[:2], qkv.shape[2] // 3, device=qkv.device).to(qkv.dtype)

    def of_op(x, b):
        if apart:
            return attention_qkv(*(t.unflatten(-1, (heads, -1)) for t in x.chunk(3, -1)), scale, b, rotation).flatten(2)
        return attention(x, heads, scale, b, rotation)

    out, dqkv, dbias = values_and_gradients(of_op, [qkv, bias], cotangent)
    expected = in_both(
        lambda dtype: values_and_gradients(lambda x, b: attention_ref(x, heads, scale, b, rotation), [qkv, bias], cotangent, dtype)
    )
    (out64, dqkv64, dbias64), (out_torch, dqkv_torch, dbias_torch) = expected
    assert_parity(out, out64, out_torch, "output")
    delta = (cotangent * out64).unflatten(-1, (heads, -1)).sum(-1)  # dq = scale * sum_j weights_j (dweights_j - delta) k_j
    q, k, _ = qkv.double().chunk(3, -1)
    # Of one token the weight is 1 whatever the scores: the reference's terms cancel, with all that TF32 lost of them; ours, but for that.
    lost = lost_units(qkv.dtype) if qkv.shape[1] == 1 else 1
    size = {"dq": k, "dk": q, "dv": None}
    for name, *parts in zip(size, *(t.chunk(3, -1) for t in (dqkv, dqkv64, dqkv_torch)), strict=True):
        largest = dqkv64.abs().max()
        if size[name] is not None:
            largest = largest.maximum(lost * delta.abs().max() * size[name].abs().max() * (scale or (q.shape[-1] // heads) ** -0.5))
        assert_parity(*parts, name=name, magnitude=largest.item())
    if bias is not None:
        assert_parity(dbias, dbias64, dbias_torch, "gradient of the bias", magnitude=(lost * delta.abs().max()).item())


SHAPES = [  # (B, N, H, D): one token; a tail of one query block; 64k+1; padded and wide heads; several blocks; an odd everything
    (1, 1, 1, 32),
    (2, 17, 2, 64),
    (2, 65, 3, 32),
    (1, 65, 2, 72),
    (1, 65, 2, 80),
    (1, 64, 1, 128),
    (1, 100, 1, 48),
    (1, 197, 2, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, device, path):
    """Every element of output and gradients, over tails, head counts, padded head dimensions and both loading paths."""
    assert_attention_parity(packed(*shape, dtype, device), shape[2])


def test_parity_many_blocks(device):
    """The loop over full blocks runs several times (N=577 of the 384-pixel models), forward and backward."""
    assert_attention_parity(packed(1, 577, 1, 64, torch.float32, device), 1)


@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (2, 65, 2, 72), (1, 130, 2, 64)], ids=str)
@pytest.mark.parametrize("what", ["apart", "bias", "rotation", "all"])
def test_parity_of_forms(what, shape, dtype, device, path):
    """Three tensors, a bias, a rotation, and all at once: each of them in every pass, over tails, blocks and padded heads."""
    batch, tokens, heads, dim = shape
    bias = torch.randn(heads, tokens, tokens, device=device).to(dtype) if what in ("bias", "all") else None
    rotation = turning(tokens, dim, device) if what in ("rotation", "all") else None
    assert_attention_parity(packed(*shape, dtype, device), heads, None, bias, rotation, what in ("apart", "all"))


def test_pipelined(dtype, device, path):
    """The scores that run one block ahead are of the right block, with none, one and several full blocks."""
    table = launch.config(
        "attention_forward", launch.device_family(device), dtype, D=64, N=9, B=1, H=1, queries=9, precision="tf32", bias=0
    )
    for tokens in (20, 37, 101):
        with launch.using("attention_forward", {**table, "BLOCK_N": 32, "PIPELINED": True}):
            assert_attention_parity(packed(1, tokens, 1, 64, dtype, device), 1)


@pytest.mark.parametrize("layout", ("heads first", "odd rows", "of one"))
def test_three_layouts(layout, device, path):
    """q, k and v each with strides of its own: transformers' (B, H, N, D), rows at odd places, and one tensor in three roles."""
    made = {
        "heads first": lambda: torch.randn(2, 3, 33, 32, device=device).half().transpose(1, 2),
        "odd rows": lambda: torch.randn(2, 33, 3, 37, device=device).half()[..., 2:34],
        "of one": lambda: torch.randn(2, 33, 3, 32, device=device).half(),
    }[layout]
    inputs = [made()] * 3 if layout == "of one" else [made(), made().contiguous(), made()]
    assert_op_parity(attention_qkv, attention_qkv_ref, inputs, ("q", "k", "v"))


def test_three_tensors_are_read_in_place(device, monkeypatch):
    """No copy of what transformers has: the kernel gets the very memory."""
    given = [torch.randn(1, 2, 33, 32, device=device).half().transpose(1, 2) for _ in range(3)]
    seen = []
    launched = launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda kernel, grid, *args, **options: (seen.append(args), launched(kernel, grid, *args, **options))
    )
    attention_qkv(*given)
    assert [of_x[0].data_ptr() for of_x in seen[0][0][:3]] == [x.data_ptr() for x in given]


@pytest.mark.parametrize("layout", ("aligned", "odd rows", "shared by heads", "transposed"))
def test_layouts_of_bias(layout, device, path):
    """A bias in place, with rows that begin anywhere, of stride 0 and transposed; its gradient has its shape."""
    bias = {
        "aligned": lambda: torch.randn(2, 33, 40, device=device).half()[..., :33],
        "odd rows": lambda: torch.randn(2, 33, 33, device=device).half(),
        "shared by heads": lambda: torch.randn(1, 33, 33, device=device).half().expand(2, -1, -1),
        "transposed": lambda: torch.randn(2, 33, 33, device=device).half().transpose(1, 2),
    }[layout]()
    assert_attention_parity(packed(2, 33, 2, 32, torch.float16, device), 2, bias=bias)


def test_bias_alone_has_a_gradient(device, path, monkeypatch):
    """And without one that is wanted, no pass for it is launched."""
    names, launched = [], launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda kernel, *args, **options: (names.append(kernel.__name__), launched(kernel, *args, **options))
    )
    qkv, bias = packed(2, 20, 1, 32, torch.float32, device), torch.randn(1, 20, 20, device=device)
    cotangent = torch.randn(2, 20, 32, device=device)
    (of_both,) = torch.autograd.grad(attention(qkv.requires_grad_(), 1, bias=bias.requires_grad_()), [bias], cotangent)
    (alone,) = torch.autograd.grad(attention(qkv.detach(), 1, bias=bias), [bias], cotangent)
    assert torch.equal(of_both, alone) and names.count("attention_backward_dbias") == 2
    (of_qkv,) = torch.autograd.grad(attention(qkv, 1, bias=bias.detach()), [qkv], cotangent)
    assert of_qkv.shape == qkv.shape and names.count("attention_backward_dbias") == 2


def test_rotation_is_a_rotation(device):
    """Against the formula of complex numbers."""
    x, angles = torch.randn(1, 7, 2, 32, device=device, dtype=torch.float64), torch.rand(7, 16, device=device, dtype=torch.float64)
    numbers = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    torch.testing.assert_close(rotated_ref(x, torch.stack((angles.cos(), angles.sin()))), torch.cat((numbers.real, numbers.imag), -1))


def test_custom_scale(dtype, device, path):
    """A scale that is not D**-0.5 reaches the forward and each gradient, once."""
    assert_attention_parity(packed(1, 70, 2, 64, dtype, device), 2, scale=0.3)
    assert_attention_parity(packed(1, 70, 2, 64, dtype, device), 2, 0.3, torch.randn(2, 70, 70, device=device).to(dtype))


def test_large_logits(device, path):
    """Logits in the hundreds, both signs: the running maximum keeps exp2 from overflowing. q and k are whole numbers, so that the scores
    are exact whatever the order of summation, and only the softmax is tested; the scale is no power of two, so PyTorch rounds as well."""
    qkv = packed(1, 70, 1, 64, torch.float32, device)
    qkv[..., :128] = (qkv[..., :128] * 12).round()
    assert_attention_parity(qkv, 1, scale=0.1)


def test_all_logits_very_negative(device, path):
    """exp2(0 - lse) of a key that is not there is infinite when every logit is below -100: it must not reach a gradient."""
    qkv = packed(1, 70, 1, 64, torch.float16, device)
    qkv[..., :64] += 5
    qkv[..., 64:128] -= 5
    assert_attention_parity(qkv, 1)


def test_weights_sum_to_one(device, tf32):
    """Where all values are the same, so is the output, in TF32 too, but for float32's rounding: the digits of the weights that the tensor
    core drops, always downwards, would cost 3e-4. Over a tail and full blocks."""
    qkv = packed(1, 197, 1, 64, torch.float32, device)
    qkv[..., 128:] = 1
    assert (attention(qkv, 1) - 1).abs().max() < 2**-20


def test_heads_are_independent(device, path):
    """NaN in one head stays there: the columns that pad D=48 to 64 would read it, and 0 * NaN is NaN."""
    qkv = packed(1, 70, 2, 48, torch.float32, device)
    cotangent = torch.randn(1, 70, 96, device=device)
    expected = values_and_gradients(lambda x: attention(x, 2), [qkv], cotangent)
    qkv.view(70, 3, 2, 48)[:, :, 1] = float("nan")
    polluted = values_and_gradients(lambda x: attention(x, 2), [qkv], cotangent)
    for clean, other in zip(expected, polluted, strict=True):
        assert torch.equal(clean.unflatten(-1, (-1, 2, 48))[..., 0, :], other.unflatten(-1, (-1, 2, 48))[..., 0, :])


def test_both_paths_ran(monkeypatch, device):
    """The fixture ``path`` really switches between pointers and descriptors."""
    if device.type == "cuda":
        pytest.skip("a GPU runs its own family's path")
    taken = []
    launched = launch.launch

    def spy(kernel, grid, *args, **kwargs):
        taken.append(kwargs["DESCRIPTOR"])
        launched(kernel, grid, *args, **kwargs)

    monkeypatch.setattr(launch, "launch", spy)
    for family in ("sm_80", "sm_90"):
        monkeypatch.setenv(launch.INTERPRETED_FAMILY_VARIABLE, family)
        attention(packed(1, 20, 1, 32, torch.float16, device), 1)
    assert taken == [False, True]


@pytest.mark.parametrize("layout", ("sliced tokens", "transposed", "odd offset", "expanded"))
def test_non_contiguous(layout, device, path):
    """Any strides are right: read in place where the last is 1, copied where not, off descriptors where TMA could not address them."""
    qkv = packed(2, 33, 2, 32, torch.float16, device)
    layouts = {
        "sliced tokens": lambda: qkv[:, 3:],
        "transposed": lambda: qkv.transpose(1, 2).contiguous().transpose(1, 2),
        "odd offset": lambda: torch.cat([qkv.new_zeros(1), qkv.flatten()])[1:].view_as(qkv),
        "expanded": lambda: qkv[:1].expand(2, -1, -1),
    }
    assert_attention_parity(layouts[layout](), 2)


def test_expanded_gradient(device, path):
    """A cotangent of stride 0 (the gradient of a sum) and a transposed one are read right."""
    qkv = packed(1, 33, 2, 32, torch.float32, device)
    checks.assert_expanded_gradient(lambda x: attention(x, 2), lambda x: attention_ref(x, 2), [qkv])


@triton.jit
def _copy_tile(ptr, batch, N, C, D: tl.constexpr, ROWS: tl.constexpr):
    tensor = (ptr, N * tl.cast(C, tl.int64), C, D)
    tile = _load_rows(tensor, None, batch, 1, N - ROWS, N, D, ROWS, D, True, False)
    _store_rows(tensor, tile, batch, 0, N - ROWS, N, D, ROWS, D)


def test_offsets_beyond_int32(far, device):
    """Offsets are 64 bits wide: a tile that lies 2^31 elements into a tensor is read from and written to its place."""
    batch, tokens, channels, dim, rows = 32, 2**20, 64, 32, 16
    assert batch * tokens * channels >= 2**31
    tensor = far.zeros((batch + 1, tokens, channels))
    written = torch.randn(rows, dim, device=device).half()
    tensor[batch, -rows:, dim:] = written
    _copy_tile[(1,)](tensor, batch, tokens, channels, dim, rows)
    assert torch.equal(tensor[batch, -rows:, :dim], written)


def test_reproducible_gradients(device, path):
    """No atomics: the same call gives the same bits."""
    qkv, bias = packed(2, 150, 2, 64, torch.float32, device), torch.randn(2, 150, 150, device=device)
    cotangent = torch.randn(2, 150, 128, device=device)
    first, second = (values_and_gradients(lambda x, b: attention(x, 2, bias=b), [qkv, bias], cotangent)[1:] for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_gradient_only_where_required(device):
    """Without requires_grad nothing is recorded, and under no_grad neither."""
    qkv = packed(1, 17, 1, 32, torch.float32, device)
    assert not attention(qkv, 1).requires_grad
    with torch.no_grad():
        assert not attention(qkv.requires_grad_(), 1).requires_grad
    assert attention(qkv, 1).requires_grad


def test_saved_memory(device):
    """Saved for the backward: qkv, the output and the log-sum-exp; no N x N map, no copy, nothing turned."""
    saved = []
    qkv = packed(1, 40, 2, 32, torch.float32, device).requires_grad_()
    table = turning(40, 32, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = attention(qkv, 2, rotation=table)
    assert {t.data_ptr() for t in saved if t.shape[-1] == 32} == {qkv.data_ptr(), out.data_ptr()}
    assert {tuple(t.shape) for t in saved if t.shape[-1] != 32} == {(1, 2, 40), tuple(table.shape)}


def test_autocast_is_followed(device):
    """Under autocast a float32 qkv is taken in autocast's dtype, as PyTorch's own attention takes it; its gradient is float32."""
    qkv = packed(1, 20, 1, 32, torch.float32, device).requires_grad_()
    with torch.autocast(device.type, dtype=torch.float16):
        out = attention(qkv, 1)
        assert attention_ref(qkv, 1).dtype == out.dtype == torch.float16
    assert torch.equal(out, attention(qkv.half(), 1))
    assert torch.autograd.grad(out.float().sum(), qkv)[0].dtype == torch.float32


def test_empty_batch(device, path):
    """A batch of nothing gives nothing, forward and backward, without a launch."""
    qkv, bias = torch.zeros(0, 5, 96, device=device, requires_grad=True), torch.zeros(1, 5, 5, device=device, requires_grad=True)
    out = attention(qkv, 1, bias=bias)
    assert out.shape == (0, 5, 32)
    dqkv, dbias = torch.autograd.grad(out.sum(), [qkv, bias])
    assert dqkv.shape == (0, 5, 96) and torch.equal(dbias, torch.zeros(1, 5, 5, device=device))


def test_opcheck(device, path, monkeypatch):
    """PyTorch's own checks of the registration: schema, fake kernels, autograd, compilation with static and dynamic shapes."""
    qkv = packed(1, 18, 1, 32, torch.float32, device).view(1, 18, 3, 1, 32)
    bias, table = torch.randn(1, 18, 18, device=device), turning(18, 32, device)
    apart = tuple(x.contiguous().requires_grad_() for x in qkv.unbind(2))
    for arguments in ((qkv.clone().requires_grad_(), None, None, 0.2, None, None), (*apart, 0.2, bias.clone().requires_grad_(), table)):
        torch.library.opcheck(torch.ops.dpt.attention.default, arguments)
        q, k, v, scale, added, turned = (x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
        out, lse = torch.ops.dpt.attention(q, k, v, scale, added, turned)
        gradient = (torch.randn_like(out), q, k, v, out, lse, scale, added, turned, added is not None)
        torch.library.opcheck(torch.ops.dpt.attention_backward.default, gradient)


def test_compile_fullgraph(device):
    """torch.compile takes the op whole, forward and backward, without a graph break."""
    qkv = packed(1, 18, 1, 32, torch.float32, device).requires_grad_()
    compiled = torch.compile(lambda x: attention(x, 1) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(qkv), attention(qkv, 1) * 2)
    assert torch.equal(*(torch.autograd.grad(f(qkv).sum(), qkv)[0] for f in (compiled, lambda x: attention(x, 1) * 2)))


def test_export(device):
    """torch.export keeps the op as one node, with any number of tokens."""

    class Module(torch.nn.Module):
        def forward(self, qkv):
            return attention(qkv, 2)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Module(), (packed(1, 18, 2, 32, torch.float32, device),), dynamic_shapes=({1: tokens},))
    assert "dpt.attention" in str(program.graph)
    other = packed(1, 35, 2, 32, torch.float32, device)
    assert torch.equal(program.module()(other), attention(other, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (lambda: (None, 1), TypeError, "qkv is a NoneType"),
        (lambda: (torch.zeros(1, 4, 96, dtype=torch.float64), 1), TypeError, "float64: it must be float32, float16 or bfloat16"),
        (lambda: (torch.zeros(1, 4, 96), 1.0), TypeError, "num_heads is 1.0"),
        (lambda: (torch.zeros(1, 4, 96), True), TypeError, "num_heads is True"),
        (lambda: (torch.zeros(4, 96), 1), ValueError, r"shape \(4, 96\): it must be \(B, N, 3\*H\*D\)"),
        (lambda: (torch.zeros(1, 0, 96), 1), ValueError, "N, its second size, must be at least 1"),
        (lambda: (torch.zeros(1, 4, 96), 0), ValueError, "num_heads=0"),
        (lambda: (torch.zeros(1, 4, 100), 1), ValueError, r"100, must be 3 \* num_heads \* D"),
        (lambda: (torch.zeros(1, 4, 3 * 36), 1), ValueError, "D=36 channels: must be a multiple of 8 from 32 to 128"),
        (lambda: (torch.zeros(1, 4, 48), 1), ValueError, "D=16"),
        (lambda: (torch.zeros(1, 4, 3 * 144), 1), ValueError, "D=144"),
        (lambda: (torch.zeros(1, 4, 96), 1, 0.0), ValueError, "scale=0.0"),
        (lambda: (torch.zeros(1, 4, 96), 1, float("nan")), ValueError, "scale=nan"),
        (lambda: (torch.zeros(1, 4, 96), 1, None, torch.zeros(4, 4)), ValueError, r"bias has shape \(4, 4\): it must be \(1, 4, 4\)"),
        (lambda: (torch.zeros(1, 4, 96), 1, None, torch.zeros(1, 4, 4).half()), TypeError, "bias is torch.float16 and the input"),
        (lambda: (torch.zeros(1, 4, 96), 1, None, None, torch.zeros(2, 4, 16).half()), TypeError, "rotation is torch.float16"),
        (
            lambda: (torch.zeros(1, 4, 96), 1, None, None, torch.zeros(2, 5, 16)),
            ValueError,
            r"\(2, 5, 16\): it must be \(2, 4, 16\), cosine and sine",
        ),
        (lambda: (torch.zeros(1, 4, 96), 1, None, None, torch.zeros(2, 4, 16, requires_grad=True)), ValueError, "rotation requires"),
        (lambda: (torch.zeros(1, 4, 96), 1, None, None, [1.0]), TypeError, "rotation is a list: it must be a tensor"),
    ],
)
def test_errors(arguments, error, says):
    """Each wrong argument is refused by name, with the rule."""
    with pytest.raises(error, match=says):
        attention(*arguments())


@pytest.mark.parametrize(
    ("k", "error", "says"),
    [
        (None, TypeError, "k is a NoneType"),
        (torch.zeros(1, 4, 32), ValueError, r"k has shape \(1, 4, 32\): it must be \(B, N, H, D\)"),
        (torch.zeros(1, 5, 1, 32), ValueError, r"k has shape \(1, 5, 1, 32\): it must be \(1, 4, 1, 32\)"),
        (torch.zeros(1, 4, 1, 32).half(), TypeError, "k is torch.float16"),
    ],
)
def test_errors_of_three(k, error, says):
    """q, k and v are of one shape and dtype, each named."""
    q = torch.zeros(1, 4, 1, 32)
    with pytest.raises(error, match=says):
        attention_qkv(q, k, q)


def test_reference_is_softmax_of_scores():
    """The reference itself, against the formula written out: a mistake in the packing of heads would pass every test above."""
    qkv, bias = torch.randn(2, 5, 3, 2, 32, dtype=torch.float64), torch.randn(2, 5, 5, dtype=torch.float64)
    q, k, v = qkv.unbind(2)
    for added in (None, bias):
        weights = (torch.einsum("bihd,bjhd->bhij", q, k).mul(0.7) + (0 if added is None else added)).softmax(-1)
        expected = torch.einsum("bhij,bjhd->bihd", weights, v).reshape(2, 5, 64)
        torch.testing.assert_close(attention_ref(qkv.reshape(2, 5, -1), 2, 0.7, added), expected)
