"""Pictures of more than 8 bits, from the file to the map. Blind spots: files of cameras and of other programs; compressions that tifffile
needs imagecodecs for; OpenEXR's older and newer versions."""

from __future__ import annotations

import io
import struct
import sys
import zlib

import exr_files
import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from small import small
from staged import stage

import dpt
from dpt.inference import deep, drawing, images
from dpt.inference import prediction as predicting
from dpt.inference.images import ImageError, load, load_image
from dpt.inference.resizing import resize_and_normalise
from dpt.zoo import CONFIGS

tifffile = pytest.importorskip("tifffile")
openexr = pytest.importorskip("OpenEXR")
cv2 = pytest.importorskip("cv2")

HEIGHT, WIDTH = 21, 34
ASSOCIATED, FREE, UNKNOWN = ({"extrasamples": [kind]} for kind in ("assocalpha", "unassalpha", "unspecified"))


def noise(channels: int, dtype: str = "u2") -> np.ndarray:
    """(H, W, channels) over the whole range of a dtype."""
    values = np.random.default_rng(channels).random((HEIGHT, WIDTH, channels))
    return np.rint(values * 65535).astype(np.uint16) if dtype == "u2" else values.astype(dtype)


def tiff(values: np.ndarray, **options) -> bytes:
    file, colour = io.BytesIO(), values.ndim == 3 and values.shape[-1] > 2
    if options.get("planarconfig"):
        values = np.moveaxis(values, -1, 0)
    tifffile.imwrite(file, values, **{"photometric": "rgb" if colour else "minisblack", **options})
    return file.getvalue()


def png(values: np.ndarray) -> bytes:
    """By OpenCV, which has its colours in the other order."""
    order = [*range(values.shape[-1])[2::-1], *range(values.shape[-1])[3:]]
    written, content = cv2.imencode(".png", values[..., order])
    assert written
    return content.tobytes()


