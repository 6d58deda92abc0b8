"""DINOv2's depth models: files in their layouts give what their own code gives, transformers' among them."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recording import difference, network_input, picture
from safetensors.torch import load_file
from small import config, randomise, small, upstream

import dpt
from dpt import exchange
from dpt.checkpoints import CheckpointError, layout_of
from dpt.commands.main import main
from dpt.config import config_from
from dpt.inference.resizing import padded, postprocess, preprocess
from dpt.model import DPT
from dpt.zoo import CONFIGS, dinov2_depthers

transformers = pytest.importorskip("transformers")
DATA = Path(__file__).parents[1] / "nets" / "data"
NYU, GIANT = "dpt-dinov2-small-nyu", "dpt-dinov2-giant-kitti"
ORIGINALS = (dinov2_depthers.ORIGINAL, dinov2_depthers.WHOLE)


def close(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 2e-5) -> None:
    assert ours.shape == theirs.shape and theirs.std() > 0.01 * theirs.abs().max()
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


def in_two(model: DPT, folder) -> list:
    """The model as its authors give it: a bare backbone, and a head as mmcv saves it; with what is never read."""
    state = upstream(model, dinov2_depthers.ORIGINAL)
    head = {key: value for key, value in state.items() if key.startswith("decode_head.")}
    width = model.config.encoder.embed_dim
    unread = {"mask_token": torch.zeros(1, width), "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    paths = [folder / "dinov2_vits14_pretrain.pth", folder / "dinov2_vits14_nyu_dpt_head.pth"]
    torch.save({key: value for key, value in state.items() if key not in head} | unread, paths[0])
    torch.save({"meta": {"epoch": 1}, "state_dict": head}, paths[1])
    return paths


@pytest.mark.parametrize("name", [NYU, GIANT])
@pytest.mark.parametrize("order", [1, -1])
def test_backbone_and_head_are_two_files(tmp_path, name, order):
    """Blind spot: one of the files passed over, their order, SwiGLU's names, a tensor that is in both."""
    model = small(name)
    paths = in_two(model, tmp_path)
    loaded = dpt.load(paths[::order], config(name))
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert loaded.config == model.config
    x = torch.randn(1, 3, 28, 42)
    assert torch.equal(dpt.build(config(name), weights=tuple(paths))(x), model(x))
    with pytest.raises(CheckpointError, match=r"pretrain.pth and .*: blocks.0.attn.proj.bias is in .*pretrain.pth and in another"):
        dpt.load([paths[0], paths[0]])
    with pytest.raises(CheckpointError, match="no file to load"):
        dpt.load([])


@pytest.mark.parametrize(("file", "there", "lacking"), [(0, "blocks.0.ls1.gamma", "decode_head"), (1, "decode_head", "blocks.0.ls1.gamma")])
def test_one_file_of_two_is_told(tmp_path, file, there, lacking):
    """Blind spot: an error about hundreds of missing keys, or an unknown layout, where the other file was forgotten."""
    path = in_two(small(NYU), tmp_path)[file]
    with pytest.raises(CheckpointError, match=rf"backbone and head layout it has {there}.* but not {lacking}.*another file"):
        dpt.load(path)


