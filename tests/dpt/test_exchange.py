"""`dpt convert`: the same tensors under other names and back, bit for bit, and read by the code that the layout is of."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import config, randomise, small, upstream

import dpt
from dpt import exchange
from dpt.checkpoints import CheckpointError
from dpt.commands.main import main
from dpt.zoo import CONFIGS, LAYOUTS, depth_anything, isl, midas, mmsegmentation, zoedepth

transformers = pytest.importorskip("transformers")
DATA = Path(__file__).parent / "nets" / "data"


def published(name: str, layout) -> dict[str, torch.Tensor]:
    """A small model's file as its family publishes it, with what the network never reads."""
    state = upstream(small(name), layout)
    width = config(name).encoder.embed_dim
    generator = torch.Generator().manual_seed(7)
    for key, shape, _ in layout.filled:
        state[key] = torch.randn([width if side == "D" else side for side in shape], generator=generator)
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[key].dtype and value.shape == other[key].shape and torch.equal(value, other[key]) for key, value in one.items()
    )


CASES = [
    ("dpt-large-midas", isl.LAYOUT),
    ("dpt-large-ade20k", isl.LAYOUT),
    ("dpt-base-ade20k", mmsegmentation.LAYOUT),
    ("depth-anything-v2-small", depth_anything.ORIGINAL),
    ("depth-anything-v2-metric-vkitti-base", depth_anything.ORIGINAL),
    ("depth-anything-v1-small", depth_anything.ORIGINAL),
    ("midas-3.1-beit-base-384", midas.ORIGINAL),
    ("zoedepth-k", zoedepth.ORIGINAL),
    ("zoedepth-nk", zoedepth.ORIGINAL_ROUTED),
]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda value: getattr(value, "name", value))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_there_and_back(tmp_path, name, layout, dtype):
    """Blind spot: a tensor that is lost, cast, or comes back in another's place; what the network never reads, which strict code wants."""
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in published(name, layout).items()}
    torch.save(state, tmp_path / "a.pth")
    assert exchange.convert(tmp_path / "a.pth", tmp_path / "b.safetensors", "dpt", config(name)) == []
    loaded = dpt.load(tmp_path / "b.safetensors")
    assert loaded.config == layout.as_run(loaded.config)
    exchange.convert(tmp_path / "b.safetensors", tmp_path / "e.safetensors", "dpt")  # ours stays as it is
    assert same(load_file(tmp_path / "e.safetensors"), load_file(tmp_path / "b.safetensors"))
    exchange.convert(tmp_path / "b.safetensors", tmp_path / "c.pth", layout.format)
    back = torch.load(tmp_path / "c.pth", weights_only=True)
    assert same(back.get("state_dict", back), state)
    exchange.convert(tmp_path / "a.pth", tmp_path / "d.safetensors", layout.format, config(name))  # and at once
    assert same(load_file(tmp_path / "d.safetensors"), state)


@pytest.mark.parametrize("name", ["dpt-large-midas", "dpt-large-ade20k"])
def test_transformers_runs_what_was_converted(tmp_path, name):
    """Blind spot: a configuration that transformers reads otherwise than we meant; a folder that from_pretrained does not take."""
    model = small(name)
    torch.save(published(name, isl.LAYOUT), tmp_path / "a.pt")
    notes = exchange.convert(tmp_path / "a.pt", tmp_path / "hf", "hf", config(name))
    kind = transformers.DPTForDepthEstimation if name.endswith("midas") else transformers.DPTForSemanticSegmentation
    theirs, info = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        given = theirs.eval()(x)
        expected = given.predicted_depth if name.endswith("midas") else given.logits
        assert (model(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert any("input.antialias" in note for note in notes) and not any("encoder." in note for note in notes)
    again = dpt.load(tmp_path / "hf").config
    assert again.encoder.norm_eps == model.config.encoder.norm_eps and again.input.size == model.config.input.size
    assert transformers.DPTImageProcessorPil.from_pretrained(tmp_path / "hf").image_mean == (0.5, 0.5, 0.5)
    exchange.convert(tmp_path / "hf", tmp_path / "back.pt", "isl")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    ours = upstream(model, isl.LAYOUT)
    assert all(torch.equal(back[key], value) for key, value in ours.items()) and back.keys() - ours.keys() == {
        key for key, *_ in isl.LAYOUT.filled
    }


@pytest.mark.parametrize("name", ["depth-anything-v2-small", "depth-anything-v2-metric-hypersim-small"])
def test_transformers_runs_depth_anything(tmp_path, name):
    """Blind spot: the same, of another class; and the one thing that it computes otherwise passed over in silence."""
    torch.save(published(name, depth_anything.ORIGINAL), tmp_path / "a.pth")
    notes = exchange.convert(tmp_path / "a.pth", tmp_path / "hf", "hf", config(name))
    assert any("encoder.pos_offset=0.0, Depth Anything 0.1" in note for note in notes)
    theirs, info = transformers.DepthAnythingForDepthEstimation.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours = dpt.load(tmp_path / "hf")
    x = torch.randn(1, 3, 70, 98, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = theirs.eval()(x).predicted_depth
        assert (ours(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
    back = exchange.convert(tmp_path / "hf", tmp_path / "back.pth", "depth-anything")
    assert any("encoder.pos_offset=0.1, transformers' Depth Anything 0.0" in note for note in back)
    exchange.convert(tmp_path / "hf", tmp_path / "b.safetensors", "dpt")
    exchange.convert(tmp_path / "b.safetensors", tmp_path / "hf2", "hf")
    assert same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(tmp_path / "hf2" / "model.safetensors"))
    for file in ("config.json", "preprocessor_config.json"):
        assert json.loads((tmp_path / "hf" / file).read_text()) == json.loads((tmp_path / "hf2" / file).read_text())


@pytest.mark.parametrize(
    ("name", "layout", "to", "said"),
    [
        ("dpt-base-ade20k", mmsegmentation.LAYOUT, "isl", "norm_eps|pos_mode"),
        ("dpt-base-ade20k", mmsegmentation.LAYOUT, "hf", "pos_mode|pos_by_count"),
        ("dpt-large-midas", isl.LAYOUT, "mmseg", "no head.conv1.weight"),
        ("dpt-large-midas", isl.LAYOUT, "depth-anything", "no reassemble.0.readout"),
        ("depth-anything-v2-small", depth_anything.ORIGINAL, "isl", "layer_scale|patch_size|its files hold|no reassemble"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused(tmp_path, name, layout, to, said):
    """Blind spot: a file that the other code loads and computes something else from; half a folder."""
    torch.save(published(name, layout), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"has no place in the layout {to} .*({said})"):
        exchange.convert(tmp_path / "a.pth", tmp_path / ("hf" if to == "hf" else "b.pth"), to, config(name))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_the_command(tmp_path, capsys):
    """Blind spot: options that do nothing; a file of somebody's overwritten; an address that is taken for a path."""
    model = small("dpt-tiny-depth")
    dpt.save(model, tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "dpt"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "b.safetensors")
    assert same(load_file(tmp_path / "b.safetensors"), load_file(tmp_path / "a.safetensors"))
    assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "dpt"]) == 2
    assert "b.safetensors exists; --overwrite replaces it" in capsys.readouterr().err
    address = (tmp_path / "a.safetensors").as_uri()
    assert main(["convert", address, str(tmp_path / "b.safetensors"), "--to", "dpt", "--overwrite"]) == 0
    for argv, said in (
        (["--to", "isl"], "has no place in the layout isl"),
        (["--to", "dpt", "--overwrite"], "must end in .safetensors"),
    ):
        assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "c.pth"), *argv]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "c.pth")])
    assert "it needs --to LAYOUT, or --vit2mmseg" in capsys.readouterr().err


