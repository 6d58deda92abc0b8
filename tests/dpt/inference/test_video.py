"""A video's frames: `dpt.inference.video`."""

from pathlib import Path

import numpy as np
import pytest

from dpt.inference.images import ImageError
from dpt.inference.video import Clip

av = pytest.importorskip("av")


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


def test_frames_in_order(tmp_path):
    """Blind spot: frames in the order they are decoded, for the order they are shown."""
    clip = Clip(make(tmp_path / "clip.mp4"))
    assert (clip.count, clip.rate, clip.sound) == (30, 25, True)
    frames = list(clip)
    assert [frame.number for frame in frames] == list(range(30)) and all(frame.image.shape == (48, 64, 3) for frame in frames)
    assert all(abs(grey(frame.image) - 8 * frame.number % 256) < 6 for frame in frames)
    assert [float(frame.pts * clip.time_base) for frame in frames] == pytest.approx([n / 25 for n in range(30)])
    assert len(list(clip)) == 30  # a second time
    assert not Clip(make(tmp_path / "mute.mkv", 3, sound=False)).sound


def test_times_that_are_not_even(tmp_path):
    """Blind spot: frames counted for their times."""
    clip = Clip(make(tmp_path / "clip.mp4", 10, gaps=(4, 4, 7)))
    assert [round(25 * frame.pts * clip.time_base) for frame in clip] == [0, 1, 2, 3, 6, 7, 8, 10, 11, 12]


def test_broken_frames_keep_their_place(tmp_path):
    """Blind spot: a clip that ends at a broken frame; frames that move up; one that is left out without a word."""
    path = make(tmp_path / "clip.mp4")
    whole = [frame.pts for frame in Clip(path)]
    damage(path, 10, 29)
    frames = list(Clip(path))
    broken = [frame for frame in frames if frame.image is None]
    assert 1 <= len(broken) <= 6 and broken[-1].number == 29 and all(frame.error for frame in broken)
    assert [frame.pts for frame in frames] == whole and [frame.number for frame in frames] == list(range(30))
    assert all(abs(grey(frame.image) - 8 * frame.number % 256) < 6 for frame in frames[:7])


def test_a_clip_that_is_cut_short(tmp_path):
    """Blind spot: what is there before the end of a damaged file."""
    path = make(tmp_path / "clip.mkv", 60, sound=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    frames = list(Clip(path))
    assert 20 < len(frames) < 60 and all(abs(grey(f.image) - 8 * f.number % 256) < 6 for f in frames[:20])


def test_what_is_no_clip_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("text")
    with pytest.raises(ImageError, match=r"text.mp4: not a video that can be read"):
        Clip(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "tone.mp4"), "w") as container:
        audio = container.add_stream("aac", rate=16000, layout="mono")
        heard = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), format="s16", layout="mono")
        heard.sample_rate = 16000
        container.mux(audio.encode(heard))
        container.mux(audio.encode())
    with pytest.raises(ImageError, match=r"tone.mp4: has no pictures"):
        Clip(tmp_path / "tone.mp4")
    with pytest.raises(OSError, match="nothing.mp4"):
        Clip(tmp_path / "nothing.mp4")
