"""What a protocol makes of pictures and models; processes that share them; points. `test_evaluate.py` has the folder's protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from torch import nn

from dpt.commands import main
from dpt.config import HALF, InputConfig
from dpt.data.datasets import FolderDataset
from dpt.evaluation import scoring
from dpt.evaluation.points import PointPairs
from dpt.evaluation.protocols import PROTOCOLS
from dpt.evaluation.scoring import evaluate, scored
from dpt.inference.images import ImageError
from dpt.system.processes import Place
from dpt.zoo import CONFIGS

DEPTH, SCENES = CONFIGS["dpt-tiny-depth"], CONFIGS["dpt-tiny-scenes"]
METRIC = DEPTH.with_("head", inverse=False)


def protocol(name: str):
    (found,) = PROTOCOLS[name]
    return found


def write(root, metres, **more):
    """A folder of one picture whose grey is its depth, 2 levels a metre, or of several."""
    for folder in ("images", "depth"):
        (root / folder).mkdir(exist_ok=True)
    for name, depth in {"0": metres, **more}.items():
        Image.fromarray((2 * depth).astype(np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray((256 * depth).astype(np.uint16)).save(root / "depth" / f"{name}.png")


class Oracle(nn.Module):
    """A model that sees pictures as they are and says `function(metres)`; it keeps the shapes it was given, and how it was to resize."""

    def __init__(self, config, function):
        super().__init__()
        self.config = replace(config, input=InputConfig(mean=HALF, std=HALF, size=(48, 48), multiple=1, rule="none", mode="bilinear"))
        self.function, self.shapes, self.resizes, self.parameter = function, [], [], nn.Parameter(torch.zeros(()))

    def forward(self, x):
        self.shapes.append(tuple(x.shape[2:]))
        self.resizes.append((self.config.input.output_mode, self.config.input.output_align_corners))
        return self.function((x.mean(1) / 2 + 0.5) * 255 / 2)


@pytest.mark.parametrize("name", ["kitti-eigen", "kitti-eigen-zoedepth", "marigold-kitti"])
def test_kitti_is_cut_before_the_network_sees_it(tmp_path, name):
    """Blind spot: a network that sees the sky above the benchmark's crop; a truth that is another part of the picture. The truth is a slope
    in both directions, so that a shift of a pixel shows."""
    metres = 1 + np.indices((375, 1242)).sum(0) % 60
    write(tmp_path, metres, again=metres[1:, :-2])
    dataset = FolderDataset(tmp_path, METRIC.head, depth_scale=256)
    model = Oracle(METRIC, lambda metres: metres)
    found = scored(model, dataset, 2, progress=False, protocol=protocol(name))
    assert found.figures["absrel"] == pytest.approx(0, abs=1e-5) and found.pictures == 2
    assert set(model.shapes) == {(352, 1216)}
    write(tmp_path, metres, again=metres[:300])
    with pytest.raises(ValueError, match=r"again\.png: the crop of KITTI's benchmark is 1216x352 pixels, and 1242x300 are fewer"):
        evaluate(model, dataset, progress=False, protocol=protocol(name))


def test_a_data_set_that_is_cut_by_itself(tmp_path):
    """Blind spot: a validation of KITTI whose network sees whole pictures, and whose truth is cut; Garg's crop of a cut truth for that of
    all of it."""
    metres = 1 + np.indices((375, 1242)).sum(0) % 60
    write(tmp_path, metres)
    right = np.zeros(metres.shape, bool)
    right[153:371, 44:1197] = True  # Garg's crop of the whole
    Image.fromarray(np.where(right, 2 * metres, 200).astype(np.uint8)).save(tmp_path / "images" / "0.png")
    dataset, model = FolderDataset(tmp_path, METRIC.head, depth_scale=256), Oracle(METRIC, lambda metres: metres)
    dataset.crop = (352, 1216)
    assert evaluate(model, dataset, progress=False, protocol=protocol("kitti-eigen"))["absrel"] == pytest.approx(0, abs=1e-5)
    assert evaluate(model, dataset, progress=False)["absrel"] > 0.1 and dataset.crop == (352, 1216)
    assert set(model.shapes) == {(352, 1216)}


def test_a_truth_of_another_size_than_a_picture_that_is_cut_is_told(tmp_path):
    """Blind spot: a truth of other pixels, of which a part of the right size is cut out."""
    write(tmp_path, np.full((375, 1242), 5))
    Image.fromarray(np.full((376, 1242), 1000, np.uint16)).save(tmp_path / "depth" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png is \(376, 1242\), its picture \(375, 1242\)"):
        evaluate(Oracle(METRIC, abs), FolderDataset(tmp_path, METRIC.head), progress=False, protocol=protocol("kitti-eigen"))


def test_the_resize_is_the_protocols_and_afterwards_the_models(tmp_path):
    """Blind spot: a model that goes on predicting by a protocol after it was measured, or after that failed."""
    write(tmp_path, np.full((480, 640), 5))
    dataset, model = FolderDataset(tmp_path, METRIC.head, depth_scale=256), Oracle(METRIC, lambda metres: metres)
    own = model.config
    evaluate(model, dataset, progress=False, protocol=protocol("nyu-eigen"))
    evaluate(model, dataset, progress=False)
    assert model.resizes == [("bilinear", True), ("bicubic", False)] and model.config is own
    (tmp_path / "depth" / "0.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="depth"):
        evaluate(model, dataset, progress=False, protocol=protocol("nyu-eigen"))
    assert model.config is own


def test_a_limit_is_not_the_users_where_the_protocol_has_one(tmp_path):
    """Blind spot: an option that is accepted and ignored, or figures that are not the protocol's under its name."""
    write(tmp_path, np.full((480, 640), 5))
    dataset = FolderDataset(tmp_path, METRIC.head, depth_scale=256)
    with pytest.raises(ValueError, match="max_depth=4: nyu-eigen says itself that depth counts to 10 m"):
        evaluate(Oracle(METRIC, abs), dataset, max_depth=4, progress=False, protocol=protocol("nyu-eigen"))


