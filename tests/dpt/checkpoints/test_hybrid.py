"""DPT-Hybrid's files: isl-org's in both layouts, against what its own code gave; transformers' folders."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import recording
import torch
from small import HYBRID_FIELDS, config, randomise, small, upstream

import dpt
from dpt import exchange, factory
from dpt.checkpoints import CheckpointError
from dpt.checkpoints.conversion import reverted
from dpt.config import DPTConfig
from dpt.inference.resizing import preprocess
from dpt.model import DPT
from dpt.zoo import CONFIGS, isl, transformers_dpt, transformers_hybrid

DATA = Path(__file__).parents[1] / "nets/data"
DEPTHS = {"dpt-hybrid-midas": "output", "dpt-hybrid-kitti": "kitti", "dpt-hybrid-nyu": "nyu"}  # what the oracle calls each one's maps
PICTURES = [
    ("dpt-hybrid-midas", "small_picture"),
    ("dpt-hybrid-midas", "large_picture"),
    ("dpt-hybrid-kitti", "kitti_picture"),
    ("dpt-hybrid-nyu", "nyu_picture"),
]


def narrow(name: str) -> DPTConfig:
    """A named model of the oracle's sizes."""
    stem = {"stem_width": 8, "stem_depths": (1, 2, 1), "stem_groups": 4}
    config = CONFIGS[name].with_("encoder", embed_dim=24, num_heads=3, depth=4, hooks=(1, 3), **stem)
    return config.with_("decoder", neck_channels=(32, 64, 20, 28), features=10)


@pytest.fixture(scope="module")
def depth_maps():
    return np.load(DATA / "dpt_hybrid.npz")


@pytest.fixture(scope="module")
def class_maps():
    return np.load(DATA / "dpt_hybrid_ade20k.npz")


def output(model: DPT, maps, which: str) -> torch.Tensor:
    with torch.inference_mode():
        return model(recording.network_input(tuple(maps[f"{which}.input"])))


@pytest.mark.parametrize("which", ["square", "wide", "tall"])
@pytest.mark.parametrize("name", DEPTHS)
def test_depth_equal_to_isl_org(depth_maps, name, which):
    """Blind spot: any part of isl-org's model: an epsilon, a hook, the padding, or the scale and shift of KITTI's or NYU's depth."""
    model = dpt.load(DATA / "dpt_hybrid.pt", narrow(name))
    assert recording.difference(depth_maps, f"{which}.{DEPTHS[name]}", output(model, depth_maps, which)).max() < 2e-5


@pytest.mark.parametrize("which", ["square", "wide", "tall"])
def test_logits_equal_to_isl_org(class_maps, which):
    """Blind spot: batch norm in the units, the classifier and its resize; the number of classes, which is read off the file."""
    model = dpt.load(DATA / "dpt_hybrid_ade20k.pt", narrow("dpt-hybrid-ade20k"))
    assert len(model.config.head.classes) == 7 and model.config.head.auxiliary
    assert recording.difference(class_maps, f"{which}.output", output(model, class_maps, which)).max() < 2e-5


def picture_of(maps, which: str) -> np.ndarray:
    """The picture; of KITTI's the part that its benchmark is about, as isl-org's program cuts it on `--kitti_crop`."""
    picture = recording.picture(*maps[f"{which}.picture"])
    if which != "kitti_picture":
        return picture
    left = (picture.shape[1] - 1216) // 2
    return picture[-352:, left : left + 1216]


@pytest.mark.parametrize(("name", "which"), PICTURES)
def test_pictures_become_isl_orgs_maps(depth_maps, name, which):
    """Blind spot: the network's size, the resize to it or back, the order of resizing and the reciprocal. To a level of 16 bits."""
    model, picture = dpt.load(DATA / "dpt_hybrid.pt", narrow(name)), picture_of(depth_maps, which)
    tensor, _ = preprocess(picture, model.config.input)
    assert recording.difference(depth_maps, f"{which}.tensor", tensor).max() < 4e-6  # PyTorch's own resize: 9e-5
    found = recording.difference(depth_maps, f"{which}.map", model.predict(picture).depth)
    assert (found <= 1 / 65535).mean() >= 0.999


