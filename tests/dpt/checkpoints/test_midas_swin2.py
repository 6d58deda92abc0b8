"""MiDaS 3.1 on Swin V2: what its own code and transformers' make of the same weights, from a picture to its map."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recording import difference, network_input, picture
from small import config, randomise, small, upstream

import dpt
from dpt import factory
from dpt.checkpoints import CheckpointError, layout_of, read
from dpt.checkpoints.conversion import reverted
from dpt.config import DPTConfig
from dpt.inference.resizing import postprocess, preprocess
from dpt.model import DPT
from dpt.zoo import CONFIGS, midas_swin2

transformers = pytest.importorskip("transformers")
DATA = Path(__file__).parents[1] / "nets" / "data"
NAMES = ("midas-3.1-swin2-large-384", "midas-3.1-swin2-base-384", "midas-3.1-swin2-tiny-256")


def narrow(name: str, pretrained: int) -> DPTConfig:
    """The recorded model's size with what a named one computes."""
    encoder = midas_swin2.swinv2(6, (2, 2, 2, 1), (1, 2, 2, 4), 4, (pretrained,) * 4, 16)
    full = replace(CONFIGS[name], encoder=encoder).with_("input", size=(64, 64))
    return full.with_("decoder", neck_channels=(6, 12, 24, 48), features=10)


RECORDED = {"midas_swin2": narrow(NAMES[0], 2), "midas_swin2_tiny": narrow(NAMES[2], 0)}


@pytest.mark.parametrize("recording", RECORDED)
def test_equal_to_the_original_code(recording):
    """Blind spot: the shift, its mask, what distances are measured by, the scale's bound, an epsilon, the order of merged patches, the dead
    unit run."""
    arrays = np.load(DATA / f"{recording}.npz")
    model = dpt.load(DATA / "midas_swin2.pt", RECORDED[recording])
    with torch.inference_mode():
        assert difference(arrays, "square.output", model(network_input(tuple(arrays["square.input"])))).max() < 1e-4


@pytest.mark.parametrize(
    ("recording", "name"), [("midas_swin2", "small_picture"), ("midas_swin2", "large_picture"), ("midas_swin2_tiny", "large_picture")]
)
def test_equal_to_the_original_from_the_picture_to_the_map(recording, name):
    """Blind spot: a picture whose aspect is kept, mean and deviation, the last resize."""
    arrays = np.load(DATA / f"{recording}.npz")
    model, image = dpt.load(DATA / "midas_swin2.pt", RECORDED[recording]), picture(*arrays[f"{name}.picture"])
    tensor, _ = preprocess(image, model.config.input)
    assert difference(arrays, f"{name}.tensor", tensor).max() < 1e-4
    depth = model.predict(image).depth
    assert depth.shape == image.shape[:2]
    assert (difference(arrays, f"{name}.map", depth) <= 1 / 65535).mean() >= 0.999


