"""ZoeDepth: what its own code and transformers' make of the same weights, from a picture to its metres."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from recording import difference, network_input, picture
from small import config, randomise, small, upstream

import dpt
from dpt import factory
from dpt.checkpoints import CheckpointError, layout_of
from dpt.inference.resizing import network_size, postprocess, preprocess
from dpt.model import DPT
from dpt.nets.metric_bins import Router
from dpt.zoo import CONFIGS, zoedepth

transformers = pytest.importorskip("transformers")
DATA = Path(__file__).parents[1] / "nets" / "data"
RECORDED = {  # recording: its weights, the named model, and what differs
    "zoedepth_n": ("zoedepth_n", "zoedepth-n", {}),
    "zoedepth_k": ("zoedepth_k", "zoedepth-k", {}),
    "zoedepth_k_hub": ("zoedepth_k", "zoedepth-k", {"bin_range": (0.001, 10.0)}),
    "zoedepth_nk": ("zoedepth_nk", "zoedepth-nk", {}),
}


@pytest.fixture
def narrow_router(monkeypatch):
    """The recorded router's sizes."""
    for field, size in (("WIDTH", 16), ("HIDDEN", 24), ("HEADS", 4), ("DEPTH", 2)):
        monkeypatch.setattr(Router, field, size)


def recorded(recording: str, **inputs) -> DPT:
    weights, name, head = RECORDED[recording]
    full = CONFIGS[name].with_("encoder", embed_dim=24, depth=5, num_heads=3, hooks=(0, 1, 3, 4), pos_grid=(4, 4))
    full = full.with_("decoder", neck_channels=(8, 12, 16, 20), features=10).with_("head", bins=16, bin_width=12, **head)
    return dpt.load(DATA / f"{weights}.pt", full.with_("input", **inputs))


@pytest.mark.usefixtures("narrow_router")
@pytest.mark.parametrize("recording", RECORDED)
@pytest.mark.parametrize("name", ["square", "wide", "tall", "other"])
def test_equal_to_the_original_code(recording, name):
    """Blind spot: any part of the bins, their attractors' strength and number, the domain that is chosen, levels of odd sizes."""
    arrays = np.load(DATA / f"{recording}.npz")
    with torch.inference_mode():
        apart = difference(arrays, f"{name}.output", recorded(recording)(network_input(tuple(arrays[f"{name}.input"]))))
    if (recording, name) == ("zoedepth_nk", "wide"):  # of the two pictures the original sends both where the second goes
        assert apart[0].max() > 0.1
        apart = apart[1]
    assert apart.max() < 1e-4


@pytest.mark.usefixtures("narrow_router")
@pytest.mark.parametrize("recording", RECORDED)
@pytest.mark.parametrize("name", ["small_picture", "large_picture"])
def test_equal_to_the_original_from_the_picture_to_the_map(recording, name):
    """Blind spot: the border's width, its place before the resize, corners, the rule of sizes, the mirrored picture, the last resize."""
    arrays = np.load(DATA / f"{recording}.npz")
    image = picture(*arrays[f"{name}.picture"])
    for prefix, inputs, found in (("", {}, "map"), ("plain_", {"border": 0.0, "flip": False}, "plain")):
        model = recorded(recording, **inputs)
        tensor, _ = preprocess(image, model.config.input)
        assert difference(arrays, f"{name}.{prefix}tensor", tensor).max() < 1e-5
        depth = model.predict(image).depth
        assert depth.shape == image.shape[:2]
        assert (difference(arrays, f"{name}.{found}", depth) <= 1 / 65535).mean() >= 0.999


BACKBONE = {
    "image_size": 64,
    "num_hidden_layers": 5,
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "use_relative_position_bias": True,
    "reshape_hidden_states": False,
    "out_indices": [1, 2, 4, 5],
}
ROUTER = {
    "num_patch_transformer_layers": 4,
    "patch_transformer_hidden_size": 128,
    "patch_transformer_intermediate_size": 1024,
    "patch_transformer_num_attention_heads": 4,
}


def ranges(*names: str, bins: int = 16) -> list[dict]:
    return [{"name": name, "n_bins": bins, "min_depth": 1e-3, "max_depth": 80.0 if name == "kitti" else 10.0} for name in names]


