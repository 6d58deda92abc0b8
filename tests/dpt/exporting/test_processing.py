"""The processing of pictures as a graph has it, beside `predict`'s."""

import numpy as np
import pytest
import torch
from PIL import Image
from small import randomise, small

import dpt
from dpt.commands.demo import PICTURES
from dpt.config import DPTConfig
from dpt.exporting import ExportError
from dpt.exporting.graphs import Graph
from dpt.exporting.processing import Processed, Side, averaged, between, covered, nominal_size
from dpt.inference import taps
from dpt.inference.resizing import network_size, resize_and_normalise
from dpt.model import DPT

SCENE = Image.open(PICTURES[0]).convert("RGB")
SIZES = ((75, 100), (230, 180), (50, 40))  # height and width: most sides grow, both shrink, both grow


def model_of(name: str) -> DPT:
    """A small model that sees a quarter of the published size."""
    config: DPTConfig = small(name).config
    if config.encoder.fixed_size is None:
        config = config.with_("input", size=tuple(side // 4 for side in config.input.size))
    return randomise(DPT(config))


def further(model: DPT) -> tuple[dict, tuple[torch.Tensor, ...]]:
    """What a model takes beside a picture, for `predict` and for the graph."""
    if model.config.decoder.prompt:
        metres = torch.linspace(1, 3, 99).reshape(9, 11)
        return {"prompt": metres}, (metres[None],)
    return ({"focal": 200.0}, (torch.tensor([200.0]),)) if model.config.head.focal else ({}, ())


# What each family's way in is: rules, paddings, modes, rounding, borders; and how far maps may be apart, of their range. In floats nothing
# but the order of sums differs; where grey levels are rounded a sum that falls between two may be a level off (one of 255).
FAMILIES = {
    "dpt-large-midas": 1e-5,
    "depth-anything-v2-small": 1e-5,
    "dpt-base-ade20k": 1e-3,  # of labels: pixels
    "zoedepth-n": 5e-4,  # of its bins; see the unit test of the border
    "prompt-depth-anything-small": 1e-5,
    "dpt-dinov2-small-nyu": 1e-5,
    "tipsv2-base": 2e-3,
    "midas-3.1-swin2-tiny-256": 1e-5,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_are_those_of_predict(name):
    """Blind spot: a resize, a padding, a border or a flip that a graph leaves out; a map of the network's size."""
    model = model_of(name)
    options, inputs = further(model)
    for height, width in SIZES:
        image = np.array(SCENE.resize((width, height)))
        wanted = model.predict(image, **options)
        graph = Graph.of(model, network_size(height, width, model.config.input), True)
        with torch.no_grad():
            found = graph.named(graph.module(torch.from_numpy(image)[None], *inputs))
        for field, maps in found.items():
            theirs, ours = getattr(wanted, field), maps[0].numpy()
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            apart = np.mean(ours != theirs) if field == "labels" else np.abs(ours - theirs).max() / np.ptp(theirs)
            assert apart <= FAMILIES[name], (field, height, width)


@pytest.mark.parametrize("name", ["depth-anything-3-metric-large", "tipsv2-base", "zoedepth-n", "dpt-tiny-depth", "dpt-large-midas"])
def test_the_network_sees_what_predict_shows_it(name):
    """Blind spot: Depth Anything 3's two resizes made one, which is forty grey levels off at edges. A level of a few values may fall to the
    next, where sums in another order do."""
    model = model_of(name)
    how = model.config.input
    mean, std = (torch.tensor(values).mul(255).view(1, 3, 1, 1) for values in (how.mean, how.std))
    for height, width in (*SIZES, (252, 196)):  # the last one halved exactly
        image = torch.from_numpy(np.array(SCENE.resize((width, height))))
        wanted = resize_and_normalise(image.numpy(), how) * std + mean
        sides = (Side.of(height, image.device), Side.of(width, image.device))
        found = Processed(model, tuple(wanted.shape[2:])).resized(image.permute(2, 0, 1)[None].float(), sides)
        off = (found - wanted).abs()
        rounded = how.grey_levels or how.mode == "area_cubic"
        assert off.max() <= (1.01 if rounded else 0.01) and (off > 0.01).double().mean() <= 0.02


def test_weights_are_those_of_the_taps():
    """Blind spot: a weight on another row, which a smooth picture hides."""
    for source, target in ((50, 32), (32, 50), (31, 31), (64, 32), (640, 37)):
        sides, eye = (Side.of(target, "cpu"), Side.of(source, "cpu")), torch.eye(source)
        for mode in ("bilinear", "bicubic"):
            for corners in (False, True):
                index, weight = taps.interpolated(source, target, mode, corners)
                wanted = torch.zeros(target, source).scatter_add_(1, index, weight)
                torch.testing.assert_close(between(*sides, mode, corners), wanted, rtol=0, atol=2e-4)  # places in float32 here
        if target <= source:
            index, weight = taps.area(source, target)
            torch.testing.assert_close(covered(*sides), torch.zeros(target, source).scatter_add_(1, index, weight), rtol=0, atol=1e-5)
        wanted = torch.nn.functional.interpolate(eye[None, None], size=(target, source), mode="bilinear", antialias=True)[0, 0]
        torch.testing.assert_close(averaged(*sides), wanted, rtol=0, atol=1e-5)


def test_a_focal_length_is_of_the_picture():
    """Blind spot: metres of a focal length in pixels of the network's input."""
    model = model_of("depth-anything-3-metric-large")
    image = torch.from_numpy(np.array(SCENE.resize((100, 75))))[None]
    graph = Processed(model, (98, 126))
    with torch.no_grad():
        one, other = graph(image, torch.tensor([100.0])), graph(image, torch.tensor([300.0]))
    torch.testing.assert_close(other, 3 * one)
    wanted = model.predict(image[0].numpy(), focal=300.0).depth
    np.testing.assert_allclose(np.median(other[0].numpy()), np.median(wanted), rtol=1e-3)  # the sky's edge falls otherwise: not all pixels


def test_sizes_that_no_network_takes_are_told():
    model = small("midas-3.1-swin2-tiny-256")
    with pytest.raises(ValueError, match="size 32x64: .* sees 64x64 alone"):
        Graph.of(model, (32, 64), False)
    with pytest.raises(ValueError, match=r"size 190x192 \(height x width\): both must be multiples of 16, the patch of dpt-tiny-depth"):
        Graph.of(dpt.build("dpt-tiny-depth"), (190, 192), False)
    assert Graph.of(small("dpt-base-ade20k"), (100, 130), True).size == (100, 130), "it is padded"
    assert nominal_size(dpt.zoo.CONFIGS["dpt-base-ade20k"]) == (512, 512)
    mirrored = DPT(small("dpt-large-midas").config.with_("input", flip=True))
    with pytest.raises(ExportError, match="averages mirrored maps that are not metres"):
        Graph.of(mirrored, None, True)
