"""Properties that every op is held to, whatever it computes: a function each, for the ops' own tests to call."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import triton
from both_passes import in_both, values_and_gradients

from dpt.kernels import launch
from dpt.kernels.tools.parity import assert_parity, float32_products, judged_at_once

FAMILIES = sorted(set(launch.TABLES.values()))
Op = Callable[..., torch.Tensor]
Inputs = Sequence[torch.Tensor | None]


@contextlib.contextmanager
def refused(match: str) -> Iterator[None]:
    """The rule refuses what is within, with such a message, also where the test runs again for several draws."""
    with judged_at_once(), pytest.raises(AssertionError, match=match):
        yield


# What an entry of a table may serve; a GPU tests it in the first of these that it does.
KINDS = ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee"))


@dataclass(frozen=True)
class Shipped:
    """A configuration that a table keeps for ``kernel``, and what it is tested in."""

    kernel: str
    config: Mapping[str, Any]
    dtype: torch.dtype
    precision: str

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The kernel is launched with it, and float32 multiplied in its precision."""
        with launch.using(self.kernel, self.config), float32_products(self.precision):
            yield


def shipped_configurations(kernel: str, backend: str | None = None) -> dict[str, Shipped]:
    """Every configuration of ``kernel`` in the tables, if ``backend`` is given those of that backend, by a name made of what differs.

    On a GPU those of its own table, in bfloat16, but for the entries that serve float32 alone: float32 in the tiles of half precision
    spills, and takes minutes to compile. The interpreter knows neither warps nor stages nor registers: there, those of all tables, each
    once, in float32 and exactly.
    """
    on_gpu, found = not launch.INTERPRETED, {}
    for family in [launch.device_family(torch.device("cuda"))] if on_gpu else FAMILIES:
        entries = launch.load_table(family)[kernel]
        for index, entry in enumerate(entries):
            config = entry["config"]
            if backend is not None and config["backend"] != backend:
                continue
            dtype, precision = _first_served(entries, index) if on_gpu else (torch.float32, "ieee")
            shown = {k: v for k, v in config.items() if on_gpu or k not in ("num_warps", "num_stages", "maxnreg")}
            shown |= {"in": f"{dtype} {precision}".removeprefix("torch.")} if on_gpu else {}
            found[" ".join(f"{k}={v}" for k, v in shown.items())] = Shipped(kernel, config, dtype, precision)
    return found


def _first_served(entries: Sequence[Mapping[str, Any]], index: int) -> tuple[torch.dtype, str]:
    """The first of KINDS that reaches the entry: its conditions hold, and no entry above takes all that it would."""
    for kind in KINDS:
        whens = [(_of_kind(entry["when"]), _of_size(entry["when"])) for entry in entries[: index + 1]]
        (mine, size), above = whens[-1], whens[:-1]
        if _holds(mine, kind) and not any(_holds(other, kind) and of_size.items() <= size.items() for other, of_size in above):
            return kind
    raise ValueError(f"the table's entry {entries[index]['when']} serves none of {KINDS}: those above it take everything")


def _of_kind(when: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in when.items() if name in ("dtype", "precision")}


def _of_size(when: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in when.items() if name not in ("dtype", "precision")}


def _holds(conditions: Mapping[str, Any], kind: tuple[torch.dtype, str]) -> bool:
    dtype, precision = kind
    return conditions.items() <= {"dtype": str(dtype).removeprefix("torch."), "precision": precision}.items()


@contextlib.contextmanager
def in_few_steps(kernel: str, config: Mapping[str, Any]) -> Iterator[None]:
    """In the interpreter ``kernel`` runs with the large blocks of ``config``, for its time is that of its steps; on a GPU, where such
    blocks fit no registers, as the table says."""
    with launch.using(kernel, config) if launch.INTERPRETED else contextlib.nullcontext():
        yield


def _leaves(inputs: Inputs, dtype: torch.dtype | None = None) -> list[torch.Tensor | None]:
    copies = (None if t is None else t.detach().clone(memory_format=torch.preserve_format) for t in inputs)
    return [None if t is None else t.to(dtype or t.dtype).requires_grad_() for t in copies]


def _cotangent(op: Op, inputs: Inputs) -> torch.Tensor:
    with torch.no_grad():
        return torch.randn_like(op(*inputs))


def assert_same(first: Inputs, second: Inputs) -> None:
    """Bit for bit."""
    for index, (one, other) in enumerate(zip(first, second, strict=True)):
        assert (one is None and other is None) or torch.equal(one, other), f"result {index} differs"


