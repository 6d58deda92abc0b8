"""What the tuning command runs, as data of the ops' spaces: a launcher, its arguments at a size that a model has, what PyTorch makes of
them, and the configurations to be tried.

Which entries of a family's table a workload stands for follows from recording its launches (:func:`buckets`); nobody writes the table's
conditions a second time.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import launch
from .parity import assert_parity, float32_products, poisoned_memory, reference_products

DESCRIPTOR_FAMILIES = ("sm_90", "sm_100", "sm_120")
# When a workload is tuned: what every inference runs, what training adds, what no model of the table does. float32 comes after all that.
FORWARD, BACKWARD, RARE = range(3)
LAST = 10  # in turn, within a stage: what costs the models most comes first

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Makes a workload's tensors: random, on ``device`` ("meta" holds no memory), in ``dtype``. ``precision``: of float32 products."""

    device: torch.device | str
    dtype: torch.dtype
    precision: str = "ieee"

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
        return (torch.randn(shape, device=self.device) * std).to(dtype or self.dtype)

    def map(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        """(B, C, H, W), channels-last."""
        return self.normal(*shape, std=std).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Workload:
    """A launcher at one size, by which the entries of the table that it looks up are chosen.

    ``what``: is computed, for people. ``launcher(**arguments)``: makes the launches; what ``compile_cases`` records.
    ``arguments(inputs, **sizes)``: the launcher's keywords, from :class:`Inputs`. ``small``: what replaces ``sizes`` for the interpreter.
    ``reference(**arguments)``: the launcher's results in plain PyTorch, called in float64 and in ``dtype``; the launcher's further results
    are not compared. Integers have to agree exactly. ``terms(**arguments)``: of results that are small differences of large terms, the
    largest of these by the result's index, which ``assert_parity`` takes as ``magnitude``.
    ``candidates``: of each kernel to be tuned, its configurations; see :func:`offered` for those with descriptors.
    ``narrow``: further conditions, where the table's entry serves sizes that are too different: an entry of its own is then proposed.
    ``stage``: FORWARD, BACKWARD or RARE; ``turn``: its place in the stage.
    ``shows``: ``tensor_cores`` and ``async_copies`` of :class:`launch.CompileCase`, as in ``compile_cases``; ``simple``: the names of the
    kernels among its launches that have to show neither.
    """

    what: str
    launcher: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]
    reference: Callable[..., Any]
    candidates: Mapping[str, Sequence[Config]]
    sizes: Mapping[str, Any]
    small: Mapping[str, Any]
    dtype: torch.dtype = torch.bfloat16
    precision: str = "ieee"
    narrow: Config = field(default_factory=dict)
    stage: int = FORWARD
    turn: int = LAST
    shows: Mapping[str, bool | str] = field(default_factory=dict)
    simple: tuple[str, ...] = ()
    terms: Callable[..., dict[int, float]] | None = None

    @property
    def name(self) -> str:
        """Unique among all workloads."""
        sizes = " ".join(f"{name}={value}" for name, value in self.sizes.items())
        return f"{self.what} {sizes} {'tf32' if self.precision == 'tf32' else str(self.dtype).removeprefix('torch.')}"

    def build(self, device: torch.device | str, dtype: torch.dtype | None = None, small: bool = False) -> dict[str, Any]:
        """The launcher's keywords on ``device``, the same random numbers each time."""
        torch.manual_seed(0)
        sizes = {**self.sizes, **self.small} if small else self.sizes
        return self.arguments(Inputs(device, dtype or self.dtype, self.precision), **sizes)

    def record(self, family: str) -> list[launch.CompileCase]:
        """The compile cases of its launches for ``family``; nothing runs."""
        with float32_products(self.precision):
            cases = launch.record(family, self.name, self.launcher, **self.build("meta"), **self.shows)
        return [replace(c, tensor_cores=False, async_copies=False) if c.function.__name__ in self.simple else c for c in cases]


def tiles(names: str, *values: Sequence[Any]) -> list[dict[str, Any]]:
    """Configurations' parts that go together: ``tiles("BLOCK_M num_warps", (64, 4), (128, 8))``."""
    return [dict(zip(names.split(), value, strict=True)) for value in values]


