"""transformers' models on the kernels themselves, against the same models untouched: forward, and for two of them backward."""

import copy

import pytest
import torch
from both_passes import in_both
from theirs import CASES, tensors

import dpt
from dpt.kernels import launch
from dpt.kernels.tools.parity import assert_parity

SIDES = {64: 32, 70: 28, 56: 28, 80: 32}  # of two patches, for the interpreter takes its time
WHOLE = ("dpt-hybrid", "dpt-swin2")  # which take their own size
WAYS = ("pointers", "descriptors") if launch.INTERPRETED else ("ieee", "ieee")  # a GPU's way of loading is its own
BACKWARD = (("dpt", WAYS[0]), ("depth-anything", WAYS[1]))
FORWARD = [(name, WAYS[index % 2]) for index, name in enumerate(CASES) if name not in dict(BACKWARD)]


def both_models(name: str, device: torch.device):
    """(accelerated, untouched, what a call takes), of pictures of four patches."""
    case = CASES[name]
    case = case if name in WHOLE else case._replace(side=SIDES[case.side])
    untouched = case.model().to(device)
    inputs = {key: value.to(device) for key, value in case.inputs(1).items()}
    if name == "vit":
        inputs["interpolate_pos_encoding"] = True
    return dpt.accelerate(copy.deepcopy(untouched)), untouched, inputs


def given(model: torch.nn.Module, inputs: dict, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    model = model if dtype is None else copy.deepcopy(model).to(dtype)
    changed = {key: value.to(dtype) if dtype and isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    return list(tensors(model(**changed)).values())


@pytest.mark.parametrize(("name", "path"), FORWARD, indirect=["path"])
def test_forward(name, device, exact_path):
    """Blind spot: weights, grids, rotations or biases that the algebra takes in one order and the kernels in another."""
    quick, untouched, inputs = both_models(name, device)
    with torch.inference_mode():
        found = given(quick, inputs)
        for results in zip(found, *in_both(lambda dtype: given(untouched, inputs, dtype)), strict=True):
            assert_parity(*results)


@pytest.mark.parametrize(("name", "path"), BACKWARD, indirect=["path"])
def test_forward_and_backward(name, device, exact_path):
    """Blind spot: a gradient that does not arrive at queries, keys or values, or arrives at another."""
    quick, untouched, inputs = both_models(name, device)

    def passed(model: torch.nn.Module, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = model if dtype is None else copy.deepcopy(model).to(dtype)
        (depth,) = given(model, {key: value.to(dtype or value.dtype) for key, value in inputs.items()})
        depth.square().mean().backward()
        return depth.detach(), {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}

    ours = passed(quick)
    exact, theirs = in_both(lambda dtype: passed(copy.deepcopy(untouched), dtype))
    assert_parity(ours[0], exact[0], theirs[0])
    assert ours[1].keys() == exact[1].keys()
    largest = {key: gradient.abs().max() for key, gradient in exact[1].items() if not key.endswith(("k_proj.bias", "key.bias"))}  # of 0
    assert all(largest.values())
    ways = (torch.cat([(way[1][key] / largest[key]).flatten() for key in largest]) for way in (ours, exact, theirs))
    assert_parity(*ways, name="gradients")
