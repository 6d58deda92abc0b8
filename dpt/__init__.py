"""Dense Prediction Transformers: `build`, `load`, `save`, `models`, `accelerate`, `fast_report`."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir():  # a checkout, not an installed package: the kernels stand beside this folder
    __path__.append(str(_HERE.parent))

from .checkpoints import CheckpointError, save  # noqa: E402
from .config import DPTConfig  # noqa: E402
from .factory import build, load, models  # noqa: E402
from .model import DPT  # noqa: E402
from .predict import Prediction  # noqa: E402

__version__ = "0.1.0"
__all__ = ["DPT", "CheckpointError", "DPTConfig", "Prediction", "accelerate", "build", "fast_report", "load", "models", "save"]


def __getattr__(name: str):
    if name in ("accelerate", "fast_report"):  # loaded when asked for: they import Triton
        from . import fast

        return getattr(fast, name)
    raise AttributeError(f"module 'dpt' has no attribute {name!r}")