def interlaced(values: np.ndarray, kind: int) -> bytes:
    """A PNG in Adam7's seven passes."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    parts = (values[top::down, left::across] for left, top, across, down in passes)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for part in parts for row in part)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 1)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return pictures.SIGNATURE + b"".join(pictures.chunk(*one) for one in chunks)


def plain(values: np.ndarray, kind: int, transparent: bytes = b"") -> bytes:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return pictures.png(values.shape[1], values.shape[0], 16, kind, rows, transparent)


def on_white(values: np.ndarray, premultiplied: bool = False) -> np.ndarray:
    """In float64."""
    part = values / (65535.0 if values.dtype == np.uint16 else 1.0)
    colours, alpha = part[..., :-1], part[..., -1:]
    return ((colours if premultiplied else colours * alpha) + 1 - alpha).clip(0, 1)


RGB, RGBA, LA, GREY = noise(3), noise(4), noise(2), noise(1)
PALE = RGBA.copy()
PALE[..., :3] = (RGBA[..., :3] * (RGBA[..., 3:] / 65535)).astype(np.uint16)  # multiplied by their opacity
FLOAT, HALF, FLOAT_A = noise(3, "f4"), noise(3, "f2"), noise(4, "f4")
FILES = {  # a file's content, and its colours in 0..1
    "colour.png": (png(RGB), RGB / 65535),
    "colour by hand.png": (plain(RGB, 2), RGB / 65535),
    "interlaced.png": (interlaced(RGB, 2), RGB / 65535),
    "opacity.png": (png(RGBA), on_white(RGBA)),
    "interlaced opacity.png": (interlaced(RGBA, 6), on_white(RGBA)),
    "grey and opacity.png": (plain(LA, 4), on_white(LA)),
    "grey.png": (plain(GREY, 0), GREY / 65535),
    "grey.pgm": (b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + GREY.astype(">u2").tobytes(), GREY / 65535),
    "grey.tif": (tiff(GREY[..., 0]), GREY / 65535),
    "colour.tif": (tiff(RGB), RGB / 65535),
    "big-endian.tif": (tiff(RGB, byteorder=">"), RGB / 65535),
    "deflate.tif": (tiff(RGB, compression="zlib"), RGB / 65535),
    "deflate big-endian.tif": (tiff(RGB, compression="zlib", byteorder=">"), RGB / 65535),
    "predictor.tif": (tiff(RGB, compression="zlib", predictor=True), RGB / 65535),
    "strips.tif": (tiff(RGB, rowsperstrip=4), RGB / 65535),
    "tiles.tif": (tiff(RGB, tile=(16, 16)), RGB / 65535),
    "deflated tiles.tif": (tiff(RGB, tile=(16, 16), compression="zlib"), RGB / 65535),
    "planes.tif": (tiff(RGB, planarconfig="separate"), RGB / 65535),
    "planes big-endian.tif": (tiff(RGB, planarconfig="separate", byteorder=">"), RGB / 65535),
    "opacity.tif": (tiff(RGBA, **FREE), on_white(RGBA)),
    "premultiplied.tif": (tiff(PALE, **ASSOCIATED), on_white(PALE, True)),
    "a fourth channel.tif": (tiff(RGBA, **UNKNOWN), RGBA[..., :3] / 65535),
    "float grey.tif": (tiff(FLOAT[..., 0]), FLOAT[..., :1]),
    "float.tif": (tiff(FLOAT), FLOAT),
    "float big-endian.tif": (tiff(FLOAT, byteorder=">"), FLOAT),
    "float deflate.tif": (tiff(FLOAT, compression="zlib"), FLOAT),
    "float planes.tif": (tiff(FLOAT, planarconfig="separate"), FLOAT),
    "float tiles.tif": (tiff(FLOAT, tile=(16, 32)), FLOAT),
    "float opacity.tif": (tiff(FLOAT_A, **FREE), on_white(FLOAT_A)),
    "float premultiplied.tif": (tiff(FLOAT_A * 0.5, **ASSOCIATED), on_white(FLOAT_A * 0.5, True)),
    "float grey opacity.tif": (tiff(FLOAT[..., :2], **FREE), on_white(FLOAT[..., :2])),
    "half.tif": (tiff(HALF), HALF),
    "double.tif": (tiff(FLOAT.astype("f8")), FLOAT),
}


@pytest.mark.parametrize("name", FILES)
def test_every_bit_is_kept(tmp_path, name):
    """Blind spot: bytes exchanged, the upper one alone, opacity applied twice or to bytes; `image` that is not the same picture. Files by
    OpenCV, by tifffile and by hand."""
    content, wanted = FILES[name]
    (tmp_path / name).write_bytes(content)
    loaded = load(tmp_path / name)
    wanted = np.broadcast_to(wanted, (HEIGHT, WIDTH, 3))
    found = loaded.deep / (65535 if loaded.deep.dtype == np.uint16 else 1)
    assert loaded.deep.dtype == (np.float32 if name.startswith(("float", "half", "double")) else np.uint16)
    exact = not any(word in name for word in ("opacity", "premultiplied"))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-7 if exact else 0.51 / 65535)
    np.testing.assert_array_equal(loaded.image, np.rint(loaded.deep / (257 if loaded.deep.dtype == np.uint16 else 1 / 255)))


def test_one_colour_that_is_not_shown_is_of_16_bits():
    """Blind spot: tRNS compared by the upper bytes, as Pillow would."""
    values = np.array([[[1000, 2000, 3000], [1000, 2000, 3001]]], np.uint16)
    loaded = load(io.BytesIO(plain(values, 2, struct.pack(">3H", 1000, 2000, 3000))))
    assert loaded.deep.tolist() == [[[65535] * 3, [1000, 2000, 3001]]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", ["u2", "f4"])
def test_orientation_of_tiff(orientation, dtype):
    """Blind spot: a turn the wrong way in the one of both decoders that Pillow's test does not see. Against Pillow's turns."""
    values = noise(3, dtype)
    turn = images.TURNS.get(orientation)
    numbers = Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.int32).reshape(HEIGHT, WIDTH))
    order = np.array(numbers if turn is None else numbers.transpose(turn))
    loaded = load(io.BytesIO(tiff(values, extratags=[(274, "H", 1, orientation, True)])))
    np.testing.assert_array_equal(loaded.deep, values.reshape(-1, 3)[order])


def test_orientation_and_focal_length_of_png():
    """Blind spot: EXIF data that are read before there are any, or for 8 bits alone."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769)[0xA405] = 50
    content = plain(RGB, 2)
    loaded = load(io.BytesIO(content[:33] + pictures.chunk(b"eXIf", exif.tobytes()[6:]) + content[33:]))
    np.testing.assert_array_equal(loaded.deep, np.rot90(RGB, -1))
    np.testing.assert_allclose(loaded.focal, 50 * np.hypot(HEIGHT, WIDTH) / np.hypot(24, 36))


