"""The ops: Triton kernels on an NVIDIA GPU, the same algebra in PyTorch elsewhere.

Where there is no Triton (it is for Linux), nothing launches and the algebra is all there is: then every op is imported here, once, while
what it imports of Triton is a stand-in. Nobody else gets to see that: afterwards there is no Triton, as before.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import sys
from types import ModuleType
from typing import Any

NAME = "triton"


class _StandIn(ModuleType):
    """A module, function, decorator or dtype of Triton's, none of which is ever used; false, as its switches are."""

    __path__: Any = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(f"{self.__name__}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> _StandIn:
        return self

    def __bool__(self) -> bool:
        return False

    def __getitem__(self, grid: Any) -> Any:
        raise ImportError(f"a kernel needs Triton, which PyPI has for Linux: pip install {NAME}")


class _Constexpr:
    """``triton.language.constexpr``: ops read its number."""

    def __init__(self, value: Any):
        self.value = value


class _TensorDescriptor:
    """``triton.tools.tensor_descriptor.TensorDescriptor``: a class, of which nothing is an instance."""


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    KNOWN: dict[str, dict[str, Any]] = {
        "triton.language": {"constexpr": _Constexpr},
        "triton.tools.tensor_descriptor": {"TensorDescriptor": _TensorDescriptor},
    }

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if fullname.split(".")[0] == NAME else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.KNOWN.get(module.__name__, {}))


def _import_without_triton() -> None:
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == NAME}
    finder = _StandIns()
    sys.meta_path.insert(0, finder)
    try:
        for op in pkgutil.iter_modules(__path__, f"{__name__}."):
            if op.name != f"{__name__}.tools":
                importlib.import_module(op.name)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
            del sys.modules[name]
        sys.modules.update(hidden)


if importlib.util.find_spec(NAME) is None:
    _import_without_triton()