@pytest.mark.parametrize("which", ["small_picture", "large_picture"])
def test_pictures_become_isl_orgs_labels(class_maps, which):
    """Blind spot: labels of logits that are resized otherwise. isl-org counts classes from 1."""
    model, picture = dpt.load(DATA / "dpt_hybrid_ade20k.pt", narrow("dpt-hybrid-ade20k")), picture_of(class_maps, which)
    labels = model.predict(picture).labels.astype(np.float32) + 1
    assert (recording.difference(class_maps, f"{which}.map", labels) == 0).mean() > 0.999


def scriptable(key: str) -> str:
    """What the branch dpt_scriptable calls a tensor of isl-org's main branch, by its code: the readout is a module of its own, and what
    follows it is counted anew."""
    key = re.sub(r"act_postprocess(\d)\.0\.project", r"readout_oper\1.0.project", key)
    return re.sub(r"act_postprocess(\d)\.(\d)", lambda found: f"act_postprocess{found[1]}.{int(found[2]) - 3}", key)


@pytest.mark.parametrize("name", ["dpt-hybrid-nyu", "dpt-hybrid-ade20k"])
def test_the_scriptable_layout(tmp_path, name):
    """Blind spot: the second layout of the same model taken for the first, or read one tensor off. It has no auxiliary head."""
    path = DATA / ("dpt_hybrid_ade20k.pt" if "ade20k" in name else "dpt_hybrid.pt")
    state = {scriptable(key): value for key, value in torch.load(path).items() if not key.startswith("auxlayer")}
    assert len(state) == len(set(state)) and any("readout_oper4.0.project.0.weight" in key for key in state)
    torch.save(state, tmp_path / "file.pt")
    ours, expected = dpt.load(tmp_path / "file.pt", narrow(name)), dpt.load(path, narrow(name))
    assert not ours.config.head.auxiliary
    x = torch.randn(1, 3, 32, 64)
    assert torch.equal(ours(x), expected(x))


def test_large_models_have_the_scriptable_layout_too():
    """Blind spot: rows for the hybrids alone."""
    with torch.device("meta"):
        expected = upstream(DPT(CONFIGS["dpt-large-midas"]), isl.LAYOUT)
        state = upstream(DPT(CONFIGS["dpt-large-midas"]), isl.SCRIPTABLE)
    assert sorted(state) == sorted(map(scriptable, expected))
    assert factory.recognised(state, isl.SCRIPTABLE, "file").name == "dpt-large-midas"


@pytest.mark.parametrize("layout", [isl.LAYOUT, isl.SCRIPTABLE, transformers_hybrid.LAYOUT], ids=lambda layout: layout.format)
def test_files_are_told_apart(layout):
    """Blind spot: KITTI's file taken for MiDaS', whose tensors have its names and shapes."""
    with torch.device("meta"):
        classes = upstream(DPT(CONFIGS["dpt-hybrid-ade20k"]), layout)
        depth = upstream(DPT(CONFIGS["dpt-hybrid-kitti"]), layout)
    assert layout.is_of(classes) and factory.recognised(classes, layout, "file").name == "dpt-hybrid-ade20k"
    with pytest.raises(CheckpointError, match="fits dpt-hybrid-midas, dpt-hybrid-kitti, dpt-hybrid-nyu alike.*say which with name="):
        factory.recognised(depth, layout, "file")


def test_what_each_named_model_is():
    """Blind spot: metres that are called inverse depth, another's scale, a size with its sides exchanged."""
    midas, kitti, nyu = (CONFIGS[name] for name in DEPTHS)
    assert [config.input.size for config in (midas, kitti, nyu)] == [(384, 384), (352, 1216), (480, 640)]
    assert [config.head.inverse for config in (midas, kitti, nyu)] == [True, False, False] and midas.head.reciprocal is None
    assert [config.head.depth_scale for config in (kitti, nyu)] == [256, 1000]
    for made in (midas, kitti, nyu, CONFIGS["dpt-hybrid-ade20k"]):
        assert (made.encoder.stem_hooks, made.encoder.hooks, made.input.multiple) == ((0, 1), (8, 11), 32)
    assert {config.licence for config in (midas, kitti, nyu, CONFIGS["dpt-hybrid-ade20k"])} == {"MIT"}