@pytest.mark.parametrize("name", ["deflated planes.tif", "colour.ppm"])
def test_what_is_of_8_bits_all_the_same(name):
    """Blind spot: the upper byte taken for the lower one too, where Pillow's decoder does not ask for the raw mode."""
    content = {
        "deflated planes.tif": lambda: tiff(RGB, planarconfig="separate", compression="zlib"),
        "colour.ppm": lambda: b"P6 %d %d 65535\n" % (WIDTH, HEIGHT) + RGB.astype(">u2").tobytes(),
    }[name]()
    loaded = load(io.BytesIO(content))
    assert loaded.deep is None and np.abs(loaded.image - RGB / 257).max() <= 1


def test_8_bits_in_16_and_in_floats_are_8():
    """Blind spot: pictures of 8 bits that come on another way than before, and so with other last digits."""
    eight = np.rint(noise(3, "f8") * 255).astype(np.uint8)
    tensor = torch.from_numpy(eight).permute(2, 0, 1)
    wide = eight.astype(np.uint16) * 257
    sources = [eight, wide, eight / 255, (eight / 255).astype("f4"), (eight / 255).astype("f2"), tensor, tensor.float() / 255]
    sources += [io.BytesIO(plain(wide, 2)), io.BytesIO(tiff(wide)), io.BytesIO(tiff(eight / np.float32(255))), Image.fromarray(eight)]
    for source in sources:
        loaded = load(source)
        np.testing.assert_array_equal(loaded.image, eight)
        assert loaded.deep is None
    wide[3, 4, 1] ^= 1
    assert load(wide).deep is not None and load(eight / 255 + 1e-6).deep is not None and load(tensor.double() / 255 * 0.99).deep is not None


LIGHT = np.float32([[-1, 0, 0.001, 0.0031308, 0.01, 0.18, 0.5, 1, 7, np.inf]])
CURVE = [0, 0, 0.01292, 0.0404499, 0.0998529, 0.4613561, 0.7353570, 1, 1, 1]  # IEC 61966-2-1, by hand


@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_exr_is_light(tmp_path, dtype):
    """Blind spot: light taken for grey levels, the curve the wrong way round, what is brighter than white wrapped or refused."""
    light = {"R": LIGHT, "G": LIGHT[:, ::-1], "B": np.zeros_like(LIGHT)}
    (tmp_path / "a.exr").write_bytes(exr_files.written({name: plane.astype(dtype) for name, plane in light.items()}))
    found = load(tmp_path / "a.exr").deep
    atol = 1e-6 if dtype == "f4" else 2e-4  # of halves of 11 bits
    np.testing.assert_allclose(found[0, :, 0], CURVE, atol=atol)
    np.testing.assert_allclose(found[0, ::-1, 1], CURVE, atol=atol)
    assert not found[..., 2].any()


def planes(names: str, prefix: str = "") -> dict[str, np.ndarray]:
    values = noise(len(names), "f4")
    return {prefix + name: np.ascontiguousarray(values[..., index]) for index, name in enumerate(names)}


def stacked(found: dict[str, np.ndarray], names: str, prefix: str = "") -> np.ndarray:
    return np.stack([found[prefix + name] for name in names], axis=-1)


