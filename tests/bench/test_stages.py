"""bench.stages: whose time is whose, and what a floor counts."""

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dpt
from bench import stages


def test_the_page_is_the_records():
    """Blind spot: a page that was written by hand, or of an older record."""
    assert stages.main(["--check"]) == 0


def test_what_is_within_a_stage_is_that_stages_alone():
    """Blind spot: seconds counted twice, or those between two stages lost."""
    seconds = itertools.count()
    clock = stages.Clock(lambda: float(next(seconds)))  # a second for each look at it
    with clock.stage("encoder"), clock.stage("attention"):
        pass
    with clock.stage("head"):
        pass
    found = clock.shares()
    assert found["attention"] == found["head"] == 1 and found["rest of the encoder"] == 5
    assert sum(found.values()) == next(seconds) - 1 and set(found) == set(stages.STAGES)


@pytest.mark.parametrize("fast", (False, True), ids=("plain", "fast"))
def test_all_that_is_computed_is_some_stages(fast):
    """Blind spot: a module that no stage names; Winograd's multiplications counted as the convolution's."""
    torch.manual_seed(0)
    model, x = dpt.build("dpt-tiny-depth", fast=fast).eval(), torch.randn(1, 3, 192, 192)
    with torch.inference_mode():
        mapping = {stages.ATTENTION: stages._attention_flops}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            model(x)
        found = stages.flops(model, x)
    assert all(amount > 0 for stage, amount in found.items() if stage != "rest of the encoder")
    assert sum(found.values()) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_model_is_measured(monkeypatch, capsys):
    """Blind spot: shares of something else than the plain model's whole; models left with clocks around their layers."""
    monkeypatch.setattr(stages, "RUNS", 1)
    monkeypatch.setattr(stages, "MEASURED", {"dpt-tiny-depth": 96})
    assert stages.main(["dpt-tiny-depth"]) == 0
    page = capsys.readouterr().out
    assert "## dpt-tiny-depth, 96x96" in page and "| whole | 100.0 |" in page
    assert all(f"| {stage} |" in page for stage in stages.STAGES)
    assert stages.main(["dpt-nowhere"]) == 2 and "no model 'dpt-nowhere': dpt-tiny-depth" in capsys.readouterr().err
