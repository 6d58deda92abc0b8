"""The line by which trtexec makes a TensorRT engine of an exported file. Nobody has run it: no test here has TensorRT."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from .graphs import Graph, Open, rounded_size
from .processing import nominal_size

LAYERS = ("Conv", "Gemm", "MatMul")


def in_float32(path: Path) -> list[str]:
    """Names of the nodes of an ONNX file that float16 rounds too much: each LayerNormalization, and before each output the last
    convolution, or where that is a linear layer its product."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    makers = {name: node for node in graph.node for name in node.output}
    found = [node.name for node in graph.node if node.op_type == "LayerNormalization"]
    for output in graph.output:
        name = _last_layer(output.name, makers)
        if name is not None and name not in found:
            found.append(name)
    return found


def _last_layer(output: str, makers: dict[str, Any]) -> str | None:
    """The layer that is nearest to an output."""
    now, seen = [output], set()
    while now:
        nodes = [makers[name] for name in now if name in makers]
        for node in nodes:
            if node.op_type in LAYERS:
                found: str = node.name
                return found
        seen.update(now)
        now = [name for node in nodes for name in node.input if name not in seen]
    return None


def trtexec(path: Path, graph: Graph) -> str:
    """One line for a shell. The profile: one picture of half the nominal size to four of twice it, for one of it."""
    height, width = graph.size or nominal_size(graph.config)
    shapes = {}
    for flag, batch, times in (("min", 1, 0.5), ("opt", 1, 1.0), ("max", 4, 2.0)):
        rows, columns = rounded_size((round(height * times), round(width * times)), graph.config.encoder.patch_size)
        sides = {"batch": batch, "height": rows, "width": columns, "prompt_height": round(192 * times), "prompt_width": round(256 * times)}
        sides |= {"rows": rows // graph.config.encoder.patch_size, "columns": columns // graph.config.encoder.patch_size}
        shapes[flag] = ",".join(
            f"{entry.name}:" + "x".join(str(side.multiple * sides[side.name] if isinstance(side, Open) else side) for side in entry.shape)
            for entry in graph.inputs
        )
    layers = ",".join(f"{name}:fp32" for name in in_float32(path))
    return shlex.join(
        [
            *("trtexec", f"--onnx={path.name}", f"--saveEngine={path.with_suffix('.engine').name}"),
            *(f"--{flag}Shapes={told}" for flag, told in shapes.items()),
            *("--fp16", "--precisionConstraints=obey", f"--layerPrecisions={layers}"),
        ]
    )