def test_channels_of_exr():
    """Blind spot: channels by their order in the file, which is the alphabet's; a render's layers; opacity, by which light is
    multiplied."""
    rgb, combined = planes("RGB"), planes("RGB", "View Layer.Combined.")
    depth = {"Z": np.full((HEIGHT, WIDTH), 5, np.float32), "View Layer.Normal.X": rgb["R"]}
    np.testing.assert_array_equal(load(io.BytesIO(exr_files.written(rgb | depth))).deep, deep.srgb(stacked(rgb, "RGB")))
    np.testing.assert_array_equal(load(io.BytesIO(exr_files.written(planes("RGB", "a.") | rgb))).deep, deep.srgb(stacked(rgb, "RGB")))
    found = load(io.BytesIO(exr_files.written(combined | depth))).deep
    np.testing.assert_array_equal(found, deep.srgb(stacked(combined, "RGB", "View Layer.Combined.")))
    np.testing.assert_array_equal(load(io.BytesIO(exr_files.written(planes("Y")))).deep[..., :1], deep.srgb(stacked(planes("Y"), "Y")))
    with_alpha = planes("RGBA")
    wanted = deep.srgb(stacked(with_alpha, "RGB") + 1 - with_alpha["A"][..., None])
    np.testing.assert_allclose(load(io.BytesIO(exr_files.written(with_alpha))).deep, wanted, atol=1e-6)
    for channels, said in (
        (depth, "its channels are View Layer.Normal.X, Z: R, G and B are wanted"),
        (planes("RG"), "its channels are G, R"),
    ):
        with pytest.raises(ImageError, match=f"^the file object: cannot be decoded: {said}"):
            load(io.BytesIO(exr_files.written(channels)))
    rgb["G"][2, 3] = np.nan
    with pytest.raises(ImageError, match=r"no numbers \(NaN\)"):
        load(io.BytesIO(exr_files.written(rgb)))


@pytest.mark.parametrize(
    ("data", "display", "place"),
    [
        ((5, 3), (0, 0, 59, 39), (slice(3, 3 + HEIGHT), slice(5, 5 + WIDTH), slice(None), slice(None))),  # a part of the picture
        ((-4, -2), (0, 0, 19, 9), (slice(0, 10), slice(0, 20), slice(2, 12), slice(4, 24))),  # more than it
        ((90, 0), (100, 5, 109, 14), (slice(0, 10), slice(0, 10), slice(5, 15), slice(10, 20))),  # which begins elsewhere
        ((50, 50), (0, 0, 9, 9), None),  # beside it
    ],
)
def test_windows_of_exr(data, display, place):
    """Blind spot: a crop or an overscan for the picture, at whose size the map has to be."""
    rgb = planes("RGB")
    found = load(io.BytesIO(exr_files.written(rgb, data, display)))
    wanted = np.zeros((display[3] - display[1] + 1, display[2] - display[0] + 1, 3), np.float32)
    if place:
        wanted[place[:2]] = deep.srgb(stacked(rgb, "RGB"))[place[2:]]
    np.testing.assert_array_equal(found.image, np.rint(wanted * 255))


def by_openexr(channels: dict[str, np.ndarray], **header) -> bytes:
    file = io.BytesIO()
    kind = {"compression": openexr.ZIP_COMPRESSION, "type": openexr.scanlineimage, **header}
    openexr.File(kind, dict(channels)).write(file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["NO", "RLE", "ZIPS", "ZIP", "PIZ", "PXR24", "B44", "DWAA"])
def test_compressions_of_exr(name):
    """Blind spot: a compression that renderers choose, and OpenEXR's own way to say so."""
    rgb = planes("RGB")
    found = load(io.BytesIO(by_openexr(rgb, compression=getattr(openexr, f"{name}_COMPRESSION")))).deep
    lossy = {"PXR24": 1e-4, "DWAA": 0.1}.get(name, 0)
    np.testing.assert_allclose(found, deep.srgb(stacked(rgb, "RGB")), rtol=0, atol=lossy)


def test_a_part_that_is_damaged():
    """Blind spot: OpenEXR leaves out a part that it cannot read, and the next one's colours are taken for it."""
    file, (first, second) = io.BytesIO(), (noise(3, "f4"), noise(4, "f4"))
    kind = {"compression": openexr.NO_COMPRESSION, "type": openexr.scanlineimage}
    parts = [
        openexr.Part({**kind, "name": name}, {letter: np.ascontiguousarray(of[..., index]) for index, letter in enumerate("RGB")})
        for name, of in (("first", first), ("second", second))
    ]
    openexr.File(parts).write(file)
    content = bytearray(file.getvalue())
    np.testing.assert_array_equal(load(io.BytesIO(content)).deep, deep.srgb(first))
    place = content.index(first[0, :, 2].tobytes())  # the first row's: its length stands before it
    content[place - 4 : place] = b"\xff" * 4
    with pytest.raises(ImageError, match="its pixels are damaged"):
        load(io.BytesIO(content))


