"""The rule for one result of a kernel: what it refuses, and what is asked again where chance has a part in it."""

import functools

import pytest
import torch

from dpt.kernels.tools.parity import BY_A_LITTLE, DRAWS, BeyondRule, Distance, assert_parity, judge_draws


def judged(ours, theirs):
    """What `judge_draws` says to a test of one value, off by ``ours`` and by ``theirs`` in each draw; the first was refused."""
    rounding = iter(zip(ours, theirs, strict=True))

    def test():
        ours, theirs = next(rounding)
        assert_parity(*(torch.tensor([1 + off], dtype=dtype) for off, dtype in ((ours, F32), (0, torch.float64), (theirs, F32))))

    return judge_draws(test, BeyondRule(Distance("output", 3e-3, 1e-3, 0.0, (0,))))


F32 = torch.float32
refused = functools.partial(pytest.raises, BeyondRule)


def test_the_rule_can_fail():
    """Twice PyTorch's own error is allowed and no more, and where PyTorch is exact one unit in the last place."""
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    theirs = torch.tensor([1.0, -2.01])
    assert_parity(torch.tensor([1.019, -2.0]), exact, theirs)
    with pytest.raises(AssertionError, match="off by 2.1"):
        assert_parity(torch.tensor([1.021, -2.0]), exact, theirs)
    with pytest.raises(AssertionError, match="off by"):
        assert_parity(torch.tensor([1.0 + 4e-7, -2.0]), exact, exact.float())


def test_what_was_chance_passes():
    """PyTorch was lucky in the first draw, and no luckier than the kernel in all."""
    assert "not so in 4 draws together" in judged([3e-3, 1e-3, 2e-3, 2e-3], [1e-3, 2e-3, 1e-3, 1.6e-3])


def test_what_is_worse_in_every_draw_is_refused():
    """By two and a half times what PyTorch loses, and by what one draw of the four is off that no draw of PyTorch's comes near."""
    with refused(match="off by 5.000e-03 at .* allowed 4.0"):
        judged([2.5e-3, 5e-3, 2.5e-3, 2.5e-3], [1e-3, 2e-3, 1e-3, 1e-3])
    with refused(match="off by 1.0000?e-01"):
        judged([1e-3, 1e-3, 1e-1, 1e-3], [1e-3] * DRAWS)


def test_what_is_far_beyond_is_not_asked_again():
    """As it stands: an element that no rounding explains costs no further runs."""
    far = BeyondRule(Distance("output", BY_A_LITTLE * 2.1e-3, 1e-3, 0.0, (0,)))
    with refused() as error:
        judge_draws(lambda: pytest.fail("asked again"), far)
    assert error.value is far


def test_other_assertions_stay():
    """A NaN in any draw is none of the rule's business."""
    with pytest.raises(AssertionError, match="not finite"):
        judged([1e-3, float("nan"), 1e-3, 1e-3], [1e-3] * DRAWS)


DRAWN = []


def test_the_test_itself_is_asked_again():
    """This test is refused in the first draw: off by 1, where PyTorch is off by 0.4; and by 1 and 0.6 when it is asked again, which is
    within the rule. Every draw has numbers of its own, the first those of the run that was refused."""
    DRAWN.append(torch.rand(1).item())
    assert len(DRAWN) <= DRAWS or (DRAWN[0] == DRAWN[1] and len(set(DRAWN)) == DRAWS)
    theirs = 0.4 if len(DRAWN) == 1 else 0.6
    assert_parity(*(torch.tensor([off], dtype=dtype) for off, dtype in ((1.0, F32), (0.0, torch.float64), (theirs, F32))))