transformers = pytest.importorskip("transformers")
CLASSES = {"depth": transformers.DPTForDepthEstimation, "segmentation": transformers.DPTForSemanticSegmentation}


def theirs(task: str = "depth", bit: dict | None = None, **fields) -> torch.nn.Module:
    backbone = {**HYBRID_FIELDS["backbone_config"], **(bit or {})}
    return randomise(CLASSES[task](transformers.DPTConfig(**{**HYBRID_FIELDS, **fields, "backbone_config": backbone})), seed=3)


WIDER = {"embedding_size": 16, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 1, 3], "num_groups": 8}


@pytest.mark.parametrize(
    ("task", "bit", "fields"),
    [
        ("depth", {}, {}),
        ("depth", WIDER, {"neck_hidden_sizes": [64, 128, 16, 16], "backbone_featmap_shape": [1, 256, 4, 4]}),
        ("depth", {"global_padding": "SAME"}, {"backbone_out_indices": [2, 5, 3, 1], "layer_norm_eps": 1e-3, "hidden_act": "relu"}),
        ("segmentation", {}, {"num_labels": 4, "use_batch_norm_in_fusion_residual": True, "num_attention_heads": 4}),
    ],
    ids=str,
)
def test_folders_of_transformers(tmp_path, task, bit, fields):
    """Blind spot: a field of config.json or of its backbone_config that is not obeyed; the first two indices taken for hooks."""
    model = theirs(task, bit, **fields)
    model.save_pretrained(tmp_path)
    ours = dpt.load(tmp_path)
    assert ours.config.encoder.stem_eps_on == "variance" and ours.config.head.task == task
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        result = model(x)
        expected = result.predicted_depth if task == "depth" else result.logits
        assert (ours(x) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid")
    theirs().save_pretrained(path)
    return path


REFUSED = [
    ("is_hybrid", False, "true: the patches come from a BiT"),
    ("backbone_config", "bit", "null or a BiT"),
    ("readout_type", "add", "'project'"),
    ("backbone_out_indices", [0, 1, 3, 3], "the last two different"),
    ("neck_ignore_stages", [0], "[0, 1]"),
    ("backbone_featmap_shape", [1, 1024], "four whole numbers"),
    ("backbone_featmap_shape", [1, 1024, 4, 4], "of 128 channels"),
    ("neck_hidden_sizes", [32, 60, 16, 16], "[32, 64] to begin with"),
]
REFUSED_BIT = [
    ("model_type", "resnet", "'bit'"),
    ("num_channels", 1, "3"),
    ("embedding_size", 0, "a whole number above 0"),
    ("hidden_sizes", [32, 64], "three whole numbers"),
    ("hidden_sizes", [32, 64, 96], "[32, 64, 128] to begin with"),
    ("depths", [3, 4, 6, 3], "three whole numbers"),
    ("layer_type", "preactivation", "'bottleneck'"),
    ("hidden_act", "gelu", "'relu'"),
    ("global_padding", None, "'same'"),
    ("num_groups", 0, "a whole number above 0"),
    ("embedding_dynamic_padding", False, "true"),
    ("output_stride", 8, "32"),
    ("width_factor", 2, "1"),
    ("out_features", ["stage1", "stage3"], "stage2"),
]


@pytest.mark.parametrize(
    ("where", "field", "value", "rule"), [*(("", *row) for row in REFUSED), *(("backbone_config", *row) for row in REFUSED_BIT)], ids=str
)
def test_what_cannot_be_obeyed_is_refused(tmp_path, folder, where, field, value, rule):
    """Blind spot: a value that is passed over, and another model computed."""
    values = json.loads((folder / "config.json").read_text())
    (values[where] if where else values)[field] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"config\.json: ({where}: )?{field}=.*{re.escape(rule)}"):
        dpt.load(tmp_path)


