"""Of each op, in the file of its name: what is compiled of it, and what is tuned.

    compile_cases(family)   its launches, recorded: what every shipped configuration has to compile to (``compiler``)
    tuning_space()          its workloads: sizes that models have, and the candidates (``tune``)

Nobody lists the ops a second time: an op is known to the tools by its file here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType


def ops() -> list[str]:
    """The names of the ops that have a space, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem != "__init__")


def space(op: str) -> ModuleType:
    """The space of ``op``."""
    return importlib.import_module(f".{op}", __name__)
