"""CHMv2's files: transformers' folders obeyed or refused, and equal to transformers' own model; the layouts of DINOv3's own code.

transformers' image processor of CHMv2 needs torchvision; what it does is computed by hand here.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recording import difference, network_input, picture
from small import config, randomise, small

import dpt
from dpt import exchange
from dpt.checkpoints import CheckpointError
from dpt.config import DPTConfig
from dpt.model import DPT
from dpt.zoo import CONFIGS, dinov3

transformers = pytest.importorskip("transformers")
BACKBONE = {
    "model_type": "dinov3_vit",
    "hidden_size": 64,
    "intermediate_size": 200,
    "num_attention_heads": 2,
    "num_hidden_layers": 5,
    "num_register_tokens": 4,
    "key_bias": True,
    "out_indices": [1, 2, 4, 5],
    "layer_norm_eps": 1e-6,
    "return_class_token": True,
}
FIELDS = {"post_process_channels": [8, 12, 16, 20], "fusion_hidden_size": 18, "head_hidden_size": 24, "number_output_channels": 32}
MEAN, STD = np.array([0.420, 0.411, 0.296]), np.array([0.213, 0.156, 0.143])


def theirs(backbone=None, **fields):
    made = transformers.CHMv2Config(backbone_config={**BACKBONE, **(backbone or {})}, **{**FIELDS, **fields})
    model = randomise(transformers.CHMv2ForDepthEstimation(made), seed=3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                value.mul_(3)  # attention that is far from uniform, so that a wrong rotation shows
    return model


def close(ours: torch.Tensor, expected: torch.Tensor, relative: float = 2e-5) -> None:
    assert ours.shape == expected.shape and expected.std() > 0.01 * expected.abs().max()
    assert (ours - expected).abs().max() <= relative * expected.abs().max()


@torch.inference_mode()
def depth(model, x: torch.Tensor) -> torch.Tensor:
    found = model(x)
    return found if isinstance(found, torch.Tensor) else found.predicted_depth


SIZES = [(64, 64), (64, 96), (48, 80), (16, 112)]  # even and odd numbers of patches


@pytest.mark.parametrize(
    ("backbone", "fields"),
    [
        ({}, {}),
        ({"num_register_tokens": 1, "layer_norm_eps": 1e-2}, {"readout_type": "ignore", "min_depth": 0.1, "max_depth": 40.0}),
        ({"hidden_act": "silu", "rope_theta": 10.0}, {"readout_type": "add", "number_output_channels": 7}),
        ({"key_bias": False, "patch_size": 8, "num_attention_heads": 4}, {"patch_size": 8}),
        ({"apply_layernorm": False, "out_indices": [2, 3, 4, 5]}, {}),
    ],
    ids=str,
)
def test_equal_to_transformers(tmp_path, backbone, fields):
    """Blind spot: a field of config.json that is not obeyed: hooks, epsilon, registers, theta, biases, readout, bins, the norms."""
    model = theirs(backbone, **fields)
    model.save_pretrained(tmp_path)
    ours = dpt.load(tmp_path)
    for size in SIZES:
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(size[0]))
        close(depth(ours, x), depth(model, x))


@pytest.mark.parametrize("size", [(64, 96), (50, 70), (33, 80)])
def test_from_a_picture_to_metres(tmp_path, size):
    """Blind spot: a picture that is resized, other statistics, padding in a corner, a map that is cut or resized by other corners."""
    model = theirs()
    model.save_pretrained(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    x = torch.from_numpy((picture / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()
    down, right = (-side % 16 for side in size)
    x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    expected = F.interpolate(depth(model, x)[:, None], size=size, mode="bilinear", align_corners=True)[0, 0]
    found = dpt.load(tmp_path).predict(picture)
    close(torch.from_numpy(found.depth), expected, 1e-4)


def original(model: DPT, prefixes: tuple[str, str], seed: int = 0) -> dict[str, torch.Tensor]:
    """A model's tensors in the layout of DINOv3's own code, by its names, with what that holds besides."""
    backbone, head = prefixes
    generator = torch.Generator().manual_seed(seed)
    state, found = model.state_dict(), {}
    width = state["encoder.cls_token"].shape[2]

    def put(name: str, key: str) -> None:
        for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if f"{key}.{part}" in state:
                found[f"{name}.{part}"] = state[f"{key}.{part}"]

    for name, key in (("cls_token", "cls_token"), ("storage_tokens", "registers")):
        found[f"{backbone}{name}"] = state[f"encoder.{key}"]
    put(f"{backbone}patch_embed.proj", "encoder.patch_embed")
    put(f"{backbone}norm", "encoder.norm")
    for index in range(len(model.encoder.blocks)):
        block, ours = f"{backbone}blocks.{index}.", f"encoder.blocks.{index}."
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2", "mlp.w3"):
            put(block + part, ours + part)
        for scale in ("ls1.gamma", "ls2.gamma"):
            found[block + scale] = state[ours + scale]
        if f"{ours}mlp.w12.weight" in state:
            for part in ("weight", "bias"):
                found[f"{block}mlp.w1.{part}"], found[f"{block}mlp.w2.{part}"] = state[f"{ours}mlp.w12.{part}"].chunk(2)
        if f"{ours}attn.qkv.bias" in state:
            bias = state[f"{ours}attn.qkv.bias"].clone()
            mask = torch.ones_like(bias)
            mask[width : 2 * width] = 0
            found[f"{block}attn.qkv.bias"] = bias + (1 - mask) * torch.randn(bias.shape, generator=generator)  # which its code passes over
            found[f"{block}attn.qkv.bias_mask"] = mask
    for level in range(4):
        put(f"{head}reassemble_blocks.projects.{level}.conv", f"reassemble.{level}.project")
        put(f"{head}reassemble_blocks.resize_layers.{level}", f"reassemble.{level}.resize")
        put(f"{head}reassemble_blocks.readout_projects.{level}.0", f"reassemble.{level}.readout.linear")
        put(f"{head}reassemble_blocks.batchnorm_layers.{level}", f"reassemble.{level}.norm")
        put(f"{head}convs.{level}.conv", f"fusion.convs.{level}")
        put(f"{head}fusion_blocks.{level}.project.conv", f"fusion.blocks.{3 - level}.project")
        for unit in (1, 2):
            for conv in (1, 2):
                name = f"{head}fusion_blocks.{level}.res_conv_unit{unit}.conv{conv}.conv"
                put(name, f"fusion.blocks.{3 - level}.unit{unit}.conv{conv}")
    put(f"{head}project.conv", "head.project")
    for place, index in ((0, 1), (2, 2), (4, 3)):
        put(f"{head}conv_depth.head.{place}", f"head.conv{index}")
    found[f"{backbone}mask_token"] = torch.randn(1, width, generator=generator)
    found[f"{backbone}rope_embed.periods"] = torch.ones(8)
    found[f"{backbone}local_cls_norm.weight"] = torch.ones(width)
    return found


def without_key_bias(model: DPT) -> DPT:
    """Its keys' biases zero, as the masks of its own code have them."""
    with torch.no_grad():
        for block in model.encoder.blocks:
            if block.attn.qkv.bias is not None:
                block.attn.qkv.bias.chunk(3)[1].zero_()
    return model


