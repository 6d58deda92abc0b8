"""`dpt info`: the named models, what they predict, and under which licence; or one checkpoint, told apart and described."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..config import DPTConfig, HeadConfig
from ..system.endings import printable
from ..zoo import CONFIGS, PARAMETERS, models


def run(args: argparse.Namespace) -> int:
    what = args.what
    if what is None or what in CONFIGS or (set(what) & set("*?[") and not Path(what).exists()):
        for name in models("*" if what is None else what):
            print(describe(CONFIGS[name], PARAMETERS[name]))
        return 0
    from .. import checkpoints, factory  # PyTorch, which the list does not need

    checkpoint = checkpoints.find(what)
    layout = checkpoints.layout_of(checkpoint.state, checkpoint.path)
    model = factory.load(checkpoint, args.model)
    described = describe(model.config, sum(parameter.numel() for parameter in model.parameters()))
    print(printable(f"{what}: {layout.name} layout, {described}"))
    return 0


def describe(config: DPTConfig, parameters: int) -> str:
    """One line: name, task, what it predicts, parameters in millions, input size, weights."""
    tasks, what = (", ".join(texts) for texts in zip(*((head.task, _predicted(head)) for head in config.heads), strict=True))
    size = "x".join(map(str, config.input.size))
    source = f"weights {' and '.join(config.addresses) or config.source} ({config.licence})"
    return f"{config.name:{_WIDTH}} {tasks:13} {what:14} {parameters / 1e6:6.1f} M  input {size:9} {source}"


def _predicted(head: HeadConfig) -> str:
    depth = "metres" if head.metric else "inverse depth" if head.inverse else "relative depth"
    return {"depth": depth, "segmentation": f"{len(head.classes)} classes", "normals": "unit vectors"}[head.task]


_WIDTH = max(map(len, CONFIGS))
