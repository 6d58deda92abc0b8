"""What the commands of one picture's depth share: the depth of `arguments.single`, in metres where known distances are given."""

from __future__ import annotations

import argparse
import os
import sys

import numpy as np

from ..config import HeadConfig
from ..inference.calibration import calibrate, read_known
from ..inference.prediction import Result, predict_iter
from ..system.endings import CommandError
from ..zoo import config_of
from . import running
from .arguments import CARRIED


def depth_of(args: argparse.Namespace, command: str) -> tuple[Result, np.ndarray, HeadConfig]:
    """The picture, its depth (H, W) and the head that says what that is. CommandError where the model has none, or not of this picture."""
    device = running.device_of(args.device)
    name = args.model or (None if args.weights else CARRIED[0])
    if name is not None:
        _has_depth(name, config_of(name).head)
    model = running.model_of(args, name, device)
    head = _has_depth(model.config.name, model.config.head)
    (result,) = predict_iter(model, [args.picture], **running.choices(args))
    if result.error is not None or result.prediction is None or result.prediction.depth is None:
        raise CommandError(str(result.error)) from result.error
    if args.calibrate is None:
        return result, result.prediction.depth, head
    return result, *calibrated(result.prediction.depth, head, args.calibrate, command)


def _has_depth(name: str, head: HeadConfig) -> HeadConfig:
    if head.task != "depth":
        raise CommandError(f"{name} has no depth: its task is {head.task}")
    return head


def calibrated(depth: np.ndarray, head: HeadConfig, known: str | os.PathLike[str], command: str) -> tuple[np.ndarray, HeadConfig]:
    """Depth in metres by the known distances of a file, and the head of such; stderr hears what is left. ImageError, ValueError."""
    found = calibrate(depth, head, *read_known(known, depth.shape))
    used = f"{found.used} of {found.given} known distances used"
    print(f"dpt {command}: {used}; off by {found.residual:.3g} m in the median", file=sys.stderr)
    return found.metres(depth), found.head(head)
