"""From pictures to predictions. Blind spots: CUDA and MPS; accuracy on real photographs, which `dpt evaluate` measures."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pictures
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small import config as small_config
from small import randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dpt
from dpt.config import HALF, DPTConfig, InputConfig
from dpt.evaluation.alignment import align
from dpt.inference import images, resizing, windows
from dpt.inference import prediction as predicting
from dpt.zoo import CONFIGS

DEPTH, SCENES = (CONFIGS[name].with_("input", size=(64, 64)) for name in ("dpt-tiny-depth", "dpt-tiny-scenes"))


EXAMPLES = Path(dpt.__file__).parent / "examples"


class Stub(nn.Module):
    """A model that computes `function(x)` on the normalised picture and keeps what it was given."""

    def __init__(self, config: DPTConfig, function):
        super().__init__()
        self.config, self.function, self.inputs = config, function, []
        self.parameter = nn.Parameter(torch.zeros(()))
        self.child = nn.Dropout(0.5)
        self.head = SimpleNamespace()

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.inputs.append(x.clone())
        return self.child(self.function(x))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [result] if isinstance(result, torch.Tensor) else [t for t in result or () if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return result


def _config(task: str, classes: int = 3, inverse: bool = True, **fields) -> DPTConfig:
    base = DEPTH if task == "depth" else SCENES
    head = dataclasses.replace(base.head, inverse=inverse)
    if task == "segmentation":
        head = dataclasses.replace(head, classes=tuple(map(str, range(classes))), palette=((0, 0, 0),) * classes)
    size = {"mean": HALF, "std": HALF, "size": (32, 32), "rule": "short_side", "mode": "bilinear", "output_mode": "bilinear"}
    return dataclasses.replace(base, head=head, input=InputConfig(**{**size, **fields}))


def _ramp(x):
    """Brightness plus the column, 0..1: not symmetric, so that a flip shows."""
    return x.mean(1) + torch.linspace(0, 1, x.shape[3])


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def depth_model():
    return pictures.lively_model(DEPTH)


@pytest.fixture(scope="module")
def carried_depth():
    return dpt.build("dpt-tiny-depth", weights="pretrained")


@pytest.fixture(scope="module")
def scenes_model():
    return pictures.lively_model(SCENES)


def test_depth_is_the_models(depth_model):
    """Blind spot: anything between `preprocess`, the model and `postprocess` that changes the map."""
    picture = _noise(50, 70)
    prediction = depth_model.predict(picture)
    x, content = resizing.preprocess(picture, DEPTH.input)
    with torch.no_grad():
        wanted = resizing.postprocess(depth_model(x), content, (50, 70), DEPTH.input)[0]
    assert prediction.size == (50, 70) and prediction.depth.dtype == np.float32
    assert prediction.labels is None and prediction.probability is None and prediction.source is None
    np.testing.assert_allclose(prediction.depth, wanted, rtol=1e-4)
    assert prediction.depth.std() > 0.3


def test_labels_are_the_models(scenes_model):
    """Blind spot: as above for labels; a probability that is not the winner's."""
    picture = _noise(70, 50)
    prediction = scenes_model.predict(Image.fromarray(picture), probability=True)
    x, content = resizing.preprocess(picture, SCENES.input)
    with torch.no_grad():
        logits = resizing.postprocess(scenes_model(x), content, (70, 50), SCENES.input)[0]
    assert prediction.labels.dtype == np.uint8 and prediction.labels.shape == (70, 50) and prediction.depth is None
    chosen = logits.gather(0, torch.from_numpy(prediction.labels).long()[None])[0]
    assert (logits.amax(0) - chosen).max() < 1e-4 < 0.1 < logits.std()  # equal but for ties within rounding
    np.testing.assert_allclose(prediction.probability, logits.softmax(0).amax(0), rtol=1e-4)
    assert len(np.unique(prediction.labels)) > 1


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_batches(depth_model, batch_size):
    """Blind spot: pictures of different sizes change places, or lean on each other, when they share a batch."""
    sizes = [(40, 60), (60, 40), (41, 60), (20, 30), (40, 60)]  # the network sees the 1st, 3rd (by rounding), 4th, 5th alike
    sources = [_noise(*size, seed) for seed, size in enumerate(sizes)]
    together = depth_model.predict(iter(sources), batch_size=batch_size)
    assert [prediction.size for prediction in together] == sizes
    for source, prediction in zip(sources, together, strict=True):
        np.testing.assert_allclose(prediction.depth, depth_model.predict(source).depth, rtol=1e-3)