@pytest.mark.parametrize("prefixes", [("", ""), ("encoder.backbone.", "decoder.")])
@pytest.mark.parametrize("name", ["chmv2", "dinov3-7b-depth"])
def test_its_own_layouts(tmp_path, name, prefixes):
    """Blind spot: a bias of keys that its code masks; halves of the gated MLP, or levels of the fusion, the other way round."""
    model = without_key_bias(randomise(DPT(config(name, norm_eps=1e-5))))
    state = original(model, prefixes)
    torch.save(state, tmp_path / "model.pth")
    loaded = dpt.load(tmp_path / "model.pth", model.config)
    assert loaded.config.encoder.norm_eps == 1e-5 and not loaded.config.input.output_align_corners
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    del state[f"{prefixes[1]}convs.2.conv.weight"]
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"convs\.2\.conv\.weight is missing"):
        dpt.load(tmp_path / "model.pth", model.config)


@pytest.mark.parametrize(
    ("mask", "message"), [(torch.full((192,), torch.nan), "bias_mask holds nan"), (torch.ones(64), r"bias_mask has shape \(64,\)")]
)
def test_masks_are_checked(tmp_path, mask, message):
    """Blind spot: a mask that was never filled, which its own code has as NaN before it is; one of another shape that broadcasts."""
    model = DPT(config("chmv2", embed_dim=64))
    state = original(model, ("", ""))
    state["blocks.1.attn.qkv.bias_mask"] = mask
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=message):
        dpt.load(tmp_path / "model.pth", model.config)


@pytest.fixture
def folder(tmp_path):
    theirs().save_pretrained(tmp_path)
    return tmp_path