def test_limits_come_before_decoding(monkeypatch):
    """Blind spot: a file of a few bytes that takes all memory: by its size, its windows, its channels, or what is deflated in it."""
    small = planes("RGB")
    many = {f"L{number}.R": small["R"] for number in range(20)} | small
    bomb = bytearray(tiff(FLOAT, compression="zlib"))
    with tifffile.TiffFile(io.BytesIO(bomb)) as opened:
        place, size = opened.pages[0].dataoffsets[0], opened.pages[0].databytecounts[0]
    bomb[place : place + size] = zlib.compress(bytes(5_000_000)).ljust(size, b"\0")
    pixels = HEIGHT * WIDTH
    refused = {
        "34x21 pixels, .*more than the limit": (exr_files.written(small), pixels - 1),
        "1000000x1000000 pixels": (exr_files.written(small, display=(0, 0, 999_999, 999_999)), pixels),
        "34x21 pixels of 23 channels": (exr_files.written(many), 5 * pixels),
        "34x21 pixels, .*more than the limit of": (tiff(FLOAT), pixels - 1),
        "160x160 pixels": (tiff(FLOAT, tile=(160, 160)), pixels),
        "has more than the 8568 bytes": (bytes(bomb), pixels),
        "34x21 pixels, 0.0 million": (plain(RGB, 2), pixels - 1),
    }
    for said, (content, most) in refused.items():
        with monkeypatch.context() as patch, pytest.raises(ImageError, match=said):
            patch.setattr(tifffile.TiffPage, "asarray", None)
            load(io.BytesIO(content), most)
    for content in (exr_files.written(small), tiff(FLOAT), plain(RGB, 2)):
        assert load(io.BytesIO(content), pixels).deep is not None


