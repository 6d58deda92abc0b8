"""Triton's real host path without a GPU: `JITFunction.run`, its specialisation, its launcher, the encoding of tensor maps; on a stub of
libcuda (`libcuda.c`) that holds every call to the hardware's rules.

What a kernel compiles to is taken from the record (`kernels/tools/ledger.py`). Of a specialisation that is not in it the launcher needs
only to know how its tensor maps are encoded, which follows from their types and blocks: that is borrowed from recorded ones of the same. So
a launch takes no compiler, but for a block that no recorded kernel reads.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch.utils import _pytree as pytree
from triton.backends.nvidia import driver as nvidia
from triton.compiler import compiler
from triton.runtime import driver

from dpt.kernels import launch
from dpt.kernels.launch import devices, written
from dpt.kernels.tools import ledger

HERE = Path(__file__).parent
HIDDEN_PARAMETERS = 2  # of a kernel's entry point: Triton's scratch memories


class NoCompiler(Exception):
    """There is no C compiler here, which the stub and Triton's own launcher need."""


@dataclass
class Seen:
    """What was launched. ``keys``: of the record -> (kernel, what ran when it was first asked for); ``borrowed``: those whose encoding is
    another's; ``compiled``: those that the compiler was asked for; ``each``: what ran -> kernel -> its keys."""

    keys: dict[str, tuple[str, str]] = field(default_factory=dict)
    each: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    borrowed: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    launches: int = 0
    where: str = ""
    kernels: set[Any] = field(default_factory=set)

    def forget(self) -> None:
        """As in a new process: everything is asked for again."""
        for kernel in self.kernels:
            kernel.device_caches.clear()

    def facts(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "kernels"}


def build(folder: Path) -> ctypes.CDLL:
    """The stub, built into ``folder`` and loaded as the libcuda.so.1 that Triton's driver then finds; NoCompiler."""
    gcc = shutil.which("gcc") or shutil.which("cc")
    if gcc is None:
        raise NoCompiler("there is no C compiler (gcc or cc), which the stub of libcuda and Triton's launcher need")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    subprocess.run([gcc, "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", "-o", library, HERE / "libcuda.c"], check=True)
    (folder / "libcuda.so").symlink_to(library.name)  # for the linker
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


class StubDriver(nvidia.CudaDriver):
    """Triton's driver for the stub's device of one family."""

    def __init__(self, family: str):
        self.device = int(family.removeprefix("sm_"))
        self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
        self.get_current_device = lambda: self.device
        self.set_current_device = lambda index: None
        self.stream = 0
        self.get_current_stream = lambda index: self.stream
        self.get_device_capability = lambda index: divmod(index, 10)


