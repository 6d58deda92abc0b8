"""Configurations: every field is held to a rule, alone and together, in the code and in files."""

import dataclasses
import json
import re

import pytest
import torch
from small import config, depth_anything, small

import dpt
from dpt import checkpoints
from dpt.checkpoints import CheckpointError
from dpt.config import (
    ACTIVATIONS,
    MAX_DEPTH,
    MAX_SIDE,
    MAX_WIDTH,
    SECTIONS,
    DecoderConfig,
    DPTConfig,
    EncoderConfig,
    HeadConfig,
    InputConfig,
    config_from,
)
from dpt.data.augmentation import Augmentation
from dpt.nets.bins import SPACING
from dpt.nets.decoder import READOUT
from dpt.nets.encoders import ENCODERS
from dpt.nets.encoders.resnetv2 import STANDARDISE
from dpt.nets.encoders.vit import ATTENTION, STEMS
from dpt.nets.functional import ACTIVATION
from dpt.nets.heads import HEADS
from dpt.training.recipes import Recipe
from dpt.zoo import CONFIGS

WRONG = [  # section, field, value, part of the rule
    ("encoder", "embed_dim", 0, "a whole number from 1 to 65536"),
    ("encoder", "embed_dim", 192.0, "a whole number from 1"),
    ("encoder", "embed_dim", True, "a whole number from 1"),
    ("encoder", "embed_dim", 33, "a multiple of num_heads=2"),
    ("encoder", "embed_dim", 10**9, "a whole number from 1 to 65536"),
    ("encoder", "depth", 10**9, "a whole number from 1 to 1024"),
    ("encoder", "depth", "4", "a whole number from 1 to 1024"),
    ("encoder", "num_heads", 0, "a whole number from 1"),
    ("encoder", "hooks", [3, 2, 1, 0], "they must increase"),
    ("encoder", "hooks", [0, 1, 1, 2], "they must increase"),
    ("encoder", "hooks", [0, 1, 2], "they must be four"),
    ("encoder", "hooks", [0, 1, 2, 4], "below depth=4"),
    ("encoder", "hooks", [-1, 1, 2, 3], "each a whole number from 0"),
    ("encoder", "hooks", 3, "a tuple of 0 to 4"),
    ("encoder", "patch_size", 0, "a whole number from 1"),
    ("encoder", "stem", "pyramid", "one of patch, convolutions, resnetv2"),
    ("encoder", "stem_hooks", [4], "each a whole number from 0 to 3"),
    ("encoder", "pos_grid", [4], "a tuple of 2"),
    ("encoder", "pos_grid", [10**9, 10**9], "a tuple of 2"),
    ("encoder", "mlp_ratio", float("nan"), "a number above 0"),
    ("encoder", "mlp_ratio", 1e-9, "no channel"),
    ("encoder", "mlp_ratio", 1e9, "at most 64"),
    ("encoder", "norm_eps", 0, "a number above 0"),
    ("encoder", "norm_eps", float("inf"), "a number above 0"),
    ("encoder", "final_norm", "first", "one of none, every, last"),
    ("encoder", "layer_scale", 1, "True or False"),
    ("encoder", "pos_mode", "nearest", "one of bilinear, bicubic"),
    ("encoder", "pos_offset", -0.1, "a number from 0 to 1"),
    ("encoder", "pos_by_count", None, "True or False"),
    ("encoder", "attention", "flash", "one of sdpa, xformers"),
    ("encoder", "activation", "tanh", "one of gelu, gelu_tanh"),
    ("encoder", "kind", "resnet", "one of vit, dinov3"),
    ("encoder", "qkv_bias", 1, "True or False"),
    ("encoder", "rope_theta", 1.0, "a number above 1"),
    ("encoder", "final_norm_eps", 0.0, "a number above 0, or None"),
    ("encoder", "registers", -1, "a whole number from 0"),
    ("encoder", "pos_antialias", 1, "True or False"),
    ("encoder", "mlp", "glu", "one of mlp, swiglu"),
    ("encoder", "stem_width", 0, "a whole number from 1"),
    ("encoder", "stem_depths", [3, 4], "a tuple of 3, each a whole number from 1 to 64"),
    ("encoder", "stem_groups", 0, "a whole number from 1"),
    ("encoder", "stem_eps_on", "mean", "one of deviation, variance"),
    ("encoder", "stage_depths", [2, 0, 2, 2], "a tuple of 0 to 4, each a whole number from 1 to 64"),
    ("encoder", "stage_heads", [2, 2, 2, 0], "a tuple of 0 to 4"),
    ("encoder", "window", -1, "a whole number from 0"),
    ("encoder", "pretrained_windows", [-1, 0, 0, 0], "a tuple of 0 to 4"),
    ("encoder", "window_mask", 0, "a number below 0"),
    ("decoder", "neck_channels", [8, 12, 16], "a tuple of 4"),
    ("decoder", "neck_channels", [8, 12, 16, 0], "a tuple of 4"),
    ("decoder", "features", 1, "a whole number from 2"),
    ("decoder", "readout", "concat", "one of project, ignore, add"),
    ("decoder", "readout_activation", "tanh", "one of gelu"),
    ("decoder", "batch_norm", "yes", "True or False"),
    ("decoder", "match_size", 0, "True or False"),
    ("decoder", "dead_unit", [], "True or False"),
    ("decoder", "prompt", 1, "True or False"),
    ("decoder", "unit_bias", 0, "True or False, or None"),
    ("decoder", "float32", 1, "True or False"),
    ("decoder", "token_norm", 0, "True or False"),
    ("head", "task", "flow", "one of depth, segmentation, normals"),
    ("head", "task", "normals", 'only kind="linear" gives them'),
    ("head", "kind", "mlp", "one of convolutions, linear"),
    ("head", "between", "gelu", "one of relu, none"),
    ("head", "classes", [1], "each text"),
    ("head", "classes", "wall", "a tuple of 0"),
    ("head", "palette", [[0, 0, 256]], "whole number from 0 to 255"),
    ("head", "palette", [[0, 0, 0]], "one for each of the 0 classes"),
    ("head", "hidden", 0, "a whole number from 1"),
    ("head", "activation", "tanh", "one of relu, sigmoid"),
    ("head", "max_depth", -1.0, "a number above 0"),
    ("head", "inverse", "no", "True or False"),
    ("head", "dropout", 1.5, "a number from 0 to 1"),
    ("head", "auxiliary", True, "only segmentation"),
    ("head", "align_corners", None, "True or False"),
    ("head", "project", "yes", "True or False"),
    ("head", "offset", float("nan"), "a number"),
    ("head", "reciprocal", [1.0], "a tuple of 2"),
    ("head", "bounds", [1.0, 1.0], "the first must be below the second"),
    ("head", "depth_scale", 0, "a number above 0"),
    ("head", "relative", True, "only depth that is not inverse"),
    ("head", "sky", True, "only depth that is not inverse"),
    ("head", "focal", 300.0, "only depth that is not inverse"),
    ("head", "focal", -300.0, "a number above 0, or None"),
    ("head", "bins", 1, "a mean is of two at least"),
    ("head", "bins", -1, "a whole number from 0"),
    ("head", "bin_range", [0.0, 10.0], "a number above 0"),
    ("head", "bin_range", [10.0, 10.0], "the first must be below the second"),
    ("head", "bin_spacing", "log", "one of linear, mixed_log"),
    ("head", "bin_floor", 0.0, "a number above 0"),
    ("head", "upsample", 0, "a whole number from 1 to 16, or None"),
    ("head", "bins", 1.0, "a whole number from 0"),
    ("head", "bin_range", [1.0, 1.0], "the first must be below the second"),
    ("head", "bin_range", [0.0, 1.0], "each a number above 0"),
    ("head", "attractors", [16, 8, 4], "of four levels, or none"),
    ("head", "attractors", [16, 8, 4, 0], "each a whole number from 1"),
    ("head", "attractors", [16, 8, 4, 1], "they move at least two bins, not 0"),
    ("head", "bin_centres", "uniform", "one of softplus, normed"),
    ("head", "bin_width", 1, "a whole number from 2"),
    ("head", "temperature", [50.0, 0.02], "the first must be below the second"),
    ("head", "domains", ["indoors"], "two different ones at least"),
    ("head", "domains", ["in/doors", "outdoors"], "a name without slashes"),
    ("input", "mean", [0.5, 0.5], "a tuple of 3"),
    ("input", "std", [0.5, 0.5, 0.0], "a number above 0"),
    ("input", "size", [0, 384], "a whole number from 1"),
    ("input", "rule", "shortest", "one of minimal"),
    ("input", "multiple", 0, "a whole number from 1"),
    ("input", "pad", "middle", "one of none, corner, centre"),
    ("input", "mode", "lanczos", "one of bilinear, bicubic"),
    ("input", "antialias", 2, "True or False"),
    ("input", "output_mode", "area", "one of bilinear, bicubic"),
    ("input", "output_align_corners", 0, "True or False"),
    ("input", "grey_levels", 8, "True or False"),
    ("input", "align_corners", 1, "True or False"),
    ("input", "border", -1.0, "a number from 0 to 64"),
    ("input", "flip", "yes", "True or False"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file of ours, and a function that writes it again with another configuration."""
    from safetensors.torch import load_file, save_file

    path = tmp_path_factory.mktemp("saved") / "model.safetensors"
    model = small("dpt-large-midas")
    dpt.save(model, path)
    state = load_file(path)

    def rewrite(values) -> None:
        save_file(state, path, metadata={"dpt": values if isinstance(values, str) else json.dumps(values)})

    return path, rewrite


@pytest.mark.parametrize(("section", "field", "value", "rule"), WRONG)
def test_each_field_has_a_rule(saved, section, field, value, rule):
    """Blind spot: a value that computes something else, never ends, or fails a hundred lines on. In the code and in a file."""
    path, rewrite = saved
    named = rf"{SECTIONS[section].__name__}\.{field}.*{re.escape(rule)}"
    given = tuple(tuple(v) if isinstance(v, list) else v for v in value) if isinstance(value, list) else value
    with pytest.raises(ValueError, match=named):
        config("dpt-large-midas").with_(section, **{field: given})
    values = dataclasses.asdict(config("dpt-large-midas"))
    values[section][field] = value
    rewrite(values)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: its configuration cannot be read \({named}"):
        dpt.load(path)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        *(("encoder", "mlp_ratio", value) for value in (0.5, 64)),
        *(("encoder", "pos_offset", value) for value in (0, 1.0)),
        *(("encoder", "pos_grid", value) for value in ((1, 1), (MAX_SIDE, MAX_SIDE))),
        *(("encoder", "patch_size", value) for value in (1, MAX_SIDE)),
        *(("encoder", "embed_dim", value) for value in (2, MAX_WIDTH)),
        *(("encoder", "depth", value) for value in (4, MAX_DEPTH)),
        *(("decoder", "features", value) for value in (2, MAX_WIDTH)),
        *(("decoder", "neck_channels", (value,) * 4) for value in (1, MAX_WIDTH)),
        *(("head", "hidden", value) for value in (1, MAX_WIDTH)),
        *(("head", "dropout", value) for value in (0, 1)),
        *(("input", "multiple", value) for value in (1, MAX_SIDE)),
        *(("input", "size", (value, value)) for value in (1, MAX_WIDTH)),
    ],
)
def test_each_bound_is_allowed(section, field, value):
    """Blind spot: a rule that is narrower than it says."""
    made = config("dpt-large-midas").with_(section, **{field: value})
    assert getattr(getattr(made, section), field) == value


def test_colours_are_bytes():
    """Blind spot: black or white refused."""
    made = config("dpt-large-ade20k", classes=2).with_("head", palette=((0, 0, 0), (255, 255, 255)))
    assert made.head.palette[1] == (255, 255, 255)


def test_every_field_is_in_a_table_of_wrong_values():
    """Blind spot: a field added without a rule, or a rule that no test breaks."""
    for name, section in SECTIONS.items():
        fields = {field.name for field in dataclasses.fields(section)}
        assert fields == set(section.RULES) == {field for place, field, *_ in WRONG if place == name}
    assert {field.name for field in dataclasses.fields(DPTConfig)} == set(DPTConfig.RULES)


def test_names_are_those_that_are_computed():
    """Blind spot: a name that the rules allow and no table has, or the other way round."""
    for section, field, table in (
        (EncoderConfig, "activation", ACTIVATION),
        (EncoderConfig, "kind", ENCODERS),
        (EncoderConfig, "attention", ATTENTION),
        (EncoderConfig, "stem", STEMS),
        (EncoderConfig, "stem_eps_on", STANDARDISE),
        (DecoderConfig, "readout", READOUT),
        (HeadConfig, "task", HEADS["linear"]),
        (HeadConfig, "kind", HEADS),
        (HeadConfig, "bin_spacing", SPACING),
    ):
        assert all(section.RULES[field].holds(name) for name in table) and f"one of {', '.join(table)}" == section.RULES[field].words
    assert set(ACTIVATIONS) == set(ACTIVATION)


def change(values: dict, where: str, value=None) -> dict:
    """The values with one replaced, or taken out."""
    section, _, field = where.rpartition(".")
    inner = values[section] if section else values
    if value is None:
        del inner[field]
    else:
        inner[field] = value
    return values


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("encoder.heads", 2, "encoder.heads=2: no such field, EncoderConfig has embed_dim"),
        ("colour", "red", "colour='red': no such field, DPTConfig has name"),
        ("encoder.depth", None, "encoder.depth is missing"),
        ("head.task", None, "head.task is missing"),
        ("decoder", None, "decoder is missing"),
        ("name", None, "name is missing"),
        ("encoder", [1, 2], "encoder is a list: it must be an object"),
        ("name", 3, "DPTConfig.name=3: it must be a name without slashes"),
        ("name", "../up", "DPTConfig.name='../up': it must be a name without slashes"),
        ("name", "", "DPTConfig.name='': it must be a name without slashes"),
        ("licence", {}, "DPTConfig.licence={}: it must be text"),
        ("source", 1.5, "DPTConfig.source=1.5: it must be text, two of it, or None"),
    ],
)
def test_fields_of_a_file_are_known_and_complete(saved, where, value, message):
    """Blind spot: TypeError from a dataclass; a misspelt field passed over."""
    path, rewrite = saved
    rewrite(change(dataclasses.asdict(config("dpt-large-midas")), where, value))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        dpt.load(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"text"', "[" * 100_000, '{"encoder": {"nonsense": 1}}'])
def test_damaged_configurations_are_named(saved, text):
    """Blind spot: a traceback from the JSON reader."""
    path, rewrite = saved
    rewrite(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its configuration cannot be read"):
        dpt.load(path)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("encoder.depth", 1000, "the model has 1000 blocks, but encoder.blocks.999.norm1.weight is not in the file"),
        ("encoder.embed_dim", 65536, r"encoder.pos_embed has shape \(1, 17, 32\), the model's encoder.pos_embed \(1, 17, 65536\)"),
        ("encoder.pos_grid", [4096, 4096], r"encoder.pos_embed has shape \(1, 17, 32\)"),
        ("decoder.features", 65536, r"fusion.convs.0.weight has shape"),
        ("decoder.neck_channels", [65536] * 4, r"reassemble.0.project.weight has shape"),
    ],
)
def test_nothing_is_built_for_what_the_file_does_not_hold(saved, where, value, message):
    """Blind spot: gigabytes and minutes for a damaged number. Within the rules, beyond the file's tensors."""
    import time

    path, rewrite = saved
    rewrite(change(dataclasses.asdict(config("dpt-large-midas")), where, value))
    started = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        dpt.load(path)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("name", "section", "changes", "message"),
    [
        ("midas-3.1-beit-base-384", "encoder", {"final_norm": "every"}, "final_norm='every': it must be 'none' with kind='beit'"),
        ("midas-3.1-beit-base-384", "encoder", {"registers": 4}, "registers=4: it must be 0 with kind='beit'"),
        ("midas-3.1-beit-base-384", "encoder", {"attention": "xformers"}, "attention='xformers': it must be 'sdpa' with kind='beit'"),
        ("zoedepth-nk", "head", {"attractors": ()}, "domains=('nyu', 'kitti'): two different ones at least, with attractors"),
        ("zoedepth-nk", "head", {"domains": ("nyu", "nyu")}, "domains=('nyu', 'nyu'): two different ones at least"),
        ("zoedepth-n", "head", {"project": True}, "attractors=(16, 8, 4, 1): only depth, without project, has them"),
        ("zoedepth-n", "input", {"antialias": True}, "align_corners=True: a resize that averages has no such form"),
        ("dpt-base-ade20k", "input", {"border": 3.0}, "input.border=3.0: it is cut off depth maps alone, not off segmentation"),
    ],
)
def test_fields_that_contradict_each_other(name, section, changes, message):
    """Blind spot: a field that is accepted, and of which this model has nothing."""
    with pytest.raises(ValueError, match=re.escape(message)):
        CONFIGS[name].with_(section, **changes)


def test_stem_maps_and_neck_agree():
    """Blind spot: a file whose parts contradict each other, seen at the first picture."""
    values = dataclasses.asdict(CONFIGS["dpt-tiny-depth"])
    assert config_from(json.loads(json.dumps(values))) == CONFIGS["dpt-tiny-depth"]
    with pytest.raises(ValueError, match=r"neck_channels=\(47, 96, 96, 128\): level 0 is a map of the encoder, which has 48 channels"):
        config_from(change(values, "decoder.neck_channels", [47, 96, 96, 128]))
    for field, value, rule in (("patch_size", 14, "for 16"), ("stem", "patch", "no maps to hook"), ("stem_hooks", (2, 1), "increase")):
        with pytest.raises(ValueError, match=rule):
            CONFIGS["dpt-tiny-depth"].with_("encoder", **{field: value})
    with pytest.raises(ValueError, match="begins with an eighth"):
        CONFIGS["dpt-tiny-depth"].with_("encoder", embed_dim=180)


def test_files_of_before_load():
    """Blind spot: the configurations in files that exist, whose final_norm and pad are true or false, and which lack the newer fields."""
    for name, final_norm in (("dpt-tiny-depth", "none"), ("dpt-tiny-scenes", False)):  # the second was written before
        assert dpt.build(name, weights="pretrained").config == CONFIGS[name]
        metadata = checkpoints.read(dpt.factory._pretrained(CONFIGS[name], False)).metadata
        assert json.loads(metadata["dpt"])["encoder"]["final_norm"] == final_norm
        assert checkpoints.saved_config(metadata, "file") == dataclasses.replace(
            CONFIGS[name], source=json.loads(metadata["dpt"])["source"]
        )
    values = dataclasses.asdict(depth_anything().config)
    values["encoder"]["final_norm"] = True
    del values["encoder"]["activation"], values["decoder"]["readout_activation"]
    values["input"]["pad"] = False
    assert config_from(values) == depth_anything().config
    values["input"]["pad"] = True
    assert config_from(values).input.pad == "corner"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    """Blind spot: a table's name for another function. Against transformers' of the same name."""
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-6, 6, 101)
    theirs = {"gelu_tanh": "gelu_pytorch_tanh"}.get(name, name)
    torch.testing.assert_close(ACTIVATION[name](x), activations.ACT2FN[theirs](x), rtol=1e-6, atol=1e-7)


