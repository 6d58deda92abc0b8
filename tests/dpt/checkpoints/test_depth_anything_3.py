"""Depth Anything 3 Mono and Metric: equal to its own code from the picture to the map, the sky, the focal length, what stays in float32."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import recording
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from small import config, randomise, upstream

import dpt
from dpt import checkpoints, exchange, factory
from dpt.checkpoints import CheckpointError
from dpt.commands import running
from dpt.commands.main import main
from dpt.config import DPTConfig
from dpt.inference.images import ImageError
from dpt.inference.resizing import network_size, postprocess, preprocess
from dpt.model import DPT
from dpt.nets.sky import with_far_sky
from dpt.zoo import CONFIGS, depth_anything_3

DATA = Path(__file__).parents[1] / "nets" / "data"
FILE = DATA / "depth_anything_3.safetensors"
MONO, METRIC = "depth-anything-3-mono-large", "depth-anything-3-metric-large"
PICTURES = ("small_picture", "large_picture", "smaller_twice")


def narrow(name: str = MONO) -> DPTConfig:
    """The named model as the oracle has it."""
    full = CONFIGS[name].with_("encoder", embed_dim=16, depth=6, num_heads=2, hooks=(1, 2, 4, 5))
    return full.with_("decoder", neck_channels=(8, 12, 16, 20), features=10)


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(DATA / "depth_anything_3.npz"))


@pytest.fixture(scope="module")
def mono() -> DPT:
    return dpt.load(FILE, narrow())


@pytest.fixture(scope="module")
def metric() -> DPT:
    return dpt.load(FILE, narrow(METRIC))


@pytest.mark.parametrize("name", ["square", "wide", "tall"])
def test_equal_to_its_own_code(mono, recorded, name):
    """Blind spot: any part of the network: epsilons, the unit that is not there, the exponential, the sky's threshold and percentile."""
    with torch.inference_mode():
        y = mono(recording.network_input(tuple(recorded[f"{name}.input"])))
    assert recording.difference(recorded, f"{name}.output", y).max() <= 2e-5


def test_its_own_code_at_the_stored_size(mono, recorded):
    """Blind spot: the embedding as it is stored, and more pixels than upstream takes the percentile of. Where there is no sky."""
    with torch.inference_mode():
        y = mono(recording.network_input(tuple(recorded["stored.input"])))
    ground = recorded["stored.sky.values"] < 0.3
    assert 0.2 < ground.mean() < 0.8 and recording.difference(recorded, "stored.depth", y)[ground].max() <= 2e-5


@pytest.mark.parametrize("name", PICTURES)
def test_the_picture_becomes_its_own_codes_tensor(recorded, name):
    """Blind spot: another filter, one resize for two, floats where upstream rounds to 8 bits. A grey level is 0.017 and more."""
    x, content = preprocess(recording.picture(*recorded[f"{name}.picture"]), CONFIGS[MONO].input)
    assert content == tuple(x.shape[2:]) and recording.difference(recorded, f"{name}.tensor", x).max() <= 1e-6


@pytest.mark.parametrize("name", PICTURES)
def test_from_the_picture_to_its_own_codes_map(mono, recorded, name):
    """Blind spot: what is lost between the stages. Smaller pictures agree to a level of 16 bits. Where one is made larger, a grey level in
    100 000 is Intel's library's own, and moves the order of the depths that the percentile is taken of: here these are few and far apart.
    """
    x, _ = preprocess(recording.picture(*recorded[f"{name}.picture"]), mono.config.input)
    with torch.inference_mode():
        difference = recording.difference(recorded, f"{name}.map", mono(x)[0])
    values = recorded[f"{name}.map.values"]
    levels = difference * (65535 * np.abs(values).max() / np.ptp(values))
    assert difference.max() <= 1e-4
    assert name != "smaller_twice" or (levels <= 1).mean() >= 0.999


def test_metres_by_the_focal_length(metric, recorded):
    """Blind spot: pixels of the picture taken for those of the network's input, one side's scale for both."""
    picture, focal = recording.picture(*recorded["large_picture.picture"]), 821.0
    (height, width), (h, w) = picture.shape[:2], network_size(*picture.shape[:2], metric.config.input)
    assert h / height != w / width
    in_network = focal * (h / height + w / width) / 2
    prediction = metric.predict(picture, focal=focal)
    assert prediction.depth is not None and prediction.depth.shape == (height, width)
    with torch.inference_mode():
        metres = metric(preprocess(picture, metric.config.input)[0])[0] * (in_network / 300)
    theirs = recorded["large_picture.metres.values"] / ((411.5 + 390.25) / 2) * in_network  # recorded with another focal length
    rows, columns = recorded["large_picture.metres.rows"], recorded["large_picture.metres.columns"]
    assert np.abs(metres.numpy()[rows[:, None], columns] - theirs).max() <= 1e-4 * theirs.max()
    np.testing.assert_allclose(prediction.depth, postprocess(metres, (h, w), (height, width), metric.config.input), rtol=1e-5)


