"""A video's frames: `dpt.inference.video`."""

import importlib
import itertools
import threading

import numpy as np
import pytest

from dpt.inference.images import ImageError
from dpt.inference.video import Clip, ahead, join, suffix_of, write_part

av = pytest.importorskip("av")
videos = importlib.import_module("videos")  # which needs it
make, grey, damage = videos.make, videos.grey, videos.damage


def test_frames_in_order(tmp_path):
    """Blind spot: frames in the order they are decoded, for the order they are shown."""
    clip = Clip(make(tmp_path / "clip.mp4"))
    assert (clip.count, clip.rate, clip.sound) == (30, 25, "aac")
    frames = list(clip)
    assert [frame.number for frame in frames] == list(range(30)) and all(frame.image.shape == (48, 64, 3) for frame in frames)
    assert all(abs(grey(frame.image) - 8 * frame.number % 256) < 6 for frame in frames)
    assert [float(frame.pts * clip.time_base) for frame in frames] == pytest.approx([n / 25 for n in range(30)])
    assert len(list(clip)) == 30  # a second time
    assert Clip(make(tmp_path / "mute.mkv", 3, sound=False)).sound is None


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


@pytest.mark.parametrize("sound", [True, False])
def test_parts_become_a_clip_with_its_sound(tmp_path, sound):
    """Blind spot: times that begin anew in each part; sound that ends with the pictures of one part, is coded again or out of step; a side
    that is odd."""
    clip = Clip(make(tmp_path / "clip.mp4", 50, sound, gaps=(20,)))
    parts = [tmp_path / f"{number}.nut" for number in range(3)]
    frames = iter(clip)
    for part, count in zip(parts, (20, 20, 20), strict=True):
        with part.open("wb") as file:
            chosen = ((frame.pts, frame.image[:47, :63]) for frame in itertools.islice(frames, count))
            written = write_part(file, chosen, clip)
    assert written == 10 and suffix_of(clip) == ".mp4"
    with (tmp_path / "whole.mp4").open("wb") as file:
        join(file, parts, clip, comment="made of parts")
    whole = Clip(tmp_path / "whole.mp4")
    made, given = list(whole), list(clip)
    assert [f.pts * whole.time_base for f in made] == [f.pts * clip.time_base for f in given] and made[0].image.shape == (48, 64, 3)
    assert all(abs(grey(one.image) - grey(other.image)) < 6 for one, other in zip(made, given, strict=True))
    assert whole.sound == clip.sound
    with av.open(str(tmp_path / "whole.mp4")) as opened:
        assert opened.metadata["comment"] == "made of parts"
    if sound:
        heard = [[bytes(p) for p in av.open(str(tmp_path / name)).demux(audio=0) if p.size] for name in ("clip.mp4", "whole.mp4")]
        assert heard[0] == heard[1] and len(heard[0]) > 20


def test_frames_are_decoded_and_encoded_meanwhile(tmp_path):
    """Blind spot: a clip whose decoder and encoder wait for the network, and it for them. Who asks for one finds the next decoded; and two
    frames are made before the first of them may be encoded."""
    clip, decoded = Clip(videos.make(tmp_path / "clip.mp4", 12)), threading.Event()

    def telling():
        for frame in clip:
            yield frame
            if frame.number == 1:
                decoded.set()

    frames = ahead(telling())
    first = next(frames)
    assert first.number == 0 and decoded.wait(20)
    assert [frame.number for frame in frames] == list(range(1, 12))
    made, threads = threading.Event(), set()

    class Held(np.ndarray):
        @property
        def shape(self):
            threads.add(threading.get_ident())
            assert made.wait(20), "it is encoded before the next is made"
            return super().shape

    def making():
        for number, frame in enumerate(clip):
            if number == 2:
                made.set()
            yield frame.pts, frame.image.view(Held) if number == 0 else frame.image

    with open(tmp_path / "part.nut", "wb+") as file:
        assert write_part(file, making(), clip) == 12
    assert threads and threading.get_ident() not in threads


def test_what_the_encoder_says_is_heard(tmp_path):
    """Blind spot: an error of its thread that is lost, with the frames behind it."""
    clip = Clip(videos.make(tmp_path / "clip.mp4", 12))
    kinds = [np.uint8] * 7 + [np.float32]
    with open(tmp_path / "part.nut", "wb+") as file, pytest.raises(ValueError, match="uint8"):
        write_part(file, ((number, np.zeros((48, 64, 3), kind)) for number, kind in enumerate(kinds)), clip)
