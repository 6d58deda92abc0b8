"""MiDaS 3.1 on BEiT: what its own code and transformers' make of the same weights, from a picture to its map."""

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
from dpt.checkpoints import CheckpointError, layout_of, read
from dpt.config import DPTConfig
from dpt.inference.resizing import postprocess, preprocess
from dpt.model import DPT
from dpt.zoo import CONFIGS, midas

transformers = pytest.importorskip("transformers")
DATA = Path(__file__).parents[1] / "nets" / "data"
NAMES = ("midas-3.1-beit-large-512", "midas-3.1-beit-large-384", "midas-3.1-beit-base-384")


def narrow(name: str) -> DPTConfig:
    """The recorded model's size with what a named one computes."""
    full = CONFIGS[name].with_("encoder", embed_dim=24, depth=5, num_heads=3, hooks=(0, 1, 3, 4), pos_grid=(4, 4))
    return full.with_("decoder", neck_channels=(8, 12, 16, 20), features=10)


@pytest.mark.parametrize("name", ["square", "wide", "tall"])
def test_equal_to_the_original_code(name):
    """Blind spot: the bias's order, sizes and resize, an epsilon, keys with a bias, levels of odd sizes, the dead unit run."""
    arrays = np.load(DATA / "midas_beit.npz")
    model = dpt.load(DATA / "midas_beit.pt", narrow("midas-3.1-beit-large-384"))
    with torch.inference_mode():
        assert difference(arrays, f"{name}.output", model(network_input(tuple(arrays[f"{name}.input"])))).max() < 1e-4


@pytest.mark.parametrize(
    ("recording", "model", "name"),
    [
        ("midas_beit", "midas-3.1-beit-large-384", "small_picture"),
        ("midas_beit", "midas-3.1-beit-large-384", "large_picture"),
        ("midas_beit_512", "midas-3.1-beit-large-512", "large_picture"),
    ],
)
def test_equal_to_the_original_from_the_picture_to_the_map(recording, model, name):
    """Blind spot: another rule of sizes, mean and deviation, the last resize."""
    arrays = np.load(DATA / f"{recording}.npz")
    model, image = dpt.load(DATA / "midas_beit.pt", narrow(model)), picture(*arrays[f"{name}.picture"])
    tensor, _ = preprocess(image, model.config.input)
    assert difference(arrays, f"{name}.tensor", tensor).max() < 1e-4
    depth = model.predict(image).depth
    assert depth.shape == image.shape[:2]
    assert (difference(arrays, f"{name}.map", depth) <= 1 / 65535).mean() >= 0.999


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
SIZES = ((64, 64), (96, 96), (64, 128), (160, 32), (80, 112), (16, 144))  # of odd numbers of patches transformers' map is larger


def theirs(backbone=(), **fields) -> torch.nn.Module:
    """transformers' class with random weights."""
    beit = transformers.BeitConfig(**{**BACKBONE, **dict(backbone)})
    small_fields = {"backbone_config": beit, "neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 16}
    model = randomise(transformers.DPTForDepthEstimation(transformers.DPTConfig(**{**small_fields, **fields})))
    with torch.no_grad():
        model.head.head[4].bias += 2  # above the last ReLU
    return model


def close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    assert ours.shape == expected.shape and (ours - expected).abs().max() <= relative * expected.abs().max()
    assert expected.std() > 0.01 * expected.abs().max()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"readout_type": "ignore", "use_batch_norm_in_fusion_residual": True},
        {"use_batch_norm_in_fusion_residual": True, "use_bias_in_fusion_residual": True, "hidden_act": "relu"},
        {"backbone": {"layer_norm_eps": 0.1, "intermediate_size": 100, "hidden_act": "gelu_new", "out_indices": [2, 3, 4, 5]}},
        {"backbone": {"image_size": 96, "num_attention_heads": 4, "num_hidden_layers": 6}},
    ],
    ids=str,
)
def test_equal_to_transformers(tmp_path, fields):
    """Blind spot: a field of config.json that is not obeyed; sizes that are not square, of an odd number of patches."""
    model = theirs(**fields)
    model.save_pretrained(tmp_path)
    ours = dpt.load(tmp_path)
    for size in SIZES:
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(size[0]))
        with torch.inference_mode():
            close(ours(x), model(x).predicted_depth)


@pytest.mark.parametrize("size", [(97, 131), (140, 90)])
def test_equal_to_transformers_from_the_picture_to_the_map(tmp_path, size):
    """Blind spot: the rule, the multiple and the antialiased resize of the processor's file; the resize back."""
    model = theirs()
    processor = transformers.DPTImageProcessorPil(size={"height": 64, "width": 64}, keep_aspect_ratio=False, ensure_multiple_of=32)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours, image = dpt.load(tmp_path), picture(*size) // 2 + 64  # within whose range its cubic overshoots stay
    inputs = processor(image, return_tensors="pt")["pixel_values"]
    tensor, _ = preprocess(image, ours.config.input)
    # Pillow rounds after each direction: half a level, times at most 1.25 (the sum of cubic weights' sizes), and half a level.
    assert tensor.shape == inputs.shape and ((tensor - inputs) * 127.5).abs().max() <= 0.5 * 1.25 + 0.5
    with torch.inference_mode():
        expected = processor.post_process_depth_estimation(model(inputs), target_sizes=[size])[0]["predicted_depth"]
        close(postprocess(ours(inputs)[0], inputs.shape[2:], size, ours.config.input), expected)