def test_batches_are_made():
    """Blind spot: batch_size accepted and ignored."""
    model = Stub(_config("depth"), _ramp)
    found = predicting.predict(model, [_noise(40, 60)] * 3 + [_noise(60, 40)] + [_noise(80, 120)] * 2, batch_size=4)
    assert [tuple(x.shape) for x in model.inputs] == [(4, 3, 32, 48), (4, 3, 48, 32), (4, 3, 32, 48)]
    assert [prediction.size for prediction in found] == [(40, 60)] * 3 + [(60, 40)] + [(80, 120)] * 2


def test_sources(tmp_path):
    """Blind spot: a path in a list or alone, a file object (which is iterable), a tuple; the source's name kept."""
    model = Stub(_config("depth"), _ramp)
    path = tmp_path / "a.png"
    Image.fromarray(_noise(40, 60)).save(path)
    wanted = predicting.predict(model, _noise(40, 60)).depth
    with open(path, "rb") as file:
        assert np.array_equal(predicting.predict(model, file).depth, wanted)
    for source in (path, str(path)):
        prediction = predicting.predict(model, source)
        assert prediction.source == str(path) and np.array_equal(prediction.depth, wanted)
    listed = predicting.predict(model, (path,))
    assert isinstance(listed, list) and np.array_equal(listed[0].depth, wanted)
    assert predicting.predict(model, []) == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        listed[0].depth = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        predicting.Options.of(model.config).scales = (2.0,)  # which were checked


def test_flip_metric():
    """Blind spot: the flipped map not flipped back (the ramp would stay), or metres aligned as if they had no scale."""
    model = Stub(_config("depth", inverse=False), _ramp)
    picture = np.zeros((32, 48, 3), np.uint8)
    np.testing.assert_allclose(predicting.predict(model, picture, flip=True).depth, -1 + 0.5, atol=1e-6)
    assert len(model.inputs) == 2
    picture[:, :24] = 255
    predicting.predict(model, picture, flip=True)
    np.testing.assert_array_equal(model.inputs[2].flip(3), model.inputs[3])


def test_relative_depth_is_aligned():
    """Blind spot: maps of different scale and shift averaged as they are; the reference another than the plain map."""
    factors = itertools.cycle([(3.0, -7.0), (1.0, 0.0), (0.2, 5.0)])
    seen = []

    def function(x):
        a, b = next(factors)
        seen.append(x.shape[3])
        return a * x.mean(1) + b

    model = Stub(_config("depth"), function)
    smooth = np.repeat(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
    merged = predicting.predict(model, smooth, scales=(2.0, 1.0, 0.5)).depth
    assert seen == [32, 64, 16]  # 1 first, whatever the order given
    np.testing.assert_allclose(merged[:, 6:-6], (smooth[:, 6:-6, 0] / 127.5 - 1) * 3 - 7, atol=0.05)


def test_align():
    """Blind spot: a constant map divides by zero; a map that disagrees is turned upside down to fit. Worked out by hand."""
    reference = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.allclose(align(reference * 5 - 2, reference), reference)
    assert torch.equal(align(torch.ones(2, 2), reference), torch.full((2, 2), 2.5))
    assert torch.equal(align(-reference, reference), torch.full((2, 2), 2.5))
    both = align(torch.stack([reference * 2, reference - 1]), torch.stack([reference, reference * 10]))
    assert torch.allclose(both, torch.stack([reference, reference * 10]))  # each map of a batch by itself
    fitted = align(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, 2.0, 6.0]]))  # slope 2.5, mean 3
    assert torch.allclose(fitted, torch.tensor([[0.5, 3.0, 5.5]]))


def _three_classes(x):
    """Logits that depend on colour and, by the last class, on the column."""
    return torch.stack([3 * x[:, 0], 2 * x[:, 1], torch.linspace(-3, 3, x.shape[3]).expand(x.shape[0], x.shape[2], -1)], dim=1)


