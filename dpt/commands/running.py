"""What the commands that run a model share: the device, whether it runs fused, the model, what stderr says of it, how data is read."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any, cast

import torch

from .. import devices, factory
from ..config import DPTConfig
from ..distributed import device_of_process
from ..inference.options import Choices
from ..model import DPT
from ..system.endings import CommandError
from ..system.processes import place
from ..zoo import CONFIGS, PARAMETERS


def device_of(name: str) -> torch.device:
    """The device of `--device`, of several processes that of this one, tried out. CommandError says why it cannot be used."""
    name = str(devices.automatic()) if name == "auto" else name
    try:
        device = device_of_process(torch.device(name), place())
        torch.zeros(1, device=device).item()  # which meta tensors do not have
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch built without CUDA asserts
        raise CommandError(f"--device {name} cannot be used: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    return device


def model_of(args: argparse.Namespace, name: str | None, device: torch.device, dtype: torch.dtype | None = None) -> DPT:
    """The model that `args`, of `arguments`, describe: of this name with its pretrained weights, or of --weights."""
    how: dict[str, Any] = {"device": device, "dtype": dtype, "fast": devices.runs_fast(args.fast, device)}
    if args.weights is None:
        model = factory.build(cast(str, name), weights="pretrained", accept_license=args.accept_license, **how)
    else:
        model = factory.load(args.weights, name, **how)
    if args.verbose and place().first:
        report(model)
    return model


def report(model: DPT) -> None:
    """Say which modules run fused, which do not, and why."""
    from ..fast.acceleration import fast_report

    print(f"{model.config.name}:\n{fast_report(model)}", file=sys.stderr)


def readers() -> int:
    """How many processes read pictures for each that trains: this machine's processors but one, at most 8, shared by those that train."""
    return max(min((os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1, 8), 1)


def scenes_only(configs: Iterable[DPTConfig]) -> str | None:
    """What is to be known of the carried models among those that run: what they have learnt, and which others there are."""
    carried = [config.name for config in configs if config.carried]
    if not carried:
        return None
    others = " or ".join(f"--model {name}" for name in _smallest_downloads())
    know = f"{' and '.join(carried)} know{'s' if len(carried) == 1 else ''} rendered scenes, not photographs"
    return f"{know}; for those, {others} downloads a larger model (dpt info lists them)"


def _smallest_downloads() -> list[str]:
    """Of each task the smallest model whose weights anybody may use."""
    smallest: dict[str, str] = {}
    for name in sorted(CONFIGS, key=lambda name: PARAMETERS[name]):
        config = CONFIGS[name]
        if not config.carried and not config.restricted:
            smallest.setdefault(config.head.task, name)
    return list(smallest.values())


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `FolderDataset` that a command line gives."""
    return {"depth_scale": args.depth_scale, "reduce_zero_label": args.reduce_zero_label}


def choices(args: argparse.Namespace) -> Choices:
    """The keywords of predictions that a command line gives: views, focal length and prompt, of those that the command takes."""
    return cast(Choices, {name: getattr(args, name) for name in Choices.__annotations__ if hasattr(args, name)})
