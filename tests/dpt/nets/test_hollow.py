"""Which parameters a training step gives no gradient: as real backwards have it, on a small model of each family."""

import copy

import pytest
import torch
from small import depth_anything, depth_anything_3, small, wide
from torch.utils import _pytree as pytree

import dpt
from dpt.nets.hollow import freeze_unreached, unreached

DEAD = "fusion.blocks.3.unit1."
# A model of each family, and the beginnings of the names without a gradient.
FAMILIES = {
    "mmsegmentation": (lambda: wide("dpt-base-ade20k"), ()),
    "isl-org": (lambda: wide("dpt-large-midas"), (DEAD,)),
    "isl-org segmentation": (lambda: wide("dpt-large-ade20k"), (DEAD,)),
    "hybrid": (lambda: wide("dpt-hybrid-nyu"), (DEAD,)),
    "beit": (lambda: wide("midas-3.1-beit-base-384"), (DEAD,)),
    "swinv2": (lambda: small("midas-3.1-swin2-tiny-256"), (DEAD,)),
    "zoedepth": (lambda: wide("zoedepth-n"), (DEAD,)),
    "zoedepth of two domains": (lambda: wide("zoedepth-nk"), (DEAD, "head.conv3.", "head.router.")),
    "Depth Anything": (depth_anything, (DEAD,)),
    "Prompt Depth Anything": (lambda: wide("prompt-depth-anything-small"), (DEAD,)),
    "Depth Anything 3": (depth_anything_3, ("head.sky.",)),
    "DINOv2": (lambda: wide("dpt-dinov2-giant-kitti"), ()),
    "DINOv3": (lambda: wide("chmv2"), ()),
    "TIPSv2": (lambda: wide("tipsv2-base"), ()),
    "ours": (lambda: wide("dpt-tiny-scenes"), ()),
    "a last block that is not hooked": (
        lambda: wide("dpt-base-ade20k", depth=5, final_norm="last"),
        ("encoder.blocks.4.", "encoder.norm."),
    ),
}


def without_gradient(model: dpt.DPT) -> list[str]:
    """After a real step."""
    encoder = model.config.encoder
    x = torch.randn(2, 3, *(encoder.fixed_size or (3 * encoder.patch_size, 4 * encoder.patch_size)))
    prompt = (torch.rand(2, 5, 7),) if model.config.decoder.prompt else ()
    found = model.forward_auxiliary(x) if model.config.head.auxiliary else model(x, *prompt)
    torch.autograd.backward([output.sum() for output in pytree.tree_leaves(found)])
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_as_a_backward_has_it(family, fast):
    """Blind spot: a parameter that is frozen and would learn, or that waits for a gradient that never comes."""
    make, prefixes = FAMILIES[family]
    model = make().train()
    if fast:
        dpt.accelerate(model)
    names = unreached(model)
    assert names == without_gradient(model)
    assert names == [name for name, _ in model.named_parameters() if name.startswith(prefixes)] if prefixes else not names


def test_nothing_is_computed_and_nothing_changes():
    """Blind spot: statistics of made-up pictures in the model, random numbers drawn, a frozen encoder that wants gradients again."""
    model = wide("dpt-large-ade20k").train()
    model.set_drop_path(0.5)
    model.encoder.requires_grad_(False)
    before, wanted = copy.deepcopy(model.state_dict()), [parameter.requires_grad for parameter in model.parameters()]
    state = torch.random.get_rng_state()
    assert all(name.startswith(DEAD) for name in unreached(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted and model.training
    assert torch.equal(torch.random.get_rng_state(), state)


def test_frozen():
    """Blind spot: others frozen, or names that are no parameters'."""
    model = wide("dpt-large-midas")
    names = freeze_unreached(model)
    assert names and names == [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