class Run:
    """`world` processes one after the other: each gives its rows, and gets those of all the second time."""

    def __init__(self, monkeypatch, world):
        self.world, self.given = world, {}
        monkeypatch.setattr(scoring, "gathered", self._gathered)

    def _gathered(self, value):
        self.given[self.rank] = value
        if len(self.given) < self.world:
            raise InterruptedError
        return [self.given[rank] for rank in range(self.world)]

    def __call__(self, call):
        for rank in [*range(self.world), 0]:
            self.rank = rank
            try:
                found = call(Place(rank, self.world))
            except InterruptedError:
                assert rank < self.world - 1
        return found


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(model, data set, protocol) of five pictures of two sizes."""
    root = tmp_path_factory.mktemp("shared")
    slope = np.indices((48, 64)).sum(0) % 50 + 1
    write(root, slope, a=slope[::-1], b=slope[:32, :32], c=slope[:, ::-1] * 0.7, d=slope[:32, -32:])
    (root / "labels").mkdir()
    for path in (root / "images").iterdir():
        Image.fromarray(np.array(Image.open(path)) % 9).save(root / "labels" / path.name)
    models = {config.name: pictures.lively_model(config.with_("input", size=(32, 32))) for config in (DEPTH, SCENES)}
    rows = (PROTOCOLS["folder"][0], protocol("midas")), (PROTOCOLS["folder"][1],)
    return [
        (models[config.name], FolderDataset(root, config.head, depth_scale=256), row)
        for config, several in zip((DEPTH, SCENES), rows, strict=True)
        for row in several
    ]


@pytest.mark.parametrize(("batch_size", "world"), [(1, 2), (2, 2), (2, 3), (5, 2), (1, 7)])
def test_processes_together_say_what_one_says(measured, monkeypatch, batch_size, world):
    """Blind spot: pictures that are counted twice or by nobody; a sum in another order; batches of other pictures, whose rounding is
    another; a process without a picture."""
    for model, dataset, row in measured:
        alone = scored(model, dataset, batch_size, progress=False, protocol=row)
        run = Run(monkeypatch, world)
        found = run(lambda own: scored(model, dataset, batch_size, progress=False, protocol=row, own=own))  # noqa: B023
        assert found == alone and found.pictures == 5
        shares = [set(rows) for rows, _ in run.given.values()]
        assert set().union(*shares) == set(range(5)) and sum(map(len, shares)) == 5


def test_a_picture_that_one_process_cannot_use_is_told_by_all(tmp_path, monkeypatch):
    """Blind spot: processes that wait for ever for one that has ended; figures without its pictures."""
    write(tmp_path, np.full((32, 32), 5), a=np.full((32, 32), 7))
    (tmp_path / "images" / "a.png").write_bytes(b"x")
    dataset, model = FolderDataset(tmp_path, METRIC.head), Oracle(METRIC, lambda metres: metres)
    run = Run(monkeypatch, 2)
    for run.rank in (1, 0):  # it is a picture of the second's
        with pytest.raises(ImageError, match=r"a\.png: not a picture") if run.rank == 0 else pytest.raises(InterruptedError):
            evaluate(model, dataset, progress=False, own=Place(run.rank, 2))


def test_two_processes_of_torchrun_write_what_one_writes(tmp_path, capfd):
    """Blind spot: a group that is never joined, or differs from `Run` above; figures printed or written twice. With a carried model."""
    slope = np.indices((48, 64)).sum(0) % 50 + 1
    write(tmp_path, slope, a=slope[::-1], b=slope[:, ::-1])
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    command = ["evaluate", "dpt-tiny-depth", "--data", str(tmp_path), "--depth-scale", "256", "--device", "cpu", "--json"]
    assert main.main([*command, str(one)]) == 0
    alone = capfd.readouterr().out
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dpt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*start, *command, str(two)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert one.read_bytes() == two.read_bytes() and done.stdout == alone
    report = json.loads(one.read_text())
    assert report["pictures"] == 3 and len(alone.splitlines()) == len(report["figures"]) == 3


@pytest.fixture
def points(tmp_path):
    write(tmp_path, np.array([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]]), a=np.full((4, 4), 9.0))
    lines = ["picture,near_row,near_column,far_row,far_column", "0.png,0,0,1,2", "a.png,3,3,0,0", "0.png,1,1,0,2", "0.png,0,1,1,0"]
    (tmp_path / "points.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_order_of_points(points):
    """Blind spot: a picture's points taken for another's; inverse depth taken for metres. Of the four pairs that the file has, one is told
    the wrong way round, and one is of equal depth."""
    dataset = PointPairs(points, METRIC.head)
    assert dataset.names == ["0.png", "a.png"] and dataset.target(0).tolist() == [[0, 0, 1, 2], [1, 1, 0, 2], [0, 1, 1, 0]]
    assert dataset.picture(0).shape == (2, 3, 3)
    found = evaluate(Oracle(METRIC, lambda metres: metres), dataset, progress=False, protocol=protocol("midas-diw"))
    assert found == {"whdr": 2 / 4}
    inverse = PointPairs(points, DEPTH.head)
    assert evaluate(Oracle(DEPTH, lambda metres: 1 / metres), inverse, progress=False, protocol=protocol("midas-diw")) == {"whdr": 2 / 4}
    assert evaluate(Oracle(DEPTH, lambda metres: metres), inverse, progress=False, protocol=protocol("midas-diw")) == {"whdr": 3 / 4}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("0.png,0,0,1", "line 6: '0.png,0,0,1': it must be a picture and two points"),
        ("0.png,0,0,1,-1", "line 6: '0.png,0,0,1,-1': it must be"),
        ("0.png,1,1,1,1", "line 6: .* two points"),
        ("b.png,0,0,1,1", "line 6: 'b.png': no such file in .*images"),
        ("../points.csv,0,0,1,1", "line 6: '../points.csv': no such file"),
        ("a.png,0,0,1,4", "a point of a.png is outside of its 4x4 pixels"),
    ],
)
def test_points_that_cannot_be_used_are_told(points, line, said):
    """Blind spot: a point counted from the other end of the picture; a line that is passed over; a file outside of the folder."""
    with (points / "points.csv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=said):
        evaluate(Oracle(METRIC, abs), PointPairs(points, METRIC.head), progress=False, protocol=protocol("midas-diw"))


@pytest.mark.parametrize("text", ["", "picture,row\n", "picture,near_row,near_column,far_row,far_column\n"])
def test_a_file_without_points_is_told(points, text):
    """Blind spot: WHDR of nothing."""
    (points / "points.csv").write_text(text)
    with pytest.raises(ValueError, match=r"points\.csv: "):
        PointPairs(points, METRIC.head)
