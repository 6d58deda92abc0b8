"""The encoders' blocks in training: branches dropped by chance, and activations computed again."""

import copy
import pickle

import pytest
import torch
from small import small, wide

import dpt
from dpt.model import DPT
from dpt.nets.encoders.residual import ResidualBlock

# A model of each kind of encoder, of four blocks (Swin: of eight), and the sides of its input.
KINDS = {
    "vit": ("dpt-large-midas", (32, 48)),
    "dinov3": ("chmv2", (32, 48)),
    "beit": ("midas-3.1-beit-base-384", (32, 48)),
    "swinv2": ("midas-3.1-swin2-tiny-256", (64, 64)),
}
BATCH = 3


def training(kind: str, fast: bool = False) -> DPT:
    model = (small if kind == "swinv2" else wide)(KINDS[kind][0]).train()
    return dpt.accelerate(model) if fast and kind != "swinv2" else model


def picture(kind: str) -> torch.Tensor:
    return torch.randn(BATCH, 3, *KINDS[kind][1], generator=torch.Generator().manual_seed(7))


def gradients(model: torch.nn.Module, x: torch.Tensor, autocast: bool = False) -> dict[str, torch.Tensor]:
    """Of the mean square of what it gives, by the random numbers of a fixed seed."""
    torch.manual_seed(3)
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = model(x)
    found.float().square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


class Deepest(torch.nn.Module):
    """The last hooked tokens."""

    def __init__(self, encoder: torch.nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)[-1]


def blocks(model: DPT) -> list[ResidualBlock]:
    return [module for module in model.encoder.modules() if isinstance(module, ResidualBlock)]


def kept(model: DPT, x: torch.Tensor) -> int:
    """Numbers that the encoder keeps for its backward, parameters aside."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    sizes = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in parameters:
            sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = model.encoder(x)
    assert len(found) == 4
    return sum(sizes.values())


@pytest.mark.parametrize("kind", KINDS)
def test_rates_rise_from_the_first_block_to_the_last(kind):
    """Blind spot: blocks of an encoder, or of a stage, that are passed over; a rate that begins anew in each stage."""
    model = training(kind)
    assert all(block.drop_path == 0 for block in blocks(model))
    model.set_drop_path(0.6)
    count = sum(model.config.encoder.stage_depths) if kind == "swinv2" else model.config.encoder.depth
    rates = [block.drop_path for block in blocks(model)]
    assert rates == pytest.approx([0.6 * index / (count - 1) for index in range(count)])
    model.set_drop_path(0)
    assert [block.drop_path for block in blocks(model)] == [0] * count


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_rates_out_of_range(rate):
    """Blind spot: a rate of 1, by whose complement is divided."""
    with pytest.raises(ValueError, match=f"drop path of {rate}: it must be from 0 to below 1"):
        training("vit").set_drop_path(rate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_branch_is_dropped_or_scaled_for_a_whole_sample(dtype):
    """Blind spot: single numbers dropped, one decision for a batch, the residual dropped too, no scale, a factor rounded to bfloat16."""
    block, count = blocks(training("vit"))[0], 4000
    x, branch = torch.full((count, 5, 2), -1.0, dtype=dtype), torch.full((count, 5, 2), 150 / 128, dtype=dtype)
    block.drop_path = 0.1
    found = block.added(x, branch)
    assert found.dtype == dtype
    assert all(len(sample.unique()) == 1 for sample in found)
    torch.testing.assert_close(found.unique(), torch.tensor([-1, 150 / 128 / 0.9 - 1], dtype=dtype), rtol=1e-6, atol=0)
    assert abs((found[:, 0, 0] == -1).double().mean() - 0.1) < 5 * (0.1 * 0.9 / count) ** 0.5
    assert torch.equal(block.eval().added(x, branch), x + branch)


@pytest.mark.parametrize("kind", KINDS)
def test_both_branches_of_a_block_are_dropped(kind):
    """Blind spot: a branch that is added as before; the decision of one branch taken for the other."""
    model, x = training(kind), picture(kind)
    block = blocks(model)[1]
    given, seen = [], []
    block.register_forward_pre_hook(lambda module, inputs: given.append(inputs))
    with torch.no_grad():
        model(x)
        block.drop_path = 1 - 1e-9  # all are dropped
        assert torch.equal(block(*given[0]), given[0][0])
        block.drop_path = 0.5
        block.added = lambda x, branch: seen.append((x, branch)) or type(block).added(block, x, branch)
        block(*given[0])
    assert len(seen) == 2
    assert all((branch != 0).any() for _, branch in seen)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rate_and_evaluation_change_nothing(kind, fast):
    """Blind spot: random numbers drawn where nothing is dropped, so that other runs differ; a map that depends on chance."""
    model, x = training(kind, fast), picture(kind)
    plain = gradients(model, x)
    state = torch.random.get_rng_state()
    model.set_drop_path(0.0)
    again = gradients(model, x)
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())
    assert torch.equal(torch.random.get_rng_state(), state)
    model.set_drop_path(0.9)
    other = gradients(model, x)
    assert not all(torch.equal(other[name], gradient) for name, gradient in plain.items())
    evaluated = model.eval()(x)
    model.set_drop_path(0.0)
    assert torch.equal(evaluated, model(x))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rate", "autocast"), [(0.0, False), (0.6, False), (0.6, True)])
def test_checkpointing_gives_the_same_gradients(kind, fast, rate, autocast):
    """Blind spot: other random numbers, or another dtype, the second time; a block of some encoder that keeps all the same."""
    model, x = training(kind, fast), picture(kind)
    model.set_drop_path(rate)
    plain, much = gradients(model, x, autocast), kept(model, x)
    model.set_checkpointing(True)
    assert kept(model, x) < 0.6 * much
    again = gradients(model, x, autocast)
    assert again.keys() == plain.keys()
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())
    model.set_checkpointing(False)
    assert kept(model, x) == much


@pytest.mark.parametrize("kind", ["vit", "beit"])
def test_the_report_tells_what_is_pytorchs_where_branches_are_dropped(kind):
    """Blind spot: a report of five launches where two are PyTorch's."""
    model = training(kind, fast=True)
    model.set_drop_path(0.3)
    told = ["it drops branches" in row.how for row in dpt.fast_report(model) if "blocks" in row.name and "encoder" in row.name]
    assert told == [False, True, True, True]
    assert "it drops branches" not in str(dpt.fast_report(model.eval()))


