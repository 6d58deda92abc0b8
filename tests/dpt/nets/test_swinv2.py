"""Swin V2: one size of pictures, windows that are shifted, and a bias whose table is kept."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from small import config, randomise, small

import dpt
from dpt.config import config_from
from dpt.nets.encoders.swinv2 import PositionBias, SwinBlock, WindowAttention

NAME = "midas-3.1-swin2-large-384"
PICTURE = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [(64, 96), (60, 64), (128, 128), (32, 32)])
def test_another_size_is_an_error_that_names_both(size):
    """Blind spot: windows of another grid, which a view of the tensor would cut across its rows without a word."""
    with pytest.raises(ValueError, match=rf"input of {size[0]}x{size[1]} .*: it must be 64x64, the one size that the windows are made for"):
        small(NAME)(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match=r"input of shape \(3, 64, 64\): it must be"):
        small(NAME)(torch.zeros(3, 64, 64))


@pytest.mark.parametrize("options", [{"tta": True}, {"scales": (0.5, 1.0)}, {"slide": True}, {"window": 32}, {"stride": 32}])
def test_scales_and_windows_are_refused(options):
    """Blind spot: an error from within the network, for an option that no such model can take."""
    with pytest.raises(ValueError, match="sees 64x64 pixels alone"):
        small(NAME).predict(PICTURE, **options)
    assert small(NAME).predict(PICTURE, flip=True, scales=(1.0,)).depth.shape == PICTURE.shape[:2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage_depths": (2, 2, 2)}, "stage_depths=(2, 2, 2): it must be of four stages"),
        ({"stage_heads": ()}, "stage_heads=(): it must be of four stages"),
        ({"pretrained_windows": ()}, "pretrained_windows=(): it must be of four stages"),
        ({"depth": 9}, "depth=9: it must be the sum"),
        ({"hooks": (0, 3, 5, 7)}, "hooks=(0, 3, 5, 7): they must be the stages' last blocks, (1, 3, 5, 7)"),
        ({"num_heads": 4}, "num_heads=4: it must be the first of stage_heads"),
        ({"stage_heads": (2, 2, 2, 3)}, "stage_heads=(2, 2, 2, 3): they must divide"),
        ({"window": 1}, "window=1: it must be at least 2"),
        ({"window": 3}, "window=3: it must divide"),
        ({"pretrained_windows": (12, 12, 12, 1)}, "1 measures no distance"),
        ({"pos_grid": (16, 32)}, "pos_grid=(16, 32): it must be a square"),
        ({"pos_grid": (12, 12)}, "that can be halved three times"),
        ({"pos_grid": (8, 8)}, "a last grid of one patch"),
        ({"layer_scale": True}, "layer_scale=True: it must be False with kind='swinv2'"),
        ({"attention": "xformers"}, "attention='xformers': it must be 'sdpa'"),
        ({"kind": "vit"}, 'only kind="swinv2" has that'),
    ],
)
def test_fields_that_contradict_each_other(changes, message):
    """Blind spot: an encoder that is built and computes nothing sensible."""
    with pytest.raises(ValueError) as raised:
        config(NAME).with_("encoder", **changes)
    assert f"EncoderConfig.{message}" in str(raised.value) or message in str(raised.value)


def test_the_input_and_the_neck_agree_with_the_encoder():
    """Blind spot: a file whose parts contradict each other, seen at the first picture."""
    values = json.loads(json.dumps(dataclasses.asdict(config(NAME))))
    assert config_from(values) == config(NAME)
    for section, field, value, rule in (
        ("input", "size", [96, 96], r"InputConfig\.size=\(96, 96\).*takes \(64, 64\) alone"),
        ("input", "rule", "minimal", 'rule="square"'),
        ("decoder", "neck_channels", [32, 64, 128, 255], "level 3 is a map of the encoder, which has 256 channels"),
    ):
        with pytest.raises(ValueError, match=rule):
            config_from({**values, section: {**values[section], field: value}})


def test_windows_are_cut_and_joined():
    """Blind spot: windows cut across, or put back elsewhere; a picture's patches in another's window."""
    block = SwinBlock(config(NAME).encoder, 0, 16, shifted=True)
    x = torch.arange(2 * 16 * 16).view(2, 16, 16, 1)
    windows = block.windows(x)
    assert windows.shape == (2, 16, 16, 1) and torch.equal(block.joined(windows), x)
    assert torch.equal(windows[1, 5, :, 0].view(4, 4), x[1, 4:8, 4:8, 0])


def test_the_mask_hides_what_only_the_shift_brought_together():
    """Blind spot: a mask of another shift, or of rows and not of columns: by what patches' places say of themselves."""
    block = SwinBlock(config(NAME).encoder, 0, 16, shifted=True)
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    places = block.windows(torch.stack((y, x), dim=-1)[None].roll((-2, -2), (1, 2)))[0]  # (W, N, 2), of the unshifted map
    near = ((places[:, :, None] - places[:, None]).abs() < 4).all(-1)
    assert torch.equal(block.mask(torch.zeros(())) == 0, near) and not near.all()