KINDS = {
    "N": {"bin_configurations": ranges("nyu")},
    "K": {"bin_configurations": ranges("nyu"), "bin_centers_type": "normed"},
    "NK": {"bin_configurations": ranges("nyu", "kitti"), **ROUTER},
}
SIZES = ((64, 64), (96, 96), (64, 128), (160, 32), (80, 112), (16, 144))  # of odd numbers of patches transformers' map is larger


def theirs(kind: str = "N", **fields) -> torch.nn.Module:
    """transformers' class with random weights."""
    small_fields = {
        "backbone_config": transformers.BeitConfig(**BACKBONE),
        "neck_hidden_sizes": [8, 12, 16, 20],
        "fusion_hidden_size": 16,
        "bottleneck_features": 16,
    }
    return randomise(transformers.ZoeDepthForDepthEstimation(transformers.ZoeDepthConfig(**{**small_fields, **KINDS[kind], **fields})))


def close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    """Within `relative` of the largest value, and by a hundredth of what a picture's metres vary by."""
    assert ours.shape == expected.shape
    assert (ours - expected).abs().max() <= min(relative * expected.abs().max(), 0.01 * expected.std())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("N", {}),
        ("K", {}),
        ("NK", {}),
        ("N", {"num_attractors": [3, 5, 2, 4], "min_temp": 0.5, "max_temp": 5.0, "num_relative_features": 8}),
        ("K", {"bin_configurations": [{"n_bins": 5, "min_depth": 0.5, "max_depth": 80}], "hidden_act": "relu"}),
        ("NK", {"num_attractors": [3, 5, 2, 4], "use_batch_norm_in_fusion_residual": True, "bin_embedding_dim": 20}),
    ],
    ids=str,
)
def test_equal_to_transformers(tmp_path, kind, fields):
    """Blind spot: a field of config.json that is not obeyed, or obeyed where transformers passes it over: attractors of NK, their strength;
    sizes that are not square, of an odd number of patches."""
    model = theirs(kind, **fields)
    model.save_pretrained(tmp_path)
    ours = dpt.load(tmp_path)
    for size in SIZES:
        x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(size[0]))
        with torch.inference_mode():
            close(ours(x), model(x).predicted_depth)
    assert not ours.config.head.inverse


@pytest.mark.parametrize("domain", [0, 1])
def test_both_domains_are_transformers(tmp_path, domain):
    """Blind spot: the domains exchanged; the one that random weights never choose."""
    model = theirs("NK")
    with torch.no_grad():
        model.metric_head.mlp_classifier.linear2.bias.copy_(torch.tensor([5.0, 0.0]).roll(domain))
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        result = model(x)
        assert result.domain_logits.argmax() == domain
        close(dpt.load(tmp_path)(x), result.predicted_depth)


def test_the_router_is_transformers(tmp_path):
    """Blind spot: a router that is right by chance, one of two. Its scores, where they hang on the picture."""
    model = theirs("NK")
    model.save_pretrained(tmp_path)
    ours, logits = dpt.load(tmp_path), []
    ours.head.router.classifier.register_forward_hook(lambda module, inputs, output: logits.append(output))
    for size in SIZES:
        x = torch.randn(1, 3, *size)
        with torch.inference_mode():
            ours(x)
            torch.testing.assert_close(logits[-1], model(x).domain_logits, rtol=1e-4, atol=1e-5)
    assert torch.cat(logits).std(0).min() > 1e-2


@pytest.mark.parametrize("size", [(97, 131), (240, 90)])
@pytest.mark.parametrize("pad", [True, False])
def test_equal_to_transformers_from_the_picture_to_the_map(tmp_path, size, pad):
    """Blind spot: the border's width, the border reflected behind the resize, its corners, the multiple, the mirrored picture."""
    model = theirs()
    processor = transformers.ZoeDepthImageProcessorPil(size={"height": 64, "width": 96}, ensure_multiple_of=32, do_pad=pad)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours, image = dpt.load(tmp_path), picture(*size)
    inputs = processor(image, return_tensors="pt")["pixel_values"]
    tensor, _ = preprocess(image, ours.config.input)
    close(tensor, inputs)
    with torch.inference_mode():
        found, mirrored = (postprocess(ours(x)[0], x.shape[2:], size, ours.config.input) for x in (inputs, inputs.flip(3)))
        expected, other = (mapped(model(x).predicted_depth, size, pad) for x in (inputs, inputs.flip(3)))
    close(found, expected)
    close(mirrored, other)
    close(torch.from_numpy(ours.predict(image).depth), expected)
    both = ours.predict(image, flip=True).depth
    close(torch.from_numpy(both), (expected + other.flip(1)) / 2)


