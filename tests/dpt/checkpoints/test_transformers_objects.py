"""Models of transformers as objects: read onto their own memory, and made of ours on its memory, bit for bit both ways."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import TRANSFORMERS_FIELDS, config, randomise, small

import dpt
from bench.published import ROUTER
from dpt import checkpoints, exchange
from dpt.checkpoints import CheckpointError
from dpt.config import IMAGENET_MEAN, DPTConfig
from dpt.factory import config_in

transformers = pytest.importorskip("transformers")
from theirs import CASES, NECK, OUT, VIT, dinov2_config, those  # noqa: E402


def on_beit(kind: str, **fields) -> torch.nn.Module:
    size = {"image_size": 64, "out_indices": OUT, "reshape_hidden_states": False, "use_relative_position_bias": True}
    made = getattr(transformers, kind)
    return made(made.config_class(backbone_config=transformers.BeitConfig(**VIT, **size), **NECK, **fields))


def on_dinov2() -> torch.nn.Module:
    backbone = dinov2_config(apply_layernorm=False, use_swiglu_ffn=True)
    fields = {"neck_hidden_sizes": [4, 8, 16, 32], "use_bias_in_fusion_residual": False, "add_projection": True}
    return transformers.DPTForDepthEstimation(transformers.DPTConfig(backbone_config=backbone, **fields))


BINS = [{"name": name, "n_bins": 16, "min_depth": 1e-3, "max_depth": metres} for name, metres in (("nyu", 10.0), ("kitti", 80.0))]
MAKE = {name: case.make for name, case in CASES.items() if name.startswith(("dpt", "depth", "prompt", "zoe", "chm", "tips"))} | {
    "dpt-dinov2": on_dinov2,
    "dpt-beit": lambda: on_beit("DPTForDepthEstimation"),
    "zoedepth-routed": lambda: on_beit("ZoeDepthForDepthEstimation", bottleneck_features=32, bin_configurations=BINS, **ROUTER),
}
WITHOUT_KEY_BIAS = ("dpt-beit", "dpt-swin2", "zoedepth", "zoedepth-routed")  # zeros stand among the biases of ours
MAPS = (("depth", "predicted_depth"), ("segmentation", "logits"), ("segmentation", "segmentation_logits"), ("normals", "normals"))
each = pytest.mark.parametrize("name", MAKE)


def theirs(name: str):
    return randomise(MAKE[name](), seed=3)


@torch.inference_mode()
def maps(model, of: DPTConfig) -> dict[str, torch.Tensor]:
    """What either model, of this configuration, makes of two pictures."""
    generator = torch.Generator().manual_seed(0)
    size = of.encoder.fixed_size or (4 * of.encoder.patch_size, 4 * of.encoder.patch_size)
    x, metres = torch.randn(2, 3, *size, generator=generator), 1 + torch.rand(2, 9, 12, generator=generator)
    ours = isinstance(model, dpt.DPT)
    prompt = {"prompt" if ours else "prompt_depth": metres if ours else metres[:, None]} if of.decoder.prompt else {}
    found = model(x, **prompt)
    if isinstance(found, torch.Tensor):
        return {of.head.task: found}
    if ours:
        return found
    return {task: found[name] for task, name in MAPS if name in found}


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for task, values in expected.items():
        assert found[task].shape == values.shape and values.std() > 1e-3 * values.abs().max()
        assert (found[task] - values).abs().max() <= 1e-4 * values.abs().max()


def memory(model) -> set[int]:
    return {value.untyped_storage()._cdata for value in model.state_dict().values()}


def elsewhere(model, other) -> list[str]:
    """The tensors of a model that lie on no memory of another's."""
    there = memory(other)
    return [key for key, value in model.state_dict().items() if value.untyped_storage()._cdata not in there]


def unread(model, files: bool = False) -> list[str]:
    """The model's own names, or those in its files, of what our network never reads."""
    names = checkpoints.own_names(model)
    keys = [key for key in names if re.fullmatch("|".join(checkpoints.layout_of(names).unused), key)]
    return keys if files else [own for key in keys for own in names[key]]