def test_a_window_attends_as_the_formula_says():
    """Blind spot: windows folded into the pictures or the heads otherwise than their masks: against one window at a time."""
    attention = randomise(WindowAttention(12, 3, 4, 2))
    x, mask = torch.randn(2, 5, 16, 12), torch.randn(5, 16, 16)
    with torch.no_grad():
        found, bias = attention(x, mask), attention.position()
        for window in range(5):
            q, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in attention.qkv(x[:, window]).chunk(3, dim=-1))
            cosine = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
            scores = cosine * attention.logit_scale.clamp(max=4.605170186).exp() + bias + mask[window]
            expected = attention.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            torch.testing.assert_close(found[:, window], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(attention(x), torch.stack([attention(x[:, i : i + 1])[:, 0] for i in range(5)], dim=1))


def test_the_table_is_kept_while_its_weights_are_as_they_were(monkeypatch):
    """Blind spot: an MLP run at each call; a bias of weights that are no longer there, whichever of them changed; one without gradients."""
    made, original = [], PositionBias._made
    monkeypatch.setattr(PositionBias, "_made", lambda self: (made.append(1), original(self))[1])
    position = randomise(PositionBias(2, 4, 0))
    with torch.no_grad():
        first = position.table()
        assert position.table() is first and len(made) == 1
        for parameter in position.mlp.parameters():
            parameter.data.mul_(2)
            assert torch.equal(position.table(), original(position)) and not torch.equal(position.table(), first)
            parameter.mul_(0.5)
        assert torch.equal(position.table(), first) and not copy.deepcopy(position).tables._kept
        assert not pickle.loads(pickle.dumps(position)).tables._kept
    position().sum().backward()
    assert all(parameter.grad is not None for parameter in position.mlp.parameters())


def test_gradients_reach_every_parameter():
    """Blind spot: a parameter that is read where no gradient goes. The deepest block's first unit is never run."""
    model = small(NAME).train()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == {
        f"fusion.blocks.3.unit1.conv{index}.{part}" for index in (1, 2) for part in ("weight", "bias")
    }


@pytest.mark.parametrize("fast", [False, True])
def test_one_program_for_all_batches(fast):
    """Blind spot: a graph that breaks, or that settles the batch. The sides are settled: the encoder takes one size."""
    torch.compiler.reset()
    model = small(NAME, stage_depths=(2, 1, 1, 1), depth=5, hooks=(1, 2, 3, 4))  # tracing takes its time
    if fast:
        dpt.accelerate(model, strict=True)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 3, 64, 64),), dynamic_shapes=({0: torch.export.Dim("b", min=1, max=64)},))
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        for batch in (1, 3):
            x = torch.randn(batch, 3, 64, 64)
            for found in (program.module()(x), compiled(x)):
                torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)


def test_decoder_and_head_run_fused_and_the_report_says_why_blocks_do_not():
    """Blind spot: maps of stages, whose memory is channels-last, in the fast decoder; an encoder that the report passes over."""
    plain = small(NAME)
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert (quick(x) - plain(x)).abs().max() <= 2e-5 * plain(x).abs().max()
    rows = {row.name: row for row in dpt.fast_report(quick)}
    assert rows["head"].fused and rows["fusion"].fused and all(rows[f"fusion.blocks.{level}.unit2"].fused for level in range(4))
    blocks = [row for name, row in rows.items() if name.startswith("encoder.")]
    assert len(blocks) == 8 and all(not row.fused and "norms stand behind" in row.how for row in blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    """Blind spot: a mask or a table that stays in float32."""
    model = small(NAME)
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        found = model.to(dtype)(x.to(dtype))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert (found.float() - expected).abs().mean() < 0.05 * expected.abs().max()
