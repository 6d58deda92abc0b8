"""Small clips, whole and damaged."""

from pathlib import Path

import av
import numpy as np


def make(path: Path, frames: int = 30, sound: bool = True, gaps: tuple[int, ...] = ()) -> Path:
    """A clip of 64x48 whose frame n has the grey 8 * n, with a tone."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"crf": "1", "bf": "2"})
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono") if sound else None
        for number in range(frames):
            picture = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * number % 256, np.uint8), format="rgb24")
            picture.pts = number + sum(number >= gap for gap in gaps)
            container.mux(video.encode(picture))
        container.mux(video.encode())
        if audio is not None:
            tone = (8000 * np.sin(np.arange(int(16000 * frames / 25)) * 0.17)).astype(np.int16)[None]
            heard = av.AudioFrame.from_ndarray(tone, format="s16", layout="mono")
            heard.sample_rate, heard.pts = 16000, 0
            container.mux(audio.encode(heard))
            container.mux(audio.encode())
    return path


def grey(image: np.ndarray) -> float:
    return float(image.mean())


def damage(path: Path, *numbers: int) -> None:
    """Zeros in the place of what packets hold, but for how long it is."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size, packet.pts) for packet in container.demux(video=0) if packet.size]
    packets.sort(key=lambda packet: packet[2])
    content = bytearray(path.read_bytes())
    for number in numbers:
        position, size, _ = packets[number]
        content[position + 4 : position + size] = bytes(size - 4)
    path.write_bytes(content)
