"""Checkpoints: their layouts, strictness, what is read off the tensors, and that nothing is half-written."""

import errno
import os
import stat

import pytest
import safetensors
import torch
from small import config, randomise, small, upstream

import dpt
from dpt import factory
from dpt.checkpoints import CheckpointError, convert, layout_of
from dpt.model import DPT
from dpt.zoo import CONFIGS, LAYOUTS, carried, isl, mmsegmentation, transformers_dpt

PUBLISHED = (
    ("dpt-base-ade20k", mmsegmentation.LAYOUT),
    ("dpt-large-midas", isl.LAYOUT),
    ("dpt-large-ade20k", isl.LAYOUT),
    ("dpt-large-midas", transformers_dpt.LAYOUT),
)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (mmsegmentation.LAYOUT, "dpt-base-ade20k"),
        (isl.LAYOUT, "dpt-large-midas"),
        (isl.LAYOUT, "dpt-large-ade20k"),
        (transformers_dpt.LAYOUT, "dpt-large-midas"),
        (transformers_dpt.LAYOUT, "dpt-large-ade20k"),
        (carried.LAYOUT, "dpt-tiny-depth"),
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
    assert any(key in upstream(model, isl.LAYOUT) for model in models)


def test_the_deepest_level_is_refinenet4():
    """Blind spot: the levels in reverse. In isl-org's files 4 is the deepest, in mmsegmentation's and transformers' it is 0."""
    assert isl.LAYOUT.source("fusion.blocks.3.project.weight") == ("scratch.refinenet4.out_conv.weight",)
    assert mmsegmentation.LAYOUT.source("fusion.blocks.3.project.weight") == ("decode_head.fusion_blocks.0.project.conv.weight",)
    assert transformers_dpt.LAYOUT.source("fusion.blocks.3.project.weight") == ("neck.fusion_stage.layers.0.projection.weight",)


def test_architecture_is_read_off_the_file(tmp_path):
    """Blind spot: the full-size default, and a fine-tuned head with its own number of classes."""
    torch.manual_seed(0)
    model = DPT(CONFIGS["dpt-base-ade20k"].with_("head", classes=tuple("abc"), palette=((0, 0, 0),) * 3))
    torch.save({"state_dict": upstream(model, mmsegmentation.LAYOUT), "meta": {"epoch": 1}}, tmp_path / "fine_tuned.pth")
    loaded = dpt.load(tmp_path / "fine_tuned.pth")
    assert loaded.config.name == "dpt-base-ade20k" and loaded.config.head.classes == ("class 0", "class 1", "class 2")
    x = torch.randn(1, 3, 32, 48)
    assert torch.equal(loaded(x), model.eval()(x))


def test_transformers_files_run_with_their_epsilon(tmp_path):
    """Blind spot: MiDaS weights from the hub run with LayerNorm epsilon 1e-12, not 1e-6."""
    torch.save(upstream(small("dpt-large-midas"), transformers_dpt.LAYOUT), tmp_path / "hub.bin")
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


