"""Render the scenes that the carried models are trained, validated and tested on: DIR/train, DIR/val and DIR/test."""

from __future__ import annotations

import argparse

from ..scenes.rendering import write_dataset
from ..system.endings import printable
from .arguments import SCENES


def run(args: argparse.Namespace) -> int:
    for split in args.split or SCENES:
        write_dataset(args.out / split, split, SCENES[split] if args.count is None else args.count, args.size, args.workers)
        print(f"dpt render: {printable(args.out / split)} is complete")
    return 0