def test_scales_have_focal_lengths_of_their_own(metric):
    """Blind spot: views of other sizes averaged as if the camera were the same. A model whose output is the same at all sizes."""
    picture = recording.picture(300, 504)
    model = dpt.build(metric.config)
    torch.nn.init.zeros_(model.head.conv3.weight)
    depth = {scale: model.predict(picture, focal=600.0, scales=[scale]).depth.mean() for scale in (0.5, 1.0)}
    assert depth[1.0] == pytest.approx(np.e * 600 * (294 / 300 + 1) / 2 / 300, rel=1e-5)
    assert depth[0.5] == pytest.approx(np.e * 600 * (154 / 300 + 252 / 504) / 2 / 300, rel=1e-5)
    assert model.predict(picture, focal=600.0, scales=[0.5, 1.0]).depth.mean() == pytest.approx(sum(depth.values()) / 2, rel=1e-5)


def photograph(path: Path, millimetres) -> Path:
    exif = Image.Exif()
    if millimetres is not None:
        exif.get_ifd(0x8769)[41989] = millimetres
    Image.fromarray(recording.picture(60, 80)).save(path, exif=exif)
    return path


def test_the_focal_length_is_in_the_picture_or_asked_for(metric, mono, tmp_path):
    """Blind spot: metres by a focal length that nobody gave; a picture's own, or an option, that is passed over."""
    known = photograph(tmp_path / "known.jpg", 35)
    pixels = 35 * 100 / np.hypot(36, 24)  # the diagonal's
    told = metric.predict(known).depth
    np.testing.assert_allclose(told, metric.predict(known, focal=pixels).depth, rtol=1e-6)
    np.testing.assert_allclose(2 * told, metric.predict(known, focal=2 * pixels).depth, rtol=1e-6)
    for unknown in (photograph(tmp_path / "unknown.jpg", None), photograph(tmp_path / "zero.jpg", 0), recording.picture(60, 80)):
        with pytest.raises(ImageError, match=rf"{METRIC}.* needs the focal length, .*give --focal \(or focal=\), in pixels"):
            metric.predict(unknown)
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"focal=.*: it must be a positive number"):
            metric.predict(known, focal=wrong)
    with pytest.raises(ValueError, match=rf"focal=500: {MONO} takes no focal length"):
        mono.predict(known, focal=500)


def test_the_command_takes_a_focal_length(metric, mono, tmp_path, monkeypatch, capsys):
    """Blind spot: an option that is read and not handed on; a picture without a focal length that the next model is not asked about either;
    metres that were made with another one and count as done."""
    monkeypatch.setattr(running, "model_of", lambda args, name, *rest: {METRIC: metric, MONO: mono}[name])
    known, unknown = photograph(tmp_path / "known.jpg", 35), photograph(tmp_path / "unknown.jpg", None)
    arguments = ["predict", str(known), str(unknown), "-o", str(tmp_path / "out"), "--model", METRIC]

    def written(name: str) -> np.ndarray:
        return np.load(tmp_path / "out" / f"{name}_{METRIC}.npy")

    assert main([*arguments, "--model", MONO]) == 1
    assert f"unknown.jpg: {METRIC} needs the focal length" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").glob("*.npy")} == {f"known_{METRIC}.npy", f"known_{MONO}.npy", f"unknown_{MONO}.npy"}
    own = written("known")
    assert main([*arguments, "--focal", "100"]) == 0
    np.testing.assert_allclose(written("known"), written("unknown"), rtol=1e-5)
    np.testing.assert_allclose(written("known"), own * (100 / (35 * 100 / np.hypot(36, 24))), rtol=1e-5)


def test_both_models_have_the_same_keys(tmp_path):
    """Blind spot: metres for relative depth, by chance. Only config.json, where there is one, tells which it is."""
    with torch.device("meta"):
        state = upstream(DPT(CONFIGS[MONO]), depth_anything_3.LAYOUT)
    with pytest.raises(CheckpointError, match=rf"fits {MONO}, {METRIC} alike, .* say which with name="):
        factory.recognised(state, depth_anything_3.LAYOUT, "file")
    shutil.copy(FILE, tmp_path / "model.safetensors")
    checkpoint = checkpoints.find(tmp_path)
    for name, theirs in ((MONO, "da3mono-large"), (METRIC, "da3metric-large")):
        (tmp_path / "config.json").write_text(json.dumps({"model_name": theirs, "config": {}}))
        stated = checkpoints.stated_config(checkpoint, depth_anything_3.LAYOUT)
        assert stated == replace(CONFIGS[name], name=stated.name)
    (tmp_path / "config.json").write_text(json.dumps({"model_name": "da3-large"}))
    with pytest.raises(CheckpointError, match="model_name='da3-large': it must be one of da3mono-large, da3metric-large"):
        dpt.load(tmp_path)