@pytest.mark.parametrize("layout", ORIGINALS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("name", [NYU, GIANT])
def test_original_layouts_round_trip(tmp_path, layout, name):
    """Blind spot: two of our keys that read one of theirs, or a key that reads the wrong one of the same shape."""
    model = small(name)
    state = upstream(model, layout)
    torch.save(state, tmp_path / "file.pth")
    loaded = dpt.load(tmp_path / "file.pth", config(name))
    assert layout_of(state) is layout and len(state) == len(model.state_dict())
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


PUBLISHED = """
cls_token
pos_embed
patch_embed.proj.bias
blocks.11.attn.qkv.weight
blocks.3.ls2.gamma
decode_head.reassemble_blocks.projects.0.conv.weight
decode_head.reassemble_blocks.resize_layers.3.bias
decode_head.reassemble_blocks.readout_projects.2.0.weight
decode_head.convs.1.conv.weight
decode_head.fusion_blocks.0.project.conv.bias
decode_head.fusion_blocks.0.res_conv_unit2.conv1.conv.weight
decode_head.fusion_blocks.3.res_conv_unit1.conv2.conv.weight
decode_head.project.conv.bias
decode_head.conv_depth.head.0.weight
decode_head.conv_depth.head.4.bias
""".split()


def test_keys_are_as_published():
    """Blind spot: a table that round-trips with itself but not with the files. Keys as the original repository's modules name them."""
    with torch.device("meta"):
        keys = upstream(DPT(CONFIGS[NYU]), dinov2_depthers.ORIGINAL).keys()
        giant = upstream(DPT(CONFIGS[GIANT]), dinov2_depthers.ORIGINAL).keys()
    assert set(PUBLISHED) <= keys and {"blocks.39.mlp.w12.weight", "blocks.0.mlp.w3.bias"} <= giant
    none = "decode_head.fusion_blocks.0.res_conv_unit1", "decode_head.convs.0.conv.bias"
    assert not any(key.startswith(none) or key.endswith("res_conv_unit2.conv1.conv.bias") for key in keys)


@pytest.mark.parametrize("size", ["small", "base"])
def test_what_tensors_cannot_tell_is_asked_for(size):
    """Blind spot: KITTI's 80 m taken for NYU's 10, whose tensors have the same names and shapes; sizes taken for each other."""
    with torch.device("meta"):
        state = upstream(DPT(CONFIGS[f"dpt-dinov2-{size}-kitti"]), dinov2_depthers.ORIGINAL)
    with pytest.raises(CheckpointError, match=rf"fits dpt-dinov2-{size}-nyu, dpt-dinov2-{size}-kitti alike, .*say which with name="):
        dpt.factory.recognised(state, dinov2_depthers.ORIGINAL, "files")


@pytest.mark.parametrize(
    ("size", "hooks"),
    [("small", (2, 5, 8, 11)), ("base", (2, 5, 8, 11)), ("large", (4, 11, 17, 23)), ("giant", (9, 19, 29, 39))],
)
@pytest.mark.parametrize(("data", "farthest"), [("nyu", 10.0), ("kitti", 80.0)])
def test_semantics_are_as_published(size, hooks, data, farthest):
    """Blind spot: bounds, hooks or addresses of another model, metres that 16 bits do not hold. As dinov2/hub/depthers.py has them."""
    found = CONFIGS[f"dpt-dinov2-{size}-{data}"]
    assert found.encoder.hooks == hooks and found.head.offset == 0.001 and found.head.bounds == (0.001, farthest)
    assert farthest * found.head.depth_scale < 65536 and not found.head.inverse and found.licence == "Apache-2.0"
    name = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{size[0]}14/dinov2_vit{size[0]}14"
    assert found.source == (f"{name}_pretrain.pth", f"{name}_{data}_dpt_head.pth")


RECORDED = {"dinov2_depther": ("small", {}), "dinov2_depther_giant": ("giant", {"depth": 5, "hooks": (0, 1, 3, 4)})}


def recorded(name: str, data: str) -> tuple[DPT, dict]:
    """The narrow model whose maps its own code has recorded (nets/oracles/README.md), of its two files, and these maps."""
    size, changes = RECORDED[name]
    narrow = CONFIGS[f"dpt-dinov2-{size}-{data}"].with_("encoder", embed_dim=16, num_heads=2, pos_grid=(8, 8), **changes)
    narrow = narrow.with_("decoder", neck_channels=(2, 4, 8, 16), features=10)
    return dpt.load([DATA / f"{name}.pth", DATA / f"{name}_head.pth"], narrow), np.load(DATA / f"{name}.npz")


@pytest.mark.parametrize("data", ["nyu", "kitti"])
@pytest.mark.parametrize("case", ["square", "wide", "tall", "padded"])
@pytest.mark.parametrize("name", RECORDED)
def test_equal_to_its_own_code(name, case, data):
    """Blind spot: any part of the arithmetic that transformers leaves out or does otherwise: the positional embedding by scale, the least
    and the greatest depth, and the padded map squeezed into the unpadded picture."""
    model, arrays = recorded(name, data)
    x = network_input(tuple(arrays[f"{case}.input"]))
    with torch.inference_mode():
        y = model(padded(x, model.config.input))
    found = postprocess(y, y.shape[1:], x.shape[2:], model.config.input)
    assert difference(arrays, f"{case}.{data}", found).max() < 2e-5
    assert (found.max() > 10) == (data == "kitti") and found.min() == 0.001  # both ends are reached


@pytest.mark.parametrize("data", ["nyu", "kitti"])
@pytest.mark.parametrize("case", ["small_picture", "large_picture"])
@pytest.mark.parametrize("name", RECORDED)
def test_equal_to_its_own_code_from_the_picture_to_the_map(name, case, data):
    """Blind spot: statistics of the wrong range, a picture resized, zeros on the wrong side, a map resized in two steps."""
    model, arrays = recorded(name, data)
    image = picture(*arrays[f"{case}.picture"])
    x, _ = preprocess(image, model.config.input)
    assert difference(arrays, f"{case}.tensor", x).max() < 1e-6
    assert difference(arrays, f"{case}.{data}", model.predict(image).depth).max() < 2e-5


def transformers_model(swiglu: bool) -> torch.nn.Module:
    """Of 256 features, as its projection has whatever the configuration says."""
    backbone = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=2,
        image_size=70,
        patch_size=14,
        out_indices=[1, 2, 4, 5],
        apply_layernorm=False,
        reshape_hidden_states=False,
        use_swiglu_ffn=swiglu,
    )
    decoder = {"neck_hidden_sizes": [4, 8, 16, 32], "use_bias_in_fusion_residual": False, "add_projection": True}
    return randomise(transformers.DPTForDepthEstimation(transformers.DPTConfig(backbone_config=backbone, **decoder)), seed=3)


