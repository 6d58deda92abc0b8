"""`dpt predict --camera`, on pictures that FFmpeg makes up in a camera's place, and in a window that only counts."""

import sys
import time
from unittest import mock

import numpy as np
import PIL
import pytest
import torch

import dpt
from dpt.commands import live
from dpt.commands.arguments import Parser, predict
from dpt.commands.main import main
from dpt.inference import camera
from dpt.inference.images import ImageError
from dpt.inference.steady import Steady

pytest.importorskip("av")
MADE_UP = {sys.platform: ("lavfi", "testsrc=size=96x64:rate=50:duration={},realtime")}


class Counting:
    """A window that is closed after so many pictures."""

    def __init__(self, until: int = 3):
        self.until, self.pictures, self.titles, self.closed = until, [], [], False

    @property
    def open(self) -> bool:
        return len(self.pictures) < self.until

    def show(self, image: np.ndarray, title: str) -> None:
        self.pictures.append(image)
        self.titles.append(title)

    def close(self) -> None:
        self.closed = True


def arguments(*given: str):
    parser = Parser("dpt predict")
    predict(parser)
    return parser.parse_args(["--camera", "9", *given])


def test_shown_until_the_window_is_closed(monkeypatch, capsys):
    """Blind spot: a camera that goes on behind the window; maps of other pictures than those beside them."""
    window = Counting()
    monkeypatch.setattr(camera, "DEVICES", MADE_UP)
    monkeypatch.setattr(live, "Window", lambda: window)
    assert main(["predict", "--camera", "20", "--model", "dpt-tiny-scenes"]) == 0
    model = dpt.build("dpt-tiny-scenes", weights="pretrained")
    assert len(window.pictures) == 3 and window.closed and "a second" in window.titles[0]
    for shown in window.pictures:
        frame = np.ascontiguousarray(shown[:, :96])
        wanted = live.view_of(frame, model.predict(frame).labels, model.config.head, None, "map")
        assert np.array_equal(shown[:, 96:], wanted)
    assert "dpt-tiny-scenes on testsrc" in capsys.readouterr().out


def test_options_of_the_model_are_kept(monkeypatch):
    """Blind spot: a dtype that is asked for and not given."""
    models = []
    monkeypatch.setattr(camera, "DEVICES", MADE_UP)
    monkeypatch.setattr(live, "Window", Counting)
    monkeypatch.setattr(live, "show", lambda model, *rest: models.append(model))
    assert main(["predict", "--camera", "20", "--dtype", "bfloat16"]) == 0
    (model,) = models
    assert model.config.name == "dpt-tiny-depth" and next(model.parameters()).dtype == torch.bfloat16


def test_depth_is_steady_and_its_range_follows():
    """Blind spot: colours that jump from frame to frame as each map's own range does; a range that is asked for and not kept."""
    model, pictures = dpt.build("dpt-tiny-depth", weights="pretrained"), [np.full((64, 96, 3), 90, np.uint8)] * 2
    pictures = [picture + np.arange(96, dtype=np.uint8)[None, :, None] for picture in pictures]
    pictures[1] = pictures[1][:, ::-1].copy()
    ranges = {}
    for options in ([], ["--range", "0.2,0.7"]):
        window = Counting(2)
        live.show(model, pictures, window, arguments("--view", "map", *options))
        ranges[len(options)] = window.pictures
    steady, ends = Steady(model.config.head), None
    for number, picture in enumerate(pictures):
        found = steady(model.predict(picture).depth, picture)
        own = live.range_of([found])
        ends = own if ends is None else tuple(0.9 * a + 0.1 * b for a, b in zip(ends, own, strict=True))
        shown = live.view_of(picture, found, model.config.head, ends, "map").astype(int)
        assert np.abs(ranges[0][number] - shown).max() <= 8
        assert np.array_equal(ranges[2][number], live.view_of(picture, found, model.config.head, (0.2, 0.7), "map"))