def test_final_norm_of_every_hook():
    """Blind spot: the norm on the last hook alone, or before the hooks are read."""
    model = depth_anything()
    x = torch.randn(1, 3, 28, 28)
    seen = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, inputs, output: seen.append(model.encoder.norm(output)))
    assert all(torch.equal(a, b) for a, b in zip(model.encoder(x), seen, strict=True))


def test_what_the_kernels_do_not_compute_stays_plain():
    """Blind spot: exact GELU in the place of another activation; a class token that is not added."""
    full = config("dpt-large-midas", embed_dim=64, activation="relu")
    with pytest.raises(ValueError, match=r"encoder\.blocks\.0 cannot run fused: mlp has activation='relu', not 'gelu'"):
        dpt.accelerate(dpt.build(full), strict=True)
    changed = full.with_("encoder", activation="gelu").with_("decoder", readout_activation="silu")
    full = config("dpt-large-midas", embed_dim=64).with_("decoder", readout="add").with_("encoder", final_norm="last")
    rows = {row.name: row for row in dpt.fast_report(dpt.accelerate(dpt.build(changed), strict=True))}
    assert rows["reassemble.0"].fused and rows["reassemble.0"].how.startswith("its readout in PyTorch, since the kernel has no 'silu'")
    same_without_and_with_kernels(changed)
    same_without_and_with_kernels(full)


def same_without_and_with_kernels(full: DPTConfig) -> None:
    plain = dpt.build(full)
    quick = dpt.accelerate(dpt.build(full), strict=True)
    quick.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(quick(x), plain(x), rtol=1e-4, atol=1e-5)


def test_input_needs_no_more_than_its_three():
    """Blind spot: a default that its own rule refuses."""
    InputConfig(mean=(0.5,) * 3, std=(0.5,) * 3, size=(384, 384))
    HeadConfig(task="depth")
    DecoderConfig(neck_channels=(1, 2, 3, 4))


@pytest.mark.parametrize(
    "made",
    [
        CONFIGS["dpt-base-ade20k"],
        *(getattr(CONFIGS["dpt-base-ade20k"], name) for name in SECTIONS),
        Recipe.of("dpt-tiny-depth"),
        Augmentation(),
        EncoderConfig.RULES["depth"],
    ],
    ids=lambda made: type(made).__name__,
)
def test_what_was_checked_stays_so(made):
    """Blind spot: a configuration that is changed after it was checked, in one model and so in all that share it; or its rule."""
    field = dataclasses.fields(made)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, field, getattr(made, field))
    assert hash(made) == hash(dataclasses.replace(made)) and made == dataclasses.replace(made)
