"""Depth Anything and Distill-Any-Depth: what their own code and transformers' make of the same weights, from a picture to its map."""

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
from dpt.checkpoints import CheckpointError, read
from dpt.config import DPTConfig
from dpt.inference.resizing import postprocess, preprocess
from dpt.model import DPT
from dpt.zoo import CONFIGS, depth_anything

transformers = pytest.importorskip("transformers")
DATA = Path(__file__).parents[1] / "nets" / "data"
SIZES = ("small", "base", "large")


def narrow(name: str, hooks: tuple[int, ...] = (1, 2, 4, 5)) -> DPTConfig:
    """The recorded model's size with what a named one computes."""
    full = CONFIGS[name].with_("encoder", embed_dim=16, depth=6, num_heads=2, hooks=hooks)
    return full.with_("decoder", neck_channels=(8, 12, 16, 20), features=10)


RECORDED = {
    "depth_anything_v2": narrow("depth-anything-v2-large"),
    "depth_anything_v2_metric": narrow("depth-anything-v2-metric-vkitti-large"),
    "depth_anything_v1": narrow("depth-anything-v1-large", hooks=(2, 3, 4, 5)),
}


@pytest.mark.parametrize("recording", RECORDED)
@pytest.mark.parametrize("name", ["square", "wide", "tall", "stored"])
def test_equal_to_the_original_code(recording, name):
    """Blind spot: the embedding resized by size and not by scale, the final norm left out, the dead unit run, an epsilon, the sigmoid."""
    arrays = np.load(DATA / f"{recording}.npz")
    model = dpt.load(DATA / "depth_anything_v2.pth", RECORDED[recording])
    with torch.inference_mode():
        assert difference(arrays, f"{name}.output", model(network_input(tuple(arrays[f"{name}.input"])))).max() < 1e-4


@pytest.mark.parametrize("recording", RECORDED)
@pytest.mark.parametrize("name", ["small_picture", "large_picture"])
def test_equal_to_the_original_from_the_picture_to_the_map(recording, name):
    """Blind spot: another rule of sizes, an antialiased resize, mean and deviation, the corners of the last resize."""
    arrays = np.load(DATA / f"{recording}.npz")
    model = dpt.load(DATA / "depth_anything_v2.pth", RECORDED[recording])
    image = picture(*arrays[f"{name}.picture"])
    tensor, _ = preprocess(image, model.config.input)
    assert difference(arrays, f"{name}.tensor", tensor).max() < 1e-4
    depth = model.predict(image).depth
    assert depth.shape == image.shape[:2]
    within = difference(arrays, f"{name}.map", depth) <= 1 / 65535
    assert within.mean() >= 0.999


def theirs(**fields) -> torch.nn.Module:
    """transformers' class with random weights."""
    backbone = {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "image_size": 70,
        "patch_size": 14,
        "out_indices": [1, 2, 4, 5],
        "reshape_hidden_states": False,
        **fields.pop("backbone", {}),
    }
    small = {"backbone_config": backbone, "reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 16}
    torch.manual_seed(0)
    return randomise(transformers.DepthAnythingForDepthEstimation(transformers.DepthAnythingConfig(**{**small, **fields})))


def close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    assert ours.shape == expected.shape and (ours - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"depth_estimation_type": "metric", "max_depth": 80, "head_hidden_size": 16},
        {"backbone": {"use_swiglu_ffn": True, "out_indices": [2, 3, 4, 5]}},
        {"backbone": {"layer_norm_eps": 0.1, "mlp_ratio": 2, "hidden_act": "gelu_new"}},
        {"backbone": {"apply_layernorm": False}},
    ],
    ids=str,
)
def test_equal_to_transformers(tmp_path, fields):
    """Blind spot: a field of config.json that is not obeyed; the embedding of transformers' own resize; sizes that are not square, of an
    odd number of patches."""
    model = theirs(**fields)
    model.save_pretrained(tmp_path)
    ours = dpt.load(tmp_path)
    for size in ((70, 70), (98, 42), (70, 154), (14, 28)):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(size[0]))
        with torch.inference_mode():
            close(ours(x), model(x).predicted_depth)
    metric = fields.get("depth_estimation_type") == "metric"
    assert ours.config.head.inverse != metric and ours.config.head.max_depth == fields.get("max_depth", 1)