def assert_reproducible(op: Op, inputs: Inputs) -> None:
    """The same call gives the same bits, output and gradients."""
    cotangent = _cotangent(op, inputs)
    assert_same(*(values_and_gradients(op, inputs, cotangent) for _ in range(2)))


def assert_gradients_alone(op: Op, inputs: Inputs) -> None:
    """Whichever one input needs a gradient, it is the one it has when all do; and without any, or under no_grad, nothing is recorded."""
    cotangent = _cotangent(op, inputs)
    _, *together = values_and_gradients(op, inputs, cotangent)
    assert not op(*inputs).requires_grad
    for index, expected in enumerate(together):
        if expected is None:
            continue
        alone = list(inputs)
        alone[index] = alone[index].detach().requires_grad_()
        with torch.no_grad():
            assert not op(*alone).requires_grad
        (gradient,) = torch.autograd.grad(op(*alone), alone[index], cotangent)
        assert torch.equal(gradient, expected), f"gradient of input {index}"


def assert_expanded_gradient(op: Op, reference: Op, inputs: Inputs) -> None:
    """A cotangent of stride 0, the gradient of a sum, and one whose memory is transposed are read right: by the rule. The cotangents cancel
    in sums, of a bias for one: ``tiny`` counts from the largest of all gradients."""

    def sums(out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = torch.linspace(-1, 1, out[0].numel(), device=out.device).to(out.dtype).view(*out.shape[1:][::-1])
        return out.sum(), (out * weights.permute(*reversed(range(weights.dim())))).sum()

    def gradients(function: Op, which: int, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        leaves = _leaves(inputs, dtype)
        return torch.autograd.grad(sums(function(*leaves))[which], [leaf for leaf in leaves if leaf is not None])

    for which in range(2):
        exact, same_dtype = in_both(lambda dtype, which=which: gradients(reference, which, dtype))
        largest = max(gradient.abs().max().item() for gradient in exact)
        for index, tensors in enumerate(zip(gradients(op, which), exact, same_dtype, strict=True)):
            assert_parity(*tensors, name=f"gradient {index}", magnitude=largest)


def assert_nan(out: torch.Tensor, must: torch.Tensor, may: torch.Tensor) -> None:
    """``out`` is NaN wherever ``must`` is true, and nowhere that ``may`` is not: masks of its shape. Not where PyTorch's is on this device,
    for a library may spread NaN further than what it computes does, by Fourier transforms or Winograd's."""
    found = out.isnan()
    must, may = must.to(out.device), may.to(out.device)
    assert must.any() and not may.all(), "the masks would not see a NaN that is lost, or one too many"
    assert found[must].all(), f"{(must & ~found).sum()} of {must.sum()} values that see a NaN are none"
    assert not found[~may].any(), f"{(found & ~may).sum()} values are NaN that see none"


def saved_shapes(op: Op, inputs: Inputs) -> list[tuple[int, ...]]:
    """The shapes of what the op keeps for its backward, sorted."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        op(*_leaves(inputs))
    return sorted(saved)


def assert_autocast_keeps(op: Op, inputs: Inputs, *weights: int) -> None:
    """Under autocast float32 ``weights``, given by their places, are kept for the backward as they are: no copy in autocast's dtype."""
    leaves, saved = _leaves(inputs), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        with torch.autocast(leaves[0].device.type, dtype=torch.float16):
            op(*leaves)
    kept = {t.untyped_storage()._cdata for t in saved}
    shapes = {leaves[index].shape for index in weights}
    assert kept >= {leaves[index].untyped_storage()._cdata for index in weights}
    assert all(t.dtype == torch.float32 for t in saved if t.shape in shapes)


def assert_follows_autocast(op: Op, inputs: Inputs, result: torch.dtype = torch.float16) -> None:
    """Under autocast float32 inputs are taken in autocast's dtype, and the result is in it, or in the one that is said; gradients are
    float32."""
    leaves = _leaves(inputs)
    given = [leaf for leaf in leaves if leaf is not None]
    with torch.autocast(given[0].device.type, dtype=torch.float16):
        out = op(*leaves)
    halves = [None if t is None else t.detach().half() for t in leaves]
    assert out.dtype == result and torch.equal(out, op(*halves))
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(out.float().sum(), given))


def assert_parameters_are_saved(op: Op, inputs: Inputs) -> None:
    """Under autocast the backward keeps all inputs but the first, the parameters, as they are, and no copy in autocast's dtype."""
    leaves, saved = _leaves(inputs), []
    given = [leaf for leaf in leaves if leaf is not None]
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        torch.autocast(given[0].device.type, dtype=torch.float16),
    ):
        op(*leaves)
    assert {leaf.data_ptr() for leaf in given[1:]} <= {t.data_ptr() for t in saved}
    assert [t.dtype for t in saved if t.dtype != torch.float32] == [torch.float16]


