"""Each stage's shapes and errors, and the whole model against other people's implementations."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from small import TRANSFORMERS_FIELDS, config, randomise, small

import dpt
from dpt.checkpoints import convert
from dpt.config import DecoderConfig
from dpt.model import DPT
from dpt.nets.decoder import Fusion, FusionBlock, Reassemble, ResidualConvUnit
from dpt.nets.encoders.vit import Block, ViT
from dpt.zoo import CONFIGS, transformers_dpt

DATA = Path(__file__).parent / "data"


def close(ours: torch.Tensor, theirs: torch.Tensor, relative: float) -> None:
    """Largest difference within `relative` of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()
    assert theirs.abs().max() > 0


@pytest.mark.parametrize("name", dpt.models())
def test_every_named_model_has_its_published_shape(name):
    """Blind spot: a typing error in the table. On the meta device, so even DPT-Large costs nothing."""
    with torch.device("meta"):
        model = DPT(CONFIGS[name])
        size = 2 * model.config.encoder.patch_size
        sides = model.config.encoder.fixed_size or (size, 3 * size)
        prompt = (torch.empty(2, 6, 8),) if model.config.decoder.prompt else ()
        y = model.eval()(torch.empty(2, 3, *sides), *prompt)
    maps = y if isinstance(y, dict) else {model.config.head.task: y}
    assert list(maps) == [head.task for head in model.config.heads]
    for head in model.config.heads:
        factor = 1 if head.kind == "linear" else head.upsample
        side, wide = sides if factor is None else (2 * 8 * factor, 6 * 8 * factor)  # the fused map has eight pixels a patch
        channels = {"depth": (), "segmentation": (len(head.classes),), "normals": (3,)}[head.task]
        assert maps[head.task].shape == (2, *channels, side, wide)


def test_parameter_counts():
    """Blind spot: a layer too many or too few. Counted by hand for ViT-B/16 and ViT-L/16 without classifiers or final norms."""
    with torch.device("meta"):
        base, large = DPT(CONFIGS["dpt-base-ade20k"]), DPT(CONFIGS["dpt-large-midas"])
    block = lambda d: 12 * d * d + 13 * d  # noqa: E731 two norms, qkv, proj, fc1, fc2, with biases
    patch = lambda d: 3 * 16 * 16 * d + d  # noqa: E731
    assert sum(p.numel() for p in base.encoder.parameters()) == 12 * block(768) + patch(768) + 768 + 197 * 768
    assert sum(p.numel() for p in large.encoder.parameters()) == 24 * block(1024) + patch(1024) + 1024 + 577 * 1024


@pytest.mark.parametrize("size", [(16, 16), (16, 80), (48, 64), (112, 32)])
@pytest.mark.parametrize("name", ["dpt-large-midas", "dpt-base-ade20k", "dpt-large-ade20k", "dpt-tiny-depth", "dpt-hybrid-kitti"])
def test_any_aspect_any_batch(name, size):
    """Blind spot: odd numbers of patches, one patch, batch 1 and 3; each picture alone gives what it gives in the batch."""
    model = small(name)
    x = torch.randn(3, 3, *size)
    with torch.inference_mode():
        y = model(x)
        assert y.shape[0] == 3 and y.shape[-2:] == size
        close(model(x[1:2]), y[1:2], 1e-5)


def test_stages():
    """Blind spot: a stage whose stride is off, hidden by the last resize."""
    c = config("dpt-large-midas")
    encoder = randomise(ViT(c.encoder))
    tokens = encoder(torch.randn(2, 3, 64, 96))
    assert [t.shape for t in tokens] == [(2, 1 + 4 * 6, 32)] * 4
    levels = [Reassemble(32, level, c.decoder) for level in range(4)]
    maps = [reassemble(t, (4, 6)) for reassemble, t in zip(levels, tokens, strict=True)]
    assert [m.shape for m in maps] == [(2, 8, 16, 24), (2, 12, 8, 12), (2, 16, 4, 6), (2, 16, 2, 3)]
    fused, deeper = Fusion(c.decoder)(maps, deeper=True)
    assert fused.shape == (2, 16, 32, 48) and deeper.shape == (2, 16, 16, 24)


