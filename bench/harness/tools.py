"""Programs of the machine. Standard library only."""

from __future__ import annotations

import os
import shutil


def tool(name: str) -> str | None:
    """Where a program is: on the path, or among the CUDA toolkit's."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
