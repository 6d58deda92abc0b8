"""The memory of a training step, counted without any."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small import wide
from torch import nn

import dpt
from dpt.kernels import launch
from dpt.model import DPT
from dpt.nets.hollow import freeze_unreached
from dpt.training.memory import Memory, counted, of_recipe
from dpt.training.recipes import RECIPES
from dpt.zoo import CONFIGS

BF16 = torch.bfloat16


def meta(name: str) -> DPT:
    with torch.device("meta"):
        return DPT(CONFIGS[name]).train()


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("name", "side", "statistics", "plain", "fast"),
    [
        ("dpt-base-ade20k", 512, True, 1.57, 0.86),
        ("dpt-base-ade20k", 512, False, 1.57, 0.81),
        ("dpt-large-midas", 384, True, 2.00, 0.76),
    ],
)
def test_what_two_pictures_take_under_autocast(name, side, statistics, plain, fast):
    """Blind spot: a kernel that begins to keep more, a plain model that keeps twice what it needs. The loss is not among it."""
    model = meta(name)
    for norm in norms(model):
        norm.train(statistics)
    found = counted(model, 2, (side, side), BF16)
    assert (round(found.saved / 1e9, 2), round(found.saved_fast / 1e9, 2)) == (plain, fast)
    assert found.saved_fast <= 0.6 * found.saved


def test_the_readmes_figures():
    """Blind spot: a kernel that keeps less, or more, while the page goes on saying what it kept."""
    page = " ".join((Path(__file__).parents[3] / "README.md").read_text().split())
    said = re.search(r"keeps (\S+) GB for its backward, (\S+) on the kernels, and with `checkpointing=true` (\S+) and (\S+): counted", page)
    recipe = replace(RECIPES["ade20k-160k"], amp="bfloat16", batch_size=2)
    config = CONFIGS[recipe.model]
    found = [of_recipe(replace(recipe, checkpointing=checkpointing), config) for checkpointing in (False, True)]
    assert said.groups() == tuple(f"{saved / 1e9:.2f}" for memory in found for saved in (memory.saved, memory.saved_fast))


def really_saved(model: DPT, x: torch.Tensor, autocast: torch.dtype | None) -> int:
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", autocast, enabled=bool(autocast)):
        found = model.forward_auxiliary(x)
        for parameter in model.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        assert len(found) == 2
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("autocast", [None, BF16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_count_is_what_a_real_step_keeps(autocast, checkpointing):
    """Blind spot: fake tensors that share memory where real ones do not, or the other way; a mode or an attribute lost in the copy."""
    model = wide("dpt-large-ade20k").train()
    norms(model)[0].eval()
    model.set_drop_path(0.5)
    model.set_checkpointing(checkpointing)
    x = torch.randn(2, 3, 48, 64).to(memory_format=torch.channels_last)
    freeze_unreached(model)
    running = [norm for norm in norms(model) if norm.training and norm.weight.requires_grad]
    missing = 4 * sum(norm.num_features for norm in running) if autocast else 0  # fake statistics are in autocast's dtype, not float32
    assert counted(model, 2, (48, 64), autocast).saved == really_saved(model, x, autocast) - missing


@pytest.mark.parametrize(
    ("optimizer", "moments"), [(torch.optim.AdamW, 2), (lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9), 1)]
)
def test_parameters_gradients_and_moments_are_those_of_a_step(optimizer, moments):
    """Blind spot: moments of what never gets a gradient, or of what is frozen."""
    model = wide("dpt-large-ade20k").train()
    model.encoder.requires_grad_(False)
    optimizer = optimizer(model.parameters())
    found = counted(model, 2, (32, 32), moments=moments, average=True)
    sum(output.sum() for output in model.forward_auxiliary(torch.randn(2, 3, 32, 32))).backward()
    optimizer.step()
    size = {id(p): p.numel() * 4 for p in model.parameters()}
    assert found.parameters == found.average == sum(size.values())
    assert found.gradients == sum(size[id(p)] for p in model.parameters() if p.grad is not None) < 0.9 * found.parameters
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value) and value.dim()]
    assert found.optimizer == sum(value.numel() * 4 for value in state)
    assert freeze_unreached(model) and counted(model, 2, (32, 32), moments=moments).gradients == found.gradients


def test_the_losss_share():
    """Blind spot: a loss that keeps more than the decoder, and is left out although it was given."""
    model = wide("dpt-base-ade20k").train()

    def loss(outputs: list[torch.Tensor]) -> torch.Tensor:
        (logits,) = outputs
        return F.cross_entropy(logits.float(), logits.new_empty((2, 32, 32), dtype=torch.long))

    with torch.no_grad():
        without, found = counted(model, 2, (32, 32)), counted(model, 2, (32, 32), loss=loss)
    classes = len(model.config.head.classes)
    extra = 2 * 32 * 32 * (classes * 4 + 8) + 4  # the softmax's logarithm, the labels, the weight's sum
    assert found.saved - without.saved == found.saved_fast - without.saved_fast == extra


def test_nothing_of_it_stays():
    """Blind spot: CPU tensors that are taken for a GPU's afterwards, a model that changed its class, its mode or its numbers."""
    model = dpt.accelerate(wide("dpt-base-ade20k").train())
    state, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    plain = wide("dpt-base-ade20k").train()
    random = torch.random.get_rng_state()
    found = counted(model, 2, (32, 32))
    assert found == counted(plain, 2, (32, 32))
    with pytest.raises(ValueError, match="input of 33x32"):
        counted(model, 2, (33, 32))
    with pytest.raises(ValueError, match="batch=0: it must be at least 1"):
        counted(model, 0, (32, 32))
    assert launch.has_kernels(torch.ones(1)) == launch.INTERPRETED
    assert [type(module) for module in model.modules()] == kinds and all(module.training for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random) and all(p.grad is None for p in model.parameters())


def test_the_table():
    """Blind spot: columns that are mixed up, sums without a part, a row of nothing."""
    lines = str(Memory(1_000_000_000, 2_000_000_000, 3_000_000_000, 0, 4_000_000_000, 500_000_000)).splitlines()
    assert [line.split()[-2:] for line in lines] == [
        ["plain", "fast"],
        *([f"{n}.00"] * 2 for n in (1, 2, 3)),
        ["4.00", "0.50"],
        ["10.00", "6.50"],
    ]
    assert str(Memory(1_000_000_000, 0, 0, 250_000_000, 0, None)).splitlines()[-1].split() == ["together", "1.25"]