BACKBONE = {
    "image_size": 64,
    "embed_dim": 8,
    "depths": [2, 2, 2, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 4,
    "pretrained_window_sizes": [3, 3, 3, 2],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def theirs(backbone=(), **fields) -> torch.nn.Module:
    """transformers' class with random weights: some logarithms of scales beyond the bound, where the mask does not hide everything."""
    values = {**BACKBONE, **dict(backbone)}
    dim = values["embed_dim"]
    sizes = {"backbone_config": transformers.Swinv2Config(**values), "fusion_hidden_size": 16}
    sizes["neck_hidden_sizes"] = [dim, 2 * dim, 4 * dim, 8 * dim]
    model = randomise(transformers.DPTForDepthEstimation(transformers.DPTConfig(**{**sizes, **fields})))
    for name, value in model.named_parameters():
        if name.endswith("logit_scale"):
            value.data.abs_().mul_(2).add_(3)
    return model


def close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    assert ours.shape == expected.shape and (ours - expected).abs().max() <= relative * expected.abs().max()
    assert expected.std() > 0.01 * expected.abs().max()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_batch_norm_in_fusion_residual": True, "use_bias_in_fusion_residual": True},
        {"backbone": {"layer_norm_eps": 0.1, "mlp_ratio": 2.5, "hidden_act": "gelu_new", "pretrained_window_sizes": [0, 0, 0, 0]}},
        {"backbone": {"image_size": 96, "window_size": 6, "depths": [1, 3, 2, 2], "out_features": None, "out_indices": [1, 2, 3, 4]}},
    ],
    ids=str,
)
def test_equal_to_transformers(tmp_path, fields):
    """Blind spot: a field of config.json that is not obeyed; the mask, which transformers adds twice."""
    model = theirs(**fields)
    model.save_pretrained(tmp_path)
    ours = dpt.load(tmp_path)
    x = torch.randn(2, 3, *ours.config.encoder.fixed_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        close(ours(x), model(x).predicted_depth)


def test_transformers_adds_the_mask_twice(tmp_path):
    """Blind spot: two codes that differ, taken for one: where scales are at their bound and heads of few channels, a mask of -100 does not
    hide everything. In float64: such scores are rounded a hundred times as much."""
    model = theirs({"num_heads": [4, 8, 8, 8]})
    for name, value in model.named_parameters():
        if name.endswith("logit_scale"):
            value.data.fill_(5.0)
    model.save_pretrained(tmp_path)
    ours = dpt.load(tmp_path)
    once = DPT(ours.config.with_("encoder", window_mask=-100.0)).eval()
    once.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    with torch.inference_mode():
        expected = model.double()(x).predicted_depth
        close(ours.double()(x), expected)
        assert (once.double()(x) - expected).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize("size", [(97, 131), (110, 90)])
def test_equal_to_transformers_from_the_picture_to_the_map(tmp_path, size):
    """Blind spot: the size and the antialiased resize of the processor's file; the resize back."""
    model = theirs()
    processor = transformers.DPTImageProcessorPil(size={"height": 64, "width": 64}, keep_aspect_ratio=False)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours, image = dpt.load(tmp_path), picture(*size)
    inputs = processor(image, return_tensors="pt")["pixel_values"]
    tensor, _ = preprocess(image, ours.config.input)
    # Pillow rounds twice, once a direction, and its filter to 8 bits: a grey level, here and there two.
    assert tensor.shape == inputs.shape
    levels = ((tensor - inputs) * 127.5).abs()
    assert levels.max() < 2.1 and levels.mean() < 0.3
    with torch.inference_mode():
        expected = processor.post_process_depth_estimation(model(inputs), target_sizes=[size])[0]["predicted_depth"]
        close(postprocess(ours(inputs)[0], inputs.shape[2:], size, ours.config.input), expected)


REFUSED = [
    ("is_hybrid", True, "false"),
    ("backbone", "timm", "null"),
    ("neck_hidden_sizes", [8, 16, 32, 63], "as the stages have them"),
    ("backbone_config", None, "an object"),
    ("backbone_config.model_type", "swin", "'swinv2'"),
    ("backbone_config.image_size", [64, 96], "a square"),
    ("backbone_config.patch_size", 2, "4"),
    ("backbone_config.num_channels", 4, "3"),
    ("backbone_config.embed_dim", 0, "above 0"),
    ("backbone_config.depths", [2, 2, 2], "four whole numbers"),
    ("backbone_config.num_heads", [1, 2, 2, 0], "four whole numbers"),
    ("backbone_config.window_size", 0, "above 0"),
    ("backbone_config.pretrained_window_sizes", [-1, 0, 0, 0], "four whole numbers"),
    ("backbone_config.mlp_ratio", 0, "above 0"),
    ("backbone_config.qkv_bias", False, "true"),
    ("backbone_config.hidden_act", "mish", "one of gelu"),
    ("backbone_config.use_absolute_embeddings", True, "false"),
    ("backbone_config.layer_norm_eps", 0, "above 0"),
    ("backbone_config.out_indices", [0, 1, 2, 3], "the four stages"),
]


@pytest.mark.parametrize(("field", "value", "rule"), REFUSED)
def test_what_cannot_be_obeyed_is_refused(tmp_path, field, value, rule):
    """Blind spot: a field passed over, and a map that is silently another."""
    theirs().save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    *outer, name = field.split(".")
    (stated[outer[0]] if outer else stated)[name] = value
    (tmp_path / "config.json").write_text(json.dumps(stated))
    name = name.replace("out_indices", "out_features")
    with pytest.raises(CheckpointError, match=rf"config\.json.*{name}=.*: it must be .*{re.escape(rule)}"):
        dpt.load(tmp_path)


def test_every_field_that_is_obeyed_is_refused_when_wrong():
    """Blind spot: a row of the table that no test breaks; a default that is not transformers'."""
    assert {field.partition(".")[2] for field, *_ in REFUSED if "." in field} - {"out_indices"} == set(midas_swin2.TABLE)
    defaults = json.loads(transformers.Swinv2Config().to_json_string(use_diff=False))
    assert {name: value for name, (value, *_) in midas_swin2.TABLE.items() if name != "model_type" and defaults[name] != value} == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"size": {"height": 96, "width": 64}}, "must be 64x64"), ({"keep_aspect_ratio": True, "ensure_multiple_of": 4}, "must be 64x64")],
)
def test_a_processor_of_another_size_is_refused(tmp_path, changes, message):
    """Blind spot: pictures that the encoder takes none of, seen at the first."""
    theirs().save_pretrained(tmp_path)
    stated = {"size": {"height": 64, "width": 64}, "keep_aspect_ratio": False, **changes}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=message):
        dpt.load(tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", midas_swin2.LAYOUTS, ids=lambda layout: layout.name)
def test_files_are_recognised(name, layout):
    """Blind spot: another size's file taken for it; markers that another layout has too."""
    with torch.device("meta"):
        state = upstream(DPT(CONFIGS[name]), layout)
    assert layout_of(state) is layout and factory.recognised(state, layout, "file").name == name


def without_key_biases(model: DPT) -> DPT:
    """The model with zeros for the biases that its keys have not in their files."""
    for key, value in model.state_dict().items():
        if key.endswith("attn.qkv.bias"):
            value.view(3, -1)[1] = 0
    return model


def test_a_layout_is_run_as_its_own_code_runs_it(tmp_path):
    """Blind spot: a file alone of transformers', run with the original's mask and resize, or the other way round."""
    model = without_key_biases(small(NAMES[2]))
    for layout, mask, antialias in ((midas_swin2.ORIGINAL, -100.0, False), (midas_swin2.TRANSFORMERS, -200.0, True)):
        torch.save(reverted(model.state_dict(), layout, model.config.encoder.embed_dim), tmp_path / "file.pth")
        loaded = dpt.load(tmp_path / "file.pth", config(NAMES[2]))
        assert (loaded.config.encoder.window_mask, loaded.config.input.antialias) == (mask, antialias)
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_the_original_keeps_is_written_back():
    """Blind spot: ImageNet's classifier left out of a file that the original's strict loader reads, or of another shape."""
    recorded = read(DATA / "midas_swin2.pt").state
    model = without_key_biases(randomise(DPT(RECORDED["midas_swin2"])))
    written = reverted(model.state_dict(), midas_swin2.ORIGINAL, 6)
    computed = {key for key in recorded if key.endswith(("attn_mask", "relative_position_index"))}
    assert written.keys() == recorded.keys() - computed
    # The classifier has a class for each of ImageNet's, and of the recorded one five.
    assert {key for key in written if tuple(written[key].shape) != tuple(recorded[key].shape)} == {
        f"pretrained.model.head.{name}" for name in ("weight", "bias")
    }


def test_stated_as_it_is_read(tmp_path):
    """Blind spot: a field that is written otherwise than it is read, or not as transformers takes it."""
    full = config(NAMES[0])
    model, processor = midas_swin2.write(full)
    assert transformers.DPTConfig.from_dict(model).backbone_config.depths == [2, 2, 2, 2]
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    torch.save(upstream(small(NAMES[0]), midas_swin2.TRANSFORMERS), tmp_path / "pytorch_model.bin")
    found, expected = dpt.load(tmp_path).config, midas_swin2.TRANSFORMERS.as_run(full)
    assert (found.encoder, found.decoder, found.head, found.input) == (expected.encoder, expected.decoder, expected.head, expected.input)
    with pytest.raises(CheckpointError, match=r"encoder\.patch_size=2: transformers computes 4 alone"):
        midas_swin2.write(full.with_("encoder", patch_size=2))


def test_what_the_family_publishes():
    """Blind spot: windows of 384 on the model of 256, another licence."""
    for name, side in zip(NAMES, (384, 384, 256), strict=True):
        full = CONFIGS[name]
        assert full.encoder.fixed_size == full.input.size == (side, side) and full.licence == "MIT" and full.head.inverse
        assert full.encoder.window == side // 16 and full.encoder.stage_heads[0] * 32 == full.encoder.embed_dim
        assert full.source.endswith(f"/v3_1/dpt_swin2_{name[16:].replace('-', '_')}.pt")