@pytest.mark.parametrize("size", [(97, 131), (140, 90)])
def test_equal_to_transformers_from_the_picture_to_the_map(tmp_path, size):
    """Blind spot: the rule, the multiple and the antialiased resize of the processor's file; the resize back."""
    model = theirs()
    processor = transformers.DPTImageProcessorPil(
        size={"height": 70, "width": 70},
        keep_aspect_ratio=True,
        ensure_multiple_of=14,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    ours, image = dpt.load(tmp_path), picture(*size)
    inputs = processor(image, return_tensors="pt")["pixel_values"]
    tensor, _ = preprocess(image, ours.config.input)
    # Pillow rounds twice, once a direction, and its filter to 8 bits: a grey level, here and there two.
    assert tensor.shape == inputs.shape
    levels = ((tensor - inputs) * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255).abs()
    assert levels.max() < 2.1 and levels.mean() < 0.3
    with torch.inference_mode():
        expected = processor.post_process_depth_estimation(model(inputs), target_sizes=[size])[0]["predicted_depth"]
        close(postprocess(ours(inputs)[0], inputs.shape[2:], size, ours.config.input), expected)
    close(torch.from_numpy(ours.predict(image).depth), expected, 0.02)  # of the grey levels


REFUSED = [
    ("model_type", "depth_pro", "'depth_anything'"),
    ("patch_size", 16, "the backbone's 14"),
    ("reassemble_factors", [4, 2, 1, 1], "[4, 2, 1, 0.5]"),
    ("neck_hidden_sizes", [8, 12, 16], "four whole numbers"),
    ("fusion_hidden_size", 1, "above 1"),
    ("head_in_index", 0, "-1 or 3"),
    ("head_hidden_size", 0, "above 0"),
    ("depth_estimation_type", "absolute", "one of relative, metric"),
    ("max_depth", 20, "1, of relative depth"),
    ("max_depth", -1, "above 0"),
    ("backbone_config", "dinov2", "an object"),
    ("backbone_config.model_type", "dinov3", "'dinov2'"),
    ("backbone_config.hidden_size", 0, "above 0"),
    ("backbone_config.num_hidden_layers", 2.5, "above 0"),
    ("backbone_config.num_attention_heads", "2", "above 0"),
    ("backbone_config.mlp_ratio", 0, "above 0"),
    ("backbone_config.hidden_act", "mish", "one of gelu"),
    ("backbone_config.layer_norm_eps", 0, "above 0"),
    ("backbone_config.image_size", [70, 84], "a square"),
    ("backbone_config.patch_size", None, "a square"),
    ("backbone_config.num_channels", 4, "3"),
    ("backbone_config.qkv_bias", False, "true"),
    ("backbone_config.use_swiglu_ffn", 1, "true or false"),
    ("backbone_config.apply_layernorm", "no", "true or false"),
    ("backbone_config.out_indices", [1, 2, 4, 6], "from 1 to 5"),
]


@pytest.mark.parametrize(("field", "value", "rule"), REFUSED)
def test_what_cannot_be_obeyed_is_refused(tmp_path, field, value, rule):
    """Blind spot: a field passed over, and a map that is silently another."""
    import json

    theirs().save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    *outer, name = field.split(".")
    (stated[outer[0]] if outer else stated)[name] = value
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=rf"config\.json.*{name}=.*: it must be .*{re.escape(rule)}"):
        dpt.load(tmp_path)


