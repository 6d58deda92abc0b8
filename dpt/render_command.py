"""Render the scenes that the carried models are trained, validated and tested on: DIR/train, DIR/val and DIR/test."""

from __future__ import annotations

import argparse
from pathlib import Path

from .endings import printable
from .scenes import write_dataset

COUNTS = {"val": 300, "test": 500, "train": 9000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", required=True, type=Path, metavar="DIR", help="an unfinished data set there is completed")
    parser.add_argument("--split", action="append", choices=COUNTS, help="can be repeated (default: all three)")
    parser.add_argument("--count", type=int, metavar="N", help=f"pictures a split (default: {COUNTS})")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS", help="side of the square pictures (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    for split in args.split or COUNTS:
        write_dataset(args.out / split, split, COUNTS[split] if args.count is None else args.count, args.size, args.workers)
        print(f"dpt render: {printable(args.out / split)} is complete")
    return 0
