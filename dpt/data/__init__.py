"""Data sets as they lie on the disk, and what a training sees of them: `open_data`.

It is loaded when asked for: the table of kinds needs no PyTorch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .datasets import open_data

__all__ = ["open_data"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name != "open_data":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .datasets import open_data

        return open_data
