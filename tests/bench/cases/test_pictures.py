"""The pictures' suite at the toy size: what is timed is from files to files, and a wrong map is no row."""

import numpy as np
import pytest
import torch

from bench.cases import pictures
from bench.harness import measure
from bench.harness.runner import Context, measure_case
from dpt.inference import outputs


@pytest.fixture
def context():
    return Context(torch.device("cpu"), measure.Budget(1e9), measure.Rounds(1, 1, 0.0), toy=True)


@pytest.mark.parametrize("model", ["dpt-tiny-depth", "dpt-tiny-scenes"])
def test_every_file_is_written_in_each_run(context, model, monkeypatch):
    """Blind spot: a run that finds its files there and writes none; fewer pictures than are told; one orientation alone."""
    written, write = [], outputs.write
    monkeypatch.setattr(
        outputs, "write", lambda stem, image, *rest, **options: written.append(image.shape) or write(stem, image, *rest, **options)
    )
    [case] = pictures.cases([pictures.PictureRow(model, (48, 64), (8,), 0.0)], [torch.float32])
    rows, skips = measure_case(case, pictures.CONTENDERS, context)
    assert not skips and [row.contender for row in rows] == list(pictures.CONTENDERS)
    assert all(row.status == "ok" and row.unit == "pictures" for row in rows)
    assert all(np.isclose(row.per_second, 8000 / row.p50_ms) for row in rows)  # the toy's batches are of two
    assert sorted(set(written)) == [(48, 64, 3), (64, 48, 3)] and len(written) == 2 * 3 * 8  # warmed up, judged, timed; plain and fast


@pytest.mark.parametrize(
    ("model", "wrong"), [("dpt-tiny-depth", lambda depth: depth + np.float32(1)), ("dpt-tiny-scenes", lambda labels: (labels + 1) % 5)]
)
def test_wrong_files_are_no_row(context, model, wrong, monkeypatch):
    """Blind spot: pictures a second of a pipeline that writes another picture's map, or none."""
    name = "labels" if model.endswith("scenes") else "depth"
    predicted = pictures.predict_iter

    def broken(model, images, beside=None, /, **options):
        for result in predicted(model, images, **options):
            if beside is not None:  # end to end
                object.__setattr__(result.prediction, name, wrong(getattr(result.prediction, name)))
            yield result

    [case] = pictures.cases([pictures.PictureRow(model, (48, 64), (8,), 0.0)], [torch.float32])
    opened = case.open(context)
    exact, plain = opened.exact(), opened.prepare("plain, network alone").judged()
    monkeypatch.setattr(pictures, "predict_iter", broken)
    found = opened.prepare("plain, end to end").judged()
    assert pictures.parity.judge(plain, exact, plain, torch.float32).problem is None
    assert pictures.parity.judge(found, exact, plain, torch.float32).problem
