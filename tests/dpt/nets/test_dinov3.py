"""DINOv3's encoder: what rotates, by which angles, and what is kept of that. Its parity with transformers is tested with its files."""

import copy
import math
import pickle

import pytest
import torch
from small import config, wide

from dpt.nets.encoders.dinov3 import DINOv3
from dpt.nets.encoders.rotary import rotated, rotation

THETA = 100.0


def turned_by_hand(vector: list[float], place: tuple[float, float]) -> list[float]:
    """A head's query or key of a patch, each channel and its partner half a head on as one complex number, turned by its angle."""
    half = len(vector) // 2
    turned = [complex(vector[c], vector[c + half]) for c in range(half)]
    for c in range(half):
        axis, step = divmod(c, half // 2)  # the first quarter of the channels turns with the row, the second with the column
        turned[c] *= complex(math.cos(1), math.sin(1)) ** (2 * math.pi * place[axis] * THETA ** (-2 * step / half))
    return [value.real for value in turned] + [value.imag for value in turned]


@pytest.mark.parametrize("grid", [(3, 5), (1, 1), (4, 2)])
def test_queries_and_keys_turn_with_their_places(grid):
    """Blind spot: rows taken for columns, neighbouring channels for partners, places of corners for those of middles, a value that is
    turned too, or a register. Against complex numbers, patch by patch."""
    heads, size, before = 2, 8, 3
    qkv = torch.randn(2, before + grid[0] * grid[1], 3 * heads * size, dtype=torch.float64)
    ours = rotated(qkv, heads, rotation(grid, size, THETA, torch.device("cpu"), before).double())
    parts, found = (x.view(2, -1, 3, heads, size) for x in (qkv, ours))
    assert torch.equal(found[:, :before], parts[:, :before]) and torch.equal(found[:, :, 2], parts[:, :, 2])
    for index in range(grid[0] * grid[1]):
        row, column = divmod(index, grid[1])
        place = (2 * row + 1) / grid[0] - 1, (2 * column + 1) / grid[1] - 1
        for which in (0, 1):
            for head in range(heads):
                wanted = turned_by_hand(parts[1, before + index, which, head].tolist(), place)
                torch.testing.assert_close(found[1, before + index, which, head].tolist(), wanted, rtol=0, atol=1e-5)


def test_angles_are_float32_in_every_dtype():
    """Blind spot: angles of up to six radians rounded to half precision before they are used."""
    table = rotation((30, 40), 32, THETA, torch.device("cpu"), 0)
    qkv = torch.randn(1, 1200, 3 * 64)
    assert table.dtype == torch.float32 and rotated(qkv.half(), 2, table).dtype == torch.float16
    exact = rotated(qkv.half().float(), 2, table)
    assert (rotated(qkv.half(), 2, table).float() - exact).abs().max() <= 2**-11 * exact.abs().max()


def test_what_is_kept():
    """Blind spot: a table in the state dict, one size's for another's, or one that grows with the sizes of pictures."""
    encoder = wide("chmv2").encoder
    before = 1 + encoder.config.registers
    with torch.no_grad():
        one, other = encoder.rotation((3, 5)), encoder.rotation((5, 3))
        assert encoder.rotation((3, 5)) is one and not torch.equal(one, other) and not one.requires_grad
        for columns in range(1, 9):
            assert torch.equal(encoder.rotation((2, columns)), rotation((2, columns), 32, THETA, one.device, before))
        assert len(encoder.rotations._kept) == encoder.rotations.MOST
    assert encoder.rotation((3, 5)).shape == (2, before + 15, 16) and not any("rot" in key for key in encoder.state_dict())
    for made in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert not made.rotations._kept and torch.equal(made.rotation((3, 5)), one)


def test_a_step_of_training_and_predicting():
    """Blind spot: a table made in inference mode, which a backward refuses; a gradient that does not come through the rotation."""
    model = wide("chmv2")
    x = torch.randn(1, 3, 48, 80)
    with torch.inference_mode():
        expected = model(x)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=0)
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.blocks[0].parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 36, "num_heads": 6}, "heads of 6 channels cannot be rotated, that takes a multiple of 4"),
        ({"stem": "convolutions"}, "stem='convolutions': it must be 'patch' with kind='dinov3'"),
    ],
)
def test_what_cannot_be_rotated_is_told(changes, message):
    """Blind spot: a shape error in the first forward."""
    with pytest.raises(ValueError, match=message):
        config("dpt-large-midas", **{"kind": "dinov3", **changes})


def test_theta_is_obeyed():
    """Blind spot: the base of the frequencies fixed in the code."""
    full = config("dpt-large-midas", kind="dinov3").encoder
    one, other = (DINOv3(changed).rotation((2, 3)) for changed in (full, config("dpt-large-midas", kind="dinov3", rope_theta=10.0).encoder))
    assert not torch.allclose(one, other) and torch.equal(one, rotation((2, 3), 16, THETA, one.device, 1))
