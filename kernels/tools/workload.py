"""What the tuning command runs, as data of the op modules: a launcher, its arguments at a size that a model has, what PyTorch makes of
them, and the configurations to be tried; and the rule by which outputs are judged, the tests' too.

An op module that can be tuned has a ``tuning_space()`` that yields workloads. Which entries of a family's table a workload stands for
follows from recording its launches (:func:`buckets`); nobody writes the table's conditions a second time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .. import launch

DESCRIPTOR_FAMILIES = ("sm_90", "sm_100", "sm_120")
# When a workload is tuned: what every inference runs, what training adds, what no model of the table does. float32 comes after all that.
FORWARD, BACKWARD, RARE = range(3)

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
    are not compared. Integers have to agree exactly.
    ``candidates``: of each kernel to be tuned, its configurations; see :func:`offered` for those with descriptors.
    ``narrow``: further conditions, where the table's entry serves sizes that are too different: an entry of its own is then proposed.
    ``stage``: FORWARD, BACKWARD or RARE. ``shows``: ``tensor_cores`` and ``async_copies`` of :class:`launch.CompileCase`, as in
    ``compile_cases``; ``simple``: the names of the kernels among its launches that have to show neither.
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
    shows: Mapping[str, bool | str] = field(default_factory=dict)
    simple: tuple[str, ...] = ()

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


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """ "tf32" or "ieee" for PyTorch's matmuls and convolutions, and so for the launchers that ask PyTorch's switches."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
    before = [switch.fp32_precision for switch in switches]
    _set_precisions([precision] * 3)
    try:
        yield
    finally:
        _set_precisions(before)


def _set_precisions(values: Sequence[str]) -> None:
    """Of matmuls, convolutions and recurrent layers. First by the older switches, for torch.export and torch.compile read those, which is
    an error where they say something else than the newer."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul.allow_tf32, cudnn.allow_tf32 = (value == "tf32" for value in values[:2])
    matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = values


def precision_in_force() -> str:
    """ "tf32" or "ieee", as both of PyTorch's switches say; ValueError where they differ, for then no one word is right."""
    matmul, convolution = (s.fp32_precision == "tf32" for s in (torch.backends.cuda.matmul, torch.backends.cudnn.conv))
    if matmul != convolution:
        raise ValueError(f"TF32 for matmuls: {matmul}, for convolutions: {convolution}: the rule needs one precision for both")
    return "tf32" if matmul else "ieee"


