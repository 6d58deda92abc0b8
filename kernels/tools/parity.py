"""The rule by which every result is judged, of the tests, of the tuning command and of the benchmarks:

    max|out - exact| <= 2 * max|plain - exact| + tiny

``plain`` is what PyTorch makes of the same in the dtype under test: ours may lose at most twice what that loses. ``exact`` is computed in a
wider dtype. ``tiny`` is one unit in the last place of the largest value, for results PyTorch happens to get exactly.

One result of a kernel is judged by :func:`assert_parity`, which raises :class:`BeyondRule`; all results of a benchmark's contender by
:func:`judge`, which gives a :class:`Verdict`. How a float32 reference has to multiply is :func:`reference_products`' to say.

Both sides of the rule are the worst of some rounding errors, and with few of them that is chance: with other random numbers, and so with
another order of additions, one test in two hundred or so is refused by a little (seen: 16 of 4592, by 1 to 20 %). So a test that is refused
by a little runs again with several draws of its random numbers, and the rule is applied to their values together, as if they stood in one
tensor: whoever loses more than twice what PyTorch loses is refused there too (:func:`judge_draws`).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

MULTIPLE = 2.0  # times what PyTorch loses
DRAWS = 4
BY_A_LITTLE = 4  # times what is allowed
COMPANIONS = 1e-2  # a tensor whose values are small beside those of its companions (a gradient that cancels) is judged by theirs


class BeyondRule(AssertionError):
    """A result is farther off than the rule allows, by ``distance``."""

    def __init__(self, distance: Distance):
        super().__init__(str(distance))
        self.distance = distance


# Where distances go instead of being checked, while draws are judged together.
_collected: ContextVar[list[Distance] | None] = ContextVar("dpt_kernels_collected_distances", default=None)


@dataclass(frozen=True)
class Distance:
    """How far off ``ours`` (at ``where``) and ``theirs``, PyTorch's, are from exact: what the rule compares. ``beyond``: how many of our
    values are farther off than is allowed."""

    name: str
    ours: float
    theirs: float
    tiny: float
    where: tuple[int, ...] = ()
    beyond: int = 0

    @property
    def allowed(self) -> float:
        return MULTIPLE * self.theirs + self.tiny

    def __str__(self) -> str:
        return f"{self.name}: off by {self.ours:.3e} at {self.where}, allowed {self.allowed:.3e}; {self.beyond} values are beyond"

    def check(self) -> None:
        """BeyondRule where ours is more than is allowed."""
        collected = _collected.get()
        if collected is not None:
            collected.append(self)
        elif self.ours > self.allowed:
            raise BeyondRule(self)


def _unusable(out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> str | None:
    """What makes a comparison impossible."""
    if not out.shape == exact.shape == plain.shape:
        return f"shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
    if out.dtype != plain.dtype:
        return f"dtype {out.dtype}, expected {plain.dtype}"
    if not (exact.isfinite().all() and plain.isfinite().all()):
        return "the reference itself is not finite: nothing can be judged by it"
    if not out.isfinite().all():
        return f"{int((~out.isfinite()).sum())} of {out.numel()} values are not finite"
    return None


def assert_parity(
    out: torch.Tensor, ref64: torch.Tensor, torch_same_dtype: torch.Tensor, name: str = "output", magnitude: float | None = None
) -> None:
    """The rule for one result of a kernel.

    ``ref64`` is the reference computed in float64, ``torch_same_dtype`` the reference computed by PyTorch in the dtype under test, in
    :func:`reference_products`: in TF32 the kernel may lose twice what operands lose that are truncated to it, exactly multiplied.
    ``magnitude``: the largest value that ``tiny`` is counted from, where the result is a small difference of large terms; default
    max|ref64|.

    BeyondRule where it does not hold; AssertionError also unless ``out`` has the dtype and shape of ``torch_same_dtype``, and all are
    finite.
    """
    problem = _unusable(out, ref64, torch_same_dtype)
    assert problem is None, f"{name}: {problem}"
    assert ref64.dtype == torch.float64, f"{name}: the reference is {ref64.dtype}, it must be float64"
    eps = torch.finfo(out.dtype).eps
    out, ref64, torch_same_dtype = (t.detach().to(out.device, torch.float64) for t in (out, ref64, torch_same_dtype))
    largest = ref64.abs().max().item() if magnitude is None else magnitude
    difference = (out - ref64).abs()
    where = tuple(int(i) for i in torch.unravel_index(difference.argmax(), difference.shape))
    found = Distance(name, difference.max().item(), (torch_same_dtype - ref64).abs().max().item(), eps * largest, where)
    replace(found, beyond=int((difference > found.allowed).sum())).check()


def judge_draws(test: Callable[[], Any], refused: BeyondRule) -> str:
    """Run a test again that the rule refused, with several draws of its random numbers; what was found, if their values together are
    within it. BeyondRule if not, ``refused`` itself where it was by more than a little."""
    if refused.distance.ours > BY_A_LITTLE * refused.distance.allowed:
        raise refused
    for same in zip(*(_distances(test, seed) for seed in range(DRAWS)), strict=True):
        theirs, tiny = max(found.theirs for found in same), max(found.tiny for found in same)
        replace(max(same, key=lambda found: found.ours), theirs=theirs, tiny=tiny).check()
    return f"{refused}; not so in {DRAWS} draws together"


@contextlib.contextmanager
def judged_at_once() -> Iterator[None]:
    """What the rule refuses within is refused there and then, also while draws are judged together: for tests that expect it."""
    token = _collected.set(None)
    try:
        yield
    finally:
        _collected.reset(token)


def _distances(test: Callable[[], Any], seed: int) -> list[Distance]:
    """What the rule would judge of a draw."""
    torch.manual_seed(seed)
    found: list[Distance] = []
    token = _collected.set(found)
    try:
        test()
    finally:
        _collected.reset(token)
    return found


@dataclass(frozen=True)
class Verdict:
    """On a contender: ``loss`` and ``allowed`` are relative to the largest value; ``problem`` is None where the rule holds."""

    loss: float
    allowed: float
    problem: str | None = None


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the exact result is computed for contenders of ``dtype``: for those of half precision float32, without TF32."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def largest_difference(out: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], rms: bool = False) -> float:
    """The largest difference between two results, relative to the largest value of the tensor it is in (or root mean squares)."""
    return max(_losses(out, reference, rms))


def judge(
    out: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    plain: Sequence[torch.Tensor],
    dtype: torch.dtype,
    rms: bool = False,
    other_plain: Sequence[torch.Tensor] | None = None,
) -> Verdict:
    """The rule for all tensors of a result, in a fixed order, each relative to its largest value; ``dtype`` is the one that is measured.

    ``other_plain``: plain PyTorch's in its other memory format. Convolutions sum in another order in channels-last memory, and lose more or
    less by it: the larger loss of the two counts.

    ``rms``: by the root mean square instead of the maximum, and the worst tensor by plain PyTorch's worst, as gradients of a whole model
    are judged: where rounding moves a value across a ReLU's kink, single gradients change by as much as they are, in every implementation.
    """
    unusable = _unusable_result(out, exact, plain)
    if unusable:
        return Verdict(float("inf"), 0.0, unusable)
    plain_losses = _losses(plain, exact, rms)
    if other_plain is not None:
        plain_losses = list(map(max, plain_losses, _losses(other_plain, exact, rms)))
    if rms:
        plain_losses = [max(plain_losses)] * len(plain_losses)
    names = [f"output {index}: " if len(out) > 1 else "" for index in range(len(out))]
    tiny = torch.finfo(dtype).eps
    found = [Distance(*each, tiny) for each in zip(names, _losses(out, exact, rms), plain_losses, strict=True)]
    worst = max(found, key=lambda distance: distance.ours / distance.allowed)
    return Verdict(worst.ours, worst.allowed, _problem(worst, rms))


def _problem(worst: Distance, rms: bool) -> str | None:
    if worst.ours <= worst.allowed:
        return None
    of = "root mean square" if rms else "largest value"
    return f"{worst.name}off by {worst.ours:.2e} of the {of}, allowed {worst.allowed:.2e} ({MULTIPLE:g} times plain PyTorch's)"


def _unusable_result(out: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]) -> str | None:
    """What makes a comparison impossible or empty."""
    if not len(out) == len(exact) == len(plain) or not exact:
        return f"{len(out)} outputs, expected {len(exact)}"
    for each in zip(out, exact, plain, strict=True):
        problem = _unusable(*each)
        if problem:
            return problem
    first = exact[0]
    if first.numel() > 1 and not (first.amax() - first.amin()).item() > 1e-3 * first.abs().amax().item():
        return "the reference is constant: nothing can be judged by it"
    return None


def _losses(out: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], rms: bool) -> list[float]:
    return [_size(ours, true, rms) / scale for ours, true, scale in zip(out, reference, _scales(reference, rms), strict=True)]


def _scales(tensors: Sequence[torch.Tensor], rms: bool) -> list[float]:
    own = [_size(tensor, None, rms) for tensor in tensors]
    floor = max(COMPANIONS * max(own), torch.finfo(torch.float32).tiny)
    return [max(value, floor) for value in own]


def _size(one: torch.Tensor, minus: torch.Tensor | None, rms: bool) -> float:
    """The largest absolute value, or the root mean square, of a tensor or of a difference."""
    if not one.numel():
        return 0.0
    wide = torch.float64 if minus is None or torch.float64 in (one.dtype, minus.dtype) else torch.float32
    value = one.to(wide) if minus is None else one.to(minus.device, wide) - minus.to(wide)
    return (value.square().mean().sqrt() if rms else value.abs().amax()).item()


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