@each
def test_an_object_is_read_onto_its_own_memory(name):
    """Blind spot: a tensor that is copied, or another's; a field of a live configuration that its file does not have."""
    model = theirs(name)
    ours = dpt.load(model)
    close(maps(ours, ours.config), maps(model, ours.config))
    joined = [key for key in ours.state_dict() if "qkv." in key or ".mlp.w12." in key]
    assert set(elsewhere(ours, model)) <= set(joined) and not ours.training and ours.config.name == type(model).__name__
    state = checkpoints.find(model).state
    left = unread(model, files=True)
    found = checkpoints.reverted(ours.state_dict(), checkpoints.layout_of(state), ours.config.encoder.embed_dim)
    assert all(torch.equal(value, state[key]) for key, value in found.items() if key not in left)


@each
def test_there_and_back(name):
    """Blind spot: a tensor in another's place, or cast; a buffer that no state dict has, of no values; query and key exchanged."""
    model = theirs(name)
    ours = dpt.load(model)
    back = dpt.to_transformers(ours, model.config.model_type)
    assert type(back) is type(model) and not back.training
    expected, found, left = model.state_dict(), back.state_dict(), unread(model)
    new = found.keys() - expected.keys()  # CHMv2's class is made with biases of its keys, which are zeros where it had none
    assert all(key.endswith("k_proj.bias") and not found[key].any() for key in new) and expected.keys() <= found.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected if key not in left)
    assert set(elsewhere(back, ours)) <= set(left) and not set(elsewhere(back, ours)) & set(dict(back.named_buffers()))
    buffers = dict(model.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in back.named_buffers())
    close(maps(back, ours.config), maps(model, ours.config))
    again = dpt.load(back)
    copied = (
        {key for key in again.state_dict() if key.endswith(".attn.qkv.bias") and key.startswith("encoder.")}
        if name in WITHOUT_KEY_BIAS
        else set()
    )
    assert again.config == ours.config and set(elsewhere(again, ours)) == copied
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("name", ["dpt-segmentation", "depth-anything"])
def test_what_one_changes_the_other_has(name):
    """Blind spot: the same numbers on other memory; gradients that are the other's too."""
    model = theirs(name)
    ours = dpt.load(model)
    back = dpt.to_transformers(ours, model.config.model_type)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter.mul_(1.25)
        for block in ours.encoder.blocks:
            block.attn.qkv.weight.mul_(0.5)
            block.attn.qkv.bias[:3].add_(1.0)
    close(maps(back, ours.config), maps(ours, ours.config))
    for key, value in dpt.load(back).state_dict().items():
        assert torch.equal(value, ours.state_dict()[key])
    convolution = next(key for key, value in model.state_dict().items() if value.dim() == 4)
    assert torch.equal(model.state_dict()[convolution], back.state_dict()[convolution])
    back(torch.randn(1, 3, 70, 70) if name == "depth-anything" else torch.randn(1, 3, 64, 64))[0].sum().backward()
    assert all(parameter.grad is None for other in (ours, model) for parameter in other.parameters())