@pytest.mark.parametrize(
    ("package", "content", "said"),
    [
        ("OpenEXR", exr_files.written({"Y": np.zeros((2, 2), np.float32)}), r"EXR needs OpenEXR: pip install '.*\[exr\]'"),
        ("tifffile", tiff(FLOAT), r"Pillow does not read this kind of TIFF, and tifffile may: pip install '.*\[tiff\]'"),
    ],
)
def test_a_package_that_is_missing(monkeypatch, package, content, said):
    """Blind spot: an ImportError, or a message that leaves one to guess. What Pillow reads alone needs neither."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImageError, match=said):
        load(io.BytesIO(content))
    for name in ("colour.png", "colour.tif", "float grey.tif", "planes.tif"):
        assert load(io.BytesIO(FILES[name][0])).deep is not None


@pytest.mark.parametrize(
    "name", ["colour.png", "opacity.png", "colour.tif", "deflate.tif", "planes.tif", "float.tif", "float deflate.tif", "a.exr"]
)
def test_cut_files_are_errors(tmp_path, name):
    """Blind spot: the missing part as black, and of the two decodings the one that does not notice."""
    content = by_openexr(planes("RGB")) if name == "a.exr" else FILES[name][0]
    (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ImageError, match=name):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tiff(FLOAT * 3), r"floats are wanted in 0\.\.1, not .*\.\.2\.9"),
        (tiff((FLOAT * 99).astype("i4")), "axes YXS, int32, photometric 2: grey or RGB is wanted, of uint8, uint16 or floats"),
        (tiff(FLOAT_A, photometric="separated"), "photometric 5"),
    ],
)
def test_other_kinds_are_named(content, said):
    """Blind spot: another kind of TIFF taken for a picture of grey levels."""
    with pytest.raises(ImageError, match=said):
        load(io.BytesIO(content))


INPUTS = {config.name: config.input for config in CONFIGS.values()}
ROUNDED = {name for name, config in INPUTS.items() if config.grey_levels or config.mode == "area_cubic"}


@pytest.mark.parametrize("size", [(40, 56), (1200, 900)], ids=["larger", "smaller"])
def test_16_bits_are_resized_as_8_are(size):
    """Blind spot: another scale, another filter, levels that are rounded on the way. 257 v of 16 bits is v of 8, to the bit where 8 bits
    are not rounded to whole levels; those are off by that rounding, of half a level: once or twice, the first under the second's weights,
    of which cubic ones are up to 1.25 in all in a row and in a column."""
    eight = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    wide, floats = (eight.int() * 257).to(torch.uint16), eight.double() / 255
    seen = {}
    for name, config in INPUTS.items():
        key = (config.rule, config.size, config.mode, config.antialias, config.align_corners, config.grey_levels, config.border, config.pad)
        if seen.setdefault(key, name) != name:
            continue
        wanted, found = resize_and_normalise(eight, config), resize_and_normalise(wide, config)
        level = 1 / (255 * min(config.std))
        if name in ROUNDED:
            assert (found - wanted).abs().max() <= (0.5 + 0.5 * 1.25**2 + 0.01) * level and not torch.equal(found, wanted), name
        else:
            assert torch.equal(found, wanted), name
        assert (resize_and_normalise(floats, config) - found).abs().max() < 1e-3 * level, name
    assert set(seen.values()) & ROUNDED and set(seen.values()) - ROUNDED


@pytest.fixture(scope="module")
def model():
    return dpt.build("dpt-tiny-depth", weights="pretrained")


def gradient() -> np.ndarray:
    """A smooth picture of ten grey levels, float64 in 0..1."""
    down, across = np.mgrid[0:96, 0:128] / 96
    light = 0.02 + 0.04 * (0.5 * down + 0.5 * np.exp(-((across - 0.7) ** 2 + (down - 0.5) ** 2) / 0.08))
    return np.stack([light, 0.9 * light, 0.8 * light], axis=-1)


@pytest.mark.parametrize("name", ["dpt-tiny-depth", "depth-anything-3-mono-large", "tipsv2-base"])
def test_16_bits_are_nearer_to_the_picture(model, name):
    """Blind spot: bits that are read and then lost: by the resize, in a batch, on the way to the device. By the inputs of models that
    round 8 bits to whole levels after a resize too."""
    model = model if name == "dpt-tiny-depth" else small(name)
    exact = gradient()
    sixteen, eight = np.rint(exact * 65535).astype(np.uint16), np.rint(exact * 255).astype(np.uint8)
    wanted = model.predict(exact).depth
    files = [sixteen, io.BytesIO(png(sixteen)), io.BytesIO(tiff(sixteen)), io.BytesIO(tiff(exact.astype("f4"))), eight]
    *near, far = (np.abs(found.depth - wanted).max() for found in model.predict(files, batch_size=5))
    assert max(near) < far / 10


def test_results_show_8_bits_and_keep_more(model):
    """Blind spot: 16 bits where a picture is shown, written or drawn upon; a picture of 8 bits in a batch with one of 16."""
    sixteen = np.rint(gradient() * 65535).astype(np.uint16)
    eight = load_image(sixteen)
    first, second = predicting.predict_iter(model, [sixteen, eight], batch_size=2)
    assert first.image.dtype == second.image.dtype == np.uint8 and second.deep is None
    np.testing.assert_array_equal(first.image, eight)
    np.testing.assert_array_equal(first.deep, sixteen)
    alone = model.predict([eight, eight], batch_size=2)[1]
    np.testing.assert_array_equal(second.prediction.depth, alone.depth)


def test_what_a_device_draws_on_is_of_8_bits(monkeypatch):
    """Blind spot: an overlay on 16 bits. Of a device that copies beside the host, which is imitated."""
    stage(monkeypatch)
    scenes = dpt.build("dpt-tiny-scenes", weights="pretrained")
    (result,) = predicting.predict_iter(scenes, [np.rint(gradient() * 65535).astype(np.uint16)], predicting.Beside(drawn=True))
    labels, shown = torch.from_numpy(result.prediction.labels), torch.from_numpy(result.image)
    wanted = drawing.drawn(labels, shown, scenes.config.head)["colours"].numpy()
    np.testing.assert_array_equal(result.drawn["segmentation"]["colours"], wanted)