def test_the_tables_are_whole():
    """Blind spot: a row that no test breaks, or a default that is not transformers'."""
    of_vit = {**transformers_dpt.DPT, **transformers_dpt.VIT}
    own = {field for field, row in transformers_hybrid.HYBRID.items() if row is not of_vit.get(field)}
    assert own == {field for field, *_ in REFUSED} - {"neck_hidden_sizes"}
    assert set(transformers_hybrid.BIT) == {field for field, *_ in REFUSED_BIT}
    hybrid = transformers.DPTConfig(is_hybrid=True)
    for table, defaults in (
        (transformers_hybrid.HYBRID, hybrid.to_dict()),
        (transformers_hybrid.BIT, transformers.BitConfig().to_dict()),
    ):
        for field, (default, *_) in table.items():
            left_out = field in ("model_type", "architectures", "is_hybrid", "backbone", "backbone_config", "out_features")
            found = defaults.get(field)
            assert left_out or (list(found) if isinstance(found, tuple) else found) == default, field
    for field, value in transformers_hybrid._DEFAULT_BIT.items():
        found = getattr(hybrid.backbone_config, field)
        assert (found.lower() if isinstance(found, str) else found) == value, field


def published(name: str) -> dict[str, torch.Tensor]:
    """A small model's file in isl-org's layout, with what its code never reads."""
    return reverted(small(name).state_dict(), isl.LAYOUT, 32)


@pytest.mark.parametrize("to", ["isl-scriptable", "dpt"])
@pytest.mark.parametrize("name", ["dpt-hybrid-kitti", "dpt-hybrid-midas"])
def test_there_and_back(tmp_path, name, to):
    """Blind spot: a tensor that is lost, or comes back in another's place or other bits."""
    state = published(name)
    torch.save(state, tmp_path / "a.pt")
    assert exchange.convert(tmp_path / "a.pt", tmp_path / "b.safetensors", to, config(name)) == []
    assert exchange.convert(tmp_path / "b.safetensors", tmp_path / "c.pt", "isl", None if to == "dpt" else config(name)) == []
    back = torch.load(tmp_path / "c.pt")
    assert back.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in back.items())


@pytest.mark.parametrize("name", ["dpt-hybrid-midas", "dpt-hybrid-ade20k"])
def test_transformers_runs_what_was_converted(tmp_path, name):
    """Blind spot: a config.json that states another model than the weights beside it; the epsilon that transformers has elsewhere passed
    over in silence; and the way back."""
    torch.save(published(name), tmp_path / "a.pt")
    notes = exchange.convert(tmp_path / "a.pt", tmp_path / "hf", "hf", config(name))
    assert any("encoder.stem_eps_on='variance', isl-org 'deviation'" in note for note in notes)
    model, loading = CLASSES[config(name).head.task].from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = dpt.load(tmp_path / "hf")
    assert ours.config.encoder == config(name, stem_eps_on="variance").encoder
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        result = model.eval()(x)
        expected = result.predicted_depth if ours.config.head.task == "depth" else result.logits
        assert (ours(x) - expected).abs().max() <= 2e-5 * expected.abs().max()
    notes = exchange.convert(tmp_path / "hf", tmp_path / "b.pt", "isl")
    assert any("encoder.stem_eps_on='deviation', transformers' DPT-Hybrid 'variance'" in note for note in notes)
    back = torch.load(tmp_path / "b.pt")
    assert all(torch.equal(back[key], value) for key, value in published(name).items())


def test_what_transformers_does_not_compute_is_not_written():
    """Blind spot: a model of metres that transformers would run as one of inverse depth."""
    write = transformers_hybrid.LAYOUT.stated.write
    with pytest.raises(CheckpointError, match=r"dpt-hybrid-nyu: head\.inverse=False"):
        write(CONFIGS["dpt-hybrid-nyu"])
    with pytest.raises(CheckpointError, match=r"dpt-large-midas: encoder\.stem='patch'"):
        write(CONFIGS["dpt-large-midas"])