def test_tta_is_mmsegmentations():
    """Blind spot: other scales, a missing flip, logits averaged instead of probabilities, a softmax before the resize."""
    config = _config("segmentation", size=(32, 128), rule="short_and_long_side", pad="corner")
    model = Stub(config, _three_classes)
    picture = _noise(24, 40)
    prediction = predicting.predict(model, picture, tta=True, probability=True)
    shapes = [tuple(x.shape[2:]) for x in model.inputs]
    wanted = {0.5: (16, 32), 0.75: (32, 48), 1.0: (32, 64), 1.25: (48, 80), 1.5: (48, 80), 1.75: (64, 96)}  # padded to 16
    assert sorted(shapes) == sorted(shape for shape in wanted.values() for _ in range(2))
    total = torch.zeros(3, 24, 40)
    for ratio in wanted:
        x = resizing.resize_and_normalise(picture, config.input, ratio=ratio)
        assert tuple(x.shape[2:]) == (round(32 * ratio), int(32 * ratio * 40 / 24 + 0.5))
        for flip in (False, True):
            view = resizing.padded(x.flip(3) if flip else x, config.input)
            logits = _three_classes(view)[..., : x.shape[2], : x.shape[3]]
            logits = F.interpolate(logits, size=(24, 40), mode="bilinear")
            total += (logits.flip(3) if flip else logits)[0].softmax(0)
    best = total / 12
    np.testing.assert_allclose(prediction.probability, best.amax(0), atol=1e-4)
    assert (prediction.labels == best.argmax(0).numpy()).mean() > 0.995  # ties within rounding


def test_tta_of_large_pictures(monkeypatch):
    """Blind spot: beyond MERGE_PIXELS the K maps are summed at the picture's size all the same; elsewhere, and only the borders of
    regions may move."""
    model = Stub(_config("segmentation", classes=20), lambda x: F.pad(_three_classes(x), (0, 0, 0, 0, 0, 17), value=-20))
    full = predicting.predict(model, pictures.scene(96, 128), tta=True, probability=True)
    monkeypatch.setattr(predicting, "MERGE_PIXELS", 100)
    monkeypatch.setattr(resizing, "STRIP_ELEMENTS", 20 * 128)
    with LargestTensor() as watch:
        small = predicting.predict(model, pictures.scene(96, 128), tta=True, probability=True)
    assert watch.elements < 20 * 96 * 128 / 2
    assert small.labels.shape == (96, 128) and (small.labels == full.labels).mean() > 0.97
    assert np.median(np.abs(small.probability - full.probability)) < 0.02


def test_scales_and_flip_chosen():
    """Blind spot: tta switched on overrules what was chosen, or one of them is ignored."""
    model = Stub(_config("segmentation"), _three_classes)
    for options, runs in (
        ({}, 1),
        ({"flip": True}, 2),
        ({"scales": (0.5, 2)}, 2),
        ({"tta": True}, 12),
        ({"tta": True, "flip": False}, 6),
        ({"tta": True, "scales": [1]}, 2),
    ):
        model.inputs.clear()
        predicting.predict(model, _noise(32, 32), **options)
        assert len(model.inputs) == runs, options


def test_sliding_windows():
    """Blind spot: gaps, a last window outside, sums not divided by their counts. One row of windows, worked out by hand."""
    counter = itertools.count()
    config = _config("segmentation", classes=2)
    model = Stub(config, lambda x: torch.stack([torch.full_like(x[:, 0], 10.0 ** next(counter)), torch.zeros_like(x[:, 0])], dim=1))
    with torch.no_grad():
        maps = windows.infer(model.eval(), torch.zeros(1, 3, 32, 80), window=(32, 32), stride=(32, 24))["segmentation"]
    assert [x.shape[3] for x in model.inputs] == [32, 32, 32]  # columns 0..32, 24..56, 48..80
    row = maps[0, 0, 5]
    assert row[:24].eq(1).all() and row[24:32].eq(5.5).all() and row[32:48].eq(10).all()
    assert row[48:56].eq(55).all() and row[56:].eq(100).all()


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [(512, 512, 341, [0]), (683, 512, 341, [0, 171]), (2048, 512, 341, [0, 341, 682, 1023, 1364, 1536]), (100, 512, 341, [0])],
)
def test_window_starts(length, window, stride, starts):
    """Blind spot: mmsegmentation's places, the last window moved inside; a picture smaller than the window."""
    assert windows._starts(length, window, stride) == starts