def test_checkpointing_is_of_training_alone():
    """Blind spot: a prediction that computes twice, or that keeps what nobody asks for."""
    model, x = training("vit"), picture("vit")
    calls = []
    blocks(model)[2].register_forward_pre_hook(lambda *args: calls.append(1))
    model.set_checkpointing(True)
    gradients(model, x)
    assert len(calls) == 2
    with torch.no_grad():
        model(x)
    assert len(calls) == 3
    gradients(model.eval(), x)
    assert len(calls) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_both_and_nothing_else_changes(copied):
    """Blind spot: a model that trains otherwise after a copy, an EMA's for one; keys of a checkpoint that moved."""
    model = training("vit")
    keys, names = list(model.state_dict()), [name for name, _ in model.named_modules()]
    model.set_drop_path(0.3)
    model.set_checkpointing(True)
    other = copied(model)
    assert list(other.state_dict()) == keys and [name for name, _ in other.named_modules()] == names
    assert [(block.drop_path, block.checkpointing) for block in blocks(other)] == [
        (block.drop_path, True) for block in blocks(model)
    ] and blocks(other)[-1].drop_path == 0.3
    assert dpt.accelerate(other).encoder.blocks[-1].drop_path == 0.3


@pytest.mark.parametrize("fast", [False, True])
def test_compiled(fast):
    """Blind spot: a graph that breaks at the checkpoint, that drops nothing, or whose backward draws other random numbers."""
    torch.compiler.reset()
    model, x = training("vit", fast), picture("vit")
    model.set_drop_path(0.5)
    model.set_checkpointing(True)
    deepest = Deepest(model.encoder)
    del model.encoder.blocks[2:]
    model.encoder.blocks[1].drop_path = 0.5
    wanted = gradients(deepest, x)
    compiled = torch.compile(deepest, backend="aot_eager", fullgraph=True)
    found = gradients(compiled, x)
    for name, gradient in wanted.items():
        assert (found[f"_orig_mod.{name}"] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-9, name