def test_converted_there_and_back(tmp_path):
    """Blind spot: the "model." that upstream's strict code wants before every key, and reading takes off."""
    exchange.convert(FILE, tmp_path / "ours.safetensors", "dpt", narrow(METRIC))
    assert dpt.load(tmp_path / "ours.safetensors").config == narrow(METRIC)
    exchange.convert(tmp_path / "ours.safetensors", tmp_path / "back.safetensors", "depth-anything-3")
    state, back = load_file(FILE), load_file(tmp_path / "back.safetensors")
    assert state.keys() == back.keys() and all(torch.equal(value, back[key]) for key, value in state.items())


def ground(count: int) -> torch.Tensor:
    return torch.rand(1, count, generator=torch.Generator().manual_seed(count)) * 7


def test_the_sky_is_at_the_99th_percentile():
    """Blind spot: the percentile of all pixels or of the sky, another interpolation; many pixels, of which upstream takes some; a picture
    that depends on its neighbour in the batch."""
    for count in (11, 1000, 150_000):
        depth, sky = ground(count + 20)[None], torch.zeros(1, 1, count + 20)
        sky[..., : 2 * 10 : 2] = sky[..., -10:] = 0.3
        is_sky = sky >= 0.3
        far = torch.quantile(depth[~is_sky].double(), 0.99)
        found = with_far_sky(depth, sky)
        assert torch.equal(found[~is_sky], depth[~is_sky])
        torch.testing.assert_close(found[is_sky].double(), far.expand(20), rtol=1e-6, atol=0)
        both = with_far_sky(torch.cat((depth, 3 * depth.flip(-1))), torch.cat((sky, sky.flip(-1))))
        torch.testing.assert_close(both, torch.cat((found, 3 * found.flip(-1))), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("sky", "count", "changes"), [(10, 40, False), (11, 40, True), (30, 40, False), (29, 40, True)])
def test_too_little_sky_or_ground_changes_nothing(sky, count, changes):
    """Blind spot: a threshold off by one, upstream's ten."""
    depth, signal = ground(count)[None], torch.zeros(1, 1, count)
    signal[..., :sky] = 1
    assert torch.equal(with_far_sky(depth, signal), depth) != changes


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A model, and its file."""
    path = tmp_path_factory.mktemp("half") / "model.safetensors"
    model = randomise(DPT(config(MONO)))
    torch.nn.init.zeros_(model.head.sky.conv3.bias)  # a part is sky
    dpt.save(model, path)
    return model, path


def test_decoder_and_head_stay_in_float32(half):
    """Blind spot: an exponential of bfloat16, which is off by percents; weights that were rounded before they were float32 again."""
    model, path = half
    loaded = dpt.load(path, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if name.startswith("encoder.") else torch.float32)
        assert name.startswith("encoder.") or torch.equal(parameter, model.get_parameter(name))
    assert dpt.build(model.config, dtype=torch.float16).head.conv3.weight.dtype == torch.float32
    x = torch.randn(1, 3, 42, 56, generator=torch.Generator().manual_seed(0))
    tokens = [t.float() for t in loaded.encoder(x.bfloat16())]
    fused = loaded.fusion([reassemble(t, (3, 4)) for reassemble, t in zip(loaded.reassemble, tokens, strict=True)])
    assert torch.equal(loaded(x.bfloat16()), loaded.head(fused, (42, 56)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, tokens = model(x), model.encoder(x)
    fused = model.fusion([reassemble(t.float(), (3, 4)) for reassemble, t in zip(model.reassemble, tokens, strict=True)])
    assert torch.equal(found, model.head(fused, (42, 56))) and found.dtype == torch.float32


def test_the_exponential_follows_the_head(half):
    """Blind spot: the sky's branch on the depth's convolutions, the same for all pixels. By hand, of the head's own parts."""
    head, x = half[0].head, torch.randn(2, 16, 6, 8, generator=torch.Generator().manual_seed(0))
    u = F.interpolate(head.conv1(x), size=(21, 28), mode="bilinear", align_corners=True)
    depth = head.conv3(head.conv2(u).relu()).exp()[:, 0]
    sky = head.sky.conv3(head.sky.conv2(u).relu()).relu()[:, 0]
    assert all(0.1 < share < 0.9 for share in (sky >= 0.3).float().mean((1, 2)))
    torch.testing.assert_close(head(x, (21, 28)), with_far_sky(depth, sky))


def test_training_is_refused(tmp_path):
    """Blind spot: a loss of metres on what is no metres."""
    from dpt.training.objective import trained_config
    from dpt.training.recipes import Recipe

    for name in (MONO, METRIC):
        with pytest.raises(ValueError, match=rf"{name} cannot be trained: there are losses for inverse depth"):
            trained_config(Recipe.of(name), tmp_path)
