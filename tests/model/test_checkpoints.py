"""Files: their layouts, strictness, safety, and that nothing is half-written."""

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from small import config, randomise, small

import dpt
from dpt import checkpoints, factory
from dpt.checkpoints import ISL, LAYOUTS, MMSEG, NATIVE, TRANSFORMERS, CheckpointError, convert, layout_of
from dpt.config import CONFIGS
from dpt.model import DPT

PUBLISHED = (("dpt-base-ade20k", MMSEG), ("dpt-large-midas", ISL), ("dpt-large-ade20k", ISL), ("dpt-large-midas", TRANSFORMERS))


def upstream(model: DPT, layout) -> dict[str, torch.Tensor]:
    """The model's state under a layout's own keys."""
    state = {}
    for key, value in model.state_dict().items():
        names = layout.source(key)
        state.update(zip(names, value.chunk(len(names)) if len(names) > 1 else (value,), strict=True))
    return state


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (MMSEG, "dpt-base-ade20k"),
        (ISL, "dpt-large-midas"),
        (ISL, "dpt-large-ade20k"),
        (TRANSFORMERS, "dpt-large-midas"),
        (TRANSFORMERS, "dpt-large-ade20k"),
        (NATIVE, "dpt-tiny-depth"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_layout_round_trips(layout, name, tmp_path):
    """Blind spot: two of our keys that read one of theirs, or a key that reads the wrong one of the same shape."""
    model = small(name)
    state = upstream(model, layout)
    assert len(state) >= len(model.state_dict())
    torch.save({"state_dict": state}, tmp_path / "file.pth")
    loaded = dpt.load(tmp_path / "file.pth", config(name))
    assert layout_of(state) is layout
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


ISL_KEYS = """
pretrained.model.blocks.11.attn.qkv.weight
pretrained.model.blocks.0.norm1.bias
pretrained.act_postprocess1.0.project.0.weight
pretrained.act_postprocess4.3.bias
pretrained.act_postprocess2.4.weight
scratch.layer1_rn.weight
scratch.refinenet4.resConfUnit1.conv1.weight
scratch.refinenet1.resConfUnit2.bn2.running_var
scratch.refinenet3.out_conv.bias
scratch.output_conv.4.weight
auxlayer.1.weight
""".split()


@pytest.mark.parametrize("key", ISL_KEYS)
def test_isl_keys_are_as_published(key):
    """Blind spot: a table that round-trips with itself but not with the files. Keys as the original repository writes them."""
    with torch.device("meta"):
        models = [DPT(CONFIGS[name]) for name in ("dpt-large-midas", "dpt-large-ade20k")]
    assert any(key in upstream(model, ISL) for model in models)


def test_the_deepest_level_is_refinenet4():
    """Blind spot: the levels in reverse. In isl-org's files 4 is the deepest, in mmsegmentation's and transformers' it is 0."""
    assert ISL.source("fusion.blocks.3.project.weight") == ("scratch.refinenet4.out_conv.weight",)
    assert MMSEG.source("fusion.blocks.3.project.weight") == ("decode_head.fusion_blocks.0.project.conv.weight",)
    assert TRANSFORMERS.source("fusion.blocks.3.project.weight") == ("neck.fusion_stage.layers.0.projection.weight",)


def test_architecture_is_read_off_the_file(tmp_path):
    """Blind spot: the full-size default, and a fine-tuned head with its own number of classes."""
    torch.manual_seed(0)
    model = DPT(CONFIGS["dpt-base-ade20k"].with_("head", classes=tuple("abc"), palette=((0, 0, 0),) * 3))
    torch.save({"state_dict": upstream(model, MMSEG), "meta": {"epoch": 1}}, tmp_path / "fine_tuned.pth")
    loaded = dpt.load(tmp_path / "fine_tuned.pth")
    assert loaded.config.name == "dpt-base-ade20k" and loaded.config.head.classes == ("class 0", "class 1", "class 2")
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(loaded(x), model.eval()(x))


def test_transformers_files_run_with_their_epsilon(tmp_path):
    """Blind spot: MiDaS weights from the hub run with LayerNorm epsilon 1e-12, not 1e-6."""
    torch.save(upstream(small("dpt-large-midas"), TRANSFORMERS), tmp_path / "hub.bin")
    assert dpt.load(tmp_path / "hub.bin", config("dpt-large-midas")).config.encoder.norm_eps == 1e-12


def test_save_and_load(tmp_path):
    """Blind spot: a configuration of the user's own that is lost, tuples that come back as lists, half precision files."""
    model = small("dpt-large-ade20k", classes=3)
    dpt.save(model, tmp_path / "new" / "mine.safetensors")
    loaded = dpt.load(tmp_path / "new" / "mine.safetensors")
    assert loaded.config == model.config
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(loaded(x), model(x))
    dpt.save(model, tmp_path / "half.safetensors", torch.float16)
    half = dpt.load(tmp_path / "half.safetensors")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    assert [p.name for p in sorted(tmp_path.rglob("*")) if p.is_file()] == ["half.safetensors", "mine.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """Blind spot: half a file where a whole one was."""
    path = tmp_path / "mine.safetensors"
    dpt.save(small(), path)
    before = path.read_bytes()

    def fail(state, name, metadata):
        Path(name).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        dpt.save(small(seed=1), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def broken(state, how):
    state = dict(state)
    if how == "missing":
        del state["scratch.refinenet1.out_conv.bias"]
    elif how == "left over":
        state["scratch.refinenet5.out_conv.bias"] = torch.zeros(1)
    else:
        state["scratch.layer1_rn.weight"] = torch.zeros(16, 9, 3, 3)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "scratch.refinenet1.out_conv.bias is missing"),
        ("left over", "scratch.refinenet5.out_conv.bias is not used by the model"),
        ("shape", r"scratch.layer1_rn.weight has shape \(16, 9, 3, 3\), the model's fusion.convs.0.weight \(16, 8, 3, 3\)"),
    ],
)
def test_loading_is_strict(how, message):
    """Blind spot: a key dropped in silence, as mmsegmentation 1.x drops the patch bias."""
    model = small()
    with pytest.raises(CheckpointError, match=message):
        convert(broken(upstream(model, ISL), how), ISL, model.state_dict())


def test_the_patch_bias_is_loaded():
    """Blind spot: the one mmsegmentation 1.x loses."""
    assert MMSEG.source("encoder.patch_embed.bias") == ("backbone.patch_embed.projection.bias",)


def test_isl_files_may_hold_what_the_network_never_reads():
    """Blind spot: refusing the published files for their classifier and final norm."""
    model = small()
    state = upstream(model, ISL) | {"pretrained.model.norm.weight": torch.ones(32), "pretrained.model.head.bias": torch.ones(1000)}
    convert(state, ISL, model.state_dict())


def test_a_segmentation_file_in_a_depth_model(tmp_path):
    """Blind spot: KeyError from a table instead of a message."""
    torch.save(upstream(small("dpt-base-ade20k"), MMSEG), tmp_path / "labels.pth")
    with pytest.raises(CheckpointError, match="mmsegmentation has no head.conv1.weight"):
        dpt.load(tmp_path / "labels.pth", config("dpt-large-midas"))


class Evil:
    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "empty.pth", "not a PyTorch file"),
        (b"not a checkpoint at all", "text.pth", "not a PyTorch file"),
        (b"\x10\x00\x00\x00\x00\x00\x00\x00{}", "short.safetensors", "not a whole safetensors file"),
        (pickle.dumps({"state_dict": Evil()}), "evil.pth", "not a PyTorch file of plain tensors"),
    ],
)
def test_bad_files_are_named(tmp_path, capsys, content, name, message):
    """Blind spot: executing a pickle, or a traceback from inside a reader."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}.*{message}"):
        dpt.load(tmp_path / name)
    assert "ran code" not in capsys.readouterr().out


def test_other_contents_are_named(tmp_path):
    """Blind spot: valid files of something else."""
    torch.save([1, 2, 3], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds list, not a state dict"):
        dpt.load(tmp_path / "list.pth")
    torch.save({"resnet.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"no known layout.*resnet\.conv1\.weight"):
        dpt.load(tmp_path / "resnet.pth")
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        dpt.load(tmp_path / "nowhere.pth")
    torch.save(upstream(small(), ISL), tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="fits no named model"):
        dpt.load(tmp_path / "odd.pth")


def test_a_damaged_configuration_is_named(tmp_path):
    """Blind spot: TypeError from a dataclass."""
    with pytest.raises(CheckpointError, match="configuration cannot be read"):
        checkpoints.saved_config({"dpt": json.dumps({"encoder": {"nonsense": 1}})}, "file")


def test_downloads_are_verified(tmp_path, monkeypatch):
    """Blind spot: a truncated or exchanged download that is loaded all the same. A file:// address stands in for the release page."""
    import hashlib
    from dataclasses import replace

    source = tmp_path / "weights.pt"
    model = small("dpt-large-midas")
    torch.save(upstream(model, ISL), source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    good, bad = tmp_path / f"weights-{digest[:8]}.pt", tmp_path / "weights-00000000.pt"
    for path in (good, bad):
        path.write_bytes(source.read_bytes())
    built = dpt.build(replace(config("dpt-large-midas"), source=good.as_uri()), weights="pretrained")
    assert torch.equal(built.fusion.convs[0].weight, model.fusion.convs[0].weight)
    with pytest.raises(OSError, match="its SHA-256 begins with"):
        dpt.build(replace(config("dpt-large-midas"), source=bad.as_uri()), weights="pretrained")
    assert [p.name for p in (tmp_path / "hub" / "checkpoints").glob("*.pt")] == [good.name]


def test_no_pretrained_weights_is_said(monkeypatch):
    """Blind spot: None as a path."""
    from dataclasses import replace

    with pytest.raises(ValueError, match="has no pretrained weights"):
        dpt.build(replace(config(), source=None), weights="pretrained")


def test_every_layout_has_a_marker_of_its_own():
    """Blind spot: a file told for another layout."""
    markers = [layout.marker for layout in LAYOUTS]
    assert len(set(markers)) == len(markers)
    for name, layout in (
        ("dpt-base-ade20k", MMSEG),
        ("dpt-large-midas", ISL),
        ("dpt-large-midas", TRANSFORMERS),
        ("dpt-large-midas", NATIVE),
    ):
        with torch.device("meta"):
            state = upstream(DPT(CONFIGS[name]), layout)
        assert [other.name for other in LAYOUTS if other.marker in state] == [layout.name]


def test_recognition_settles_each_published_file():
    """Blind spot: two named models that one file fits."""
    for name, layout in (
        ("dpt-base-ade20k", MMSEG),
        ("dpt-large-midas", ISL),
        ("dpt-large-ade20k", ISL),
        ("dpt-large-midas", TRANSFORMERS),
    ):
        with torch.device("meta"):
            state = upstream(DPT(CONFIGS[name]), layout)
        assert factory._recognise(state, layout, "file").name == name


def test_randomise_leaves_nothing_initial():
    """Blind spot: comparisons that hold because both sides are at their initial value."""
    fresh, other = DPT(config("dpt-large-ade20k")), randomise(DPT(config("dpt-large-ade20k")))
    same = [key for key, value in fresh.state_dict().items() if value.is_floating_point() and torch.equal(value, other.state_dict()[key])]
    assert same == []