def test_hooks_are_the_tokens_after_their_blocks():
    """Blind spot: hooks off by one."""
    encoder = randomise(ViT(config().encoder))
    x = torch.randn(1, 3, 64, 64)
    seen = []
    for block in encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert all(torch.equal(a, b) for a, b in zip(encoder(x), seen, strict=True))


def test_a_block_by_hand():
    """Blind spot: LayerScale that divides, scales the skip too, or is the other branch's; a norm behind its branch."""
    block, x = randomise(Block(config(layer_scale=True).encoder)), torch.randn(2, 7, 32)
    y = x + block.ls1.gamma * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), y + block.ls2.gamma * block.mlp(block.norm2(y)))


def test_the_residual_is_the_raw_input():
    """Blind spot: an in-place ReLU that turns the skip into relu(x), as MiDaS v2.1 has it."""
    unit = ResidualConvUnit(DecoderConfig((4, 4, 4, 4), features=4))
    torch.nn.init.zeros_(unit.conv2.weight)
    torch.nn.init.zeros_(unit.conv2.bias)
    x = -torch.rand(1, 4, 5, 5)
    assert torch.equal(unit(x), x)


def test_the_dead_unit_is_kept_and_never_run():
    """Blind spot: running refinenet4.resConfUnit1, which changes every output a little."""
    model = small("dpt-large-midas")
    x = torch.randn(1, 3, 64, 64)
    before = model(x)
    torch.nn.init.constant_(model.fusion.blocks[3].unit1.conv1.weight, torch.nan)
    assert "fusion.blocks.3.unit1.conv1.weight" in model.state_dict() and torch.equal(model(x), before)
    assert not hasattr(small("dpt-base-ade20k").fusion.blocks[3], "unit1")


def test_match_size_upsamples_to_the_next_level():
    """Blind spot: Depth Anything's rule, which no odd-sized skip is resized under."""
    decoder = config().with_("decoder", match_size=True).decoder
    block = FusionBlock(decoder, deepest=False)
    assert block(torch.randn(1, 16, 3, 4), torch.randn(1, 16, 3, 4), (5, 7)).shape == (1, 16, 5, 7)
    maps = [torch.randn(1, c, *s) for c, s in zip(decoder.neck_channels, [(20, 12), (10, 6), (5, 3), (3, 2)], strict=True)]
    assert Fusion(decoder)(maps).shape == (1, 16, 40, 24)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 30, 32), r"30x32 .*multiples of the patch size 16"),
        ((1, 3, 0, 32), r"0x32 .*at least one patch"),
        ((1, 1, 32, 32), r"\(1, 1, 32, 32\).*\(batch, 3, height, width\)"),
        ((3, 32, 32), r"\(3, 32, 32\).*\(batch, 3, height, width\)"),
    ],
)
def test_wrong_inputs_are_named(shape, message):
    """Blind spot: a scrambled map without an error."""
    with pytest.raises(ValueError, match=message):
        small()(torch.randn(shape))


def test_unknown_names_are_refused():
    """Blind spot: errors that do not say what would be right."""
    with pytest.raises(ValueError, match="did you mean 'dpt-large-midas'"):
        dpt.build("dpt-large-midsa")
    with pytest.raises(ValueError, match="attention='flash': it must be one of sdpa, xformers"):
        dpt.build("dpt-tiny-depth", attention="flash")


def test_xformers_attention_needs_its_package(monkeypatch):
    """Blind spot: an ImportError from the middle of the first forward pass."""
    monkeypatch.setitem(__import__("sys").modules, "xformers", None)
    with pytest.raises(ImportError, match="pip install xformers"):
        dpt.build("dpt-tiny-depth", attention="xformers")


