"""Rates, decays and averages of a recipe, against what others' code computes and values worked out by hand."""

from dataclasses import replace

import pytest
import torch
from small import small

from dpt.training.optimization import Average, optimizer_of, parameter_groups, rate, set_rates
from dpt.training.recipes import RECIPES, Recipe

PLAIN = Recipe(model="dpt-base-ade20k", crop=(64, 64))
# Of mmengine 0.10.7, run: LinearLR(start_factor=1e-6, end=15) and PolyLR(power=1, begin=15, end=160) at 6e-5; PolyLR(power=0.9, end=100).
LINEAR = {0: 6e-11, 1: 4.28577e-06, 2: 8.57148e-06, 13: 5.571429e-05, 14: 6e-05, 15: 6e-05, 16: 5.958333e-05, 17: 5.916667e-05}
LINEAR |= {80: 3.291667e-05, 158: 4.166667e-07, 159: 0.0}
POWER = {0: 0.002, 1: 0.0019818089648900973, 2: 0.001963599357687103, 50: 0.0010620251281928642, 98: 3.198588124747026e-05, 99: 0.0}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"learning_rate": 6e-5, "warmup": 15, "warmup_start": 1e-6, "steps": 160, "power": 1.0}, LINEAR),
        ({"learning_rate": 2e-3, "warmup": 0, "steps": 100, "power": 0.9}, POWER),
    ],
)
def test_polynomial_rates_are_mmengines(changes, wanted):
    """Blind spot: a step too early or late, where warm-up meets the schedule and at the end."""
    recipe = replace(PLAIN, schedule="polynomial", **changes)
    for step, value in wanted.items():
        assert recipe.learning_rate * rate(recipe, step) == pytest.approx(value, rel=1e-6, abs=1e-15)


def test_cosine_by_hand():
    """Blind spot: a cosine that does not end at zero. Of five steps after one of warm-up: 1, 0.854, 0.5, 0.146, 0."""
    recipe = replace(PLAIN, steps=6, warmup=1, warmup_start=0.25)
    assert [rate(recipe, step) for step in range(6)] == pytest.approx([0.25, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0])


def test_weight_decay_of_mmsegmentations_recipe():
    """Blind spot: norms without decay, as that recipe means and does not do: cls_token and pos_embed alone have none."""
    groups = parameter_groups(small("dpt-base-ade20k"), RECIPES["ade20k-160k"])
    undecayed = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    assert undecayed == {"encoder.cls_token", "encoder.pos_embed"}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}


def test_no_decay_of_vectors():
    """Blind spot: a bias or a norm that is drawn to zero."""
    model = small("dpt-base-ade20k")
    groups = parameter_groups(model, PLAIN)
    undecayed = {name for group in groups if not group["weight_decay"] for name in group["names"]}
    expected = {name for name, value in model.named_parameters() if value.dim() == 1}
    assert undecayed == expected | {"encoder.cls_token", "encoder.pos_embed"}
    assert sorted(name for group in groups for name in group["names"]) == sorted(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("dpt-large-midas", {"encoder.patch_embed.weight": 0.5**5, "encoder.blocks.0.attn.qkv.weight": 0.5**4}),
        ("dpt-large-midas", {"encoder.blocks.3.mlp.fc1.bias": 0.5, "fusion.convs.0.weight": 1.0, "head.conv1.bias": 1.0}),
        ("midas-3.1-swin2-tiny-256", {"encoder.stages.3.blocks.1.attn.qkv.weight": 0.5, "encoder.stages.3.blocks.0.attn.qkv.weight": 0.25}),
    ],
)
def test_layerwise_rates(name, wanted):
    """Blind spot: deeper blocks with the smaller rate, a block that is not counted, a decoder that decays too. Four blocks, 0.1 x 0.5^k."""
    recipe = replace(PLAIN, layer_decay=0.5, encoder_rate=0.1, learning_rate=1.0)
    groups = parameter_groups(small(name), recipe)
    factors = {parameter: group["factor"] for group in groups for parameter in group["names"]}
    for parameter, factor in wanted.items():
        assert factors[parameter] == pytest.approx(factor * (0.1 if parameter.startswith("encoder.") else 1)), parameter


def test_frozen_parameters_are_left_out():
    """Blind spot: an optimiser whose weight decay moves what is frozen."""
    model = small()
    model.encoder.requires_grad_(False)
    assert not any(name.startswith("encoder.") for group in parameter_groups(model, PLAIN) for name in group["names"])


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_the_optimizer_is_the_recipes(name):
    """Blind spot: a rate that the groups do not follow, an optimiser's own settings forgotten."""
    recipe = replace(PLAIN, optimizer=name, encoder_rate=0.1, betas=(0.8, 0.9), momentum=0.7, warmup=4, warmup_start=0.0)
    optimizer = optimizer_of(small(), recipe)
    assert type(optimizer).__name__.lower() == name
    group = optimizer.param_groups[0]
    assert group["momentum"] == 0.7 if name == "sgd" else group["betas"] == (0.8, 0.9)
    assert set_rates(optimizer, recipe, 3) == pytest.approx(1e-3)
    assert {(each["factor"], each["lr"]) for each in optimizer.param_groups} == {(0.1, 1e-4), (1.0, 1e-3)}
    assert set_rates(optimizer, recipe, 0) == 0 and {each["lr"] for each in optimizer.param_groups} == {0}


def test_the_average_by_hand():
    """Blind spot: decay and share swapped, the slow start. Of 0, 1, 2 with at most 2/11 and 3/12: 1 * 9/11; 2 * 9/12 + 9/11 * 3/12."""
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()
        average = Average(model, 0.99)
        for step in (1, 2):
            model.weight.fill_(step)
            average.update(model, step)
    assert average.values["weight"].item() == pytest.approx(1.5 + 9 / 11 / 4)
    average.decay = 0.0
    average.update(model, 1000)
    assert average.values["weight"].item() == 2
