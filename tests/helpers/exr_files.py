"""EXR files by hand, from the format's description (openexr.com, "OpenEXR File Layout"): scanlines, uncompressed to write, and ZIP to read.
So what one library writes is read by another, and the other way round."""

from __future__ import annotations

import struct
import zlib

import numpy as np

MAGIC = struct.pack("<II", 20000630, 2)
KINDS = {0: np.dtype("<u4"), 1: np.dtype("<f2"), 2: np.dtype("<f4")}
ROWS = {0: 1, 2: 1, 3: 16}  # of a block, by compression: none, ZIPS, ZIP


def _attribute(name: str, kind: str, value: bytes) -> bytes:
    return name.encode() + b"\0" + kind.encode() + b"\0" + struct.pack("<i", len(value)) + value


def written(
    channels: dict[str, np.ndarray], data: tuple[int, int] = (0, 0), display: tuple[int, int, int, int] | None = None, sampling: int = 1
) -> bytes:
    """A file of channels (H, W), float16 or float32, whose data window begins at `data` (x, y); `display`: left, top, right, bottom."""
    height, width = next(iter(channels.values())).shape
    window = (*data, data[0] + width - 1, data[1] + height - 1)
    codes = {dtype: code for code, dtype in KINDS.items()}
    names = sorted(channels)
    entry = {name: struct.pack("<iB3xii", codes[channels[name].dtype.newbyteorder("<")], 0, sampling, sampling) for name in names}
    header = b"".join(
        (
            _attribute("channels", "chlist", b"".join(name.encode() + b"\0" + entry[name] for name in names) + b"\0"),
            _attribute("compression", "compression", b"\0"),
            _attribute("dataWindow", "box2i", struct.pack("<4i", *window)),
            _attribute("displayWindow", "box2i", struct.pack("<4i", *(window if display is None else display))),
            _attribute("lineOrder", "lineOrder", b"\0"),
            _attribute("pixelAspectRatio", "float", struct.pack("<f", 1)),
            _attribute("screenWindowCenter", "v2f", struct.pack("<2f", 0, 0)),
            _attribute("screenWindowWidth", "float", struct.pack("<f", 1)),
        )
    )
    rows = [
        b"".join(channels[name][row].astype(channels[name].dtype.newbyteorder("<")).tobytes() for name in names) for row in range(height)
    ]
    blocks = [struct.pack("<ii", data[1] + row, len(content)) + content for row, content in enumerate(rows)]
    start = len(MAGIC) + len(header) + 1 + 8 * height
    places = [start + sum(map(len, blocks[:row])) for row in range(height)]
    return MAGIC + header + b"\0" + struct.pack(f"<{height}Q", *places) + b"".join(blocks)


def read(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, bytes]]:
    """The channels (H, W), and the header's attributes as bytes, of a file of scanlines, uncompressed or ZIP."""
    assert content[:8] == MAGIC
    place, attributes = 8, {}
    while content[place]:
        name, kind = content[place:].split(b"\0", 2)[:2]
        place += len(name) + len(kind) + 2
        (size,) = struct.unpack_from("<i", content, place)
        attributes[name.decode()] = content[place + 4 : place + 4 + size]
        place += 4 + size
    left, top, right, bottom = struct.unpack("<4i", attributes["dataWindow"])
    width, height, compression = right - left + 1, bottom - top + 1, attributes["compression"][0]
    kinds, entries = {}, attributes["channels"]
    while len(entries) > 1:
        name = entries.split(b"\0", 1)[0]
        kinds[name.decode()] = KINDS[struct.unpack_from("<i", entries, len(name) + 1)[0]]
        entries = entries[len(name) + 17 :]
    found = {name: np.empty((height, width), kind) for name, kind in kinds.items()}
    count = -(-height // ROWS[compression])
    for offset in struct.unpack_from(f"<{count}Q", content, place + 1):
        first, size = struct.unpack_from("<ii", content, offset)
        rows = range(first - top, min(first - top + ROWS[compression], height))
        whole = sum(kind.itemsize for kind in kinds.values()) * width * len(rows)
        block = content[offset + 8 : offset + 8 + size]
        block = _unzipped(block) if compression and size < whole else block
        assert len(block) == whole
        for row in rows:
            for name, kind in kinds.items():
                found[name][row] = np.frombuffer(block[: width * kind.itemsize], kind)
                block = block[width * kind.itemsize :]
    return found, attributes


def _unzipped(block: bytes) -> bytes:
    """zlib; then sums of differences; then the halves, which are the even bytes and the odd ones."""
    values = np.frombuffer(zlib.decompress(block), np.uint8).astype(np.int64)
    values[1:] -= 128
    values = (np.cumsum(values) % 256).astype(np.uint8)
    half = (len(values) + 1) // 2
    result = np.empty_like(values)
    result[::2], result[1::2] = values[:half], values[half:]
    return result.tobytes()