def mapped(depth: torch.Tensor, size: tuple[int, int], pad: bool) -> torch.Tensor:
    """transformers' post_process_depth_estimation, whose resize is torchvision's bicubic one without antialiasing: PyTorch's."""
    y, x = (int(np.sqrt(side / 2) * 3) if pad else 0 for side in size)
    resized = torch.nn.functional.interpolate(depth[None], size=(size[0] + 2 * y, size[1] + 2 * x), mode="bicubic", align_corners=False)
    return resized[0, 0, y : y + size[0], x : x + size[1]]


def test_the_named_ones_flip_and_pad_by_default():
    """Blind spot: metres that are not those of the original's `infer`, which averages both."""
    model = small("zoedepth-n")
    image = picture(60, 90)
    depth = model.predict(image).depth
    assert np.abs(depth - model.predict(image, flip=False).depth).max() > 1e-3 * depth.max()
    mirrored = model.predict(np.ascontiguousarray(image[:, ::-1])).depth
    assert np.abs(mirrored[:, ::-1] - depth).max() < 1e-4 * depth.max()


@pytest.mark.parametrize(("height", "width"), [(480, 640), (375, 1242), (100, 100), (3000, 2000)])
def test_sizes_are_the_originals(height, width):
    """Blind spot: the picture's size without its border, another rule. The formulas of the original's PrepForMidas."""
    for name, target in (("zoedepth-n", (384, 512)), ("zoedepth-k", (384, 768))):
        sides = [side + 2 * int(np.sqrt(side / 2) * 3) for side in (height, width)]
        scales = [goal / side for goal, side in zip(target, sides, strict=True)]
        scale = scales[1] if abs(1 - scales[1]) < abs(1 - scales[0]) else scales[0]
        expected = tuple(int(np.round(scale * side / 32) * 32) for side in sides)
        assert network_size(height, width, CONFIGS[name].input) == expected


REFUSED = [
    ("model_type", "glpn", "'zoedepth'"),
    ("readout_type", "add", "'project'"),
    ("hidden_act", "mish", "one of gelu"),
    ("reassemble_factors", [4, 2, 1, 1], "[4, 2, 1, 0.5]"),
    ("neck_hidden_sizes", [8, 12, 16], "four whole numbers"),
    ("fusion_hidden_size", 1, "above 1"),
    ("head_in_index", 0, "-1 or 3"),
    ("use_batch_norm_in_fusion_residual", "no", "true, false or null"),
    ("use_bias_in_fusion_residual", 1, "true, false or null"),
    ("batch_norm_eps", 1e-3, "1e-5"),
    ("num_relative_features", 0, "above 0"),
    ("add_projection", True, "false"),
    ("bottleneck_features", 8, "fusion_hidden_size=16"),
    ("num_attractors", [16, 8, 4], "four whole numbers above 0"),
    ("bin_embedding_dim", 1, "above 1"),
    ("bin_embedding_dim", 64, "128 with one of bin_configurations"),
    ("attractor_kind", "sum", "'mean'"),
    ("min_temp", 0, "above 0"),
    ("max_temp", "50", "above 0"),
    ("bin_centers_type", "hybrid1", "one of softplus, normed"),
    ("bin_configurations", [], "one object, or two"),
    ("bin_configurations", [3], "one object, or two"),
    ("bin_configurations", [{"n_bins": 1, "min_depth": 0.1, "max_depth": 1.0}], "one object, or two"),
    ("bin_configurations", ranges("kitti", "nyu"), "one object, or two"),
    ("bin_configurations", [*ranges("nyu"), *ranges("kitti", bins=8)], "one object, or two"),
    ("bin_configurations", ranges("nyu", "kitti", "ddad"), "one object, or two"),
    ("backbone_config", {"model_type": "swinv2"}, "'beit'"),
]


