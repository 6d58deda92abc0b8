"""Decoding, sizes and resizes of pictures. Blind spots: real camera files and ICC profiles; GPU resizes."""

from __future__ import annotations

import io
import os
import struct
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pictures
import pytest
import torch
from PIL import Image

from dpt.classes import ade20k
from dpt.config import HALF, InputConfig
from dpt.inference import images
from dpt.inference.images import ImageError, load_image
from dpt.inference.resizing import network_size, padded, postprocess, preprocess, resize_and_normalise, without_padding
from dpt.zoo import CONFIGS

EXACT = {name for name in (*pictures.COLOR, *pictures.GREY_FILES) if name.endswith((".png", ".bmp", ".gif", ".tif", "color.webp"))}


def _config(**fields) -> InputConfig:
    return InputConfig(**{"mean": HALF, "std": HALF, "size": (384, 384), **fields})


def _close(picture: np.ndarray, wanted: np.ndarray, name: str) -> None:
    assert picture.dtype == np.uint8 and picture.shape == wanted.shape
    if name in EXACT:
        np.testing.assert_array_equal(picture, wanted)
    else:  # lossy
        assert all(
            np.abs(np.subtract(a, b)).max() <= 12 for a, b in zip(pictures.quarters(picture), pictures.quarters(wanted), strict=True)
        )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", pictures.COLOR)
def test_color_files(tmp_path, name):
    """Blind spot: a format, orientation or bit depth that turns, mirrors, clips or swaps channels without an error."""
    pictures.COLOR[name](tmp_path / name)
    _close(load_image(tmp_path / name), pictures.scene(), name)


@pytest.mark.parametrize("name", pictures.GREY_FILES)
def test_grey_files(tmp_path, name):
    """Blind spot: 16-bit and float grey clipped to white instead of scaled."""
    pictures.GREY_FILES[name](tmp_path / name)
    _close(load_image(str(tmp_path / name)), np.repeat(pictures.luma(pictures.scene())[..., None], 3, axis=2), name)


@pytest.mark.parametrize("name", pictures.RIGHT_HALF_WHITE)
def test_transparency_is_white(tmp_path, name):
    """Blind spot: the arbitrary colours under transparent pixels reach the network."""
    pictures.RIGHT_HALF_WHITE[name](tmp_path / name)
    picture = load_image(tmp_path / name)
    assert (picture[:, pictures.WIDTH // 2 :] == 255).all()
    assert pictures.quarters(picture)[::2] == [pictures.RED, pictures.BLUE]


def test_palette_transparency_is_white(tmp_path):
    """Blind spot: transparency by palette entry, which convert("RGB") drops."""
    pictures.palette_with_transparency(tmp_path / "p.png")
    assert pictures.quarters(load_image(tmp_path / "p.png")) == [pictures.RED, (255, 255, 255), pictures.BLUE, pictures.GREY]


@pytest.mark.parametrize("name", pictures.BAD)
def test_bad_files_are_named(tmp_path, name):
    """Blind spot: a decoder's own exception type, a message without the file, or a grey picture instead of an error."""
    write, reason = pictures.BAD[name]
    write(tmp_path / name)
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(tmp_path / name)
    assert name in str(caught.value)


def test_the_cause_of_an_error_is_the_systems(tmp_path):
    """Blind spot: too many open files taken for one bad picture, and the next one tried; an error that keeps what was decoded alive."""
    (tmp_path / "words.png").write_bytes(b"words")
    with pytest.raises(ImageError) as words:
        load_image(tmp_path / "words.png")
    with pytest.raises(ImageError) as missing:
        load_image(tmp_path / "missing.png")
    assert words.value.__cause__ is None
    assert type(missing.value.__cause__) is FileNotFoundError and missing.value.__cause__.__traceback__ is None


def test_sources_agree(tmp_path):
    """Blind spot: channel order and scaling of arrays, tensors, PIL images and file objects."""
    scene = pictures.scene()
    Image.fromarray(scene).save(tmp_path / "scene.png")
    stream = io.BytesIO((tmp_path / "scene.png").read_bytes())
    chw = torch.from_numpy(scene).permute(2, 0, 1)
    opaque = np.dstack([scene, np.full(scene.shape[:2], 255, np.uint8)])
    sources = [
        stream,
        Image.fromarray(scene),
        scene,
        scene.astype(np.uint16) * 257,
        scene / 255,
        (scene / 255).astype(np.float32),
        scene[:, ::-1][:, ::-1],
        opaque,
        chw,
        chw.float() / 255,
        chw.double() / 255,
    ]
    for source in sources:
        np.testing.assert_array_equal(load_image(source), scene)
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for source in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None], grey.astype(np.float16) / 255):
        np.testing.assert_array_equal(load_image(source), np.repeat(grey[..., None], 3, axis=2))
    np.testing.assert_array_equal(load_image(np.array([[False, True]]))[0, :, 0], [0, 255])
    transparent = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], dtype=np.uint8)
    np.testing.assert_array_equal(load_image(transparent)[0], [[255, 255, 255], [10, 20, 30], [204, 204, 204]])


