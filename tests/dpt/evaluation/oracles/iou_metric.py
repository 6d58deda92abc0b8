"""What mmsegmentation's own IoUMetric says of made-up label maps, for iou_metric.npz: `python tests/dpt/evaluation/oracles/iou_metric.py`.

It needs the environment of mmsegmentation.py, which tests/dpt/nets/oracles/README.md says how to make. The test makes the same maps anew.
"""

from pathlib import Path
from unittest import mock

import numpy as np
import torch

CASES = {  # name: classes, pictures, (height, width), seed, classes that never occur, percent of pixels that are ignored, repeats
    "few": (5, 3, (20, 30), 0, (), 10, 1),
    "absent": (7, 4, (16, 16), 1, (4, 6), 30, 1),
    "many": (150, 6, (97, 61), 2, (149,), 5, 1),
    "large": (3, 2, (300, 400), 3, (), 1, 9000),  # sums of 7e8: float32 has lost digits of them that are printed
}


def maps(classes, pictures, size, seed, absent, ignored):
    """Pairs of int64 maps (H, W), prediction and labels, made of the generator's raw numbers, which no version of NumPy changes."""
    bits = np.random.PCG64(seed)
    known = np.setdiff1d(np.arange(classes), absent)
    for _ in range(pictures):
        first, second, third = ((bits.random_raw(size[0] * size[1]).reshape(size) >> np.uint64(11)).astype(np.int64) for _ in range(3))
        labels = known[first % len(known) ** 2 % len(known)]
        found = np.where(third % 1000 < 600, labels, known[second % len(known)])
        yield found, np.where(third % 100 < ignored, 255, labels)


def main():
    from mmseg.evaluation.metrics.iou_metric import IoUMetric

    found = {}
    for name, (classes, *case, repeats) in CASES.items():
        metric = IoUMetric(iou_metrics=["mIoU"])
        metric.dataset_meta = {"classes": [f"class {index}" for index in range(classes)]}
        for prediction, labels in maps(classes, *case):
            sample = {"pred_sem_seg": {"data": torch.from_numpy(prediction)[None]}, "gt_sem_seg": {"data": torch.from_numpy(labels)[None]}}
            metric.process({}, [sample])
        columns = {}
        with mock.patch("mmseg.evaluation.metrics.iou_metric.PrettyTable") as table:
            table.return_value.add_column = columns.__setitem__
            table.return_value.get_string = lambda: ""
            figures = metric.compute_metrics(metric.results * repeats)
        found[name] = np.array([figures[key] for key in ("mIoU", "mAcc", "aAcc")])
        found[f"{name} classes"] = np.stack([columns["IoU"], columns["Acc"]])
        print(name, figures)
    np.savez_compressed(Path(__file__).with_suffix(".npz"), **found)


if __name__ == "__main__":
    main()