@pytest.mark.parametrize("name", those("dpt", "dpt-swin2", "chmv2"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_mode_are_the_objects(name, dtype):
    """Blind spot: a model that is cast to the default dtype, or set to evaluation; buffers of another dtype."""
    model = theirs(name).to(dtype).train()
    ours = dpt.load(model)
    back = dpt.to_transformers(ours, model.config.model_type)
    assert ours.training and back.training and back.dtype is dtype
    assert {value.dtype for value in ours.state_dict().values() if value.is_floating_point()} == {dtype}
    buffers = dict(model.named_buffers())
    assert all(value.dtype is buffers[key].dtype or value.dtype is dtype for key, value in back.named_buffers())
    cast = dpt.load(model, dtype=torch.float32)
    assert cast.training and {value.dtype for value in cast.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert not memory(cast) & memory(model)


def test_fast_models_are_the_same():
    """Blind spot: weights that `accelerate` lays out anew, of a model that another shares; query, key and value that lie together."""
    model = theirs("depth-anything")
    plain = dpt.load(model).config
    expected, state = maps(model, plain), {key: value.clone() for key, value in model.state_dict().items()}
    fast = dpt.load(model, fast=True)
    close(maps(fast, plain), expected)
    close(maps(dpt.to_transformers(fast, "depth_anything"), plain), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    dpt.accelerate(model)
    ours = dpt.load(model)
    assert elsewhere(ours, model) == []
    close(maps(ours, plain), expected)


def test_the_names_of_a_file_do_not_matter(tmp_path):
    """Blind spot: an object that came from a file with the object's own names, of which transformers remembers that none was changed."""
    model = theirs("depth-anything")
    model.config.save_pretrained(tmp_path)
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = type(model).from_pretrained(tmp_path)
    ours = dpt.load(loaded)
    assert ours.config.name == tmp_path.name
    close(maps(ours, ours.config), maps(model, ours.config))
    assert not any("q_proj" in str(change) for change in loaded._weight_conversions)
    model.save_pretrained(tmp_path / "theirs")
    again = dpt.load(type(model).from_pretrained(tmp_path / "theirs"))
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in again.state_dict().items())


def of_named_size(**fields):
    """transformers' Depth Anything V2 small, whose tensors have no values."""
    backbone = {"model_type": "dinov2", "image_size": 518, "hidden_size": 384, "num_attention_heads": 6, "reshape_hidden_states": False}
    with torch.device("meta"):
        return transformers.DepthAnythingForDepthEstimation(
            transformers.DepthAnythingConfig(backbone_config={**backbone, "out_indices": [3, 6, 9, 12]}, **fields)
        )


def test_pictures_are_prepared_as_named_models_agree():
    """Blind spot: the class' default mean for weights that want ImageNet's; a size that one of several models has."""
    named = config_in(found := checkpoints.find(of_named_size()), checkpoints.layout_of(found.state)).input
    assert (named.mean, named.size, named.rule, named.multiple, named.mode) == (IMAGENET_MEAN, (518, 518), "minimal", 14, "bicubic")
    unknown = config_in(found := checkpoints.find(of_named_size(head_hidden_size=24)), checkpoints.layout_of(found.state)).input
    assert (unknown.mean, unknown.size, unknown.rule, unknown.multiple) == ((0.5,) * 3, (518, 518), "square", 14)


def test_objects_convert_as_their_folders_do(tmp_path):
    """Blind spot: what the network never reads, lost on the way."""
    model = theirs("dpt")
    exchange.convert(model, tmp_path / "a.safetensors", "dpt")
    model.save_pretrained(tmp_path / "b")
    exchange.convert(tmp_path / "b", tmp_path / "b.safetensors", "dpt")
    one, other = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    assert any(key.startswith("unused.hf.") for key in one)


def spoilt(name: str, change):
    model = theirs(name)
    change(model)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), r"a torch\.nn\.modules\.linear\.Linear: what is loaded must be a path, .*a model of transformers"),
        (lambda: 3, r"a builtins\.int: what is loaded must be a path"),
        (of_named_size, "is a tensor without values, of the meta device, where a dense tensor is needed"),
        (lambda: theirs("dpt").dpt, "DPTModel: no known layout"),
        (
            lambda: spoilt("dpt", lambda model: setattr(model.config, "head_in_index", 0)),
            r"DPTForDepthEstimation\.config: head_in_index=0: it must be -1 or 3",
        ),
        (
            lambda: spoilt("dpt", lambda model: setattr(model.config, "num_hidden_layers", 6)),
            "the model has 6 blocks, but dpt.encoder.layer.5.layernorm_before.weight is not in the file",
        ),
        (
            lambda: spoilt("dpt", lambda model: model.head.head[0].bias.data.fill_(float("nan"))),
            r"DPTForDepthEstimation: head\.head\.0\.bias holds nan, where every value must be finite",
        ),
        (
            lambda: spoilt("depth-anything", lambda model: setattr(model.backbone.config, "qkv_bias", False)),
            r"DepthAnythingForDepthEstimation\.config: backbone_config: qkv_bias=False: it must be true",
        ),
        (
            lambda: type("Mine", (transformers.DPTForDepthEstimation,), {})(transformers.DPTConfig(**TRANSFORMERS_FIELDS)),
            r"architectures=\['Mine'\]: it must be one of DPTForDepthEstimation",
        ),
    ],
)
def test_what_is_no_model_is_refused(make, message):
    """Blind spot: a model that is silently another; an error of PyTorch's."""
    with pytest.raises(CheckpointError, match=message):
        dpt.load(make())


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("depth-anything-v2-small", "depth_anything", r"not what DepthAnything\w+ computes, which is encoder\.pos_offset=0\.0, not 0\.1"),
        ("depth-anything-v2-small", "dpt", r"has no place in the layout hf of dpt .*encoder\.blocks\.0\.ls1\.gamma"),
        ("dpt-hybrid-midas", "dpt", r"not what DPTForDepthEstimation computes, which is encoder\.stem_eps_on='variance', not 'deviation'"),
        (
            "dpt-large-midas",
            "depth_anything",
            r"has no place in the layout hf of depth_anything .*encoder\.final_norm='none': transformers computes 'every' alone",
        ),
        ("dpt-base-ade20k", "dpt", "has no place in the layout hf of dpt .*(pos_mode|pos_by_count)"),
        (
            "dpt-tiny-depth",
            "dpt",
            r"has no place in the layout hf of dpt .*its files hold dpt\.embeddings\.patch_embeddings\.projection\.weight",
        ),
    ],
)
def test_what_a_class_does_not_compute_is_refused(name, kind, message):
    """Blind spot: a model of transformers that computes something else."""
    with pytest.raises(CheckpointError, match=message):
        dpt.to_transformers(small(name), kind)