def edit(folder, file: str, **fields) -> None:
    values = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps(values))


@pytest.mark.parametrize(("field", "value", "rule"), REFUSED)
def test_what_cannot_be_obeyed_is_refused(tmp_path, field, value, rule):
    """Blind spot: a field passed over, and metres that are silently others."""
    theirs().save_pretrained(tmp_path)
    edit(tmp_path, "config.json", **{field: value})
    name = "model_type" if field == "backbone_config" else field
    with pytest.raises(CheckpointError, match=rf"config\.json.*{name}=.*: it must be .*{re.escape(rule)}"):
        dpt.load(tmp_path)


@pytest.mark.parametrize("field", ROUTER)
def test_routers_of_other_sizes_are_refused(tmp_path, field):
    """Blind spot: transformers builds four layers of 128 whatever the file says of some of these."""
    theirs("NK").save_pretrained(tmp_path)
    edit(tmp_path, "config.json", **{field: 2})
    with pytest.raises(CheckpointError, match=rf"config\.json: {field}=2: it must be {ROUTER[field]}"):
        dpt.load(tmp_path)
    edit(tmp_path, "config.json", **{field: ROUTER[field]}, bin_centers_type="normed")
    with pytest.raises(CheckpointError, match=r"bin_centers_type='normed': it must be softplus with several"):
        dpt.load(tmp_path)


def test_the_processors_fields(tmp_path):
    """Blind spot: a multiple of transformers 5.23's own default, a thirty-second of a pixel."""
    theirs().save_pretrained(tmp_path)
    assert dpt.load(tmp_path).config.input == CONFIGS["zoedepth-n"].with_("input", flip=False).input
    transformers.ZoeDepthImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"ensure_multiple_of=0\.03125: it must be a whole number above 0"):
        dpt.load(tmp_path)
    edit(tmp_path, "preprocessor_config.json", ensure_multiple_of=32, do_pad=False, keep_aspect_ratio=False)
    found = dpt.load(tmp_path).config.input
    assert (found.border, found.rule, found.align_corners, found.antialias, found.size) == (0.0, "square", True, False, (384, 512))


def test_defaults_are_those_of_transformers():
    """Blind spot: a default that transformers has changed, or that was copied wrong; a row that no test breaks."""
    assert {field for field, *_ in REFUSED} - {"backbone_config"} == set(zoedepth.TABLE)
    model = json.loads(transformers.ZoeDepthConfig().to_json_string(use_diff=False))
    processor = json.loads(transformers.ZoeDepthImageProcessorPil().to_json_string())
    for table, stated in ((zoedepth.TABLE, model), (zoedepth.INPUT, processor)):
        assert {name: value for name, (value, *_) in table.items() if name != "model_type" and stated.get(name) != value} == {}


