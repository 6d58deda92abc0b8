"""Models for other runtimes: ONNX files, programs of torch.export, packages of AOTInductor; each is run beside PyTorch before it is
kept."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from ..fast.rules import PLAIN
from ..system.disk import must_be_replaceable, write_whole
from . import onnx_files
from .checking import BOUND, Differs, compared
from .failures import ExportError, quiet
from .graphs import Graph
from .onnx_files import OPSET
from .packages import MissingPackage, needed

if TYPE_CHECKING:
    from ..model import DPT

__all__ = ["BOUND", "OPSET", "Differs", "ExportError", "Exported", "MissingPackage", "export"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: the weights that stand beside a file first, the file last.
        graph: inputs and outputs by name, and which sides are open.
        checked: of each trial the size, the batch, and the largest difference from PyTorch's map as a part of its range, or of labels the
            part of pixels that have another; empty where nothing was checked.
        load: Python that loads it.
    """

    files: tuple[Path, ...]
    graph: Graph
    checked: tuple[tuple[tuple[int, int], int, float], ...]
    load: str


def export(
    model: DPT,
    path: str | Path,
    *,
    aot: bool = False,
    opset: int = OPSET,
    size: tuple[int, int] | None = None,
    processing: bool = False,
    check: bool = True,
) -> Exported:
    """Write a model for another runtime: `.onnx`, or `.pt2`, a program of `torch.export` or with `aot` a package of AOTInductor.

    Batch, height and width are open, the sides multiples of the patch from three on; a network of one size (Swin) keeps its own.

    Args:
        model: in evaluation mode or not, it is exported in it. Its plain form, without `fast=True`, whose kernels no other runtime has.
        path: the file, which is replaced. Of an ONNX file of more than 1.9 GB of weights those stand in PATH.data beside it.
        aot: compile for this processor, which needs a C++ compiler.
        opset: of ONNX's operators.
        size: height and width of the network's input, which are then fixed.
        processing: take pictures uint8 (B, H, W, 3) of any size and give maps of their size, as `predict` does: depth float32 (B, H, W),
            labels (B, H, W), normals (B, H, W, 3). The network sees `size`, or else the size its rule aims at, whatever a picture's aspect.
        check: run it beside PyTorch at three sizes and in two batches, and write it only where no map differs by more than `BOUND` of its
            range.

    Raises:
        ExportError: a ValueError; the operator, or the line of a module, that cannot be exported. ValueError: a suffix, size or opset.
        Differs: the exported model gives other maps. MissingPackage: an ImportError; a package or a compiler. OSError: it cannot be
            written.
    """
    path = Path(path)
    make = _maker(path, aot, opset)
    must_be_replaceable(path)
    if any(type(module) in PLAIN for module in model.modules()):
        raise ExportError("it runs on the fused kernels, which no other runtime has: build it without fast=True (--no-fast)")
    graph = Graph.of(model, size, processing)
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with tempfile.TemporaryDirectory(prefix="dpt-export-") as folder:
            files, load, run = make(graph, Path(folder) / path.name, check)
            checked = compared(graph, run) if run is not None else []
            if len(files) > 1:
                path.unlink(missing_ok=True)  # stopped between the two, it would stand beside weights that are not its own
            for file in files:
                write_whole(path.with_name(file.name), functools.partial(_copy, file))
    finally:
        for module in training:
            module.training = True
    return Exported(tuple(path.with_name(file.name) for file in files), graph, tuple(checked), load)


Made = tuple[list[Path], str, Callable[..., Any] | None]  # files, how they are loaded, and a run of them where it is wanted


def _maker(path: Path, aot: bool, opset: int) -> Callable[[Graph, Path, bool], Made]:
    """What writes such a file; ValueError for another suffix."""
    if path.suffix == ".pt2":
        return _package if aot else _program
    if aot or path.suffix != ".onnx":
        raise ValueError(f"{path}: it must end in .pt2{'' if aot else ' or .onnx'}")
    return functools.partial(_onnx, opset)


def _onnx(opset: int, graph: Graph, path: Path, check: bool) -> Made:
    needed("onnx", "onnxscript", *(["onnxruntime"] if check else []))  # before the minute that tracing takes
    files = onnx_files.save(onnx_files.converted(graph.traced(), graph, opset), path)
    return files, f'onnxruntime.InferenceSession("{path.name}")', onnx_files.session(path) if check else None


def _program(graph: Graph, path: Path, check: bool) -> Made:
    with quiet():
        torch.export.save(graph.traced(), path)
        run = torch.export.load(path).module() if check else None
    return [path], f'torch.export.load("{path.name}").module()', run


def _package(graph: Graph, path: Path, check: bool) -> Made:
    from torch._inductor import aoti_compile_and_package, aoti_load_package, cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise MissingPackage("a package of AOTInductor needs a C++ compiler, and none is found: install g++, or name one by CXX") from error
    program = graph.traced()
    try:
        with quiet():
            aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # of the compiler, whose message is pages long
        raise ExportError(f"AOTInductor cannot compile it: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error
    return [path], f'torch._inductor.aoti_load_package("{path.name}")', aoti_load_package(str(path)) if check else None


def _copy(source: Path, file: BinaryIO) -> None:
    with open(source, "rb") as content:
        shutil.copyfileobj(content, file, 1 << 22)