def test_xformers_attention_gets_the_layout_it_documents(monkeypatch):
    """Blind spot: heads and tokens exchanged. A stand-in computes what xformers documents for (B, N, H, D)."""
    import sys
    import types

    def memory_efficient_attention(q, k, v):
        assert q.shape == (2, 17, 2, 16)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    x = torch.randn(2, 3, 64, 64)
    close(small(attention="xformers")(x), small()(x), 1e-5)


def test_build_defaults():
    """Blind spot: the default is mmsegmentation's model, random, in evaluation mode."""
    model = dpt.build()
    assert model.config.name == "dpt-base-ade20k" and not model.training and len(model.config.head.classes) == 150
    assert dpt.models()[0] == "dpt-base-ade20k"
    half = dpt.build("dpt-tiny-depth", dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["dpt-large-midas", "dpt-large-ade20k"])
def test_deepcopy_and_pickle(name):
    """Blind spot: a model that holds something uncopiable."""
    model = small(name)
    x = torch.randn(1, 3, 32, 48)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


def test_auxiliary_head():
    """Blind spot: the auxiliary classifier on the wrong map; isl-org's reads the one a level deeper."""
    model = small("dpt-large-ade20k")
    x = torch.randn(2, 3, 32, 48)
    main, auxiliary = model.forward_auxiliary(x)
    assert torch.equal(main, model(x))
    _, deeper = model.features(x, deeper=True)
    assert auxiliary.shape == main.shape and torch.equal(auxiliary, model.auxiliary_head(deeper, (32, 48)))


@pytest.mark.parametrize(("task", "size"), [("depth", 64), ("depth", 96), ("segmentation", 64), ("segmentation", 96)])
def test_equal_to_transformers(task, size):
    """Blind spot: any part of the arithmetic. transformers' DPT with the same random weights; 96 resizes the positional embedding."""
    transformers = pytest.importorskip("transformers")
    theirs_class, name = {
        "depth": (transformers.DPTForDepthEstimation, "dpt-large-midas"),
        "segmentation": (transformers.DPTForSemanticSegmentation, "dpt-large-ade20k"),
    }[task]
    theirs = randomise(
        theirs_class(
            transformers.DPTConfig(
                **TRANSFORMERS_FIELDS,
                num_labels=5,
                is_hybrid=False,
                use_batch_norm_in_fusion_residual=task == "segmentation",
            )
        )
    )
    ours = DPT(config(name, norm_eps=1e-12)).eval()
    ours.load_state_dict(convert(theirs.state_dict(), transformers_dpt.LAYOUT, ours.state_dict()))
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        result = theirs(x)
        expected = result.predicted_depth if task == "depth" else result.logits
        y = ours(x)
    assert y.std() > 0.01 * y.abs().max()
    close(y, expected, 2e-5)


def mmseg_config():
    c = CONFIGS["dpt-base-ade20k"]
    c = c.with_("encoder", embed_dim=16, num_heads=2, depth=6, hooks=(0, 2, 3, 5))
    return c.with_("decoder", neck_channels=(8, 12, 16, 16), features=10)


@pytest.mark.parametrize("case", ["square", "same_token_count", "resized"])
def test_equal_to_mmsegmentation(case):
    """Blind spot: any part of mmsegmentation's model. Logits of mmsegmentation itself (oracles/README.md says what each input shows)."""
    model = dpt.load(DATA / "mmseg_tiny.pth", mmseg_config())
    data = np.load(DATA / "mmseg_tiny.npz")
    batch, height, width = data[f"{case}.shape"]
    x = np.random.RandomState(int(data["input_seed"])).randint(-128, 128, (batch, 3, height, width)) / 64
    with torch.inference_mode():
        logits = model(torch.from_numpy(x).float())
    rows, columns = data[f"{case}.rows"], data[f"{case}.columns"]
    close(logits[:, :, rows[:, None], columns], torch.from_numpy(data[f"{case}.logits"]), 2e-5)
