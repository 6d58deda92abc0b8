"""BEiT: the bias by relative position, written out token by token, resized, kept and learned."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from small import config, randomise, small

from dpt.nets.encoders.beit import BEiTAttention, RelativePosition

NAME = "midas-3.1-beit-base-384"


def position(grid: tuple[int, int] = (3, 2)) -> RelativePosition:
    return randomise(RelativePosition(config(NAME, pos_grid=grid).encoder))


def test_the_bias_by_hand():
    """Blind spot: rows and columns exchanged, query and key exchanged, the class token's three numbers in another order."""
    made = position((3, 2))
    rows = made.table[:-3].view(5, 3, 2)  # distances down, and across, for two heads
    from_class, to_class, itself = made.table[-3:]
    with torch.no_grad():
        bias = made((3, 2))
    assert bias.shape == (1, 2, 7, 7)
    for query in range(6):
        for key in range(6):
            down, across = query // 2 - key // 2, query % 2 - key % 2
            assert torch.equal(bias[0, :, 1 + query, 1 + key], rows[down + 2, across + 1])
        assert torch.equal(bias[0, :, 0, 1 + query], from_class) and torch.equal(bias[0, :, 1 + query, 0], to_class)
    assert torch.equal(bias[0, :, 0, 0], itself)


def test_attention_by_hand():
    """Blind spot: a bias that is scaled with the products, multiplied, or added behind the softmax; keys' and queries' sides of it."""
    attention = randomise(BEiTAttention(config(NAME, pos_grid=(3, 2)).encoder))
    x = torch.randn(2, 7, 32)
    q, k, v = attention.qkv(x).view(2, 7, 3, 2, 16).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) / 4 + attention.position((3, 2))).softmax(-1)
    torch.testing.assert_close(attention(x, (3, 2)), attention.proj((weights @ v).transpose(1, 2).reshape(2, 7, 32)))


def test_a_bias_of_the_keys_changes_nothing():
    """Blind spot: that ours has one, which is zero in files, and stays where it is in training."""
    attention = randomise(BEiTAttention(config(NAME).encoder))
    x = torch.randn(1, 17, 32)
    before = attention(x, (4, 4))
    before.square().sum().backward()
    q, k, v = attention.qkv.bias.grad.view(3, -1).abs().amax(1)
    assert k < 1e-4 * min(q, v)
    with torch.no_grad():
        attention.qkv.bias[32:64] += 1
    torch.testing.assert_close(attention(x, (4, 4)), before)


def test_another_grid_resizes_the_maps_of_each_head():
    """Blind spot: tables of other heads, or the class token's rows, resized with them; corners in the same places."""
    made = position((3, 2))
    maps = made.table[:-3].T.view(1, 2, 5, 3)
    resized = F.interpolate(maps, size=(3, 7), mode="bilinear", align_corners=False)[0]
    with torch.no_grad():
        bias = made((2, 4))
    assert torch.equal(bias[0, :, 1 + 7, 1 + 0], resized[:, 2, 6])  # from the last patch to the first: one down, three across
    assert torch.equal(bias[0, :, 1 + 0, 1 + 7], resized[:, 0, 0])
    assert torch.equal(bias[0, :, 0, 0], made.table[-1])


def test_what_is_kept():
    """Blind spot: a bias of earlier weights, of another size, or of every size there was, which are gigabytes; one without gradients."""
    made = position()
    with torch.inference_mode():
        first = made((3, 2))
        assert made((3, 2)) is first and made((2, 3)) is not first and made((3, 2)) is not first
        assert len(made.kept._kept) == 1
        expected = made((3, 2))
        made.table.data[0] += 1
        changed = made((3, 2))
        assert not torch.equal(changed, expected)
    bias = made((3, 2))
    assert bias.requires_grad and torch.equal(bias, changed) and not made.kept._kept
    bias.sum().backward()
    assert (made.table.grad != 0).all()
    for other in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other((3, 2)), changed) and other.kept.most == 1


def test_rows_lie_as_cuda_reads_them():
    """Blind spot: a copy of the whole bias in each block of each picture, which CUDA's attention makes of rows at odd addresses."""
    for grid in ((3, 2), (4, 4), (1, 1), (7, 1)):
        with torch.no_grad():
            bias = position()(grid)
        tokens = 1 + grid[0] * grid[1]
        assert bias.shape == (1, 2, tokens, tokens)
        assert bias.stride(3) == 1 and all(stride % 8 == 0 for stride in bias.stride()[:3])


@pytest.mark.parametrize("size", [(16, 16), (16, 80), (48, 64), (112, 32)])
@pytest.mark.parametrize("name", ["midas-3.1-beit-base-384", "zoedepth-n", "zoedepth-k", "zoedepth-nk"])
def test_any_aspect_any_batch(name, size):
    """Blind spot: odd numbers of patches, one patch, batch 1 and 3; each picture alone gives what it gives in the batch."""
    model = small(name)
    x = torch.randn(3, 3, *size)
    with torch.inference_mode():
        y = model(x)
        assert y.shape == (3, *size) and y.std() > 0
        assert (model(x[1:2]) - y[1:2]).abs().max() <= 1e-5 * y.abs().max()


def test_half_precision():
    """Blind spot: a bias of another dtype than the queries', under autocast or in half."""
    model = small(NAME)
    x = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (model(x) - expected).abs().max() <= 0.1 * expected.abs().max()
        assert (copy.deepcopy(model).bfloat16()(x.bfloat16()) - expected).abs().max() <= 0.1 * expected.abs().max()