def edit(path, **fields) -> None:
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bins_strategy": "linear"}, "bins_strategy='linear': it must be 'chmv2_mixlog'"),
        ({"norm_strategy": "softmax"}, "norm_strategy='softmax': it must be 'chmv2_mixlog'"),
        ({"patch_size": 14}, "patch_size=14: it must be the backbone's 16"),
        ({"min_depth": 20.0}, r"max_depth=96\.0: it must be above 8 times min_depth=20"),
        ({"backbone_config": BACKBONE | {"use_gated_mlp": True}}, "use_gated_mlp=True"),
        ({"backbone_config": BACKBONE | {"num_register_tokens": 0}}, "num_register_tokens=0: it must be a whole number above 0"),
        ({"backbone_config": BACKBONE | {"return_class_token": False}}, "return_class_token=False"),
        ({"backbone_config": BACKBONE | {"out_indices": [1, 2, 3]}}, r"out_indices=\[1, 2, 3\]"),
        ({"backbone_config": BACKBONE | {"rope_theta": 0.5}}, r"rope_theta=0\.5: it must be a number above 1"),
        ({"backbone_config": BACKBONE | {"num_attention_heads": 32}}, "heads of 2 channels cannot be rotated"),
    ],
)
def test_what_cannot_be_followed_is_refused(folder, fields, message):
    """Blind spot: a wrong map, of a field that is passed over."""
    edit(folder / "config.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        dpt.load(folder)


def test_the_processor_is_obeyed(folder):
    """Blind spot: the defaults of DPT's processor, which resizes; statistics of a file that are not taken."""
    assert dpt.load(folder).config.input == dinov3.MODELS[0].input
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "size_divisor": 32}))
    found = dpt.load(folder).config.input
    assert found.mean == pytest.approx((0.1, 0.2, 0.3)) and found.std == pytest.approx(tuple(STD)) and found.multiple == 32
    assert (found.rule, found.pad) == ("none", "centre")


def test_what_is_written_is_read_again():
    """Blind spot: a field that is read and not written, or the other way round; a model that transformers cannot follow."""
    chmv2, large = dinov3.MODELS
    model, processor = dinov3.write(chmv2)
    theirs = transformers.CHMv2Config.from_dict(model)
    assert theirs.max_depth == 96.0 and theirs.backbone_config.out_indices == [6, 12, 18, 24]
    made = dinov3.read(dinov3.Document("config.json", model), dinov3.Document("preprocessor_config.json", processor), "chmv2")
    for section in ("encoder", "decoder", "head"):
        assert getattr(made, section) == getattr(chmv2, section)
    assert made.input.mean == pytest.approx(chmv2.input.mean) and (made.input.rule, made.input.pad) == ("none", "centre")
    with pytest.raises(CheckpointError, match="transformers computes"):
        dinov3.write(large)


DATA = Path(__file__).parents[1] / "nets" / "data"
RECORDED = {"chmv2": "chmv2", "dinov3_7b": "dinov3-7b-depth"}


def recorded_model(recording_of: str) -> DPTConfig:
    """The configuration of the narrow model that `nets/oracles/dinov3.py` made."""
    full = CONFIGS[RECORDED[recording_of]]
    full = full.with_("encoder", embed_dim=32, depth=6, num_heads=2, hooks=(1, 2, 4, 5), norm_eps=1e-5)
    full = full.with_("decoder", neck_channels=(8, 12, 16, 20), features=10)
    return full.with_("head", bins=32, hidden=20 if recording_of == "chmv2" else 32)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", RECORDED)
def test_what_its_own_code_computes(tmp_path, name, whole):
    """Blind spot: all that transformers has otherwise, or not at all: the epsilon, the batch norm of tokens, the masks, two files."""
    arrays = np.load(DATA / f"{name}.npz")
    path = DATA / f"{name}.pth"
    if not whole:
        state = torch.load(path)
        path = [tmp_path / "backbone.pth", tmp_path / "head.pth"]
        for file, prefix in zip(path, ("encoder.backbone.", "decoder."), strict=True):
            torch.save({key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, file)
    model = dpt.load(path, recorded_model(name), dtype=torch.float32)
    for size in ("square", "wide", "tall"):
        with torch.inference_mode():
            found = model(network_input(tuple(arrays[f"{size}.input"])))
        assert difference(arrays, f"{size}.output", found).max() < 1e-5
    if name == "chmv2":
        shown = model.predict(picture(*arrays["padded.picture"]))
        assert difference(arrays, "padded.map", shown.depth).max() < 1e-5


@pytest.mark.parametrize(("form", "prefixes"), [("dinov3", ("encoder.backbone.", "decoder.")), ("dinov3-parts", ("", ""))])
def test_converted_there_and_back(tmp_path, form, prefixes):
    """Blind spot: a tensor that is lost or comes back in another's place; a folder that transformers reads otherwise than we meant."""
    model = without_key_bias(small("chmv2"))
    state = {key: value.clone() for key, value in original(model, prefixes).items()}
    for key in [key for key in state if key.endswith("qkv.bias")]:
        state[key] *= state[f"{key}_mask"]  # as published: what is masked was never learnt
    torch.save(state, tmp_path / "a.pth")
    exchange.convert(tmp_path / "a.pth", tmp_path / "b.safetensors", "dpt", model.config)
    exchange.convert(tmp_path / "b.safetensors", tmp_path / "c.pth", form)
    back = torch.load(tmp_path / "c.pth")
    assert back.keys() == state.keys() and all(torch.equal(value, back[key]) for key, value in state.items())
    exchange.convert(tmp_path / "b.safetensors", tmp_path / "hf", "hf")
    theirs, info = transformers.CHMv2ForDepthEstimation.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours, x = dpt.load(tmp_path / "hf"), torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    close(depth(ours, x), depth(theirs.eval(), x), 1e-4)
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in model.state_dict().items())
