"""What a training tells of itself. Blind spot: TensorBoard's own pages; the memory of a GPU."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dpt.data.targets import IGNORE
from dpt.inference.outputs import colored
from dpt.training import logs
from dpt.zoo import CONFIGS

DEPTH, LABELS = CONFIGS["dpt-tiny-depth"].head, CONFIGS["dpt-tiny-scenes"].head


def test_a_log_goes_on_where_the_checkpoint_is(tmp_path):
    """Blind spot: rows that stand there twice after a kill, a half line that makes the next one unreadable, what is no row."""
    path, rows = tmp_path / "log.jsonl", [{"step": step, "seconds": 1.0, "loss": 2.0, "rate": 0.1} for step in (2, 4, 4, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '[1]\n{"step": "x"}\n{"step": 7, "lo')
    log = logs.Log(tmp_path, 4)
    assert log.rows == rows[:3] and [json.loads(line) for line in path.read_text().splitlines()] == rows[:3]
    log.add({"step": 5, "seconds": 2.0, "miou": 0.5})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 4, 5]
    assert logs.Log(tmp_path, 0).rows == [] and path.read_text() == ""


def test_a_row_in_words():
    """Blind spot: a number under another's name."""
    row = {"loss": 1.23456, "rate": 6e-5, "pictures_per_second": 12.345, "memory": 8.09, "gradient": 3.0}
    assert logs.in_words(row) == "loss 1.2346, rate 6e-05, 12.3 pictures/s, 8.09 GB"


@pytest.mark.parametrize("inverse", [True, False])
def test_pictures_of_depth(inverse):
    """Blind spot: truth whose far is bright where the prediction's is dark, unknown pixels and the sky taken for near. Each row: 2 m, 1 m,
    and what is not known."""
    head = DEPTH if inverse else replace(DEPTH, inverse=False, activation="sigmoid", max_depth=9.0)
    image, truth = np.full((2, 3, 3), 7, np.uint8), np.array([[2, 1, 0], [2, 1, np.inf]], np.float32)
    found = np.array([[0.5, 1, 0.7], [0.5, 1, 0.7]] if inverse else [[2, 1, 1.5], [2, 1, 1.5]], np.float32)
    sheet = logs.sheet([(image, truth, found)], head)
    assert sheet.shape == (6, 9, 3) and (sheet[:2, :3] == 7).all() and (sheet[2:] == 255).all()
    near, far = colored(np.array([[1.0, 0.0]], np.float32), True)[0]
    assert (sheet[:2, 3] == far).all() and (sheet[:2, 4] == near).all() and (sheet[:2, 6] == far).all() and (sheet[:2, 7] == near).all()
    unknown = colored(np.array([[np.nan, 1.0, 2.0]], np.float32), True)[0, 0]
    assert (sheet[:2, 5] == unknown).all()


def test_pictures_of_labels():
    """Blind spot: pixels without a label in the first class' colour; pictures of two widths."""
    image = np.full((2, 2, 3), 100, np.uint8)
    truth, found = np.array([[0, IGNORE], [1, 1]]), np.array([[0, 0], [1, 1]], np.uint8)
    wide = (np.zeros((1, 4, 3), np.uint8), np.zeros((1, 4), int), np.zeros((1, 4), np.uint8))
    sheet = logs.sheet([(image, truth, found), wide], LABELS)
    assert sheet.shape == (6 + 5, 12, 3) and (sheet[:2, 6:] == 255).all()
    shown, predicted = sheet[:2, 2:4], sheet[:2, 4:6]
    assert (shown[0, 1] == 100).all() and (predicted[0, 1] != 100).any()
    assert (shown[0, 0] == predicted[0, 0]).all() and (shown[1] == predicted[1]).all() and (shown[0, 0] != shown[1, 0]).any()
    tint = np.array(LABELS.palette[1]) * 0.55 + 100 * 0.45
    assert np.abs(shown[1, 0] - tint).max() <= 1
