"""TIPSv2's dense models: each of transformers' four classes, from its folders and from a picture to the maps at its size."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from small import randomise, small

import dpt
from dpt import exchange
from dpt.checkpoints import CheckpointError
from dpt.inference.resizing import preprocess
from dpt.zoo import CONFIGS, stated, tipsv2

transformers = pytest.importorskip("transformers")
BACKBONE = {
    "model_type": "tipsv2_vision_model",
    "hidden_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "out_indices": [1, 2, 4, 5],
    "reshape_hidden_states": False,
    "image_size": 56,
}
FIELDS = {"neck_hidden_sizes": [8, 12, 16, 20], "fusion_hidden_size": 18, "num_depth_bins": 32, "num_labels": 5}
MAPS = {"depth": "predicted_depth", "normals": "normals", "segmentation": "segmentation_logits"}
SIZES = [(56, 56), (56, 84), (42, 70), (14, 98)]  # even and odd numbers of patches, the stored grid and others


def theirs(kind: str, backbone=None, **fields):
    made = transformers.Tipsv2DptConfig(backbone_config={**BACKBONE, **(backbone or {})}, **{**FIELDS, **fields})
    model = randomise(getattr(transformers, kind)(made), seed=3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                value.mul_(3)
    return model


def close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> None:
    assert ours.shape == expected.shape and expected.std() > 0.01 * expected.abs().max()
    assert (ours - expected).abs().max() <= relative * expected.abs().max()


@torch.inference_mode()
def compare(ours, model, x: torch.Tensor) -> None:
    found, expected = ours(x), model(x)
    if isinstance(found, torch.Tensor):
        found = {ours.config.head.task: found}
    assert set(found) == {head.task for head in ours.config.heads}
    for task, maps in found.items():
        close(maps, expected[MAPS[task]] if MAPS[task] in expected else expected["logits"])


@pytest.mark.parametrize("kind", tipsv2.CLASSES)
@pytest.mark.parametrize(
    ("backbone", "fields"),
    [
        ({}, {}),
        (
            {"use_swiglu_ffn": True, "num_register_tokens": 3, "layer_norm_eps": 1e-3},
            {"readout_activation": "gelu", "min_depth": 0.5, "max_depth": 20.0},
        ),
        ({"image_size": 42, "mlp_ratio": 2.5, "hidden_act": "relu", "apply_layernorm": False}, {"num_labels": 3, "num_depth_bins": 8}),
    ],
    ids=["as published", "gated", "others"],
)
def test_equal_to_transformers(tmp_path, kind, backbone, fields):
    """Blind spot: a decoder that reads another's weights; registers read as patches; a ReLU before normals or logits; a field that is not
    obeyed."""
    model = theirs(kind, backbone, **fields)
    model.save_pretrained(tmp_path)
    ours = dpt.load(tmp_path)
    assert tuple(head.task for head in ours.config.heads) == tipsv2.CLASSES[kind]
    for size in SIZES:
        compare(ours, model, torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(size[0])))


def processed(picture: np.ndarray, side: int) -> torch.Tensor:
    """What transformers' processor, which needs torchvision, makes of a picture: resized as 8 bits to a square, scaled to 0..1."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None]
    return F.interpolate(x, size=(side, side), mode="bilinear", antialias=True) / 255