def assert_empty_batch(op: Op, inputs: Inputs, shape: Sequence[int]) -> None:
    """A batch of nothing (of the first input) gives ``shape``, and a gradient of nothing to what has a batch, of zeros to what has not."""
    leaves = _leaves([inputs[0][:0], *inputs[1:]])
    out = op(*leaves)
    assert tuple(out.shape) == tuple(shape)
    given = [leaf for leaf in leaves if leaf is not None]
    for leaf, gradient in zip(given, torch.autograd.grad(out.sum(), given), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


def assert_compiles(op: Op, inputs: Inputs) -> None:
    """torch.compile takes the op whole, forward and backward, without a graph break, and computes the same bits."""
    compiled, cotangent = torch.compile(op, fullgraph=True, backend="aot_eager"), _cotangent(op, inputs)
    assert_same(*(values_and_gradients(f, inputs, cotangent) for f in (compiled, op)))


def assert_exports(op: Op, x: torch.Tensor, other: torch.Tensor, dimension: int, node: str, least: int = 2) -> None:
    """torch.export keeps ``op(x)`` as one node, with any size, from ``least`` on, of one dimension: as that of ``other``."""

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return op(x)

    size = torch.export.Dim("size", min=least, max=512)
    program = torch.export.export(Module(), (x,), dynamic_shapes=({dimension: size},))
    assert node in str(program.graph)
    assert torch.equal(program.module()(other), op(other))


class Far:
    """Tensors of more than 2^31 elements for the op under test, which runs on their far end alone.

    On a CPU their memory is reserved, not given out: only touched pages exist. It begins 2^31 elements before the tensor, so that an offset
    that wraps around lands in zeros and fails the comparison, rather than ending the process; and of each launch only the last program
    runs. On a GPU the tensors are what they seem, and every program runs.
    """

    BEFORE = 2**31

    def __init__(self, device: torch.device, monkeypatch: pytest.MonkeyPatch):
        self.device = device
        if device.type != "cuda":
            self._reserve_large(monkeypatch)
            self._run_last_programs(monkeypatch)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype = torch.float16, channels_last: bool = False) -> torch.Tensor:
        """Zeros of ``shape``; if ``channels_last``, (B, C, H, W) with that memory."""
        if channels_last:
            batch, channels, height, width = shape
            return self.zeros((batch, height, width, channels), dtype).permute(0, 3, 1, 2)
        needed = math.prod(shape)
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if needed * dtype.itemsize > free:
                pytest.skip(f"{shape} of {dtype} does not fit the GPU's memory")
            return torch.zeros(shape, dtype=dtype, device=self.device)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        memory = mmap.mmap(-1, (self.BEFORE + needed) * dtype.itemsize, flags=flags)
        return torch.frombuffer(memory, dtype=dtype)[self.BEFORE :].view(shape)

    def _reserve_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        allocate = torch.empty

        def empty(shape: Any, *args: Any, memory_format: Any = torch.contiguous_format, **kwargs: Any) -> torch.Tensor:
            if not isinstance(shape, Sequence) or math.prod(shape) < 2**28:
                return allocate(shape, *args, memory_format=memory_format, **kwargs)
            return self.zeros(shape, kwargs["dtype"], memory_format == torch.channels_last)

        monkeypatch.setattr(torch, "empty", empty)

    @staticmethod
    def _run_last_programs(monkeypatch: pytest.MonkeyPatch) -> None:
        interpreter = triton.runtime.interpreter
        builder = interpreter.interpreter_builder

        class LastProgram(interpreter.GridExecutor):
            def __call__(self, *args: Any, **kwargs: Any) -> None:
                index = (*(side - 1 for side in self.grid), 0, 0)[:3]
                self.grid = (1,)
                monkeypatch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", index))
                super().__call__(*args, **kwargs)

        monkeypatch.setattr(interpreter, "GridExecutor", LastProgram)


def spied_launches(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """(kernel, its keywords) of the launches from now on; ``modules``: those that hold ``launch.launch`` under a name of their own."""
    launches = []
    launched = launch.launch

    def spy(kernel: Any, *args: Any, **kwargs: Any) -> None:
        launches.append((kernel.__name__, kwargs))
        launched(kernel, *args, **kwargs)

    for module in (launch, *modules):
        monkeypatch.setattr(module, "launch", spy)
    return launches


def by_cudnn(launches: Sequence[tuple[str, Any]]) -> bool:
    """Whether PyTorch's 3x3 convolution was taken, of which the launches show what follows it."""
    return "conv3x3_epilogue" in [name for name, _ in launches]
