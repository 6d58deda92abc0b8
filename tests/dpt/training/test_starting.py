"""What a training starts from: models, checkpoints of other layouts, and a ViT alone."""

import pytest
import torch
import torch.nn.functional as F
from small import config, randomise, small

import dpt
from dpt.checkpoints import CheckpointError
from dpt.training.starting import start_from


def timm_vit(model: dpt.DPT, side: int = 4) -> dict[str, torch.Tensor]:
    """The state of timm's ViT that the encoder of a model is, with a grid of side x side patches, the classifier and the last norm."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for key, value in model.encoder.state_dict().items():
        shape = (1, 1 + side * side, value.shape[2]) if key == "pos_embed" else value.shape
        state[key.replace("patch_embed.", "patch_embed.proj.")] = torch.randn(shape, generator=generator)
    width = model.config.encoder.embed_dim
    return state | {
        "norm.weight": torch.ones(width),
        "norm.bias": torch.ones(width),
        "head.weight": torch.ones(9, width),
        "head.bias": torch.ones(9),
    }


@pytest.mark.parametrize("wrapped", [None, "state_dict", "model"], ids=["bare", "timm", "DeiT"])
def test_a_vit_of_timms(tmp_path, wrapped):
    """Blind spot: an encoder of which a tensor stays random, or a decoder that is touched; the wrappers that such files come in."""
    model = small("dpt-base-ade20k")
    state, before = timm_vit(model), {key: value.clone() for key, value in model.state_dict().items()}
    torch.save({wrapped: state} if wrapped else state, tmp_path / "vit.pth")
    assert start_from(model, str(tmp_path / "vit.pth")) == ["encoder"]
    for key, value in model.state_dict().items():
        if key.startswith("encoder."):
            given = state[key.removeprefix("encoder.").replace("patch_embed.", "patch_embed.proj.")]
            assert torch.equal(value, given), key
        else:
            assert torch.equal(value, before[key]), key


def test_positions_of_another_grid_are_resized(tmp_path):
    """Blind spot: a class token that is resized with the patches, rows and columns swapped: a grid of 4x4, from one of 3x3."""
    model = small("dpt-base-ade20k")
    state = timm_vit(model, side=3)
    torch.save(state, tmp_path / "vit.pth")
    start_from(model, str(tmp_path / "vit.pth"))
    stored, found = state["pos_embed"], model.encoder.pos_embed
    assert torch.equal(found[:, 0], stored[:, 0])
    wanted = F.interpolate(stored[0, 1:].T.reshape(1, -1, 3, 3), size=(4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(found[0, 1:].T.reshape(1, -1, 4, 4), wanted)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: state.pop("blocks.2.attn.qkv.bias"), "Missing key.*blocks.2.attn.qkv.bias"),
        (lambda state: state.update({"blocks.9.norm1.weight": torch.ones(32)}), "no place for blocks.9.norm1.weight"),
        (lambda state: state.update({"cls_token": torch.ones(1, 1, 48)}), "size mismatch for cls_token"),
        (
            lambda state: state.update({"pos_embed": torch.ones(1, 12, 32)}),
            r"pos_embed of shape \(1, 12, 32\) is no class token and square",
        ),
    ],
)
def test_a_vit_that_does_not_fit(tmp_path, spoil, message):
    """Blind spot: an encoder that is left half random, without a word."""
    model = small("dpt-base-ade20k")
    state = timm_vit(model)
    spoil(state)
    torch.save(state, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=f"vit.pth: .*{message}"):
        start_from(model, str(tmp_path / "vit.pth"))


def test_from_inverse_depth_to_metres_by_its_reciprocal(tmp_path):
    """Blind spot: isl-org's metric models, whose layers say what MiDaS' do, started with a head that knows nothing."""
    source = randomise(dpt.DPT(config("dpt-hybrid-midas")), seed=1)
    dpt.save(source, tmp_path / "midas.safetensors")
    model = randomise(dpt.DPT(config("dpt-hybrid-nyu")), seed=2)
    assert start_from(model, str(tmp_path / "midas.safetensors")) == ["encoder", "reassemble", "fusion", "head"]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())


def test_from_relative_depth_to_metres(tmp_path):
    """Blind spot: a head of inverse depth taken over for one of metres."""
    source = randomise(dpt.DPT(config("dpt-large-midas")), seed=1)
    dpt.save(source, tmp_path / "relative.safetensors")
    metres = config("dpt-large-midas").with_("head", inverse=False, activation="sigmoid", max_depth=10.0)
    model = randomise(dpt.DPT(metres), seed=2)
    head = model.head.conv1.weight.detach().clone()
    assert start_from(model, str(tmp_path / "relative.safetensors")) == ["encoder", "reassemble", "fusion"]
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value) is not key.startswith("head."), key
    assert torch.equal(model.head.conv1.weight, head)