def test_slide_defaults():
    """Blind spot: other windows than mmsegmentation's 512 and 341 for its model; padding inside a picture cut in windows."""
    options = predicting.Options.of(CONFIGS["dpt-base-ade20k"], slide=True)
    assert (options.window, options.stride) == ((512, 512), (341, 341))
    model = Stub(_config("segmentation", size=(32, 128), rule="short_and_long_side", pad="corner"), _three_classes)
    predicting.predict(model, _noise(30, 75), slide=True)
    assert [tuple(x.shape[2:]) for x in model.inputs] == [(32, 32)] * 4 and all(x[..., -1].abs().sum() > 0 for x in model.inputs)


@pytest.mark.parametrize("inverse", [True, False])
def test_sliding_depth(inverse):
    """Blind spot: seams between windows, each of which has a scale and shift of its own, relative depth or metres."""
    number = itertools.count()

    def function(x):
        place = next(number)
        return (1 + place) * x.mean(1) + place

    model = Stub(_config("depth", inverse=inverse), function)
    picture = _noise(32, 70)
    with torch.no_grad():
        x, _ = resizing.preprocess(picture, model.config.input)
    sliding = predicting.predict(model, picture, slide=True)
    wanted = resizing.postprocess(x.mean(1), tuple(x.shape[2:]), (32, 70), model.config.input)[0]
    np.testing.assert_allclose(sliding.depth, wanted, atol=1e-5)
    assert next(number) == 4  # the whole picture and three windows


def _finer(x):
    """A map of two pixels for each of the picture's, a side."""
    return F.interpolate(x.mean(1, keepdim=True), scale_factor=2)[:, 0]


def test_a_map_of_its_own_size():
    """Blind spot: a map cut, or resized twice, where padding around the picture belongs to it and the head has a size of its own; the
    mirrored picture padded as the other was; windows whose maps have another size than they."""
    model = Stub(_config("depth", inverse=False, rule="none", pad="centre", multiple=14), _finer)
    picture = _noise(20, 37)
    found = predicting.predict(model, picture).depth
    x, _ = resizing.preprocess(picture, model.config.input)
    assert model.inputs[0].shape == x.shape == (1, 3, 28, 42) and torch.equal(model.inputs[0], x)
    wanted = F.interpolate(_finer(x)[None], size=(20, 37), mode="bilinear")[0, 0]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    flipped = predicting.predict(model, picture, flip=True).depth
    mirrored = F.pad((x[..., 4:24, 2:39]).flip(3), (2, 3, 4, 4))
    assert torch.equal(model.inputs[2], mirrored)
    wanted = (wanted + F.interpolate(_finer(mirrored).flip(2)[None], size=(20, 37), mode="bilinear")[0, 0]) / 2
    np.testing.assert_allclose(flipped, wanted, atol=1e-6)
    whole = _noise(28, 70)
    model.inputs.clear()
    sliding = predicting.predict(model, whole, window=28, stride=14).depth
    assert [tuple(x.shape[2:]) for x in model.inputs] == [(28, 70)] + [(28, 28)] * 4
    np.testing.assert_allclose(sliding, (whole.mean(2) / 127.5 - 1), atol=1e-5)


def test_windows_of_depth_fade():
    """Blind spot: a window that stops where it is not yet nothing. By hand: at its edges half a step, in its middle all; and a constant
    stays one."""
    assert windows._fade((4, 2), torch.device("cpu")).tolist() == [[0.125, 0.125], [0.375, 0.375], [0.375, 0.375], [0.125, 0.125]]
    model = Stub(_config("depth"), lambda x: torch.full_like(x[:, 0], 3.0))
    assert np.allclose(predicting.predict(model, _noise(50, 90), window=32, stride=(7, 32)).depth, 3)


def _largest_jump(depth: np.ndarray) -> float:
    """The largest mean difference between neighbouring columns or rows, in units of the median one."""
    jumps = np.concatenate([np.abs(np.diff(depth.astype(np.float64), axis=axis)).mean(axis=1 - axis) for axis in (0, 1)])
    return jumps.max() / np.median(jumps)


