"""A traced model as ONNX: the conversion, names of sides, the file, and its run by ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .failures import ExportError, quiet, unconverted
from .graphs import Graph, Open
from .packages import needed

OPSET = 18  # the one that torch's exporter writes by itself; others are converted
OPSETS = range(18, 24)
INLINE = 1_900_000_000  # bytes of weights in the file itself; beyond, they are in a second one: protobuf ends at 2 GB
KEPT = "namespace"  # of what the exporter notes of a node: the module it comes from; no lines and paths of source files


def converted(program: torch.export.ExportedProgram, graph: Graph, opset: int) -> Any:
    """torch's ONNXProgram. ExportError names the operator that has no translation."""
    needed("onnx", "onnxscript")
    if opset not in OPSETS:
        raise ValueError(f"opset {opset}: it must be from {OPSETS[0]} to {OPSETS[-1]}")
    names = [entry.name for entry in graph.inputs]
    try:
        with quiet(), torch.no_grad():
            found = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=names, output_names=list(graph.outputs), verbose=False
            )
    except Exception as error:  # as in tracing
        raise unconverted(error) from error
    assert found is not None
    written = found.model.opset_imports[""]
    if written != opset:
        raise ExportError(f"it cannot be converted to opset {opset}: some operator stays at {written}")
    _name(found.model, graph)
    return found


def _name(model: Any, graph: Graph) -> None:
    """Sides by their names in place of the tracer's, the module a node comes from, and what the model is."""
    names = {}
    for entry, value in zip(graph.inputs, model.graph.inputs, strict=True):
        for open, side in zip(entry.shape, value.shape, strict=True):
            symbol = re.search(r"s\d+", str(side))
            if isinstance(open, Open) and symbol:
                names[symbol[0]] = open.name

    def named(side: Any) -> Any:
        return side if isinstance(side, int) else re.sub(r"s\d+", lambda found: names.get(found[0], found[0]), side.value or "") or None

    def renamed(value: Any) -> None:
        value.metadata_props.clear()
        if value.shape is not None:
            value.shape = type(value.shape)([named(side) for side in value.shape])

    for node in model.graph.all_nodes():
        kept = node.metadata_props.get(KEPT)
        node.metadata_props.clear()
        if kept is not None:
            node.metadata_props[KEPT] = kept
        for value in node.outputs:
            renamed(value)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        renamed(value)
    model.metadata_props.clear()
    model.metadata_props.update({"model": graph.config.name, "licence": graph.config.licence})
    model.metadata_props.update({entry.name: str(entry) for entry in graph.inputs})
    model.metadata_props.update(zip(graph.outputs, graph.units, strict=True))


def save(found: Any, path: Path) -> list[Path]:
    """Write `path`, and where the weights are too large for one file `path`.data beside it; returns what was written, the weights first."""
    size = sum(value.const_value.nbytes for value in found.model.graph.initializers.values() if value.const_value is not None)
    with quiet():
        found.save(path, external_data=size > INLINE)
    beside = path.with_name(path.name + ".data")
    return [beside, path] if beside.exists() else [path]


def session(path: Path, threads: int = 0) -> Callable[..., list[Tensor]]:
    """ONNX Runtime's run of a file on the CPU, from tensors to tensors; `threads`: 0 lets it choose."""
    needed("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    found = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in found.get_inputs()]
    return lambda *given: [torch.from_numpy(y) for y in found.run(None, dict(zip(names, (x.numpy() for x in given), strict=True)))]
