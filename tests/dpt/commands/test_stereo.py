"""`dpt stereo`, as a user calls it."""

import numpy as np
import pytest
from PIL import Image

import dpt
from dpt.commands.demo import PICTURES
from dpt.commands.main import main
from dpt.inference.images import load_image
from dpt.inference.stereo import anaglyph, views

PICTURE = str(PICTURES[0])


def test_pair_and_anaglyph(tmp_path, capsys):
    """Blind spot: eyes that are the wrong way round; a disparity that is not obeyed; an anaglyph of other views."""
    model = dpt.build("dpt-tiny-depth", weights="pretrained")
    image, depth = load_image(PICTURE), model.predict(PICTURE).depth
    left, right = views(image, depth, model.config.head, 0.05)
    out = tmp_path / "seen.png"
    for options, wanted in (
        ([], np.concatenate((left, right), axis=1)),
        (["--crossed"], np.concatenate((right, left), axis=1)),
        (["--anaglyph"], anaglyph(left, right)),
    ):
        assert main(["stereo", PICTURE, "-o", str(out), "--disparity", "0.05", *options]) == 0
        assert np.array_equal(np.asarray(Image.open(out)), wanted)
        assert f"{wanted.shape[1]}x{wanted.shape[0]} pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-o", "seen.jpg"], "DST must end in .png"),
        (["-o", "seen.png", "--anaglyph", "--crossed"], "--crossed is of two pictures"),
        (["-o", "seen.png", "--disparity", "0.6"], "'0.6': it must be above 0 and below 0.5"),
    ],
)
def test_what_cannot_be_is_told(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["stereo", PICTURE, *options])
    assert ended.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())