SEAMS = [(15, (384, 384), 2.0), (3, (384, 384), 3.0), (10, (300, 500), 2.0), (3, (500, 350), 1.7)]


@pytest.mark.parametrize(("number", "size", "scale"), SEAMS)
def test_windows_leave_no_seams(carried_depth, number, size, scale):
    """Blind spot: a checkerboard. Without blending the largest jump lay at a window's edge, 65 times the median one."""
    with Image.open(EXAMPLES / f"scene-{20000000 + number}.png") as picture:
        picture = picture.resize(size[::-1])
    whole, windows = (carried_depth.predict(picture, scales=[scale], slide=slide).depth for slide in (False, True))
    assert not np.array_equal(whole, windows)
    assert _largest_jump(windows) <= 1.5 * _largest_jump(whole)


@pytest.mark.parametrize("classes", [3, 256, 257])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(5, 7), (31, 50), (9, 9), (1, 1)])
def test_labels_from_logits(monkeypatch, classes, mode, align_corners, size):
    """Blind spot: strips that do not meet, rows of the wrong taps, uint8 overflow. Against `F.interpolate` in float64."""
    monkeypatch.setattr(resizing, "STRIP_ELEMENTS", classes * size[1] * 4)
    config = _config("segmentation", output_mode=mode, output_align_corners=align_corners).input
    logits = 5 * torch.randn(classes, 9, 13, generator=torch.Generator().manual_seed(1))
    labels, probability = resizing.labels_from_logits(logits, size, config, probability=True)
    full = F.interpolate(logits[None].double(), size=size, mode=mode, align_corners=align_corners)[0]
    assert labels.dtype == (torch.uint8 if classes <= 256 else torch.int16)
    assert labels.shape == probability.shape == size
    assert (full.amax(0) - full.gather(0, labels.long()[None])[0]).max() < 1e-4
    torch.testing.assert_close(probability, full.softmax(0).amax(0).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(resizing.labels_from_logits(logits, size, config)[0], labels)


def test_labels_from_logits_memory(monkeypatch):
    """Blind spot: K maps at the picture's size. Counts elements of each tensor that an operator returns, not the process's memory."""
    monkeypatch.setattr(resizing, "STRIP_ELEMENTS", 40 * 300 * 5)
    with LargestTensor() as watch:
        resizing.labels_from_logits(torch.randn(40, 20, 30), (200, 300), SCENES.input, probability=True)
    assert 40 * 300 <= watch.elements <= 40 * 300 * 5  # 2.4 million at once would be all


def test_state_is_left_alone():
    """Blind spot: inference mode leaks out of the generator, training mode is lost, or a frozen module is set training."""
    model = Stub(_config("depth"), _ramp).train()
    model.child.eval()
    for _ in predicting.predict_iter(model, [_noise(32, 32)] * 3):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert model.training and not model.child.training
    broken = Stub(_config("depth"), lambda x: 1 / 0).train()
    with pytest.raises(ZeroDivisionError):
        predicting.predict(broken, _noise(32, 32))
    assert broken.training and broken.child.training


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
def test_threads(fast, training):
    """Blind spot: a thread that puts the model back into training while another still predicts: its batch norms then normalise by their
    batch, and learn from it."""
    model = randomise(dpt.build(small_config("dpt-base-ade20k").with_("input", size=(64, 64))))
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    model = dpt.accelerate(model) if fast else model
    model.train(training)
    frozen = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    noise = [_noise(48, 48 + 16 * (seed % 3), seed) for seed in range(8)]
    alone = [model.predict(image).labels for image in noise]
    before = copy.deepcopy(model.state_dict())
    start = threading.Barrier(8)

    def predict_often(number):
        start.wait()
        return [np.array_equal(model.predict(noise[number]).labels, alone[number]) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        assert all(itertools.chain(*pool.map(predict_often, range(8))))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training == (training and module is not frozen) for module in model.modules())
    assert not predicting._evaluating_now


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_two_models_in_four_threads(fast):
    """Blind spot: a thread that is given what another made for its size, or another model made: positions, biases, rotations. Each of the
    two models, of several sizes, in two threads at once, to the bit what it gives alone."""
    configs = [small_config(name).with_("input", size=(64, 64)) for name in ("midas-3.1-beit-base-384", "chmv2")]
    models = [dpt.accelerate(model) if fast else model for model in map(randomise, map(dpt.build, configs))]
    noise = [_noise(32 + 16 * (seed % 3), 48 + 16 * (seed // 3), seed) for seed in range(6)]
    alone = [[model.predict(image).depth for image in noise] for model in models]
    start = threading.Barrier(4)

    def predict_all(number):
        which, order = number % 2, range(6) if number < 2 else range(5, -1, -1)
        start.wait()
        return [np.array_equal(models[which].predict(noise[index]).depth, alone[which][index]) for index in [*order] * 3]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads change between any two lines
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(itertools.chain(*pool.map(predict_all, range(4))))
    finally:
        sys.setswitchinterval(interval)


def test_bad_pictures_do_not_stop_the_rest(tmp_path):
    """Blind spot: one bad file loses its batch, its neighbours' order, or its own name."""
    model = Stub(_config("depth"), _ramp)
    sources = []
    for name, (write, _) in pictures.BAD.items():
        write(tmp_path / name)
        sources += [_noise(32, 40), tmp_path / name]
    sources += [np.zeros((1, 5000, 3), np.uint8), None, _noise(40, 32)]
    results = list(predicting.predict_iter(model, sources, batch_size=3))
    assert [result.source is source for result, source in zip(results, sources, strict=True)] == [True] * len(sources)
    for result in results:
        good = isinstance(result.source, np.ndarray) and result.source.shape[0] > 1
        assert (result.prediction is not None) == (result.image is not None) == good == (result.error is None)
        if not good:
            assert isinstance(result.error, images.ImageError | TypeError)
    assert len([result for result in results if result.error is None]) == len(pictures.BAD) + 1
    with pytest.raises(images.ImageError, match="truncated.jpg"):
        predicting.predict(model, sources)


def test_memory_running_out_is_one_pictures_error():
    """Blind spot: one huge picture ends a run of a thousand. A stub's exception, not a device's."""

    def function(x):
        if x.shape[3] > 500:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x.mean(1)

    results = list(predicting.predict_iter(Stub(_config("depth"), function), [_noise(32, 32), _noise(32, 600), _noise(32, 32)]))
    assert [result.error is None for result in results] == [True, False, True]
    assert "batch size" in str(results[1].error)


def test_reading_ahead_is_bounded():
    """Blind spot: a list of ten thousand pictures is read into memory at once."""
    taken = []

    def sources():
        for number in range(1000):
            taken.append(number)
            yield _noise(32, 32)

    results = predicting.predict_iter(Stub(_config("depth"), _ramp), sources(), batch_size=2)
    for _ in range(6):
        next(results)
    assert len(taken) <= 12
    results.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(depth_model, dtype):
    """Blind spot: half-precision maps in the result, or a resize in half precision. The error is relative to the map's deviation from
    its mean; it was 2 to 4 of the dtype's steps with three pictures, in both dtypes."""
    model = copy.deepcopy(depth_model).to(dtype)
    wanted, depth = depth_model.predict(_noise(40, 40)).depth, model.predict(_noise(40, 40)).depth
    assert depth.dtype == np.float32
    assert not np.array_equal(depth, torch.from_numpy(depth).to(dtype).float().numpy())
    assert 0 < np.sqrt(np.mean((depth - wanted) ** 2)) / wanted.std() <= 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("depth", {"scales": ()}, "scales"),
        ("depth", {"scales": (1, 0)}, "scales"),
        ("depth", {"scales": (float("nan"),)}, "scales"),
        ("depth", {"probability": True}, "probability"),
        ("depth", {"window": 40}, "multiples of 16"),
        ("depth", {"window": 0}, "window"),
        ("depth", {"window": (16, 16, 16)}, "window"),
        ("segmentation", {"window": 32, "stride": 33}, "gaps"),
        ("segmentation", {"stride": -1}, "stride"),
        ("segmentation", {"batch_size": 0}, "batch_size"),
    ],
)
def test_options_are_checked(task, options, message):
    """Blind spot: an option that is silently ignored, or fails only after the first thousand pictures."""
    with pytest.raises(ValueError, match=message):
        predicting.predict_iter(Stub(_config(task), _ramp), [], **options)
