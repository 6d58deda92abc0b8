"""Dense Prediction Transformers: `build`, `load`, `save`, `models`, `accelerate`, `export`, `fast_report`, `graphed`,
`to_transformers`, `Predictor`.

Names and modules are loaded when asked for: `import dpt` does not import PyTorch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors, which run nothing
    from .checkpoints import CheckpointError, save
    from .config import DPTConfig
    from .exchange import to_transformers
    from .exporting import export
    from .factory import build, load
    from .fast.acceleration import accelerate, fast_report
    from .inference.graphs import graphed
    from .inference.prediction import Prediction
    from .inference.predictor import Predictor
    from .model import DPT
    from .zoo import models

__version__ = "0.1.0"
__all__ = [
    "DPT",
    "CheckpointError",
    "DPTConfig",
    "Prediction",
    "Predictor",
    "accelerate",
    "build",
    "export",
    "fast_report",
    "graphed",
    "load",
    "models",
    "save",
    "to_transformers",
]

_HOME = {  # the module of each public name
    "DPT": "model",
    "CheckpointError": "checkpoints",
    "DPTConfig": "config",
    "Prediction": "inference.prediction",
    "Predictor": "inference.predictor",
    "accelerate": "fast.acceleration",
    "build": "factory",
    "export": "exporting",
    "fast_report": "fast.acceleration",
    "graphed": "inference.graphs",
    "load": "factory",
    "models": "zoo",
    "save": "checkpoints",
    "to_transformers": "exchange",
}
_FOLDER = Path(__file__).resolve().parent
if not (_FOLDER / "kernels").is_dir():  # a checkout, not an installed package: the kernels stand beside this folder
    __path__.append(str(_FOLDER.parent))


if not TYPE_CHECKING:  # which would take any name for one of the package's

    def __getattr__(name: str) -> Any:
        if name in _HOME:
            value = getattr(import_module(f".{_HOME[name]}", __name__), name)
            globals()[name] = value  # asked for once
            return value
        if name in _modules():
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _modules() -> set[str]:
    """The modules of the package, which need not be imported by name: `import dpt; dpt.zoo.CONFIGS`."""
    inside = {path.stem for path in _FOLDER.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    return {name for name in inside if not name.startswith("_")} | {"kernels"}