def test_loading_does_not_alias(tmp_path):
    """Blind spot: a result that is a read-only view, or that writes through to the caller's array."""
    scene = pictures.scene()
    loaded = load_image(scene)
    loaded[:] = 0
    assert scene.any()


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((0, 5, 3), np.uint8),
        np.zeros((5, 0), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.int64),
        np.full((4, 4, 3), 2.0),
        np.full((4, 4, 3), -1.0),
        np.full((4, 4, 3), np.nan),
        torch.zeros(1, 3, 4, 4),
        io.BytesIO(b""),
        io.BytesIO(b"no picture"),
        Image.new("RGB", (0, 3)),
    ],
    ids=lambda source: getattr(source, "shape", source).__str__()[:24],
)
def test_bad_sources(source):
    """Blind spot: a 0..255 float array taken for 0..1, NaN, batches, zero-sized arrays."""
    with pytest.raises(ImageError):
        load_image(source)


@pytest.mark.parametrize(
    ("depth", "color_type", "row", "transparent", "wanted"),
    [
        (1, 0, bytes([0b01000000]), (0,), [255, 255, 255]),
        (2, 0, bytes([0b00011000]), (1,), [0, 255, 170]),
        (4, 0, bytes([0x07, 0xA0]), (7,), [0, 255, 170]),
        (8, 0, bytes([0, 7, 100]), (7,), [0, 255, 100]),
        (16, 0, struct.pack(">3H", 257, 1000, 1001), (1000,), [1, 255, 4]),
        (8, 2, bytes([1, 2, 3, 1, 2, 4, 9, 9, 9]), (1, 2, 3), [(255, 255, 255), (1, 2, 4), (9, 9, 9)]),
        (16, 2, struct.pack(">9H", 1000, 2000, 3000, 1000, 2000, 4000, 0, 0, 0), (1000, 2000, 3000), [(255,) * 3, (4, 8, 16), (0,) * 3]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_the_transparent_colour_of_every_bit_depth(depth, color_type, row, transparent, wanted):
    """Blind spot: tRNS, which has the file's bit depth, compared with the 8 bits that Pillow makes, or (16-bit grey) with nothing."""
    file = pictures.png(3, 1, depth, color_type, b"\0" + row, struct.pack(f">{len(transparent)}H", *transparent))
    assert [tuple(pixel) for pixel in load_image(io.BytesIO(file))[0].tolist()] == [w if isinstance(w, tuple) else (w,) * 3 for w in wanted]


def test_floats_may_pass_their_ends_by_a_thousandth():
    """Blind spot: a resize's overshoot refused; 0 to 2 or -1 to 1 cut off without a word."""
    assert load_image(np.float32([[-0.0009, 1.0009]]))[0, :, 0].tolist() == [0, 255]
    for value in (-0.0011, 1.0011):
        with pytest.raises(ImageError, match=r"floats are wanted in 0\.\.1, not"):
            load_image(np.float32([[0.5, value]]))


def test_other_types_are_refused():
    """Blind spot: None or a number failing deep inside with another message."""
    with pytest.raises(TypeError, match="a picture is"):
        load_image(None)


SIZES = [  # rule, size, multiple, pad, picture (h, w), network (h, w); worked out by hand from the upstream formulas
    ("minimal", (384, 384), 32, "none", (480, 640), (384, 512)),
    ("minimal", (384, 384), 32, "none", (640, 480), (512, 384)),
    ("minimal", (384, 384), 32, "none", (1080, 1920), (384, 672)),  # 682.7 is nearer to 672 than to 704
    ("minimal", (384, 384), 32, "none", (100, 300), (128, 384)),  # scales 3.84 and 1.28: 1.28
    ("minimal", (384, 384), 32, "none", (1, 1000), (32, 384)),  # 0.4 rounds to 0 in MiDaS, which then fails
    ("minimal", (480, 480), 32, "none", (240, 400), (288, 480)),
    ("lower_bound", (518, 518), 14, "none", (600, 800), (518, 686)),  # 690.7: 49 patches
    ("lower_bound", (518, 518), 14, "none", (800, 600), (686, 518)),
    ("lower_bound", (384, 384), 14, "none", (384, 384), (392, 392)),  # 27.4 patches would be 378, below the bound
    ("upper_bound", (384, 384), 14, "none", (384, 384), (378, 378)),
    ("upper_bound", (380, 380), 32, "none", (380, 380), (352, 352)),  # 384 is nearest and above the bound
    ("lower_bound", (384, 384), 32, "none", (404, 400), (384, 384)),  # 387.8: 384 is nearest and not below the bound
    ("upper_bound", (384, 384), 32, "none", (400, 404), (384, 384)),  # 380.2: 384 is nearest and not above the bound
    ("short_side", (256, 256), 16, "none", (384, 384), (256, 256)),
    ("short_side", (256, 256), 16, "none", (375, 500), (256, 336)),  # 341.3
    ("short_side", (256, 256), 16, "none", (1, 1), (256, 256)),
    ("short_and_long_side", (512, 2048), 16, "corner", (512, 683), (512, 683)),
    ("short_and_long_side", (512, 2048), 16, "corner", (300, 400), (512, 683)),  # 682.7
    ("short_and_long_side", (512, 2048), 16, "corner", (400, 300), (683, 512)),
    ("short_and_long_side", (512, 2048), 16, "corner", (300, 2400), (256, 2048)),  # the long side decides
    ("short_and_long_side", (512, 2048), 16, "corner", (1, 100_000), (1, 2048)),
    ("square", (384, 512), 16, "none", (77, 1000), (384, 512)),
    ("none", (490, 644), 14, "centre", (97, 131), (97, 131)),
    ("none", (490, 644), 14, "none", (97, 131), (98, 126)),
]


@pytest.mark.parametrize(("rule", "size", "multiple", "pad", "picture", "network"), SIZES)
def test_network_size(rule, size, multiple, pad, picture, network):
    """Blind spot: a rule off by one multiple, swapped sides, a size of 0."""
    assert network_size(*picture, _config(rule=rule, size=size, multiple=multiple, pad=pad)) == network


def test_network_size_ratio():
    """Blind spot: at another test-time scale another side decides, and a larger ratio gives a smaller picture."""
    minimal = _config(multiple=32)
    sizes = [network_size(400, 1000, minimal, ratio) for ratio in (0.5, 1.0, 1.75)]
    assert sizes == [(192, 480), (384, 960), (672, 1664)]  # 0.96 of the picture, times the ratio, to multiples of 32
    base = CONFIGS["dpt-base-ade20k"].input
    assert network_size(300, 400, base, 0.75) == (384, 512)  # mmsegmentation: (1536, 384)


def test_network_size_of_the_longest_side():
    """Blind spot: one rounding for two, a multiple between two that goes to the even one, a side that becomes nothing."""
    config = CONFIGS["depth-anything-3-mono-large"].input
    assert network_size(1080, 1920, config) == (280, 504)  # 283.5 to 284, nearer to 280
    assert network_size(35, 504, config) == (42, 504) and network_size(63, 504, config) == (70, 504)
    assert network_size(504, 1, config) == (504, 14)
    assert network_size(100, 200, config, 0.5) == (126, 252)
    with pytest.raises(ValueError, match="antialias=True: mode=area_cubic averages by itself"):
        _config(mode="area_cubic", antialias=True)


def test_network_size_errors():
    """Blind spot: a 1x100000 picture eats all memory; a misspelt rule does nothing."""
    with pytest.raises(ImageError, match="elongated"):
        network_size(1, 100_000, CONFIGS["dpt-tiny-depth"].input)
    with pytest.raises(ImageError, match="zero"):
        network_size(0, 5, _config())
    with pytest.raises(ValueError, match="'shortest'"):
        network_size(5, 5, _config(rule="shortest"))


def test_every_model_accepts_its_own_sizes():
    """Blind spot: a configuration whose multiple does not fit its patch size."""
    for config in CONFIGS.values():
        for height, width in ((1, 1), (37, 91), (1000, 333)):
            x, _ = preprocess(np.zeros((height, width, 3), np.uint8), config.input)
            assert all(side > 0 and side % config.encoder.patch_size == 0 for side in x.shape[2:]), config.name


# OpenCV 4.10, cv2.resize(..., INTER_CUBIC) of the row / 255 in float64, from 6 pixels to 9 and to 4
ROW = [0, 230, 26, 153, 76, 255]
CUBIC_9 = [-0.07829518, 0.52598039, 0.8567947, 0.18920179, 0.30428922, 0.58770862, 0.28908867, 0.62071078, 1.06093411]
CUBIC_4 = [0.23247549, 0.26239277, 0.55943627, 0.8303462]


@pytest.mark.parametrize("wanted", [CUBIC_9, CUBIC_4], ids=["up", "down"])
def test_cubic_is_opencv(wanted):
    """Blind spot: antialiasing, another cubic coefficient, or clipping between resize and normalisation. One row only."""
    config = _config(size=(1, len(wanted)), multiple=1, rule="square")
    x = resize_and_normalise(np.repeat(np.uint8([ROW])[..., None], 3, axis=2), config)
    np.testing.assert_allclose(x[0, 1, 0].numpy() / 2 + 0.5, wanted, atol=1e-5)


def test_antialias_averages():
    """Blind spot: a large photograph of fine stripes aliases into false ones for the carried models."""
    stripes = np.zeros((1024, 1024, 3), np.uint8)
    stripes[:, ::2] = 255
    carried = CONFIGS["dpt-tiny-depth"].input
    x, _ = preprocess(stripes, _config(size=(240, 240), mode=carried.mode, antialias=carried.antialias))
    assert x[..., 2:-2].abs().max() < 0.05  # middle grey, 0 after normalisation
    x, _ = preprocess(stripes, _config(size=(240, 240), mode=carried.mode))
    assert x[..., 2:-2].abs().max() > 0.9  # what upstream's resize makes of it


def test_normalisation_and_padding():
    """Blind spot: mean and std in the wrong unit or order; padding before normalisation, or at the top or left."""
    base = CONFIGS["dpt-base-ade20k"].input
    image = np.empty((512, 683, 3), np.uint8)
    image[:] = (200, 100, 50)
    x, content = preprocess(image, base)
    assert content == (512, 683) and x.shape == (1, 3, 512, 688)
    wanted = [(200 - 123.675) / 58.395, (100 - 116.28) / 57.12, (50 - 103.53) / 57.375]
    np.testing.assert_allclose(x[0, :, :, :683].amin((1, 2)), wanted, rtol=1e-5)
    np.testing.assert_allclose(x[0, :, :, :683].amax((1, 2)), wanted, rtol=1e-5)
    assert (x[..., 683:] == 0).all()
    assert preprocess(image, base, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert padded(torch.ones(1, 3, 16, 32), base).shape == (1, 3, 16, 32)


def test_centre_padding():
    """Blind spot: the odd row on the other side, sides swapped, or a map cut that upstream leaves whole. By hand: 11x24 to 14x28."""
    config = _config(multiple=14, rule="none", pad="centre")
    x, content = preprocess(np.full((11, 24, 3), 255, np.uint8), config)
    assert content == x.shape[2:] == (14, 28)
    assert x[0, 0, 1:12, 2:26].eq(1).all() and x.sum() == 3 * 11 * 24  # one row above and two below, two columns on either side
    depth = torch.zeros(1, 28, 56)  # of a head that makes two pixels of one
    depth[:, 0] = 1
    assert without_padding(depth, torch.empty(1, 3, 11, 24), config) is depth
    assert postprocess(depth, (28, 56), (14, 28), config)[0, 0].gt(0.4).all()


def test_what_is_cut_off_is_in_proportion():
    """Blind spot: a map twice as fine as the input cut as if it were not."""
    corner = _config(multiple=16, pad="corner")
    for scale in (1, 2):
        y = without_padding(torch.ones(1, 48 * scale, 64 * scale), torch.empty(1, 3, 40, 50), corner)
        assert y.shape == (1, 40 * scale, 50 * scale)


@pytest.mark.parametrize(("height", "width"), [(50, 70), (3, 9), (1, 1), (2, 400)])
def test_the_border_is_reflected_and_cut_off(height, width):
    """Blind spot: a border of the network's pixels, one as wide as it is high, pictures too small to be reflected so far."""
    border = [min(int(3 * np.sqrt(side / 2)), side - 1) for side in (height, width)]
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    padded = np.pad(image, ((border[0],) * 2, (border[1],) * 2, (0, 0)), mode="reflect")
    with_border, plain = _config(multiple=1, border=3.0, size=(600, 600)), _config(multiple=1, size=(600, 600))
    assert network_size(height, width, with_border) == network_size(*padded.shape[:2], plain)
    x, content = preprocess(image, with_border)
    assert torch.equal(x, preprocess(padded, plain)[0])
    expected = postprocess(x[0], content, padded.shape[:2], plain)[:, border[0] :, border[1] :][:, :height, :width]
    assert torch.equal(postprocess(x[0], content, (height, width), with_border), expected)


def test_corners_of_the_resize_on_the_way_in():
    """Blind spot: the field passed over. With the corners in their places the outermost pixels stay as they are."""
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    config = _config(size=(64, 64), rule="square", mode="bilinear", align_corners=True, multiple=1)
    x, _ = preprocess(image, config)
    np.testing.assert_allclose(x[0, :, ::63, ::63].permute(1, 2, 0), image[::4, ::6] / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("align_corners", [False, True])
def test_postprocess(mode, align_corners):
    """Blind spot: the padding bleeds into the map, swapped sides, the wrong align_corners."""
    config = _config(output_mode=mode, output_align_corners=align_corners)
    output = torch.full((1, 24, 40), 1e6)
    output[:, :20, :33] = torch.linspace(0, 1, 33)
    depth = postprocess(output, (20, 33), (41, 101), config)
    assert depth.shape == (1, 41, 101) and depth.dtype == torch.float32
    assert depth.max() <= 1.01
    if align_corners:
        np.testing.assert_allclose(depth[0, 7, [0, 25, 50, 100]], [0, 0.25, 0.5, 1], atol=0.01)
        assert depth[0, 7, 1] > 0.003  # the corner itself is the only pixel at 0
    elif mode == "bilinear":
        assert depth[0, 7, 0] == depth[0, 7, 1] == 0  # half a source pixel is repeated beyond the first centre


def test_ade20k():
    """Blind spot: a lost, doubled or shifted class or colour."""
    assert len(ade20k.CLASSES) == len(set(ade20k.CLASSES)) == len(ade20k.PALETTE) == 150
    assert {index: ade20k.CLASSES[index] for index in (0, 7, 12, 44, 58, 107, 149)} == {
        0: "wall",
        7: "bed",
        12: "person",
        44: "chest of drawers",
        58: "screen door",
        107: "washer",
        149: "flag",
    }
    assert [ade20k.PALETTE[index] for index in (0, 2, 12, 149)] == [(120, 120, 120), (6, 230, 230), (150, 5, 61), (92, 0, 255)]
    twice = [index for index, color in enumerate(ade20k.PALETTE) if ade20k.PALETTE.count(color) > 1]
    assert [ade20k.CLASSES[index] for index in twice] == ["road", "skyscraper"]  # so in the customary palette


def test_a_pipe_in_a_files_place(tmp_path, monkeypatch):
    """Blind spot: a pipe that takes a file's place between the look at it and its opening, which then waits for a writer."""
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").touch()
    status = os.stat(tmp_path / "b.png")
    monkeypatch.setattr(os, "stat", lambda path, **options: status)
    with pytest.raises(ImageError, match=r"a\.png: a pipe, not a regular file"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("extension", [".tif", ".webp", ".gif", ".png", ".jpg"])
def test_max_pixels(tmp_path, monkeypatch, recwarn, extension):
    """Blind spot: Pillow's own limits, which some decoders ask again; a limit changed for everybody, or for good. The limits are made
    small for the test."""
    path = tmp_path / f"a{extension}"
    Image.fromarray(pictures.scene()).save(path)  # 3072 pixels
    monkeypatch.setattr(images, "WARNED_PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match=r"64x48 pixels|3072 pixels"):
        load_image(path, 2000)
    with pytest.raises(ImageError, match=r"limit.*--max-pixels"):
        load_image(path, 3071)
    assert load_image(path, 3072).shape == (48, 64, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000 and not recwarn
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    meanwhile = []
    monkeypatch.setattr(images, "_scale_transparent_colour", lambda image: meanwhile.append(Image.MAX_IMAGE_PIXELS))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert load_image(path, 3072).shape == (48, 64, 3) and meanwhile == [None] and Image.MAX_IMAGE_PIXELS is None
    with pytest.raises(ImageError):
        load_image(path, 3071)


def test_max_pixels_in_threads(tmp_path, monkeypatch):
    """Blind spot: two threads that lift Pillow's limit, of which the second puts back what the first had made of it."""
    monkeypatch.setattr(images, "WARNED_PIXELS", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(images, "_scale_transparent_colour", lambda image: time.sleep(0.001))  # so that they meet
    Image.fromarray(pictures.scene()).save(tmp_path / "a.tif")
    with ThreadPoolExecutor(8) as pool:
        shapes = {picture.shape for picture in pool.map(lambda _: load_image(tmp_path / "a.tif", 3072), range(100))}
    assert shapes == {(48, 64, 3)} and Image.MAX_IMAGE_PIXELS == 1000


def test_heic(tmp_path, monkeypatch):
    """Blind spot: pillow-heif that is installed and not asked; without it, an error that does not say what is missing."""
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.fromarray(pictures.scene())).save(tmp_path / "a.heic", quality=95)
    _close(load_image(tmp_path / "a.heic"), pictures.scene(), "a.heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    images._openers.cache_clear()
    try:
        with pytest.raises(ImageError, match=r"a\.heic: a HEIC picture.*pip install 'dense-prediction-transformers\[heic\]'"):
            load_image(tmp_path / "a.heic")
    finally:
        images._openers.cache_clear()


class _Stream(io.BytesIO):
    """A file object that cannot seek, or that fails."""

    def __init__(self, content: bytes, failure: Exception | None = None) -> None:
        super().__init__(content)
        self.failure = failure

    def seek(self, *place):
        raise self.failure or io.UnsupportedOperation("seek")


def test_a_stream_that_cannot_seek():
    """Blind spot: a picture that is piped to a program."""
    file = io.BytesIO()
    Image.fromarray(pictures.scene()).save(file, "PNG")
    np.testing.assert_array_equal(load_image(_Stream(file.getvalue())), pictures.scene())


def _closed() -> io.BytesIO:
    file = io.BytesIO(b"x")
    file.close()
    return file


class _Path:
    def __init__(self, path: str | bytes) -> None:
        self.path = path

    def __fspath__(self) -> str | bytes:
        return self.path


@pytest.mark.parametrize(
    "source",
    [
        _closed(),
        io.StringIO("words"),
        _Stream(b"x", ZeroDivisionError()),
        "nul\0byte.png",
        "\ud800.png",
        "a" * 5000,
        _Path(b"/nowhere/\xff.png"),
        torch.zeros(3, 4, 4, device="meta"),
        torch.zeros(3, 4, 4, dtype=torch.complex64),
        np.array([[None]]),
        np.array([["a"]]),
        np.zeros((4, 4), "m8[s]"),
    ],
    ids=lambda source: type(source).__name__,
)
def test_nothing_but_image_errors(source):
    """Blind spot: an exception of the file object's, the path's or the array's own."""
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert caught.value.__context__ is None  # which would keep the pixels in memory for as long as the error


def test_memory_that_runs_out(tmp_path, monkeypatch):
    """Blind spot: a MemoryError of one picture that ends the run, or, while it is turned upright, leaves it lying. Simulated."""
    pictures.turned(6)(tmp_path / "a.jpg")

    def fail(*arguments):
        raise MemoryError

    for method in ("transpose", "convert"):
        with monkeypatch.context() as patch, pytest.raises(ImageError, match=r"a\.jpg: too large for this machine's memory"):
            patch.setattr(Image.Image, method, fail)
            load_image(tmp_path / "a.jpg")


def test_the_user_may_interrupt(tmp_path, monkeypatch):
    """Blind spot: Ctrl-C taken for a fault of the picture."""

    def interrupted(image):
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "_decode", interrupted)
    Image.fromarray(pictures.scene()).save(tmp_path / "a.png")
    with pytest.raises(KeyboardInterrupt):
        load_image(tmp_path / "a.png")