class Compiler:
    """Stands in for ``triton.compile``: makes kernels, in ``folder``, out of what is recorded."""

    def __init__(self, family: str, seen: Seen, folder: Path):
        self.family, self.seen, self.folder = family, seen, folder
        self.recorded = ledger.read(family)
        self.encodings: dict[str, dict[str, Any]] = {}
        for encoding in (encoding for facts in self.recorded.values() for encoding in facts["descriptors"]):
            if self.encodings.setdefault(encoding["type"], encoding) != encoding:
                raise ValueError(f"{encoding} and {self.encodings[encoding['type']]}: a type has two encodings, so none can be borrowed")
        self.asked = ""

    def ask(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's jit_cache_hook: keeps the key of what is about to be compiled, and lets it go on."""
        self.asked = ledger.key(compile, fn.jit_function, int(self.family.removeprefix("sm_")))
        self.seen.keys.setdefault(self.asked, (fn.name, self.seen.where))
        self.seen.each.setdefault(self.seen.where, {}).setdefault(fn.name, []).append(self.asked)
        return False

    def __call__(self, src: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        facts = self.recorded.get(self.asked) or self._borrowed(src, options)
        if facts is None:
            self.seen.compiled.append(self.asked)
            return compiler.compile(src, target=target, options=options, **more)
        names = {
            "target": vars(target),
            **options,
            "name": src.fn.__name__,
            "num_warps": facts["warps"],
            "shared": facts["shared"],
            "tmem_size": facts["tensor_memory"],
            "tensordesc_meta": facts["descriptors"],
            "cluster_dims": [1, 1, 1],
            **dict.fromkeys(("global_scratch_size", "profile_scratch_size"), 0),
            **dict.fromkeys(("global_scratch_align", "profile_scratch_align"), 1),
        }
        description, binary = self.folder / f"{self.asked}.json", self.folder / f"{self.asked}.cubin"
        description.write_text(json.dumps(names, default=vars))
        binary.write_bytes(b"nothing")
        kernel = Kernel(src, {description.name: str(description), binary.name: str(binary)}, self.asked)
        kernel.parameters = facts.get("parameters")
        return kernel

    def _borrowed(self, src: Any, options: dict[str, Any]) -> ledger.Facts | None:
        """What the launcher needs to know of a kernel that is not recorded; None if a tensor map has no encoding to be borrowed."""
        types = [kind for kind in src.signature.values() if isinstance(kind, str) and kind.startswith("tensordesc")]
        if not self.encodings.keys() >= set(types):
            return None
        self.seen.borrowed.append(self.asked)
        encodings = [self.encodings[kind] for kind in types]
        return {"warps": options["num_warps"], "shared": 0, "tensor_memory": 0, "descriptors": encodings}


class Kernel(compiler.CompiledKernel):
    """A kernel that nobody runs. ``parameters``: of its entry point, where that is recorded."""

    parameters: int | None = None

    def _init_handles(self) -> None:
        super()._init_handles()
        signature = getattr(self._run, "kernel_signature", None)  # an older Triton builds a launcher in C, which is right or does not build
        if None not in (signature, self.parameters) and len(signature) + HIDDEN_PARAMETERS != self.parameters:
            passed = len(signature) + HIDDEN_PARAMETERS
            raise RuntimeError(f"stub: the launcher passes {passed} parameters and the entry point of {self.name} takes {self.parameters}")


class Stub:
    """From its making on, in this process, CPU tensors pass for a GPU's and launches go to the stub; ``use`` says of which family.

    Files are written into ``folder``. ``seen``: family -> what was launched, and what a launch raised. Raises NoCompiler.
    """

    def __init__(self, folder: Path):
        self.library, self.folder = build(folder), folder
        self.compilers: dict[str, Compiler] = {}
        self.launched = launch.launch
        triton.knobs.runtime.jit_cache_hook = lambda **told: self.compiler.ask(**told)
        triton.compiler.compile = lambda *args, **options: self.compiler(*args, **options)
        launch.launch = self.launch
        self.standing_in = launch.stand_ins()  # for as long as the process lives
        self.standing_in.__enter__()
        devices._family_of_gpu, torch.cuda.current_device = lambda index: self.family, lambda: 0  # of the device "cuda", where a test asks
        self.use("sm_90")

    def use(self, family: str) -> Seen:
        """From now on the GPU is of ``family``; what it has seen so far."""
        self.family = family
        self.compiler = self.compilers.setdefault(family, Compiler(family, Seen(), self.folder))
        self.library.stub_use(int(family.removeprefix("sm_")))
        os.environ[launch.INTERPRETED_FAMILY_VARIABLE] = family
        driver.set_active(StubDriver(family))
        launch.forget_choices()
        return self.compiler.seen

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> None:
        """As ``launch.launch``; what it raises is kept."""
        seen = self.compiler.seen
        seen.launches += 1
        seen.kernels.add(kernel)
        try:
            self.launched(kernel, grid, *args, **kwargs)
        except Exception as error:
            seen.errors.append(f"{seen.where}: {kernel.__name__}{grid}: {type(error).__name__}: {error}")
            raise


class Watch:
    """While in force, keeps what Triton's launcher is told, for this and for all that was worked out before: addresses as places, which are
    in a tensor that was given or in fresh memory of so many bytes."""

    def __init__(self, seen: Seen):
        self.seen = seen
        self.calls: list[tuple[Any, ...]] = []
        self.memory: list[tuple[int | None, int, int]] = []  # (which of the tensors, or None; address; bytes)
        self.maps: dict[int, tuple[Any, Any]] = {}  # by identity, which they keep

    def __enter__(self) -> Watch:
        utils = driver.active.utils
        self.launch, self.encode, self.empty = utils.launch, utils.fill_tma_descriptor_tiled, written.EMPTY["cpu"]
        self._install(self._launched, self._encoded, self._allocated)
        return self

    def __exit__(self, *_: Any) -> None:
        self._install(self.launch, self.encode, self.empty)

    def _install(self, launched: Any, encoded: Any, empty: Any) -> None:
        utils = driver.active.utils
        utils.launch, utils.fill_tma_descriptor_tiled, written.EMPTY["cpu"] = launched, encoded, empty
        self.seen.forget()  # launchers that hold what was there
        launch.forget_choices()

    def of(self, call: Any, tensors: Any = ()) -> list[tuple[Any, ...]]:
        """What is launched by a call that is given these tensors: (grid, stream, function, options, ..., arguments)."""
        self.calls, self.memory = [], []
        for place, tensor in enumerate(tensors):
            self.note(place, tensor)
        call()
        return self.calls

    def note(self, name: int | None, tensor: torch.Tensor) -> None:
        """A tensor whose memory is a place."""
        storage = tensor.untyped_storage()
        self.memory.insert(0, (name, storage.data_ptr(), storage.nbytes()))

    def _allocated(self, *args: Any) -> torch.Tensor:
        tensor = self.empty(*args)
        self.note(None, tensor)
        return tensor

    def _encoded(self, *args: Any) -> Any:
        made = self.encode(*args)
        self.maps[id(made)] = made, args
        return made

    def _launched(self, *args: Any) -> Any:
        *before, _, _, _, _, _, _, signature, given = args  # hooks, scratch memories, annotations
        self.calls.append((*before, bytes(signature), *map(self._told, pytree.tree_leaves(list(given)))))
        return self.launch(*args)

    def _told(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self._place(value.data_ptr())
        if id(value) in self.maps:
            address, *rest = self.maps[id(value)][1]
            return self._place(address), *map(repr, rest)
        return self._place(value) if isinstance(value, int) and value > 1 << 32 else repr(value)

    def _place(self, address: int) -> tuple[Any, ...]:
        for name, begin, size in self.memory:
            if begin <= address < begin + max(size, 1):
                return name, size, address - begin
        return (bool(address),)
