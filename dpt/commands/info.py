"""The named models: parameters, input, source and licence of their weights; or one checkpoint, told apart and described."""

from __future__ import annotations

import argparse

from ..config import DPTConfig
from ..system.endings import printable
from ..zoo import CONFIGS, PARAMETERS


def run(args: argparse.Namespace) -> int:
    if args.file is None:
        for name, config in CONFIGS.items():
            print(describe(config, PARAMETERS[name]))
        return 0
    from .. import checkpoints, factory  # PyTorch, which the list does not need

    checkpoint = checkpoints.find(args.file)
    layout = checkpoints.layout_of(checkpoint.state, checkpoint.path)
    model = factory.load(checkpoint)
    described = describe(model.config, sum(parameter.numel() for parameter in model.parameters()))
    print(printable(f"{args.file}: {layout.name} layout, {described}"))
    return 0


def describe(config: DPTConfig, parameters: int) -> str:
    """One line: name, task, parameters in millions, input size, weights."""
    head = config.head
    depth = "metres" if head.metric else "inverse depth" if head.inverse else "relative depth"
    what = f"{len(head.classes)} classes" if head.task == "segmentation" else depth
    size = "x".join(map(str, config.input.size))
    source = f"weights {config.source} ({config.licence})"
    return f"{config.name:18} {head.task:13} {what:14} {parameters / 1e6:6.1f} M  input {size:9} {source}"