@pytest.fixture(scope="module", params=[False, True], ids=["mlp", "swiglu"])
def folder(request, tmp_path_factory):
    """A folder as facebook's: transformers' model and its processor, which pads what it does not resize."""
    path = tmp_path_factory.mktemp("dinov2")
    transformers_model(request.param).save_pretrained(path)
    transformers.DPTImageProcessorPil(
        do_resize=False,
        do_rescale=False,
        do_pad=True,
        size_divisor=14,
        image_mean=[123.675, 116.28, 103.53],
        image_std=[58.395, 57.12, 57.375],
    ).save_pretrained(path)
    return path


def test_transformers_configuration_is_obeyed(folder):
    """Blind spot: the offset and the bounds that transformers leaves out, its positional embedding by size, a unit with a bias."""
    found, head, inputs = dpt.load(folder).config, CONFIGS[NYU].head, CONFIGS[NYU].input
    assert (found.encoder.hooks, found.encoder.final_norm, found.encoder.pos_offset) == ((0, 1, 3, 4), "none", 0.0)
    assert (found.head.offset, found.head.bounds) == (0.0, None) and (head.offset, head.bounds) == (0.001, (0.001, 10.0))
    assert (found.head.upsample, found.head.project, found.head.inverse, found.decoder.unit_bias) == (2, True, False, False)
    assert (found.input.rule, found.input.pad, found.input.multiple) == (inputs.rule, inputs.pad, inputs.multiple)
    assert found.input.mean == inputs.mean and found.input.std == inputs.std and found.input.output_mode == "bicubic"
    file = dpt.load(folder, CONFIGS[NYU].with_("encoder", **vars_of(found.encoder)).with_("decoder", **vars_of(found.decoder)))
    assert (file.config.encoder.pos_offset, file.config.head.offset, file.config.head.bounds) == (0.0, 0.0, None)


def vars_of(section) -> dict:
    return dict(vars(section))


