"""Depth refined by tiles: of a network worked out by hand, of the carried one on rendered scenes, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import dpt
from dpt.commands.demo import PICTURES
from dpt.evaluation.alignment import align
from dpt.inference import prediction as predicting
from dpt.inference import windows
from dpt.inference.images import load_image
from dpt.inference.resizing import network_size
from dpt.scenes import rendering
from dpt.zoo import CONFIGS


class Stub(torch.nn.Module):
    """A network whose map is a function of its input."""

    def __init__(self, config, function):
        super().__init__()
        self.config, self.function, self.sizes = config, function, []
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.head = torch.nn.Identity()

    def forward(self, x):
        self.sizes.append(tuple(x.shape[2:]))
        return self.function(x)


@pytest.fixture(scope="module")
def carried():
    return dpt.build("dpt-tiny-depth", weights="pretrained")


def test_each_tile_has_its_own_scale_and_the_whole_decides():
    """Blind spot: seams where every tile has a scale and a shift of its own; the whole's level lost, or its blur kept."""
    ramp = torch.linspace(0, 1, 512)[None, None, None].expand(1, 3, 512, 512).clone()
    ramp[..., 100:102, :] += 0.5  # a line that the whole, seen at an eighth, does not have
    generator = torch.Generator().manual_seed(0)

    def own(x):
        scale, shift = torch.rand(2, generator=generator)
        return (0.5 + scale) * x[:, 0] + shift

    model = Stub(CONFIGS["dpt-tiny-depth"], own)
    truth = ramp[:, :1]
    whole = torch.linspace(0, 1, 64)[None, None, None].expand(1, 1, 64, 64)
    found = windows.refine(model, ramp, whole, (128, 128), (64, 64))
    assert model.sizes == [(128, 128)] * 49 and found.shape == truth.shape
    line = found[..., 100:102, :].mean() - torch.cat((found[..., 84:92, :], found[..., 110:118, :]), -2).mean()
    assert 0.25 < line < 0.55
    far = torch.cat((found[..., :60, :], found[..., 150:, :]), -2) - F.interpolate(whole, size=(512, 512), mode="bicubic")[..., :422, :]
    assert far.abs().max() < 0.02  # where the tiles have nothing to say, the whole's level, and no seam


def test_what_the_network_sees(carried):
    """Blind spot: tiles of a picture that was made small before; a mirrored whole beside tiles that are not; labels of tiles."""
    image = np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)
    seen = []
    config = carried.config
    model = Stub(config, lambda x: (seen.append(x), x[:, 0])[1])
    plain = model.function, model.sizes
    depth = predicting.predict(model, image, tiles=True).depth
    assert depth.shape == (400, 500) and plain[1][0] == network_size(400, 500, config.input)
    assert set(plain[1][1:]) == {(192, 192)} and seen[1].std() > 1.2 * seen[0].std()  # noise is averaged where it is made small
    model.sizes.clear()
    predicting.predict(model, image, tiles=True, window=96, stride=96, flip=True)
    assert len(model.sizes) == 2 * (1 + 5 * 6) and set(model.sizes[1:31]) == {(96, 96)}
    small = np.random.default_rng(1).integers(0, 256, (150, 150, 3), dtype=np.uint8)
    assert np.array_equal(carried.predict(small, tiles=True).depth, carried.predict(small).depth)


def test_a_mirrored_picture_is_refined_as_itself():
    """Blind spot: tiles that are not mirrored with the whole. A network that is the same either way gives the same."""
    image = np.random.default_rng(0).integers(0, 256, (300, 384, 3), dtype=np.uint8)
    model = Stub(CONFIGS["dpt-tiny-depth"], lambda x: x[:, 0])
    one, both = (predicting.predict(model, image, tiles=True, flip=flip).depth for flip in (False, True))
    assert np.abs(one - both).max() < 0.02 * np.ptp(one)


def test_metres_of_a_focal_length_stay_metres():
    """Blind spot: the focal length of the finer picture used for the depth of the coarser one."""
    config = CONFIGS["depth-anything-3-metric-large"]
    config = replace(config, input=replace(config.input, size=(56, 56)))
    image = np.full((224, 224, 3), 128, np.uint8)
    model = Stub(config, lambda x: torch.full_like(x[:, 0], 3.0))
    whole, tiled = (predicting.predict(model, image, tiles=tiles, focal=500.0).depth for tiles in (False, True))
    assert np.allclose(whole, tiled, rtol=1e-4) and len(model.sizes) > 3


@pytest.fixture(scope="module")
def scenes():
    pytest.importorskip("pybullet")
    return [rendering.render(seed, 576) for seed in rendering.split_seeds("test", 9)[::4]]


