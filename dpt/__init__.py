"""Dense Prediction Transformers: `build`, `load`, `save`, `models`."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir():  # a checkout, not an installed package: the kernels stand beside this folder
    __path__.append(str(_HERE.parent))

from .checkpoints import CheckpointError, save  # noqa: E402
from .config import DPTConfig  # noqa: E402
from .factory import build, load, models  # noqa: E402
from .model import DPT  # noqa: E402

__version__ = "0.1.0"
__all__ = ["DPT", "CheckpointError", "DPTConfig", "build", "load", "models", "save"]