@pytest.mark.parametrize(
    ("name", "kind", "changes"),
    [("dpt-large-midas", "dpt", {}), ("dpt-large-ade20k", "dpt", {}), ("depth-anything-v2-small", "depth_anything", {"pos_offset": 0.0})],
)
def test_named_models_become_objects(name, kind, changes):
    """Blind spot: the configuration of a class that is made of ours and not of transformers'."""
    ours = randomise(dpt.DPT(config(name).with_("encoder", **changes)))
    made = dpt.to_transformers(ours, kind)
    close(maps(made, ours.config), maps(ours, ours.config))
    classes = ours.config.head.classes
    assert not classes or tuple(made.config.id2label.values()) == classes


def test_wrong_arguments(monkeypatch):
    """Blind spot: an error that does not say what is wrong or what to do."""
    model = small("dpt-large-midas")
    with pytest.raises(ValueError, match="kind='bert': it must be one of .*dpt.*depth_anything"):
        dpt.to_transformers(model, "bert")
    with pytest.raises(ValueError, match=r"model of type Linear: it must be a dpt\.DPT"):
        dpt.to_transformers(torch.nn.Linear(2, 2), "dpt")
    monkeypatch.setitem(sys.modules, "transformers.initialization", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[hf\]'"):
        dpt.to_transformers(model, "dpt")


def test_transformers_is_not_imported_by_others(tmp_path):
    """Blind spot: seconds of imports on the way to a file."""
    dpt.save(small("dpt-large-midas"), tmp_path / "a.safetensors")
    code = "import sys, dpt; dpt.load(sys.argv[1]); dpt.to_transformers; print('transformers' in sys.modules)"
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.safetensors")], capture_output=True, text=True, cwd=Path(dpt.__file__).parents[1]
    )
    assert process.stdout.strip() == "False", process.stderr
