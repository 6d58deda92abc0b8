"""`dpt predict` of clips, as a user calls it."""

import importlib
import io

import numpy as np
import pytest
from PIL import Image

from dpt.commands import clips
from dpt.commands.main import main
from dpt.inference.video import Clip

av = pytest.importorskip("av")
videos = importlib.import_module("videos")  # which needs it

MODEL = ("--model", "dpt-tiny-depth")


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["predict", *map(str, arguments), *MODEL])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_clip_beside_its_maps(tmp_path, capsys):
    """Blind spot: frames that are missing, or another's; sound that is lost; what is done once more."""
    path, out = videos.make(tmp_path / "clip.mp4"), tmp_path / "out"
    code, told, _ = said(capsys, path, "-o", out, "--frames", "npz")
    assert code == 0 and "30 frames" in told
    made = Clip(out / "clip_dpt-tiny-depth.mp4")
    frames = list(made)
    assert len(frames) == 30 and made.sound == "aac" and frames[0].image.shape == (48, 128, 3)
    assert all(abs(videos.grey(frame.image[:, :60]) - 8 * frame.number % 256) < 8 for frame in frames)
    with np.load(out / "clip_dpt-tiny-depth.npz") as maps:
        assert sorted(maps) == [f"{number:06}" for number in range(30)] and maps["000029"].shape == (48, 64)
    assert sorted(path.name for path in out.iterdir()) == ["clip_dpt-tiny-depth.mp4", "clip_dpt-tiny-depth.npz"]
    assert "1 done before" in said(capsys, path, "-o", out, "--frames", "npz")[1]
    code, _, _ = said(capsys, path, "-o", out, "--view", "map")
    assert code == 0 and next(iter(Clip(out / "clip_dpt-tiny-depth.mp4"))).image.shape == (48, 64, 3)


def test_frames_as_pictures_of_one_range(tmp_path, capsys):
    """Blind spot: each frame spread by itself, so that what is as far is not as bright."""
    path, out = videos.make(tmp_path / "clip.mp4", 5, sound=False), tmp_path / "out"
    said(capsys, path, "-o", out, "--frames", "png", "--range=-1000,3000")
    pictures = [np.asarray(Image.open(out / "clip_dpt-tiny-depth_frames" / f"{number:06}.png")) for number in range(5)]
    assert all(picture.shape == (48, 64) and picture.min() > 10000 and picture.max() < 30000 for picture in pictures)


def test_progress_counts_the_clips_frames(tmp_path, monkeypatch, capsys):
    """Blind spot: a bar of another clip, of no end, that stands still, or that begins anew where a run goes on."""
    bars, keep = [], clips._Maps.keep

    class Bar(clips.tqdm):
        def __init__(self, **given):
            super().__init__(**{**given, "disable": False, "file": io.StringIO()})
            bars.append(self)

    def stopping(self, number, *rest):
        if number >= 7:
            raise KeyboardInterrupt
        return keep(self, number, *rest)

    monkeypatch.setattr(clips, "PART", 5)
    monkeypatch.setattr(clips, "tqdm", Bar)
    monkeypatch.setattr(clips._Maps, "keep", stopping)
    path = videos.make(tmp_path / "clip.mp4", 12)
    assert said(capsys, path, "-o", tmp_path / "out")[0] == 130
    monkeypatch.setattr(clips._Maps, "keep", keep)
    assert said(capsys, path, "-o", tmp_path / "out")[0] == 0
    assert [(bar.desc, bar.unit, bar.total, bar.initial, bar.n) for bar in bars] == [
        ("clip.mp4", "frame", 12, 0, 7),
        ("clip.mp4", "frame", 12, 5, 12),
    ]


@pytest.mark.parametrize("after", [5, 14, 25])
def test_a_clip_that_was_stopped_goes_on(after, tmp_path, monkeypatch, capsys):
    """Blind spot: frames that are there twice or lost; another range or another mean behind the place where it was stopped."""
    monkeypatch.setattr(clips, "PART", 10)
    monkeypatch.setattr(clips, "LOOKED_AT", 7)
    path = videos.make(tmp_path / "clip.mp4")
    said(capsys, path, "-o", tmp_path / "whole", "--frames", "npz")
    keep = clips._Maps.keep

    def stopping(self, number, *rest):
        if number >= after:
            raise KeyboardInterrupt
        return keep(self, number, *rest)

    monkeypatch.setattr(clips._Maps, "keep", stopping)
    assert said(capsys, path, "-o", tmp_path / "out", "--frames", "npz")[0] == 130
    assert not (tmp_path / "out" / "clip_dpt-tiny-depth.mp4").exists()
    monkeypatch.setattr(clips._Maps, "keep", keep)
    code, told, _ = said(capsys, path, "-o", tmp_path / "out", "--frames", "npz")
    assert code == 0 and f"{30 - after // 10 * 10} frames" in told
    with np.load(tmp_path / "whole" / "clip_dpt-tiny-depth.npz") as whole, np.load(tmp_path / "out" / "clip_dpt-tiny-depth.npz") as out:
        assert sorted(whole) == sorted(out) and all(np.allclose(whole[name], out[name], atol=1e-4) for name in whole)
    one, other = (list(Clip(tmp_path / folder / "clip_dpt-tiny-depth.mp4")) for folder in ("whole", "out"))
    assert [frame.pts for frame in one] == [frame.pts for frame in other]
    assert all(np.abs(a.image.astype(int) - b.image).mean() < 2 for a, b in zip(one, other, strict=True))


def test_broken_frames_are_named_and_bridged(tmp_path, capsys):
    """Blind spot: a clip that ends where a frame is broken; one that is shorter than its sound."""
    path = videos.make(tmp_path / "clip.mp4")
    videos.damage(path, 10)
    code, _, err = said(capsys, path, "-o", tmp_path / "out")
    assert code == 0 and "clip.mp4: frame 10, at 0.40 s: " in err and "it has the map of the one before" in err
    assert len(list(Clip(tmp_path / "out" / "clip_dpt-tiny-depth.mp4"))) == 30


def test_what_is_no_clip_is_named_and_nothing_replaced(tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("text")
    good, out = videos.make(tmp_path / "good.mp4", 3), tmp_path / "out"
    out.mkdir()
    code, _, err = said(capsys, tmp_path / "text.mp4", good, "-o", out)
    assert code == 1 and "text.mp4: not a video that can be read" in err and (out / "good_dpt-tiny-depth.mp4").exists()
    videos.make(out / "other_dpt-tiny-depth.mp4", 3)
    other = videos.make(tmp_path / "other.mp4", 4)
    before = (out / "other_dpt-tiny-depth.mp4").read_bytes()
    code, _, err = said(capsys, other, "-o", out)
    assert code == 1 and "was not made by dpt predict" in err and (out / "other_dpt-tiny-depth.mp4").read_bytes() == before
    assert said(capsys, other, "-o", out, "--overwrite")[0] == 0
