"""Packages that exporting needs beside PyTorch."""

from __future__ import annotations

import importlib.util


class MissingPackage(ImportError):
    """A package of the extra `export` that is not installed, or a compiler; the message says how to get it."""


def needed(*names: str) -> None:
    """MissingPackage unless all of them can be imported."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackage(f"{' and '.join(missing)} must be installed for that: pip install '.[export]'")
