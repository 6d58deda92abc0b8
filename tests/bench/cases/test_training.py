"""What the gate catches of a training step at its toy size."""

import torch

from bench.cases import models, training
from bench.harness import runner


def test_a_lost_gradient_does_not_pass(toy, monkeypatch):
    """Blind spot: a training gate that a step without one parameter's gradient would pass."""

    def broken(model):
        unit = model.fusion.blocks[1].unit1.conv1
        unit.weight.register_hook(torch.zeros_like)
        return model

    monkeypatch.setitem(training.CONTENDERS, "fast", broken)
    row = models.ModelRow("dpt-base-ade20k", 64, (2,), 0)
    [case] = models.cases([row], "training", training.CONTENDERS, [torch.float32], training.OpenedTraining)
    rows, _ = runner.measure_case(case, case.contenders, toy)
    found = {row.contender: row for row in rows}
    assert found["plain"].status == "ok" and found["fast"].status == "failed" and "root mean square" in found["fast"].problem


def test_what_a_step_keeps_is_counted_of_both(toy):
    """Blind spot: one contender's bytes under the other's name; a CPU's, where nothing is fused, as the kernels'."""
    row = models.ModelRow("dpt-base-ade20k", 64, (2,), 0)
    [case] = models.cases([row], "training", training.CONTENDERS, [torch.bfloat16], training.OpenedTraining)
    rows, _ = runner.measure_case(case, case.contenders, toy)
    saved = {row.contender: row.facts["saved_bytes"] for row in rows}
    assert 0 < saved["fast"] < saved["plain"] and all(row.facts["model"] == "dpt-base-ade20k" for row in rows)