@pytest.mark.parametrize("size", [(56, 56), (50, 90), (200, 131)])
def test_from_a_picture_to_its_maps(tmp_path, size):
    """Blind spot: maps resized twice, by corners, or in another mode; normals that are no unit vectors, or in another order of axes; three
    passes through the encoder."""
    model = theirs("Tipsv2DptForDensePrediction")
    model.save_pretrained(tmp_path)
    processor = {
        "size": {"height": 56, "width": 56},
        "do_normalize": False,
        "resample": 2,
        "image_processor_type": "Tipsv2DptImageProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = dpt.load(tmp_path)
    x, _ = preprocess(picture, ours.config.input)
    off = (x - processed(picture, 56)).abs() * 255
    assert off.max() < 1.01 and (off > 0.5).float().mean() < 0.02  # 8 bits, in whose resize PyTorch's weights have 16
    with torch.inference_mode():
        expected = model(x)

    def at_size(maps: torch.Tensor) -> torch.Tensor:
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)[0]

    passes = []
    ours.encoder.register_forward_hook(lambda *args: passes.append(None))
    found = ours.predict(picture)
    assert len(passes) == 1
    close(torch.from_numpy(found.depth), at_size(expected.predicted_depth[:, None])[0])
    normals = F.normalize(at_size(F.normalize(expected.normals, dim=1)), dim=0)  # transformers leaves out the second
    close(torch.from_numpy(found.normals), normals.permute(1, 2, 0))
    assert (found.labels == at_size(expected.segmentation_logits).argmax(0).numpy()).mean() > 0.999
    assert found.size == size and found.normals.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found.normals, axis=2), 1, atol=1e-5)


@pytest.fixture
def folder(tmp_path):
    theirs("Tipsv2DptForDensePrediction").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_depth": 0.001}, r"max_depth=0\.001: it must be above min_depth=0\.001"),
        ({"depth_decoder_activation": "gelu"}, "depth_decoder_activation='gelu': it must be 'relu'"),
        ({"backbone_config": BACKBONE | {"reshape_hidden_states": True}}, "reshape_hidden_states=True"),
        ({"backbone_config": BACKBONE | {"num_register_tokens": 0}}, "num_register_tokens=0"),
        ({"backbone_config": BACKBONE | {"qkv_bias": False}}, "qkv_bias=False"),
        ({"backbone_config": BACKBONE | {"model_type": "dinov2"}}, "model_type='dinov2'"),
        ({"backbone_config": BACKBONE | {"num_attention_heads": 3}}, "a multiple of num_heads=3"),
    ],
)
def test_what_cannot_be_followed_is_refused(folder, fields, message):
    """Blind spot: a wrong map, of a field that is passed over."""
    values = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        dpt.load(folder)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("tipsv2")])
def test_what_is_written_is_read_again(name):
    """Blind spot: a field that is read and not written, or the other way round; a file that transformers reads otherwise."""
    made = CONFIGS[name]
    layout = tipsv2.LAYOUTS[0]
    model, processor = layout.stated.write(made)
    read = layout.stated.read(stated.Document("config.json", model), stated.Document("preprocessor_config.json", processor), name)
    for section in ("encoder", "decoder", "further", "input"):
        assert getattr(read, section) == getattr(made, section), section
    assert read.head == made.head
    their = transformers.Tipsv2DptConfig.from_dict(model)
    assert their.num_labels == 150 and their.backbone_config.out_indices == [hook + 1 for hook in made.encoder.hooks]


def test_a_model_of_three_tasks_is_saved_and_loaded(tmp_path):
    """Blind spot: further tasks that a file of ours does not state, or whose tensors are not in it."""
    model = small("tipsv2-base")
    dpt.save(model, tmp_path / "mine.safetensors")
    loaded = dpt.load(tmp_path / "mine.safetensors")
    assert loaded.config == model.config
    x = torch.rand(1, 3, 42, 56)
    with torch.inference_mode():
        ours, expected = loaded(x), model(x)
    assert list(ours) == ["depth", "segmentation", "normals"] and all(torch.equal(ours[task], expected[task]) for task in ours)


@pytest.mark.parametrize("kind", tipsv2.CLASSES)
def test_converted_there_and_back(tmp_path, kind):
    """Blind spot: a tensor that is lost or comes back in another's place; a folder that transformers reads otherwise than we meant."""
    model = theirs(kind)
    model.save_pretrained(tmp_path / "a")
    exchange.convert(tmp_path / "a", tmp_path / "b.safetensors", "dpt")
    exchange.convert(tmp_path / "b.safetensors", tmp_path / "c", "hf")
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("a", "c"))
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
    again, info = getattr(transformers, kind).from_pretrained(tmp_path / "c", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    compare(dpt.load(tmp_path / "b.safetensors"), again.eval(), torch.rand(1, 3, 42, 70, generator=torch.Generator().manual_seed(0)))