NAMES = ("zoedepth-n", "zoedepth-k", "zoedepth-nk")
ORIGINAL = dict(zip(NAMES, (zoedepth.ORIGINAL, zoedepth.ORIGINAL, zoedepth.ORIGINAL_ROUTED), strict=True))
TRANSFORMERS = dict(zip(NAMES, (zoedepth.TRANSFORMERS, zoedepth.TRANSFORMERS, zoedepth.TRANSFORMERS_ROUTED), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("original", [True, False])
def test_every_layout_round_trips(name, original, tmp_path):
    """Blind spot: two of our keys that read one of theirs, or a key that reads the wrong one of the same shape."""
    model, layout = small(name), (ORIGINAL if original else TRANSFORMERS)[name]
    state = upstream(model, layout)
    for key, value in model.state_dict().items():
        if key.endswith("attn.qkv.bias") and "router" not in key:
            value.view(3, -1)[1] = 0  # BEiT's keys have no bias, nor its files
    torch.save({"model": state}, tmp_path / "file.pth")
    loaded = dpt.load(tmp_path / "file.pth", config(name))
    assert layout_of(state) is layout
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert loaded.config.decoder.match_size == original and loaded.config.input.flip == original
    assert loaded.config.encoder.norm_eps == (1e-6 if original else 1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layouts", [ORIGINAL, TRANSFORMERS], ids=["original", "transformers"])
def test_files_are_recognised(name, layouts):
    """Blind spot: N's file taken for K's: bounded bins have points of two numbers."""
    with torch.device("meta"):
        state = upstream(DPT(CONFIGS[name]), layouts[name])
    assert layout_of(state) is layouts[name] and factory.recognised(state, layouts[name], "file").name == name


KEYS = """
core.core.pretrained.model.blocks.23.attn.q_bias
core.core.pretrained.model.blocks.0.attn.relative_position_bias_table
core.core.pretrained.act_postprocess1.0.project.0.weight
core.core.scratch.refinenet4.resConfUnit1.conv1.weight
core.core.scratch.output_conv.4.bias
conv2.weight
seed_projector._net.2.bias
projectors.3._net.0.weight
seed_bin_regressor._net.0.weight
attractors.0._net.2.weight
conditional_log_binomial.mlp.2.bias
seed_bin_regressors.kitti._net.2.weight
attractors.nyu.3._net.0.bias
conditional_log_binomial.kitti.mlp.0.weight
patch_transformer.embedding_convPxP.weight
patch_transformer.transformer_encoder.layers.3.self_attn.in_proj_weight
patch_transformer.transformer_encoder.layers.0.self_attn.in_proj_bias
patch_transformer.transformer_encoder.layers.1.self_attn.out_proj.weight
patch_transformer.transformer_encoder.layers.2.linear1.weight
patch_transformer.transformer_encoder.layers.2.norm2.bias
mlp_classifier.2.weight
""".split()


@pytest.mark.parametrize("key", KEYS)
def test_keys_are_as_published(key):
    """Blind spot: a table that round-trips with itself but not with the files. Keys as the original repository writes them."""
    with torch.device("meta"):
        states = [upstream(DPT(CONFIGS[name]), ORIGINAL[name]) for name in NAMES]
    assert any(key in state for state in states)


STEM = {"stem_width": 64, "stem_depths": (3, 4, 9), "stem_groups": 32}  # the defaults of what BEiT has not


@pytest.mark.parametrize("name", NAMES)
def test_stated_as_it_is_read(tmp_path, name):
    """Blind spot: a field that is written otherwise than it is read, or not as transformers takes it."""
    full = config(name, **STEM)
    full = full.with_("head", bin_range=(0.001, 10.0)) if name == "zoedepth-nk" else full
    model, processor = zoedepth.write(full)
    transformers.ZoeDepthConfig.from_dict(model)
    transformers.ZoeDepthImageProcessorPil.from_dict(processor)
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    torch.save(upstream(small(name), TRANSFORMERS[name]), tmp_path / "pytorch_model.bin")
    found, expected = dpt.load(tmp_path).config, zoedepth.TRANSFORMERS.as_run(full).with_("encoder", norm_eps=1e-6)
    assert (found.encoder, found.decoder, found.head, found.input) == (expected.encoder, expected.decoder, expected.head, expected.input)
    with pytest.raises(CheckpointError, match=r"input\.align_corners=False: transformers computes True alone"):
        zoedepth.write(full.with_("input", align_corners=False))
    model = transformers.ZoeDepthForDepthEstimation.from_pretrained(tmp_path)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        close(dpt.load(tmp_path)(x), model(x).predicted_depth)


def test_what_the_family_publishes():
    """Blind spot: KITTI's metres an eighth of what they are, as the original's own defaults and transformers' file make them."""
    n, k, nk = (CONFIGS[name] for name in NAMES)
    assert k.head.bin_range == (0.001, 80.0) and k.head.bin_centres == "normed" and k.input.size == (384, 768)
    assert n.head.bin_centres == nk.head.bin_centres == "softplus" and n.input.size == nk.input.size == (384, 512)
    assert n.head.attractors == k.head.attractors == (16, 8, 4, 1) and nk.head.attractors == (16,) * 4
    for name, full in zip("N K NK".split(), (n, k, nk), strict=True):
        assert full.licence == "MIT" and not full.head.inverse and full.source.endswith(f"/v1.0/ZoeD_M12_{name}.pt")
        assert full.encoder == CONFIGS["midas-3.1-beit-large-384"].encoder and 80 * full.head.depth_scale <= 65535