def test_edges_are_nearer_to_the_truth(carried, scenes):
    """Blind spot: detail that is noise, or bought with the depth of the whole. Off by how much, beside edges of depth and everywhere."""
    shares = []
    for scene in scenes:
        truth = torch.from_numpy(1 / scene.depth.astype(np.float64))
        jumps = torch.from_numpy(np.log(np.minimum(scene.depth, 1e3)))[None, None]
        spread = F.max_pool2d(jumps, 9, 1, 4) + F.max_pool2d(-jumps, 9, 1, 4)
        edges = (spread > 0.3)[0, 0]
        off = []
        for tiles in (False, True):
            found = torch.from_numpy(carried.predict(scene.image, tiles=tiles).depth.astype(np.float64))
            wrong = (align(found, truth) - truth).abs()
            off.append((wrong[edges].mean(), wrong.mean()))
        shares.append([tiled / whole for whole, tiled in zip(*off, strict=True)])
    beside, everywhere = np.mean(shares, axis=0)
    assert beside < 0.97 and everywhere < 1.01


def _jumps(depth: np.ndarray, axis: int) -> np.ndarray:
    return np.abs(np.diff(depth.astype(np.float64), axis=axis)).mean(axis=1 - axis)


def _beside(depth: np.ndarray, side: int, stride: int, shift: int) -> list[float]:
    """The jumps at the edges of windows, so many pixels beside them, in units of those around."""
    found = []
    for axis in (0, 1):
        jumps = _jumps(depth, axis)
        for place in sorted({edge for start in windows._starts(depth.shape[axis], side, stride) for edge in (start - 1, start + side - 1)}):
            here = place + shift
            if 8 <= here < len(jumps) - 8:
                found.append(jumps[here] / np.median(np.r_[jumps[here - 8 : here - 1], jumps[here + 2 : here + 9]]))
    return found


def test_no_seams(carried):
    """Blind spot: a checkerboard. At the edges of tiles depth jumps no more than elsewhere, and no more than at those of sliding windows;
    and by the measure that those are held to in test_predict.py."""
    at_edges: dict[bool, list[float]] = {False: [], True: []}
    elsewhere: list[float] = []
    for path in PICTURES:
        for width, height in ((384, 384), (768, 576), (576, 384)):  # whose tiles' edges lie between pixels of the picture
            with Image.open(path) as opened:
                image = np.array(opened.convert("RGB").resize((width, height)))
            whole, tiled = (carried.predict(image, tiles=tiles).depth for tiles in (False, True))
            at_edges[True] += _beside(tiled, 192, 96, 0)
            elsewhere += [value for shift in (-24, -16, 16, 24) for value in _beside(tiled, 192, 96, shift)]
            at_edges[False] += _beside(carried.predict(image, scales=[height / 192], slide=True).depth, 192, 128, 0)
            jumps = [np.concatenate([_jumps(depth, axis) for axis in (0, 1)]) for depth in (tiled, whole)]
            assert jumps[0].max() / np.median(jumps[0]) <= 1.5 * jumps[1].max() / np.median(jumps[1])
    tiled, windowed = (np.mean(at_edges[tiles]) for tiles in (True, False))
    assert tiled <= np.mean(elsewhere) and tiled <= windowed


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("dpt-tiny-scenes", {}, "tiles refine depth; dpt-tiny-scenes predicts segmentation"),
        ("dpt-tiny-depth", {"slide": True}, "at one scale"),
        ("dpt-tiny-depth", {"scales": [1.0, 2.0]}, "at one scale"),
        ("dpt-tiny-depth", {"tta": True}, "at one scale"),
        ("dpt-tiny-depth", {"window": 100}, "multiples of 16"),
        ("dpt-tiny-depth", {"stride": 500}, "gaps"),
        ("midas-3.1-swin2-tiny-256", {}, "sees 256x256 pixels alone"),
        ("prompt-depth-anything-small", {"prompt": np.ones((4, 4))}, "a prompt is of the whole picture"),
    ],
)
def test_what_tiles_cannot_do(name, options, said):
    with pytest.raises(ValueError, match=said):
        predicting.Options.of(CONFIGS[name], tiles=True, **options)


def test_on_the_command_line(tmp_path, carried):
    """Blind spot: an option that is read and not used; results without tiles taken for those with them."""
    from dpt.commands.main import main

    command = ["predict", str(PICTURES[0]), "-o", str(tmp_path), "--model", "dpt-tiny-depth"]
    name = tmp_path / f"{PICTURES[0].stem}_dpt-tiny-depth.npy"
    labels = dpt.build("dpt-tiny-scenes", weights="pretrained").predict(load_image(PICTURES[0])).labels
    both = ["predict", str(PICTURES[0]), "-o", str(tmp_path), "--tiles"]  # carried models, of which one has labels alone
    assert main([*both, "--window", "96"]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / f"{PICTURES[0].stem}_dpt-tiny-scenes.png")), labels)
    assert main([*both, "--model", "dpt-tiny-scenes"]) == 2
    for more in ([], ["--tiles"]):
        assert main([*command, *more]) == 0
        wanted = carried.predict(load_image(PICTURES[0]), tiles=bool(more)).depth
        assert np.allclose(np.load(name), wanted, atol=1e-5)
