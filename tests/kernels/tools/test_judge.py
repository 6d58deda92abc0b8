"""The rule for all results of a contender: what is refused, and what a rounding of the dtype may cost."""

import pytest
import torch

from dpt.kernels.tools import parity

EXACT = torch.linspace(-1.0, 1.0, 101, dtype=torch.float64)
PLAIN = EXACT.float() + 1e-5


def judge(out, exact=EXACT, plain=PLAIN, dtype=torch.float32, rms=False):
    return parity.judge([out], [exact], [plain], dtype, rms)


def test_the_other_memory_format_counts_where_it_loses_more():
    """Blind spot: a yardstick that only the layout of the baseline sets, or one that the better layout narrows."""
    out, near = EXACT.float() + 5e-5, EXACT.float() + 1e-6
    for plain, other, passes in ((PLAIN, None, False), (PLAIN, near, False), (PLAIN, out, True), (out, near, True)):
        verdict = parity.judge([out], [EXACT], [plain], torch.float32, other_plain=None if other is None else [other])
        assert (verdict.problem is None) == passes


@pytest.mark.parametrize(("error", "passes"), [(0.0, True), (1.9e-5, True), (2.1e-5, False), (1.0, False)])
def test_twice_what_plain_loses(error, passes):
    """Blind spot: a contender that is further off than allowed, by little and by much, in one value only."""
    out = EXACT.float()
    out[50] += error
    verdict = judge(out)
    assert (verdict.problem is None) == passes
    if not passes:
        assert "of the largest value, allowed" in verdict.problem and verdict.loss == pytest.approx(error, rel=0.02)


def test_one_unit_in_the_last_place_is_allowed():
    """Blind spot: a plain result that happens to be exact must not forbid all rounding."""
    out = EXACT.float()
    out[0] += torch.finfo(torch.float32).eps
    assert judge(out, plain=EXACT.float()).problem is None
    out[0] += 3 * torch.finfo(torch.float32).eps
    assert judge(out, plain=EXACT.float()).problem is not None


@pytest.mark.parametrize(
    ("out", "why"),
    [
        (torch.full_like(PLAIN, float("nan")), "101 of 101 values are not finite"),
        (PLAIN[:-1], "shape"),
        (PLAIN.half(), "dtype"),
        (torch.zeros_like(PLAIN), "off by"),
    ],
)
def test_what_cannot_be_right(out, why):
    """Blind spot: NaN, which no comparison finds too large; another shape or dtype; an output that was never written."""
    assert why in judge(out).problem


def test_a_constant_reference_judges_nothing():
    """Blind spot: random weights under a last ReLU that are zero everywhere: any broken contender would pass."""
    zeros = torch.zeros(10, dtype=torch.float64)
    assert "constant" in parity.judge([zeros.float()], [zeros], [zeros.float()], torch.float32).problem


def test_a_reference_that_is_not_finite_judges_nothing():
    """Blind spot: half precision that overflows in plain PyTorch allows everything."""
    plain = PLAIN.clone()
    plain[0] = float("inf")
    assert "reference itself" in judge(PLAIN, plain=plain).problem


def test_each_tensor_is_judged():
    """Blind spot: only the first of several outputs."""
    wrong = PLAIN.clone()
    wrong[3] = 5.0
    verdict = parity.judge([PLAIN, wrong], [EXACT, EXACT], [PLAIN, PLAIN], torch.float32)
    assert verdict.problem.startswith("output 1: ")
    assert "1 outputs, expected 2" in parity.judge([PLAIN], [EXACT, EXACT], [PLAIN, PLAIN], torch.float32).problem


def test_small_companions_are_judged_by_the_large_ones():
    """Blind spot: a gradient that cancels to rounding noise has no relative error of its own; one that is of size is still seen."""
    noise, large = torch.full((4,), 3e-10, dtype=torch.float64), EXACT
    noise[0] = 0.0
    wrong_noise = (-noise).float()
    assert parity.judge([PLAIN, wrong_noise], [large, noise], [PLAIN, noise.float()], torch.float32).problem is None
    dropped = torch.zeros(101)
    assert parity.judge([PLAIN, dropped], [large, 0.1 * EXACT], [PLAIN, 0.1 * PLAIN], torch.float32).problem is not None


def test_gradients_by_their_root_mean_square():
    """Blind spot: a dropped gradient must fail though single values may jump; a jump of one value in plain's worst tensor must not."""
    exact = [torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    plain = [tensor.float() + 0.01 * torch.randn(1000) for tensor in exact]
    jump = [tensor.clone() for tensor in plain]
    jump[0][7] += 0.2
    assert parity.judge(jump, exact, plain, torch.bfloat16, rms=True).problem is None
    assert parity.judge(jump, exact, plain, torch.bfloat16).problem is not None
    for wrong in (torch.zeros(1000), -plain[1], 2 * plain[1]):
        assert parity.judge([plain[0], wrong], exact, plain, torch.bfloat16, rms=True).problem is not None


def test_exact_is_wider_than_what_it_judges():
    """Blind spot: a reference in the dtype under test, which would judge nothing."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.finfo(parity.exact_dtype(dtype)).eps < torch.finfo(dtype).eps
