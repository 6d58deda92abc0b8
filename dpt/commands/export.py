"""`dpt export`: a model for other runtimes. What it takes and writes is told by its help, in `arguments`."""

from __future__ import annotations

import argparse
from importlib.metadata import version

import torch

from ..exporting import BOUND, OPSET, Differs, Exported, ExportError, MissingPackage, export
from ..exporting.tensorrt import trtexec
from ..inference.resizing import network_size
from ..system.endings import FAILED, CommandError, printable
from . import running

SHOWN = ((480, 640), (640, 480))  # height and width of pictures whose size in the network is told


def run(args: argparse.Namespace) -> int:
    """Run `dpt export`; returns the exit code. CommandError where nothing was written."""
    model = running.model_of(args, args.model, torch.device("cpu"))
    name, opset = model.config.name, args.opset or OPSET
    try:
        found = export(model, args.target, aot=args.aot, opset=opset, size=args.sides, processing=args.with_processing, check=args.check)
    except (ExportError, Differs) as error:
        raise CommandError(f"{name}: {error}", FAILED if isinstance(error, Differs) else 2) from error
    except MissingPackage as error:
        raise CommandError(f"{error}{'; --no-check does without' if 'onnxruntime' in str(error) else ''}") from error
    print("\n".join(_told(args, found, opset)))
    return 0


def _told(args: argparse.Namespace, found: Exported, opset: int) -> list[str]:
    graph, onnx = found.graph, args.target.suffix == ".onnx"
    kind = f"opset {opset}" if onnx else "a package of AOTInductor" if args.aot else "a program of torch.export"
    sizes = " + ".join(f"{printable(file)} ({file.stat().st_size / 1e6:.1f} MB)" for file in reversed(found.files))
    lines = [f"{sizes}: {graph.config.name}, {kind}"]
    lines += [f"  takes {entry}" for entry in graph.inputs]
    lines += [f"  gives {name}: {unit}" for name, unit in zip(graph.outputs, graph.units, strict=True)]
    if graph.processing and graph.size is not None:
        shown = {f"{width}x{height}": network_size(height, width, graph.config.input) for height, width in SHOWN}
        told = ", ".join(f"{wide} at {size[1]}x{size[0]}" for wide, size in shown.items())
        lines.append(f"  the network sees {graph.size[1]}x{graph.size[0]} pixels (width x height); dpt predict shows it pictures of {told}")
    if found.checked:
        by = f"ONNX Runtime {version('onnxruntime')}" if onnx else "PyTorch's program" if not args.aot else "the package"
        tried = ", ".join(f"{batch} of {size[1]}x{size[0]}" for size, batch, _ in found.checked)
        worst = max(apart for *_, apart in found.checked)
        lines.append(f"  {by} beside PyTorch on {tried} (width x height): {worst:.1e} of the range apart at most; {BOUND:g} is refused")
    else:
        lines.append("  not checked")
    lines.append(f"  load it: {found.load}")
    if args.trtexec:
        lines += ["  TensorRT, which has not been run:", trtexec(found.files[-1], graph)]
    return lines
