"""`dpt convert`: a checkpoint in another family's layout."""

from __future__ import annotations

import argparse
import sys

from ..exchange import convert, vit2mmseg
from ..system.disk import must_be_replaceable
from ..system.endings import CommandError, printable


def run(args: argparse.Namespace) -> int:
    if args.target.exists() and not args.overwrite:
        raise CommandError(f"{args.target} exists; --overwrite replaces it")
    if not args.target.is_dir():
        must_be_replaceable(args.target)
    source = args.source[0] if len(args.source) == 1 else args.source
    notes = vit2mmseg(source, args.target) if args.vit2mmseg else convert(source, args.target, args.to, args.model)
    for note in notes:
        print(f"dpt convert: {printable(note)}", file=sys.stderr)
    print(printable(str(args.target)))
    return 0