def test_what_a_saved_file_holds(tmp_path):
    """Blind spot: a dtype that is asked for and not written, or that counters are written in; tensors as they lie in memory; a file that
    transformers and safetensors' own reader refuse; another format under a name that nobody can read back."""
    model = small("dpt-large-ade20k").to(torch.float64, memory_format=torch.channels_last)
    path = tmp_path / "a" / "b" / "mine.safetensors"
    for dtype in (None, torch.bfloat16):
        dpt.save(model, path, dtype)  # the second time over the first
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt" and set(file.keys()) == set(model.state_dict())
            for name, value in model.state_dict().items():
                wanted = value if dtype is None or not value.is_floating_point() else value.to(dtype)
                assert file.get_tensor(name).dtype == wanted.dtype and torch.equal(file.get_tensor(name), wanted)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float64, torch.int64}
    with pytest.raises(ValueError, match=r"mine\.pt: models are saved as \.safetensors"):
        dpt.save(model, tmp_path / "c" / "mine.pt")
    assert not (tmp_path / "c").exists()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    """Blind spot: half a file where a whole one was."""
    path = tmp_path / "mine.safetensors"
    dpt.save(small(), path)
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device: '.*/mine.safetensors'"):
        dpt.save(small(seed=1), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_saved_files_have_the_mode_of_new_files(tmp_path, mask):
    """Blind spot: a temporary file's mode, which lets nobody else read the model."""
    before = os.umask(mask)
    try:
        dpt.save(small(), tmp_path / "mine.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "mine.safetensors").stat().st_mode) == 0o666 & ~mask


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
        convert(broken(upstream(model, isl.LAYOUT), how), isl.LAYOUT, model.state_dict())


def test_the_patch_bias_is_loaded():
    """Blind spot: the one mmsegmentation 1.x loses."""
    assert mmsegmentation.LAYOUT.source("encoder.patch_embed.bias") == ("backbone.patch_embed.projection.bias",)


def test_isl_files_may_hold_what_the_network_never_reads():
    """Blind spot: refusing the published files for their classifier and final norm."""
    model = small()
    state = upstream(model, isl.LAYOUT) | {"pretrained.model.norm.weight": torch.ones(32), "pretrained.model.head.bias": torch.ones(1000)}
    convert(state, isl.LAYOUT, model.state_dict())


def test_a_segmentation_file_in_a_depth_model(tmp_path):
    """Blind spot: KeyError from a table instead of a message."""
    torch.save(upstream(small("dpt-base-ade20k"), mmsegmentation.LAYOUT), tmp_path / "labels.pth")
    with pytest.raises(CheckpointError, match="mmsegmentation has no head.conv1.weight"):
        dpt.load(tmp_path / "labels.pth", config("dpt-large-midas"))


def test_downloads_are_verified(tmp_path, monkeypatch):
    """Blind spot: a truncated or exchanged download that is loaded all the same. A file:// address stands in for the release page."""
    import hashlib
    from dataclasses import replace

    source = tmp_path / "weights.pt"
    model = small("dpt-large-midas")
    torch.save(upstream(model, isl.LAYOUT), source)
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


def final_norm_by_hand(model: DPT, tokens: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    last = torch.nn.functional.layer_norm(tokens[-1], tokens[-1].shape[-1:], weight, bias, model.config.encoder.norm_eps)
    return [*tokens[:-1], last]


def test_mmsegmentations_final_norm_is_behind_the_last_block(tmp_path):
    """Blind spot: backbone.ln1 dropped in silence, or applied to every hooked layer."""
    model = small("dpt-base-ade20k")
    weight, bias = torch.rand(32) + 0.5, torch.randn(32)
    state = upstream(model, mmsegmentation.LAYOUT) | {"backbone.ln1.weight": weight, "backbone.ln1.bias": bias}
    torch.save({"state_dict": state}, tmp_path / "normed.pth")
    loaded = dpt.load(tmp_path / "normed.pth", config("dpt-base-ade20k"))
    assert loaded.config.encoder.final_norm == "last"
    x = torch.randn(1, 3, 32, 48)
    wanted = final_norm_by_hand(model, model.encoder(x), weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(loaded.encoder(x), wanted, strict=True))
    earlier_hooks = config("dpt-base-ade20k", depth=6, hooks=(0, 1, 2, 3)).with_("encoder", final_norm="last")
    unread = randomise(DPT(earlier_hooks))
    tokens = unread.encoder(x)
    torch.nn.init.constant_(unread.encoder.norm.weight, torch.nan)  # the last block is not hooked: nothing reads its norm
    assert all(torch.equal(a, b) for a, b in zip(unread.encoder(x), tokens, strict=True))


@pytest.mark.parametrize(
    ("name", "layout"),
    [("dpt-base-ade20k", mmsegmentation.LAYOUT), ("dpt-large-ade20k", isl.LAYOUT), ("dpt-large-ade20k", transformers_dpt.LAYOUT)],
)
def test_grid_and_auxiliary_head_are_read_off_the_file(name, layout, tmp_path):
    """Blind spot: a file trained at another size (mmsegmentation's img_size), or whose auxiliary head was left away."""
    full = config(name, pos_grid=(6, 6))
    model = randomise(DPT(full))
    state = {key: value for key, value in upstream(model, layout).items() if not key.startswith(("auxlayer", "auxiliary_head"))}
    torch.save(state, tmp_path / "file.pth")
    loaded = dpt.load(tmp_path / "file.pth", config(name, norm_eps=full.encoder.norm_eps))
    assert loaded.config.encoder.pos_grid == (6, 6) and not loaded.config.head.auxiliary
    x = torch.randn(1, 3, 64, 64)
    if layout is not transformers_dpt.LAYOUT:  # whose files run with another epsilon
        assert torch.equal(loaded(x), model(x))
    odd = dict(state)
    odd[layout.source("encoder.pos_embed")[0]] = torch.zeros(1, 1 + 6 * 5, 32)
    torch.save(odd, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=r"has shape \(1, 31, 32\)"):
        dpt.load(tmp_path / "odd.pth", config(name))


def test_a_file_is_described_against_the_nearest_model(tmp_path):
    """Blind spot: hundreds of differences from the first named model, where one from another would say what is wrong."""
    with torch.device("meta"):
        state = upstream(DPT(CONFIGS["dpt-large-midas"]), isl.LAYOUT)
    del state["scratch.output_conv.2.bias"]
    with pytest.raises(CheckpointError, match=r"differs from dpt-large-midas, the nearest: scratch\.output_conv\.2\.bias is missing$"):
        factory.recognised(state, isl.LAYOUT, "file")


def test_no_pretrained_weights_is_said(monkeypatch):
    """Blind spot: None as a path."""
    from dataclasses import replace

    with pytest.raises(ValueError, match="has no pretrained weights"):
        dpt.build(replace(config(), source=None), weights="pretrained")


def test_every_layout_has_a_marker_of_its_own():
    """Blind spot: a file told for another layout."""
    markers = [layout.markers for layout in LAYOUTS]
    assert len(set(markers)) == len(markers)
    for name, layout in (
        ("dpt-base-ade20k", mmsegmentation.LAYOUT),
        ("dpt-large-midas", isl.LAYOUT),
        ("dpt-large-midas", transformers_dpt.LAYOUT),
        ("dpt-large-midas", carried.LAYOUT),
    ):
        with torch.device("meta"):
            state = upstream(DPT(CONFIGS[name]), layout)
        assert [other.name for other in LAYOUTS if other.is_of(state)] == [layout.name]


def test_recognition_settles_each_published_file():
    """Blind spot: two named models that one file fits."""
    for name, layout in (
        ("dpt-base-ade20k", mmsegmentation.LAYOUT),
        ("dpt-large-midas", isl.LAYOUT),
        ("dpt-large-ade20k", isl.LAYOUT),
        ("dpt-large-midas", transformers_dpt.LAYOUT),
    ):
        with torch.device("meta"):
            state = upstream(DPT(CONFIGS[name]), layout)
        assert factory.recognised(state, layout, "file").name == name


def test_a_fine_tuned_file_is_recognised():
    """Blind spot: mmsegmentation's DPT trained with another img_size, its final norm and its own classes, by its tensors alone."""
    with torch.device("meta"):
        tuned = CONFIGS["dpt-base-ade20k"].with_("encoder", pos_grid=(32, 32), final_norm="last")
        state = upstream(DPT(tuned.with_("head", classes=("a", "b"), palette=((0, 0, 0),) * 2)), mmsegmentation.LAYOUT)
    found = factory.recognised(state, mmsegmentation.LAYOUT, "file")
    assert (found.name, found.encoder.pos_grid, found.encoder.final_norm) == ("dpt-base-ade20k", (32, 32), "last")
    assert found.head.classes == ("class 0", "class 1") and found.encoder.norm_eps == 1e-5


def test_randomise_leaves_nothing_initial():
    """Blind spot: comparisons that hold because both sides are at their initial value."""
    fresh, other = DPT(config("dpt-large-ade20k")), randomise(DPT(config("dpt-large-ade20k")))
    same = [key for key, value in fresh.state_dict().items() if value.is_floating_point() and torch.equal(value, other.state_dict()[key])]
    assert same == []
