"""The steps of the cumulative gain at their toy size."""

import torch

from bench.cases import models, steps
from bench.harness import runner


def test_wrong_labels_do_not_pass(toy):
    """Blind spot: logits that pass while the labels made of them are another class's."""
    opened = steps.OpenedSteps("dpt-base-ade20k", models.Sizes(1, 64, 64), torch.float32, toy)
    prepared = opened.prepare("plain float32")
    exact, (logits, chosen) = opened.exact(), prepared.judged()
    assert (chosen - exact[1]).abs().max() <= 1e-5
    labels = prepared.run(0)[1].long()
    wrong = opened._judged(logits, (labels + 1) % 5)[1]
    assert (wrong - exact[1]).abs().max() > 1e-2


def test_steps_that_need_kernels_are_skipped_with_the_reason(toy):
    """Blind spot: a row of a fused step on a machine that has no kernels."""
    [case] = models.cases([models.ModelRow("dpt-large-midas", 64, (1,), 0)], "steps", steps.STEPS, [torch.float32], steps.OpenedSteps)
    rows, skips = runner.measure_case(case, case.contenders, toy)
    assert [row.contender for row in rows] == ["plain float32", "+ channels_last", "+ exact rewrites"]
    assert {skip.contender for skip in skips} == set(steps.STEPS) - {row.contender for row in rows}
    assert all("GPU" in skip.reason or "float32" in skip.reason for skip in skips)


def test_steps_are_cumulative():
    """Blind spot: a step that loses what the one above it had."""
    found = [set(step.ops) for step in steps.STEPS.values() if step.ops is not None]
    assert all(one <= other for one, other in zip(found, found[1:], strict=False))