def test_every_field_that_is_obeyed_is_refused_when_wrong():
    """Blind spot: a row of the tables that no test breaks; a default that is not transformers'."""
    import json

    outer = {field for field, *_ in REFUSED if "." not in field} - {"backbone_config"}
    inner = {field.partition(".")[2] for field, *_ in REFUSED if "." in field} - {"out_indices"}
    from dpt.zoo import stated

    assert outer == set(depth_anything.TABLE) and inner == set(stated.DINOV2)
    for table, kind in ((depth_anything.TABLE, transformers.DepthAnythingConfig), (stated.DINOV2, transformers.Dinov2Config)):
        defaults = json.loads(kind().to_json_string(use_diff=False))
        assert {name: default for name, (default, *_) in table.items() if name != "model_type" and defaults[name] != default} == {}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", depth_anything.LAYOUTS, ids=lambda layout: layout.name)
def test_equal_files_are_asked_about(size, layout):
    """Blind spot: metres of 20 where they are of 80, or hooks of V1, chosen in silence."""
    with torch.device("meta"):
        state = upstream(DPT(CONFIGS[f"depth-anything-v2-{size}"]), layout)
    names = [f"depth-anything-v2-{size}", f"depth-anything-v2-metric-hypersim-{size}", f"depth-anything-v2-metric-vkitti-{size}"]
    names += [f"depth-anything-v1-{size}", f"distill-any-depth-{size}"]
    with pytest.raises(CheckpointError, match=f"fits {', '.join(names)} alike, .*say which with name="):
        factory.recognised(state, layout, "file")


def test_a_layout_is_run_as_its_own_code_runs_it(tmp_path):
    """Blind spot: transformers' files with the original's embedding and sizes, or the other way round."""
    model = small("depth-anything-v2-small")
    for layout, offset, rule, antialias in (
        (depth_anything.ORIGINAL, 0.1, "lower_bound", False),
        (depth_anything.DISTILLED, 0.1, "lower_bound", False),
        (depth_anything.TRANSFORMERS, 0.0, "minimal", True),
    ):
        torch.save({**upstream(model, layout), **{name: torch.ones(1, 32) for name, *_ in layout.filled}}, tmp_path / "file.pth")
        loaded = dpt.load(tmp_path / "file.pth", config("depth-anything-v2-small"))
        assert (loaded.config.encoder.pos_offset, loaded.config.input.rule, loaded.config.input.antialias) == (offset, rule, antialias)
        assert dpt.checkpoints.layout_of(read(tmp_path / "file.pth").state) is layout


def test_what_the_families_publish():
    """Blind spot: a licence of the small model on the large ones; V1's hooks, corners and sizes; metres that 16 bits of millimetres cut."""
    for size in SIZES:
        v2, v1 = CONFIGS[f"depth-anything-v2-{size}"], CONFIGS[f"depth-anything-v1-{size}"]
        assert v2.restricted == (size != "small") and not v1.restricted and not CONFIGS[f"distill-any-depth-{size}"].restricted
        depth = v2.encoder.depth
        assert v1.encoder.hooks == tuple(range(depth - 4, depth)) and not v1.input.output_align_corners
        assert v2.encoder.hooks == ((4, 11, 17, 23) if size == "large" else (2, 5, 8, 11)) and v2.input.output_align_corners
        assert replace(v1, name=v2.name, encoder=v2.encoder, input=v2.input, source=v2.source, licence=v2.licence) == v2
        for data, metres in (("hypersim", 20.0), ("vkitti", 80.0)):
            head = CONFIGS[f"depth-anything-v2-metric-{data}-{size}"].head
            assert (head.activation, head.max_depth, head.inverse) == ("sigmoid", metres, False)
            assert metres * head.depth_scale <= 65535
        assert CONFIGS[f"distill-any-depth-{size}"].input.size == (700, 700)
    assert dpt.models("*anything*") == [name for name in CONFIGS if "anything" in name]
    assert dpt.models("distill*large") == ["distill-any-depth-large"]
    with pytest.raises(ValueError, match="no model's name fits 'v3\\*'"):
        dpt.models("v3*")