@pytest.mark.parametrize("grid", [(5, 5), (6, 6), (3, 7), (4, 5), (1, 2)])
def test_the_network_is_transformers(folder, grid):
    """Blind spot: any part of the arithmetic; odd numbers of patches, of which the map has sixteen pixels more than one a patch."""
    x = torch.randn(2, 3, 14 * grid[0], 14 * grid[1], generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = transformers.DPTForDepthEstimation.from_pretrained(folder)(x).predicted_depth
        close(dpt.load(folder)(x), expected)
    assert expected.shape == (2, *(16 * (side + side % 2) for side in grid))


@pytest.mark.parametrize("shape", [(41, 62), (70, 70), (14, 29), (90, 33)])
def test_pictures_and_maps_are_transformers(folder, shape):
    """Blind spot: padding on the wrong side or of pixels instead of normalised zeros, and a map that is cut instead of squeezed."""
    processor = transformers.DPTImageProcessorPil.from_pretrained(folder)
    model = transformers.DPTForDepthEstimation.from_pretrained(folder)
    picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = dpt.load(folder)
    inputs = processor(picture, return_tensors="pt")
    x, _ = preprocess(picture, ours.config.input)
    torch.testing.assert_close(x, inputs.pixel_values, rtol=0, atol=1e-5)
    with torch.inference_mode():
        expected = processor.post_process_depth_estimation(model(**inputs), target_sizes=[shape])[0]["predicted_depth"]
    close(torch.from_numpy(ours.predict(picture).depth), expected)


@pytest.mark.parametrize(
    ("file", "field", "value", "rule"),
    [
        ("config.json", "architectures", ["DPTForSemanticSegmentation"], "DPTForDepthEstimation"),
        ("config.json", "is_hybrid", True, "false: the encoder is the backbone alone"),
        ("config.json", "backbone", "facebook/dinov2-small", "null"),
        ("config.json", "backbone_config", None, "an object"),
        ("config.json", "backbone_config", {"model_type": "dinov2_with_registers"}, "'dinov2'"),
        ("preprocessor_config.json", "size_divisor", 16, "a multiple of 14"),
        ("preprocessor_config.json", "size_divisor", None, "a multiple of 14"),
        ("preprocessor_config.json", "do_pad", False, "true where nothing is padded"),
        ("preprocessor_config.json", "do_resize", True, "false where pictures are resized"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(folder, tmp_path, file, field, value, rule):
    """Blind spot: a field passed over, and a map that is silently another."""
    path = shutil.copytree(folder, tmp_path / "copied") / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(CheckpointError, match=rf"{file}: .*it must be .*{rule}"):
        dpt.load(tmp_path / "copied")


@pytest.mark.parametrize("name", [NYU, GIANT])
def test_original_files_become_transformers(tmp_path, name):
    """Blind spot: a folder that transformers reads otherwise than it was written; what it computes otherwise passed over in silence."""
    whole = config(name).with_("decoder", features=256)
    ours, layout = randomise(DPT(whole)), dinov2_depthers.TRANSFORMERS
    notes = exchange.convert(in_two(ours, tmp_path), tmp_path / "hf", "hf", whole)
    said = ("encoder.pos_offset=0.0", "head.offset=0.0", "head.bounds=None", "input.output_mode='bicubic'")
    assert len(notes) == len(said) and all(part in note for part, note in zip(said, notes, strict=True))
    theirs, report = transformers.DPTForDepthEstimation.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values())
    x = torch.randn(1, 3, 56, 84)
    as_theirs = DPT(layout.as_run(ours.config)).eval()
    as_theirs.load_state_dict(ours.state_dict())
    back = dpt.load(tmp_path / "hf")
    with torch.inference_mode():
        close(as_theirs(x), theirs(x).predicted_depth)
        assert torch.equal(back(x), as_theirs(x))
    assert back.config.input == layout.as_run(ours.config).input


def together(paths) -> dict[str, torch.Tensor]:
    backbone, head = (torch.load(path, weights_only=True) for path in paths)
    return backbone | head["state_dict"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_conversions_there_and_back(tmp_path):
    """Blind spot: a tensor that is lost or comes back in another's place, through our files and through transformers'; its unit that never
    runs written where the original has none."""
    whole = config(NYU).with_("decoder", features=256)
    published = in_two(randomise(DPT(whole)), tmp_path)
    assert exchange.convert(published, tmp_path / "a.safetensors", "dpt", whole) == []
    exchange.convert(published, tmp_path / "hf", "hf", whole)
    for source in ("a.safetensors", "hf"):
        exchange.convert(tmp_path / source, tmp_path / "b.pth", "dinov2")
        assert same(torch.load(tmp_path / "b.pth", weights_only=True), together(published)), source
    exchange.convert(tmp_path / "b.pth", tmp_path / "whole.pth", "dinov2-whole", whole)
    bare = {key.removeprefix("backbone."): value for key, value in torch.load(tmp_path / "whole.pth", weights_only=True).items()}
    assert same(bare, together(published))
    arguments = ["convert", *map(str, published), str(tmp_path / "c.safetensors"), "--to", "dpt"]
    assert main(arguments) == 2  # a small model has no name


def test_transformers_files_there_and_back(folder, tmp_path):
    """Blind spot: the unit that never runs, the final norm and the mask token, which its own code wants, lost on the way."""
    exchange.convert(folder, tmp_path / "a.safetensors", "dpt")
    exchange.convert(tmp_path / "a.safetensors", tmp_path / "hf", "hf")
    assert same(load_file(tmp_path / "hf" / "model.safetensors"), load_file(folder / "model.safetensors"))


def test_the_pretrained_weights_are_two_downloads(tmp_path, monkeypatch, capsys):
    """Blind spot: one of two addresses downloaded, or their licence not told."""
    published = in_two(small(NYU), tmp_path)
    named = replace(config(NYU), source=tuple(path.as_uri() for path in published))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    model = dpt.build(named, weights="pretrained")
    assert all(torch.equal(value, small(NYU).state_dict()[key]) for key, value in model.state_dict().items())
    assert {path.name for path in published} <= {path.name for path in (tmp_path / "cache" / "checkpoints").iterdir()}
    said = capsys.readouterr().err
    assert all(path.as_uri() in said for path in published) and "Apache-2.0" in said
    assert config_from(json.loads(json.dumps(asdict(named)))) == named


@pytest.mark.parametrize(
    ("section", "changes", "field"),
    [
        ("decoder", {"features": 16}, "decoder.features=16: transformers computes 256"),
        ("head", {"upsample": None}, "head.upsample=None"),
        ("head", {"inverse": True}, "head.inverse=True"),
        ("encoder", {"pos_mode": "bilinear"}, "encoder.pos_mode='bilinear'"),
    ],
)
def test_what_transformers_cannot_follow_is_not_written(section, changes, field):
    """Blind spot: a config.json that says nothing of what makes the map another."""
    whole = config(NYU).with_("decoder", features=256)
    with pytest.raises(CheckpointError, match=field):
        dinov2_depthers.write(whole.with_(section, **changes))