def truncated(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 ``tensor`` as a tensor core reads it in TF32: the last 13 of its 23 bits are not there. Other dtypes as they are."""
    return (tensor.view(torch.int32) & -(2**13)).view(torch.float32) if tensor.dtype == torch.float32 else tensor


aten = torch.ops.aten
# Of PyTorch's products, the arguments that are multiplied; what is added to the product is not truncated.
OPERANDS = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.convolution.default: (0, 1),
    aten.convolution_backward.default: (0, 1, 2),
}
OTHER_PRODUCTS = (aten.mv.default, aten.addmv.default, aten.dot.default, aten.addbmm.default)


class _TruncatedProducts(TorchDispatchMode):
    """float32 operands of every product are truncated to TF32, in the backward too; sums stay in float32."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in OTHER_PRODUCTS:
            raise NotImplementedError(f"{function}: its operands would not be truncated, add it to OPERANDS")
        if function not in OPERANDS:
            with self:  # in inference mode `linear` and the like arrive whole: go on with what they are made of
                parts = function.decompose(*args, **kwargs) if function.namespace == "aten" else NotImplemented
            return function(*args, **kwargs) if parts is NotImplemented else parts
        result = function(*(truncated(arg) if index in OPERANDS[function] else arg for index, arg in enumerate(args)), **kwargs)
        if function is aten.convolution_backward.default and args[10][2]:  # the bias's gradient is a sum, not a product
            return *result[:2], args[0].sum((0, *range(2, args[0].dim())))
        return result


@contextlib.contextmanager
def reference_products(precision: str) -> Iterator[None]:
    """How a reference in float32 multiplies, to be the rule's yardstick: exactly; for "tf32", exactly what is left of truncated operands.

    PTX rounds to TF32 only where it is told to (cvt.rna.tf32), and Triton does not tell it: the tensor core leaves out the last 13 bits of
    what it is given. That loses more than cuDNN and cuBLAS do, which round, so their TF32 is no yardstick: in the ops' references 2.2 to
    3.5 times as much in outputs, 1.8 to 4.6 times in gradients where no ReLU jumps. Attention is written out, so that its products are
    seen.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(float32_products("ieee"))
        if precision == "tf32":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_TruncatedProducts())
        yield


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory comes full of NaN: the allocator would hand out the right results of the call before, and hide what was not written."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class BeyondRule(AssertionError):
    """A result is farther off than the rule allows, by ``distance``."""

    def __init__(self, distance: Distance):
        super().__init__(str(distance))
        self.distance = distance


@dataclass(frozen=True)
class Distance:
    """The largest differences from float64, ``ours`` (at ``where``) and ``theirs``, PyTorch's, which the rule compares; see
    :func:`assert_parity`. ``beyond``: how many of our values are farther off than is allowed."""

    name: str
    ours: float
    theirs: float
    tiny: float
    where: tuple[int, ...]
    beyond: int = 0

    @property
    def allowed(self) -> float:
        return 2 * self.theirs + self.tiny

    def __str__(self) -> str:
        return f"{self.name}: off by {self.ours:.3e} at {self.where}, allowed {self.allowed:.3e}; {self.beyond} values are beyond"

    def check(self) -> None:
        """BeyondRule where ours is more than is allowed."""
        if self.ours > self.allowed:
            raise BeyondRule(self)


def assert_parity(
    out: torch.Tensor,
    ref64: torch.Tensor,
    torch_same_dtype: torch.Tensor,
    name: str = "output",
    magnitude: float | None = None,
) -> None:
    """The rule by which a kernel's output is judged:

        max|out - ref64| <= 2 * max|torch_same_dtype - ref64| + tiny

    ``ref64`` is the reference computed in float64, ``torch_same_dtype`` the reference computed by PyTorch in the dtype under test: the
    kernel may lose at most twice what PyTorch loses; in TF32, twice what operands lose that are truncated to it, exactly multiplied: see
    :func:`reference_products`, in which ``torch_same_dtype`` has to be computed. ``tiny`` is one unit in the last place of the largest
    value, for results PyTorch happens to get exactly.

    BeyondRule where it does not hold; AssertionError also unless ``out`` has the dtype and shape of ``torch_same_dtype``, and is finite.
    ``magnitude``: the largest value that ``tiny`` is counted from, where the result is a small difference of large terms; default
    max|ref64|.
    """
    assert out.dtype == torch_same_dtype.dtype, f"{name}: dtype {out.dtype}, expected {torch_same_dtype.dtype}"
    assert out.shape == ref64.shape == torch_same_dtype.shape, f"{name}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}"
    assert ref64.dtype == torch.float64, f"{name}: the reference is {ref64.dtype}, it must be float64"
    eps = torch.finfo(out.dtype).eps
    out, ref64, torch_same_dtype = (t.detach().to(out.device, torch.float64) for t in (out, ref64, torch_same_dtype))
    assert ref64.isfinite().all(), f"{name}: the reference itself is not finite"
    assert out.isfinite().all(), f"{name}: {(~out.isfinite()).sum()} of {out.numel()} values are not finite"
    largest = ref64.abs().max().item() if magnitude is None else magnitude
    difference = (out - ref64).abs()
    where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    found = Distance(name, difference.max().item(), (torch_same_dtype - ref64).abs().max().item(), eps * largest, where)
    replace(found, beyond=int((difference > found.allowed).sum())).check()


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
        outputs = _flat(outputs)
        assert len(outputs) >= len(self.expected), f"{len(outputs)} results, the reference has {len(self.expected)}"
        for index, (out, (exact, same)) in enumerate(zip(outputs, self.expected, strict=False)):
            if exact is None:
                continue
            if out.is_floating_point():
                assert_parity(out, exact, same.to(out.dtype), f"{self.workload.name}, result {index}")
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


def buckets(workloads: Iterable[Workload], family: str, order: Sequence[str] = ()) -> list[Bucket]:
    """The entries of the table that the workloads stand for, in the order of tuning: half precision before float32, FORWARD before
    BACKWARD before RARE, and then as ``order`` has the kernels.

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
        first = min(bucket.workloads, key=lambda workload: (workload.dtype == torch.float32, workload.stage))
        place = order.index(bucket.kernel) if bucket.kernel in order else len(order)
        return first.dtype == torch.float32, first.stage, place

    return sorted(found.values(), key=rank)
