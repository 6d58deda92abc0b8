"""CUDA graphs without a GPU: a capture runs the forward, a replay launches nothing, streams and events are names. What is left of a call
of a graphed model on CPU tensors is the host's work around the replay."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from dpt.inference import graphs


class Name:
    """A stream or an event: all that it is told to do is queued on a GPU."""

    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any) -> None: ...


class Graph:
    """``replays``: of all graphs, since the process began."""

    replays = 0

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        Graph.replays += 1


def install() -> None:
    """Put them in the place of `torch.cuda`'s, in the whole process, with CPU tensors for CUDA's."""
    stream = Name()
    graphs.DEVICE = "cpu"
    torch.cuda.Stream = torch.cuda.Event = Name
    torch.cuda.CUDAGraph = Graph
    torch.cuda.graph = lambda *_, **__: contextlib.nullcontext()
    torch.cuda.device = torch.cuda.stream = lambda _: contextlib.nullcontext()
    torch.cuda.current_stream = lambda device=None: stream
    torch.cuda.graph_pool_handle = lambda: (0, 1)
    torch.cuda.is_current_stream_capturing = lambda: False
