"""The audit of half precision: its page, its stages, its figures."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from bench import precision
from bench.harness.shrunk import shrunk
from bench.reporting.precision import page
from dpt.model import DPT
from dpt.nets.encoders.residual import ResidualBlock
from dpt.zoo import CONFIGS

RECORD = json.loads(precision.RECORD.read_text(encoding="utf-8"))
ENCODERS = ["dpt-large-midas", "dpt-hybrid-midas", "midas-3.1-beit-base-384", "midas-3.1-swin2-tiny-256", "dpt-tiny-depth", "tipsv2-base"]


def small(name: str) -> DPT:
    full = CONFIGS[name]
    neck = None if full.encoder.map_widths else (8, 12, 16, 16)
    return DPT(shrunk(full, "small", width=32, features=16, grid=4, neck=neck, classes=5)).eval()


def test_the_page_shows_the_record():
    """Blind spot: a figure on the page that no file holds."""
    assert page(RECORD) == precision.PAGE.read_text(encoding="utf-8")
    assert precision.main(["--check"]) == 0
    other = copy.deepcopy(RECORD)
    other["models"][0]["stages"]["encoder.blocks.0"]["bfloat16"]["rms"] *= 2
    assert page(other) != page(RECORD)


def test_the_record_holds_what_is_audited():
    """Blind spot: a model that was left out of the last run, or figures that are none."""
    assert {record["name"]: record["weights"] == "trained" for record in RECORD["models"]} == precision.AUDITED
    for record in RECORD["models"]:
        assert len(record["stages"]) == CONFIGS[record["name"]].encoder.depth + 12  # embedding, maps, levels, three of the head
        for stage in record["stages"].values():
            assert 0 < stage["largest"] <= record["largest"]["value"]
            for dtype, half in precision.HALVES.items():
                unit = torch.finfo(half).eps / 2
                assert unit / 100 < stage[dtype]["rms"] and stage[dtype]["largest"] < 1


@pytest.mark.parametrize("name", ENCODERS)
def test_stages_are_found_by_the_tree(name):
    """Blind spot: an encoder or a head whose stages are called otherwise, or not at all."""
    model = small(name)
    encoder = model.config.encoder
    with torch.inference_mode(), precision.watched(model) as (outputs, largest, last):
        maps = model(torch.randn(1, 3, *(encoder.fixed_size or (4 * encoder.patch_size,) * 2)))
    names = list(outputs)
    tasks = [""] if not model.config.further else ["", *(f"further.{task}." for task in model.further)]
    blocks = [path for path, module in model.named_modules() if isinstance(module, ResidualBlock)]
    assert names[0] == precision.EMBEDDING and names[1 : 1 + len(blocks)] == blocks
    assert [path for path in names if ".blocks" not in path and "reassemble." in path] == [
        f"{task}reassemble.{level}" for task in tasks for level in range(4)
    ]
    for task in tasks:
        assert [path for path in names if path.startswith(f"{task}fusion.")] == [f"{task}fusion.blocks.{level}" for level in (3, 2, 1, 0)]
        assert [path for path in names if path.startswith(f"{task}head")] == [
            f"{task}head, {what}" for what in ("before its last layer", "behind it", "its map")
        ]
    first = next(iter(maps.values())) if isinstance(maps, dict) else maps
    assert torch.equal(outputs["head, its map"], first) and isinstance(last["head"], nn.Conv2d | nn.Linear)
    assert max(float(value.abs().max()) for value in outputs.values()) <= max(largest.values())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", [name for name, trained in precision.AUDITED.items() if trained])
def test_the_figures_are_those_of_the_model(name):
    """Blind spot: figures of weights, pictures or code that are no more. Another processor rounds in another order: by less than half."""
    recorded, found = next(record for record in RECORD["models"] if record["name"] == name), precision.audit(name, trained=True)
    assert list(found["stages"]) == list(recorded["stages"])
    for stage, values in found["stages"].items():
        other = recorded["stages"][stage]
        assert values["largest"] == pytest.approx(other["largest"], rel=1e-3), stage
        for dtype in precision.HALVES:
            assert values[dtype]["rms"] == pytest.approx(other[dtype]["rms"], rel=0.5), (stage, dtype)
    for kind, dtypes in recorded["last layer"].items():
        for dtype, values in dtypes.items():
            assert found["last layer"][kind][dtype]["rms"] == pytest.approx(values["rms"], rel=0.5)


def test_what_is_rounded_is_the_same_function():
    """Blind spot: a part that is off because it is another function, not because it is rounded."""
    torch.manual_seed(0)
    model, x = small("dpt-large-midas").double(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.inference_mode():
        exact = model(x)
        for part, functions in precision.ROUNDED.items():
            with precision.Instead(functions):
                found = model(x)
            assert 0 < (found - exact).abs().max() <= 1e-12 * exact.abs().max(), part  # in another order of sums, so that it was called


def test_errors_are_relative():
    """Blind spot: a root mean square of the stage, a NaN that is smaller than all."""
    exact = torch.tensor([3.0, -4.0])
    assert precision.errors(exact + torch.tensor([0.0, 0.4]), exact) == {"largest": 0.1, "rms": 0.08}
    assert precision.errors(exact * torch.nan, exact)["rms"] == math.inf