VIT2MMSEG = {  # what mmsegmentation's script makes of timm's keys
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed.proj.weight": "patch_embed.projection.weight",
    "patch_embed.proj.bias": "patch_embed.projection.bias",
    "blocks.0.norm1.weight": "layers.0.ln1.weight",
    "blocks.0.norm2.bias": "layers.0.ln2.bias",
    "blocks.0.attn.qkv.weight": "layers.0.attn.attn.in_proj_weight",
    "blocks.0.attn.qkv.bias": "layers.0.attn.attn.in_proj_bias",
    "blocks.0.attn.proj.weight": "layers.0.attn.attn.out_proj.weight",
    "blocks.0.attn.proj.bias": "layers.0.attn.attn.out_proj.bias",
    "blocks.0.mlp.fc1.weight": "layers.0.ffn.layers.0.0.weight",
    "blocks.0.mlp.fc2.bias": "layers.0.ffn.layers.1.bias",
    "blocks.11.norm1.bias": "layers.11.ln1.bias",
    "norm.weight": "ln1.weight",
    "norm.bias": "ln1.bias",
    "pre_logits.fc.weight": "pre_logits.fc.weight",
}


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])  # bare; timm; DeiT
def test_a_vit_becomes_mmsegmentations_backbone(tmp_path, wrapper):
    """Blind spot: a key that the script names otherwise; the classifier kept; a wrapper that is not looked into."""
    state = OrderedDict((key, torch.randn(3)) for key in VIT2MMSEG)
    content = {**state, "head.weight": torch.randn(3), "head.bias": torch.randn(3)}
    torch.save({wrapper: content} if wrapper else content, tmp_path / "vit.pth")
    assert main(["convert", "--vit2mmseg", (tmp_path / "vit.pth").as_uri(), str(tmp_path / "out.pth")]) == 0
    found = torch.load(tmp_path / "out.pth", weights_only=True)
    assert same(found, {VIT2MMSEG[key]: value for key, value in state.items()})
    with pytest.raises(CheckpointError, match="no ViT of timm's"):
        exchange.vit2mmseg(DATA / "mmseg_tiny.pth", tmp_path / "other.pth")


def test_a_converted_backbone_is_the_encoder(tmp_path):
    """Blind spot: keys that are named as the script names them and hold another tensor."""
    encoder = randomise(small("dpt-base-ade20k").encoder)
    timm = {key.replace("patch_embed.", "patch_embed.proj."): value for key, value in encoder.state_dict().items()}
    torch.save(timm, tmp_path / "vit.pth")
    exchange.vit2mmseg(tmp_path / "vit.pth", tmp_path / "backbone.safetensors")
    found = load_file(tmp_path / "backbone.safetensors")
    for key, value in encoder.state_dict().items():
        assert torch.equal(found[mmsegmentation.LAYOUT.source(f"encoder.{key}")[0].removeprefix("backbone.")], value)


def test_every_field_is_a_size_or_computes():
    """Blind spot: a field added to the configuration that says how large a model is, for which converting then asks a named one."""
    import dataclasses

    for section, sizes in exchange.SIZES.items():
        names = {field.name for field in dataclasses.fields(getattr(CONFIGS["dpt-large-midas"], section))}
        assert sizes <= names
    assert {layout.format for layout in LAYOUTS} >= {"dpt", "mmseg", "isl", "hf"}