REFUSED = [
    ("is_hybrid", True, "false"),
    ("backbone", "timm", "null"),
    ("backbone_config", None, "an object"),
    ("backbone_config.model_type", "dinov3", "'beit'"),
    ("backbone_config.hidden_size", 0, "above 0"),
    ("backbone_config.num_hidden_layers", 2.5, "above 0"),
    ("backbone_config.num_attention_heads", "2", "above 0"),
    ("backbone_config.intermediate_size", -1, "above 0"),
    ("backbone_config.hidden_act", "mish", "one of gelu"),
    ("backbone_config.layer_norm_eps", 0, "above 0"),
    ("backbone_config.image_size", [64, 96], "a square"),
    ("backbone_config.patch_size", 14, "16"),
    ("backbone_config.num_channels", 4, "3"),
    ("backbone_config.use_mask_token", True, "false"),
    ("backbone_config.use_absolute_position_embeddings", True, "false"),
    ("backbone_config.use_relative_position_bias", False, "true"),
    ("backbone_config.use_shared_relative_position_bias", True, "false"),
    ("backbone_config.layer_scale_init_value", 0, "above 0"),
    ("backbone_config.add_fpn", True, "false"),
    ("backbone_config.reshape_hidden_states", True, "false"),
    ("backbone_config.out_indices", [1, 2, 4, 6], "from 1 to 5"),
]


@pytest.mark.parametrize(("field", "value", "rule"), REFUSED)
def test_what_cannot_be_obeyed_is_refused(tmp_path, field, value, rule):
    """Blind spot: a field passed over, and a map that is silently another."""
    theirs().save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    *outer, name = field.split(".")
    (stated[outer[0]] if outer else stated)[name] = value
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=rf"config\.json.*{name}=.*: it must be .*{re.escape(rule)}"):
        dpt.load(tmp_path)


def test_every_field_that_is_obeyed_is_refused_when_wrong():
    """Blind spot: a row of the table that no test breaks; a default that is not transformers'."""
    assert {field.partition(".")[2] for field, *_ in REFUSED if "." in field} - {"out_indices"} == set(midas.TABLE)
    defaults = json.loads(transformers.BeitConfig().to_json_string(use_diff=False))
    assert {name: value for name, (value, *_) in midas.TABLE.items() if name != "model_type" and defaults[name] != value} == {}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", midas.LAYOUTS, ids=lambda layout: layout.name)
def test_files_are_recognised(name, layout):
    """Blind spot: the 512's file taken for the 384's, which differ in the tables' sizes alone."""
    with torch.device("meta"):
        state = upstream(DPT(CONFIGS[name]), layout)
    assert layout_of(state) is layout and factory.recognised(state, layout, "file").name == name


def test_a_layout_is_run_as_its_own_code_runs_it(tmp_path):
    """Blind spot: a file alone of transformers', run with the original's epsilon, sizes of levels and aspect, or the other way round."""
    model = small(NAMES[2])
    for layout, eps, sized, factor, rule in (
        (midas.ORIGINAL, 1e-6, True, None, "minimal"),
        (midas.TRANSFORMERS, 1e-12, False, 2, "square"),
    ):
        torch.save(upstream(model, layout), tmp_path / "file.pth")
        loaded = dpt.load(tmp_path / "file.pth", config(NAMES[2]))
        assert (loaded.config.encoder.norm_eps, loaded.config.decoder.match_size, loaded.config.input.rule) == (eps, sized, rule)
        assert loaded.config.head.upsample == factor
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in without_key_biases(model).items())


def without_key_biases(model: DPT) -> dict[str, torch.Tensor]:
    """The state with zeros for the biases that BEiT's keys have not, nor its files."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in state.items():
        if key.endswith("attn.qkv.bias"):
            value.view(3, -1)[1] = 0
    return state


def test_the_recorded_file_has_what_is_never_read():
    """Blind spot: a file as published that is refused for what its own code only keeps."""
    state = read(DATA / "midas_beit.pt").state
    for key in ("head.weight", "fc_norm.bias", "blocks.4.attn.relative_position_index"):
        assert f"pretrained.model.{key}" in state
    del state["pretrained.model.blocks.4.attn.relative_position_index"]
    assert layout_of(state) is midas.ORIGINAL


STEM = {"stem_width": 64, "stem_depths": (3, 4, 9), "stem_groups": 32}  # the defaults of what BEiT has not


def test_stated_as_it_is_read(tmp_path):
    """Blind spot: a field that is written otherwise than it is read, or not as transformers takes it."""
    full = config(NAMES[2], **STEM)
    model, processor = midas.write(midas.TRANSFORMERS.as_run(full))
    transformers.DPTConfig.from_dict(model)
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    torch.save(upstream(small(NAMES[2]), midas.TRANSFORMERS), tmp_path / "pytorch_model.bin")
    found = dpt.load(tmp_path).config
    expected = midas.TRANSFORMERS.as_run(full)
    assert (found.encoder, found.decoder, found.head, found.input) == (expected.encoder, expected.decoder, expected.head, expected.input)
    with pytest.raises(CheckpointError, match=r"encoder\.layer_scale=False: transformers computes True alone"):
        midas.write(full.with_("encoder", layer_scale=False))


def test_what_the_family_publishes():
    """Blind spot: hooks of the large model on the base one, another licence."""
    for name, side in zip(NAMES, (512, 384, 384), strict=True):
        full = CONFIGS[name]
        assert full.input.size == (side, side) and full.encoder.pos_grid == (side // 16,) * 2 and full.licence == "MIT"
        assert full.encoder.hooks == ((2, 5, 8, 11) if "base" in name else (5, 11, 17, 23)) and full.head.inverse
        assert full.source.endswith(f"/v3_1/dpt_beit_{name[15:].replace('-', '_')}.pt")