def combinations(parts: Sequence[Config], **choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Each of ``parts`` with every combination of the choices."""
    return [{**part, **dict(zip(choices, chosen, strict=True))} for part in parts for chosen in itertools.product(*choices.values())]


def by_autograd(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], cotangent: torch.Tensor) -> list[torch.Tensor]:
    """The gradient of each input of ``function(*inputs)``, by autograd."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    return list(torch.autograd.grad(function(*leaves), leaves, cotangent))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating-point tensor in it, however deep in tuples, in ``dtype``."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [_cast(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _flat(value: Any) -> list[torch.Tensor | None]:
    """The tensors of a launcher's result, in order."""
    return [tensor for part in value for tensor in _flat(part)] if isinstance(value, (tuple, list)) else [value]


class Trial:
    """A workload's arguments on one device, and what has to come out."""

    def __init__(self, workload: Workload, device: torch.device | str, dtype: torch.dtype | None = None, small: bool = False):
        self.workload, self.dtype = workload, dtype or workload.dtype
        with reference_products(workload.precision):  # a gradient's arguments hold what its forward gave
            self.arguments = workload.build(device, dtype, small)

    def run(self) -> Any:
        """The launches, which are what is timed. Call it with the workload's precision in force: :func:`float32_products`."""
        return self.workload.launcher(**self.arguments)

    @functools.cached_property
    def expected(self) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """(in float64, by PyTorch in the dtype under test) of each result that is compared."""
        found = []
        for dtype in (torch.float64, self.dtype):
            arguments = {name: _cast(value, dtype) for name, value in self.arguments.items()}
            with reference_products(self.workload.precision):
                found.append(_flat(self.workload.reference(**arguments)))
        return list(zip(*found, strict=True))

    def check(self) -> None:
        """AssertionError unless the launches give what the rule demands."""
        with poisoned_memory():
            outputs = self.run()
        self.judge(outputs)

    def judge(self, outputs: Any) -> None:
        """AssertionError unless ``outputs`` are what the rule demands."""
        outputs, terms = _flat(outputs), self.workload.terms(**self.arguments) if self.workload.terms else {}
        assert len(outputs) >= len(self.expected), f"{len(outputs)} results, the reference has {len(self.expected)}"
        for index, (out, (exact, same)) in enumerate(zip(outputs, self.expected, strict=False)):
            if exact is None:
                continue
            if out.is_floating_point():
                assert_parity(out, exact, same.to(out.dtype), f"{self.workload.name}, result {index}", terms.get(index))
            else:
                assert torch.equal(out, exact), f"{self.workload.name}, result {index}: {(out != exact).sum()} integers differ"


@dataclass(frozen=True)
class Bucket:
    """One entry of a family's table, to be tuned on ``workloads``.

    ``when``: its conditions. ``parent``: those of the entry that serves the workloads now: the same, or a wider one before which the new
    entry goes. ``shipped``: that entry's configuration, the first of ``candidates``.
    """

    kernel: str
    when: Config
    parent: Config
    workloads: tuple[Workload, ...]
    shipped: Config
    candidates: tuple[Config, ...]

    def cases(self, family: str, candidate: Config) -> list[launch.CompileCase]:
        """What has to be compiled for the workloads under ``candidate``."""
        with launch.using(self.kernel, candidate):
            return list(launch.distinct(case for workload in self.workloads for case in workload.record(family)))


def offered(candidates: Iterable[Config], family: str, when: Config, shipped: Config) -> list[Config]:
    """The shipped configuration and the candidates, each once. Where there are no descriptors, those with are tried without; or are left
    out, if the pointers' tiles have other names.
    """
    if family not in DESCRIPTOR_FAMILIES or not when.get("describable", True):
        candidates = [c for c in candidates if not c.get("descriptor") or set(c) == set(shipped)]
        candidates = [{**c, "descriptor": False} if "descriptor" in c else c for c in candidates]
    return list({json.dumps(candidate, sort_keys=True): candidate for candidate in (shipped, *candidates)}.values())


def buckets(workloads: Iterable[Workload], family: str) -> list[Bucket]:
    """The entries of the table that the workloads stand for, in the order of tuning: half precision before float32, FORWARD before
    BACKWARD before RARE, and then by their turn.

    ValueError if a workload has candidates of a kernel that it does not launch.
    """
    found: dict[tuple[str, str], Bucket] = {}
    for workload in workloads:
        used = dict.fromkeys(entry for case in workload.record(family) for entry in case.used)
        missing = set(workload.candidates) - {kernel for kernel, _ in used}
        if missing:
            raise ValueError(f"{workload.name}: has candidates of {', '.join(sorted(missing))}, which {family} does not look up")
        for kernel, conditions in used:
            if kernel not in workload.candidates:
                continue
            parent = json.loads(conditions)
            when = {**parent, **{name: value for name, value in workload.narrow.items() if name not in parent}}
            key = kernel, json.dumps(when, sort_keys=True)
            shipped = next(entry["config"] for entry in launch.load_table(family)[kernel] if entry["when"] == parent)
            known = found.get(key, Bucket(kernel, when, parent, (), shipped, ()))
            candidates = offered((*known.candidates, *workload.candidates[kernel]), family, when, shipped)
            found[key] = replace(known, workloads=(*known.workloads, workload), candidates=tuple(candidates))

    def rank(bucket: Bucket) -> tuple[bool, int, int]:
        return min((workload.dtype == torch.float32, workload.stage, workload.turn) for workload in bucket.workloads)

    return sorted(found.values(), key=rank)
