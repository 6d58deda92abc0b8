"""`dpt evaluate`: the metrics of a model on a folder of pictures with depth or labels, beside those of trivial predictors."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from .datasets import FolderDataset
from .factory import build, load
from .metrics import DepthMetrics, SegmentationMetrics

MAX_DEPTH = 80.0  # metres; what is farther counts as unknown


@torch.inference_mode()
def evaluate(model, dataset: FolderDataset, batch_size: int = 16, max_depth: float = MAX_DEPTH, progress: bool = True) -> dict[str, float]:
    """Depth: {"absrel", "rmse", "delta1"}; segmentation: {"miou", "accuracy"}; at the data set's size.

    Args:
        model: a DPT of the data set's task, in evaluation mode; or a trivial predictor: pictures (B, 3, H, W) -> output.
        max_depth: metres, depth models only.
    """
    task = dataset.task
    metrics = DepthMetrics(max_depth) if task == "depth" else SegmentationMetrics(_class_count(model, dataset))
    first = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    for images, targets in tqdm(DataLoader(dataset, batch_size), disable=not progress, desc="evaluate", unit="batch"):
        if first is not None:
            images = images.to(first.device, first.dtype)
        output = model(images).float().cpu()
        metrics.update(output if task == "depth" else output.argmax(1), targets)
    return metrics.compute()


def _class_count(model, dataset: FolderDataset) -> int:
    return len(model.config.head.classes) if hasattr(model, "config") else len(dataset.classes)


def trivial_predictors(dataset: FolderDataset, train: FolderDataset | None) -> dict:
    """The predictors a model must beat: for depth a constant, and the row (the lower, the nearer); for labels the commonest class.

    The commonest class is counted on the training set, or on `dataset` itself where there is none (which only helps it).
    """
    if dataset.task == "depth":
        return {
            "constant": lambda images: torch.ones(len(images), *images.shape[2:]),
            "row": lambda images: torch.arange(images.shape[2], dtype=torch.float32)[:, None].expand(len(images), *images.shape[2:]),
        }
    counts = torch.zeros(len(dataset.classes), dtype=torch.int64)
    source = train or dataset
    for index in range(min(len(source), 500)):
        labels = source[index][1]
        counts += torch.bincount(labels[labels != 255], minlength=len(counts))
    commonest = torch.nn.functional.one_hot(counts.argmax(), len(counts)).float()

    def most_common(images: Tensor) -> Tensor:
        return commonest[None, :, None, None].expand(len(images), -1, *images.shape[2:])

    return {"commonest class": most_common}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a named model; its carried or downloaded weights unless --weights is given")
    parser.add_argument("--weights", type=Path, help="a checkpoint file")
    parser.add_argument("--data", required=True, type=Path, help="folder of images/ beside depth/ or labels/")
    parser.add_argument("--train-data", type=Path, help="training folder, for the trivial predictor of labels")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-depth", type=float, default=MAX_DEPTH, help="metres; what is farther counts as unknown")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")


def run(args: argparse.Namespace) -> int:
    if args.weights is None and args.model is None:
        raise ValueError("evaluate needs --model NAME or --weights FILE")
    if args.weights is not None:
        model = load(args.weights, args.model, device=args.device)
    else:
        model = build(args.model, weights="pretrained", device=args.device)
    config = model.config
    dataset = FolderDataset(args.data, config.head.task, config.input)
    train = FolderDataset(args.train_data, config.head.task, config.input) if args.train_data else None
    figures = {config.name: evaluate(model, dataset, args.batch_size, args.max_depth)}
    for name, predictor in trivial_predictors(dataset, train).items():
        figures[name] = evaluate(predictor, dataset, args.batch_size, args.max_depth, progress=False)
    for name, metrics in figures.items():
        print(f"{name:24}" + "  ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()))
    if args.json:
        args.json.write_text(json.dumps({"pictures": len(dataset), "figures": figures}, indent=1) + "\n")
    return 0