def test_what_came_while_nobody_asked_is_left_out(monkeypatch):
    """Blind spot: a window that lags behind by all that could not be predicted in time."""
    monkeypatch.setattr(camera, "DEVICES", MADE_UP)
    with camera.Camera(20) as opened:
        pictures = iter(opened)
        first = next(pictures)
        time.sleep(0.3)
        newest = opened._newest.pts
        second = next(pictures)
    assert newest > 3 and not np.array_equal(first, second)


def test_a_camera_that_ends_is_told(monkeypatch):
    monkeypatch.setattr(camera, "DEVICES", MADE_UP)
    with camera.Camera(0.05) as opened, pytest.raises(ImageError, match="gives no more pictures"):
        list(opened)


@pytest.mark.skipif(sys.platform != "linux", reason="names of cameras are of Linux")
def test_no_camera(monkeypatch, capsys):
    monkeypatch.setattr(live, "Window", Counting)
    assert main(["predict", "--camera", "97"]) == 2
    assert "/dev/video97: no camera that can be read" in capsys.readouterr().err
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["predict", "--camera", "97"]) == 2
    assert "--camera 97: cameras are read on darwin and linux, not on win32" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="displays are of X11")
def test_no_window(monkeypatch, capsys):
    pytest.importorskip("tkinter")
    monkeypatch.setenv("DISPLAY", ":197")
    assert main(["predict", "--camera", "0"]) == 2
    assert "--camera needs a window: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["photo.jpg"], "--camera shows what it sees"),
        (["-o", "out"], "--camera shows what it sees"),
        (["--camera", "x"], "'x': it must be a whole number from 0"),
    ],
)
def test_what_does_not_go_together(given, said, capsys):
    with pytest.raises(SystemExit):
        main(["predict", "--camera", "0", *given])
    assert said in capsys.readouterr().err
    for without, wanted in ((["-o", "out"], "it needs INPUT"), (["photo.jpg"], "it needs -o DIR")):
        with pytest.raises(SystemExit):
            main(["predict", *without])
        assert wanted in capsys.readouterr().err


def test_the_range_goes_with_the_maps(monkeypatch):
    """Blind spot: colours that go away from the range of new maps, or jump to it."""
    ranges, ends = iter([(0.0, 1.0), (1.0, 3.0), (1.0, 3.0)]), []
    monkeypatch.setattr(live, "range_of", lambda maps: next(ranges))
    monkeypatch.setattr(live, "view_of", lambda image, found, head, of, view: ends.append(of) or image)
    model = dpt.build("dpt-tiny-depth", weights="pretrained")
    live.show(model, [np.full((64, 96, 3), level, np.uint8) for level in (20, 90, 200)], Counting(3), arguments())
    assert np.allclose(ends, [(0, 1), (0.1, 1.2), (0.19, 1.38)])


def test_one_model_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(live, "Window", Counting)
    assert main(["predict", "--camera", "0", "--model", "dpt-tiny-depth", "--model", "dpt-tiny-scenes"]) == 2
    assert "--camera shows one model, not dpt-tiny-depth and dpt-tiny-scenes" in capsys.readouterr().err


def test_a_window_is_closed_once(monkeypatch):
    """Blind spot: a key that does not close it, or a second close of what is gone. On a stand-in for Tk."""
    tk = mock.MagicMock()
    monkeypatch.setitem(sys.modules, "tkinter", tk)
    monkeypatch.setattr(PIL, "ImageTk", mock.MagicMock(), raising=False)
    window = live.Window()
    root, label = tk.Tk.return_value, tk.Label.return_value
    assert window.open
    window.show(np.zeros((4, 5, 3), np.uint8), "dpt: 3 a second")
    root.title.assert_called_with("dpt: 3 a second")
    label.configure.assert_called_once_with(image=label.image)
    assert root.update.called and not root.destroy.called
    closing = {call.args[0]: call.args[1] for call in root.bind.call_args_list}
    closing["<Escape>"](None)
    closing["q"](None)
    root.protocol.assert_called_once_with("WM_DELETE_WINDOW", window.close)
    window.close()
    assert not window.open
    root.destroy.assert_called_once_with()
