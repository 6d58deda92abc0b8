"""The seam, on a machine without a GPU: what is exchanged, what is refused, and that nothing else changes."""

import copy
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from small import config, depth_anything, depth_anything_3, randomise, small, wide
from torch import nn
from torch.nn.utils import parametrizations

import dpt
from dpt.config import DEPTHS
from dpt.fast import acceleration, modules, rules
from dpt.model import DPT
from dpt.nets.decoder import ResidualConvUnit
from dpt.nets.encoders.vit import Block

ROOT = Path(__file__).parents[3]

NAMES = [
    *("dpt-large-midas", "dpt-base-ade20k", "dpt-large-ade20k", "dpt-tiny-depth", "dpt-hybrid-nyu", "dpt-dinov2-giant-kitti"),
    *("midas-3.1-beit-base-384", "zoedepth-n", "zoedepth-k", "zoedepth-nk"),
]


def close(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 2e-5) -> None:
    assert (ours - theirs).abs().max() <= relative * theirs.abs().max()


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_algebra_on_a_cpu(name, layer_scale):
    """Blind spot: the rewritten forward, with and without LayerScale, on even and odd grids."""
    plain = wide(name, layer_scale=layer_scale)
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    for grid in ((4, 6), (3, 1)):
        x = torch.randn(2, 3, *(side * plain.config.encoder.patch_size for side in grid))
        with torch.inference_mode():
            close(quick(x), plain(x))


@pytest.mark.parametrize("grid", [(4, 6), (3, 5), (1, 1)])
def test_depth_anything_style(grid):
    """Blind spot: no class token read out, sizes matched to the next level, a sigmoid, patches of 14."""
    plain = depth_anything()
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(2, 3, 14 * grid[0], 14 * grid[1])
    with torch.inference_mode():
        close(quick(x), plain(x))


@pytest.mark.parametrize("grid", [(4, 6), (3, 5)])
def test_depth_anything_3(grid, monkeypatch):
    """Blind spot: the sky from the depth's convolutions, or not at all; a branch that runs plain and is not told."""
    plain = depth_anything_3()
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    called = []
    original = modules.depth_head
    monkeypatch.setattr(modules, "depth_head", lambda *args: (called.append(args), original(*args))[1])
    x = torch.randn(2, 3, 14 * grid[0], 14 * grid[1])
    with torch.inference_mode():
        found, wanted = quick(x), plain(x)
    close(found, wanted)
    assert len(called) == 2 and all(depth.unique().numel() < 0.95 * depth.numel() for depth in wanted)  # some is sky, of one depth
    assert all(depth.unique().numel() > 0.05 * depth.numel() for depth in wanted)
    assert "sky" not in str(dpt.fast_report(quick))


@pytest.mark.parametrize("activation", DEPTHS)
def test_every_activation_of_depth(activation):
    """Blind spot: an activation that the kernel has not, left out or applied twice; what follows it. Forward and gradients."""
    full = config("dpt-large-midas", embed_dim=64).with_("head", activation=activation, max_depth=3.0, offset=0.25, bounds=(0.3, 30.0))
    plain = randomise(DPT(full))
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    x, cotangent = torch.randn(2, 3, 48, 64), torch.randn(2, 48, 64)
    close(quick(x), plain(x))
    expected = gradients(plain, x, cotangent)
    for name, gradient in gradients(quick, x, cotangent).items():
        if name.startswith("head."):
            close(gradient, expected[name], 1e-4)


def test_the_auxiliary_head_reads_the_same_map():
    """Blind spot: the deeper map, which the fast fusion otherwise never writes."""
    plain = wide("dpt-large-ade20k")
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(1, 3, 48, 64)
    with torch.inference_mode():
        for ours, theirs in zip(quick.forward_auxiliary(x), plain.forward_auxiliary(x), strict=True):
            close(ours, theirs)


def test_predictions_are_the_plain_ones():
    """Blind spot: a fast head that decides labels in a way of its own."""
    picture = np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)
    for name in ("dpt-base-ade20k", "dpt-large-ade20k"):
        plain = wide(name)
        quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
        ours, theirs = (model.predict(picture, probability=True) for model in (quick, plain))
        assert (ours.labels == theirs.labels).mean() > 0.999
        assert np.abs(ours.probability - theirs.probability).max() < 1e-3


def gradients(model: DPT, x: torch.Tensor, cotangent: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of every parameter that has one, float64."""
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    model(x.to(dtype)).backward(cotangent.to(dtype))
    return {name: parameter.grad.double() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_plain_ones(name, training):
    """Blind spot: a rewrite that is right forward only, with the batch's statistics and without. A ReLU that a rounding turns moves a
    gradient far more than the rounding, now in one model and now in the other, so the measure is ten times what the plain model's
    gradients lose in float32 where they lose most; a term that is missing or wrong is off by its own size, a hundred times as much. Where a
    rounding turned one in ours alone, another input decides: a wrong term is wrong with each."""
    plain = wide(name).train(training)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    exact, ours = copy.deepcopy(plain).double(), dpt.accelerate(copy.deepcopy(plain), strict=True)
    lost = {}
    for seed in range(3):
        worst, allowed = losses_of_gradients(plain, ours, exact, seed)
        assert allowed < 0.1
        if worst[1] <= allowed:
            return
        lost[seed] = worst
    raise AssertionError(lost)


def losses_of_gradients(plain: DPT, ours: DPT, exact: DPT, seed: int) -> tuple[tuple[str, float], float]:
    """The parameter whose gradient ours loses most of, and how much, on an input of this seed; and what is allowed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, *(side * plain.config.encoder.patch_size for side in (3, 4)), generator=generator)
    with torch.no_grad():
        shape = plain(x).shape
    cotangent = torch.randn(shape, generator=generator)
    wanted, found, theirs = (gradients(model, x, cotangent) for model in (exact, ours, plain))
    assert wanted.keys() == found.keys() == theirs.keys()
    floor = 1e-3 * max(gradient.abs().max() for gradient in wanted.values())

    def losses(found: dict[str, torch.Tensor]) -> dict[str, float]:
        return {key: ((found[key] - g).abs().max() / g.abs().max().clamp_min(floor)).item() for key, g in wanted.items()}

    return max(losses(found).items(), key=lambda item: item[1]), 10 * max(losses(theirs).values()) + 1e-6


def test_nothing_but_the_class_changes():
    """Blind spot: a fast class that adds or renames state, parameters that are exchanged, values that move with the memory's order."""
    plain = wide("dpt-large-ade20k", layer_scale=True)
    before, values = plain.state_dict(keep_vars=True), copy.deepcopy(plain.state_dict())
    names, modes = [n for n, _ in plain.named_modules()], [m.training for m in plain.modules()]
    quick = dpt.accelerate(plain)
    assert quick is plain
    after = quick.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[key] is value for key, value in before.items())
    assert all(torch.equal(value, values[key]) and value.shape == values[key].shape for key, value in after.items())
    assert [n for n, _ in quick.named_modules()] == names and [m.training for m in quick.modules()] == modes
    assert "FastBlock" in repr(quick)


def orders(model: nn.Module) -> dict[str, bool]:
    """Of each convolution's weight in a fast module, whether its memory is in the kernels' order: the depth head's last 3x3, tap by tap."""
    found, tap_by_tap = {}, {"head.conv2": (2, 3, 0, 1)}
    for name, module in model.named_modules():
        if type(module) in acceleration.MEMORY and not name.startswith("encoder."):
            found[name] = module.weight.permute(tap_by_tap.get(name, acceleration.MEMORY[type(module)])).is_contiguous()
    return found


def saved(path: Path) -> tuple[dict, bytes]:
    """The header of a safetensors file, in which the metadata come in any order, and the bytes of its tensors."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_weights_lie_as_the_kernels_read_them(tmp_path):
    """Blind spot: an order that a copy, a pickle, a load or another dtype loses; a file whose bytes depend on it; a weight left out."""
    plain = wide("dpt-large-ade20k")
    assert sum(orders(plain).values()) < len(orders(plain)) / 2
    dpt.save(plain, tmp_path / "plain.safetensors")
    state = copy.deepcopy(plain.state_dict())
    quick = dpt.accelerate(plain)
    dpt.save(quick, tmp_path / "quick.safetensors")
    assert saved(tmp_path / "plain.safetensors") == saved(tmp_path / "quick.safetensors")
    x = torch.randn(1, 3, 48, 64)
    with torch.inference_mode():
        expected = quick(x)
    for other in (quick, copy.deepcopy(quick), pickle.loads(pickle.dumps(quick)), dpt.accelerate(quick), copy.deepcopy(quick).double()):
        assert all(orders(other).values())
    quick.load_state_dict({key: value + 1 if value.is_floating_point() else value for key, value in state.items()})
    assert all(orders(quick).values())
    quick.load_state_dict(state)
    assigned = copy.deepcopy(quick)
    assigned.load_state_dict(state, assign=True)  # as its tensors lie; the kernels copy them
    with torch.inference_mode():
        for model in (quick, assigned):
            close(model(x), expected)
    torch.save(quick.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())


@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_an_optimizer_made_before_goes_on(options):
    """Blind spot: a step that takes the memory of a parameter and of its state in two orders, as fused ones do. Accelerated in training,
    weights stay as they lie; made afterwards, an optimizer makes its state as they do."""
    x = torch.randn(2, 3, 32, 48)
    first = wide()

    def train(model: DPT, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    def optimizer_of(model: DPT) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9, **options)

    results = []
    for accelerated in ("never", "between", "before"):
        model = copy.deepcopy(first)
        if accelerated == "before":
            dpt.accelerate(model)
        model.train()
        optimizer = optimizer_of(model)
        train(model, optimizer)
        if accelerated == "between":
            optimizer.zero_grad()
            dpt.accelerate(model, strict=True)
        train(model, optimizer)
        results.append(dict(model.named_parameters()))
    never, *others = results
    for other in others:
        moved = max((never[key] - value).abs().max() for key, value in first.named_parameters())
        assert max((never[key] - value).abs().max() for key, value in other.items()) < 0.01 * moved


def tie(model: DPT) -> nn.Parameter:
    unit = model.fusion.blocks[0].unit1
    unit.conv2.weight = nn.Parameter(unit.conv1.weight.data)
    return unit.conv1.weight


def view(model: DPT) -> nn.Parameter:
    conv = model.fusion.blocks[0].unit1.conv1
    conv.weight = nn.Parameter(torch.stack((conv.weight.data, conv.weight.data))[0])
    return conv.weight


def share(model: DPT) -> nn.Parameter:
    return model.fusion.blocks[0].unit1.conv1.weight.share_memory_()


def give_gradient(model: DPT) -> nn.Parameter:
    weight = model.fusion.blocks[0].unit1.conv1.weight
    weight.grad = torch.ones_like(weight)
    return weight


@pytest.mark.parametrize("spoil", [tie, view, share, give_gradient])
def test_memory_that_others_use_stays(spoil):
    """Blind spot: two parameters of one memory that part, a process or a flat buffer that no longer sees the weight."""
    model = wide()
    weight = spoil(model)
    address = weight.data_ptr()
    dpt.accelerate(model, strict=True)
    assert weight.data_ptr() == address and weight.is_contiguous()
    assert model.fusion.blocks[1].unit1.conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_one_parameter_in_two_places_stays_one():
    """Blind spot: tied weights, which are one parameter."""
    model = wide()
    unit = model.fusion.blocks[0].unit1
    unit.conv2.weight = unit.conv1.weight
    dpt.accelerate(model)
    assert unit.conv2.weight is unit.conv1.weight and all(orders(model).values())


def test_on_the_meta_device_and_of_inference_tensors():
    """Blind spot: parameters without memory, or without a version."""
    with torch.device("meta"):
        meta = dpt.accelerate(DPT(wide().config).eval(), strict=True)
    assert all(parameter.is_meta for parameter in meta.parameters()) and all(orders(meta).values())
    meta.load_state_dict(wide().state_dict(), assign=True)
    with torch.inference_mode():
        other = wide()
        close(meta(torch.ones(1, 3, 32, 32)), dpt.accelerate(other)(torch.ones(1, 3, 32, 32)))


def test_fast_classes_override_forward_only():
    """Blind spot: constructors, buffers or parameters in the seam."""
    for plain, replacement in rules.FAST.items():
        if not plain.__module__.startswith("dpt."):
            continue  # of transformers, where a test before has had one of its models
        assert replacement.fast.__bases__ == (plain,)
        own = {name for name in vars(replacement.fast) if not name.startswith("__")}
        assert "forward" in own and all(callable(getattr(replacement.fast, name)) for name in own)
        assert "__init__" not in vars(replacement.fast)


def test_twice_is_once_and_copies_stay_fast():
    """Blind spot: a class exchanged twice, or lost by deepcopy and pickle."""
    quick = dpt.accelerate(dpt.accelerate(wide()))
    x = torch.randn(1, 3, 32, 48)
    expected = quick(x)
    for other in (copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
        assert type(other.encoder.blocks[0]) is modules.FastBlock and torch.equal(other(x), expected)


def test_build_and_load_take_fast(tmp_path):
    """Blind spot: an argument that is accepted and forgotten."""
    dpt.save(wide(), tmp_path / "mine.safetensors")
    for model in (dpt.build(wide().config, fast=True), dpt.load(tmp_path / "mine.safetensors", fast=True)):
        assert all(row.fused for row in dpt.fast_report(model))


def test_compiles_and_exports():
    """Blind spot: a seam that breaks the graph."""
    quick = dpt.accelerate(wide())
    x = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        expected = quick(x)
        close(torch.export.export(quick, (x,), strict=True).module()(x), expected)
        close(torch.compile(quick, fullgraph=True, backend="aot_eager")(x), expected)


def test_hooks_on_the_block_itself_work():
    """Blind spot: feature extraction by hooks, which users have."""
    quick = dpt.accelerate(wide())
    seen = []
    quick.encoder.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    quick(torch.randn(1, 3, 32, 32))
    assert seen == [(1, 5, 64)] and dpt.fast_report(quick)[1].fused


def test_hooks_on_a_residual_unit_see_what_they_see_in_the_plain_model():
    """Blind spot: the first unit of a level, whose fast form adds the previous level's map as well."""
    seen = []
    plain = wide()
    x = torch.randn(1, 3, 64, 64)
    for model in (plain, dpt.accelerate(copy.deepcopy(plain), strict=True)):
        model.fusion.blocks[1].unit1.register_forward_hook(lambda module, inputs, output: seen.append((len(inputs), output)))
        model(x)
    (theirs, ours) = seen
    assert ours[0] == theirs[0] == 1
    close(ours[1], theirs[1])


def test_a_plain_unit_inside_a_fast_fusion():
    """Blind spot: a fusion that hands the previous map to a unit that knows nothing of it."""
    plain = wide()
    mixed = copy.deepcopy(plain)
    mixed.fusion.blocks[0].unit1.conv1.register_forward_hook(lambda *args: None)
    dpt.accelerate(mixed)
    assert type(mixed.fusion) is modules.FastFusion and type(mixed.fusion.blocks[0].unit1) is ResidualConvUnit
    x = torch.randn(1, 3, 64, 64)
    close(mixed(x), plain(x))


def test_batch_statistics_are_taken_and_told():
    """Blind spot: running statistics used, or not updated, in training."""
    plain = wide("dpt-base-ade20k").train()
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(2, 3, 48, 64)
    for model in (plain, quick):
        model(x)
    norms = [[m for m in model.modules() if isinstance(m, nn.BatchNorm2d)] for model in (plain, quick)]
    for one, other in zip(*norms, strict=True):
        assert one.num_batches_tracked == other.num_batches_tracked == 1
        close(other.running_mean, one.running_mean, 1e-4)
        close(other.running_var, one.running_var, 1e-4)
    rows = {row.name: row.how for row in dpt.fast_report(quick)}
    assert all("the batch's statistics" in rows[name] for name in ("head", "fusion.blocks.0.unit1"))
    assert all("same algebra" in rows[name] for name in ("fusion", "reassemble.0"))
    assert not any("the batch's statistics" in row.how for row in dpt.fast_report(quick.eval()))


@pytest.mark.parametrize("name", ["dpt-large-midas", "dpt-base-ade20k", "midas-3.1-beit-base-384"])
def test_layers_that_change_after_it(name):
    """Whatever computes a weight since, or took its place, is read: a parametrization, another parameter, one that is called as a function.

    Blind spot: a parameter that is read where it no longer is, or kept.
    """
    plain = wide(name)
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(1, 3, 32, 48)
    for model in (plain, quick):
        torch.manual_seed(0)
        for place in ("encoder.blocks.1.attn.qkv", "encoder.blocks.2.mlp.fc2", "reassemble.1.resize", "fusion.blocks.1.unit1.conv2"):
            layer = model.get_submodule(place)
            parametrizations.weight_norm(layer)
            layer.parametrizations.weight.original0.data *= 1 + torch.rand(1)
        norm = model.encoder.blocks[0].norm2
        norm.weight = nn.Parameter(torch.rand_like(norm.weight))
        model.fusion.blocks[0].project.bias.data = torch.rand_like(model.fusion.blocks[0].project.bias)
    other = {key: 1.5 * value for key, value in plain.named_parameters() if "conv1" in key or "qkv" in key}
    with torch.no_grad():
        close(quick(x), plain(x))
        called = [torch.func.functional_call(model, other, (x,)) for model in (quick, plain)]
        close(*called)
        assert (called[1] - plain(x)).abs().max() > 1e-3 * plain(x).abs().max()


class LoRA(nn.Linear):
    pass


def spoil_type(block: Block) -> None:
    block.attn.qkv.__class__ = LoRA


def spoil_hook(block: Block) -> None:
    block.mlp.register_forward_hook(lambda *args: None)


def spoil_parametrization(block: Block) -> None:
    parametrizations.weight_norm(block.mlp.fc1)


def spoil_forward(block: Block) -> None:
    block.attn.forward = lambda x: x


def spoil_child(block: Block) -> None:
    block.adapter = nn.Identity()


def spoil_missing(block: Block) -> None:
    del block.ls2


def spoil_dtype(block: Block) -> None:
    block.double()


class Coded(torch.Tensor):
    """A tensor whose memory stands for other values, as quantised ones are."""


def spoil_subclass(block: Block) -> None:
    block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight.detach().as_subclass(Coded))


def spoil_vector(block: Block) -> None:
    block.norm1.bias = nn.Parameter(block.norm1.bias.detach().as_subclass(Coded))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (spoil_type, "attn.qkv is a LoRA"),
        (spoil_hook, "mlp has hooks"),
        (spoil_parametrization, "mlp.fc1.* parametri|mlp.fc1 is a Parametrized"),
        (spoil_forward, "attn has a forward of its own"),
        (spoil_child, "adapter is a Identity"),
        (spoil_missing, "ls2 is missing"),
        (spoil_dtype, "torch.float64"),
        (spoil_subclass, "mlp.fc1.weight is a Coded"),
        (spoil_vector, "norm1.bias is a Coded"),
    ],
)
def test_refusals_have_reasons(spoil, reason):
    """Blind spot: a change to a child that the fused forward passes over in silence."""
    model = wide()
    spoil(model.encoder.blocks[2])
    with pytest.raises(ValueError, match=rf"encoder\.blocks\.2 cannot run fused: .*({reason})"):
        dpt.accelerate(model, strict=True)
    assert type(model.encoder.blocks[0]) is Block  # strict: all or nothing
    assert model.fusion.convs[0].weight.is_contiguous()
    dpt.accelerate(model)
    assert type(model.encoder.blocks[2]) is Block and type(model.encoder.blocks[1]) is modules.FastBlock
    rows = {row.name: row for row in dpt.fast_report(model)}
    assert not rows["encoder.blocks.2"].fused and re.search(reason, rows["encoder.blocks.2"].how)
    assert rows["encoder.blocks.1"].fused


def dilate(conv: nn.Conv2d) -> None:
    conv.dilation, conv.padding = (2, 2), (2, 2)


@pytest.mark.parametrize(
    ("name", "where", "spoil", "reason"),
    [
        ("dpt-large-midas", "fusion.blocks.0.unit2", lambda unit: dilate(unit.conv1), r"conv1 has padding=\(2, 2\), not \(1, 1\)"),
        (
            "dpt-base-ade20k",
            "fusion.blocks.1.unit1",
            lambda unit: setattr(unit, "norm1", nn.InstanceNorm2d(16, affine=True, track_running_stats=True)),
            "norm1 is a InstanceNorm2d",
        ),
        ("dpt-large-midas", "fusion", lambda fusion: fusion.blocks[2].project.register_forward_hook(print), "blocks.2.project has hooks"),
        ("dpt-large-midas", "fusion", lambda fusion: fusion.blocks[2].register_forward_pre_hook(print), "blocks.2 has hooks"),
        ("dpt-large-midas", "reassemble.0", lambda module: setattr(module.resize, "output_padding", (1, 1)), "resize has output_padding"),
        ("dpt-large-midas", "reassemble.3", lambda module: setattr(module, "readout", nn.Identity()), "readout is a Identity"),
        ("dpt-large-midas", "head", lambda head: setattr(head, "align_corners", False), "align_corners=False"),
        ("dpt-large-midas", "head", lambda head: setattr(head, "conv2", nn.Conv2d(8, 24, 3, padding=1)), "24 channels before the last"),
        ("dpt-base-ade20k", "head", lambda head: setattr(head, "norm", nn.BatchNorm2d(16, affine=False)), "norm has affine=False"),
        ("dpt-base-ade20k", "head", lambda head: head.conv.double(), "conv.weight is torch.float64"),
        (
            "dpt-base-ade20k",
            "head",
            lambda head: setattr(head.norm, "running_var", head.norm.running_var.as_subclass(Coded)),
            "norm.running_var is a Coded",
        ),
    ],
)
def test_refusals_of_the_decoder(name, where, spoil, reason):
    """Blind spot: a change to the decoder that its fused forward would pass over."""
    model = wide(name)
    spoil(model.get_submodule(where))
    with pytest.raises(ValueError, match=rf"{re.escape(where)} cannot run fused: .*{reason}"):
        dpt.accelerate(model, strict=True)
    dpt.accelerate(model)
    rows = {row.name: row for row in dpt.fast_report(model)}
    assert not rows[where].fused and sum(not row.fused for row in rows.values()) == 1


def test_the_report_of_beit_and_of_bins():
    """Blind spot: a report of kernels where PyTorch computes; hooks on the bias that a fast block passes over."""
    model = wide("zoedepth-n")
    seen = []
    model.encoder.blocks[1].attn.position.register_forward_hook(lambda *args: seen.append(1))
    model.encoder.blocks[2].attn.register_forward_hook(lambda *args: None)
    rows = {row.name: row for row in dpt.fast_report(dpt.accelerate(model))}
    assert "the same algebra" in rows["encoder.blocks.0"].how and "the bins are PyTorch's" in rows["head"].how
    assert not rows["encoder.blocks.2"].fused and "attn has hooks" in rows["encoder.blocks.2"].how
    assert rows["encoder.blocks.1"].fused and rows["head"].fused
    model(torch.randn(1, 3, 32, 32))
    assert seen == [1]
    model = wide("zoedepth-n")
    model.head.conv2.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="head cannot run fused: conv2 has hooks"):
        dpt.accelerate(model, strict=True)


def test_deeper_maps_of_a_fast_fusion():
    """Blind spot: maps of other levels, or before their projection or upsampling, where a head reads them."""
    plain = wide("zoedepth-n")
    quick = dpt.accelerate(copy.deepcopy(plain), strict=True)
    x = torch.randn(1, 3, 48, 80)
    with torch.inference_mode():
        for deeper in (1, 2, 3, 4):
            ours, theirs = quick.features(x, deeper), plain.features(x, deeper)
            assert len(ours) == len(theirs) == 1 + deeper
            for one, other in zip(ours, theirs, strict=True):
                assert one.shape == other.shape
                close(one, other)


def test_head_sizes_the_kernel_has_not():
    """Blind spot: an error from inside the kernel at the first picture."""
    model = small()  # heads of 16
    with pytest.raises(ValueError, match="heads of 16 channels"):
        dpt.accelerate(model, strict=True)


def test_a_model_with_nothing_to_exchange():
    """Blind spot: accelerate() that does nothing and says nothing."""
    with pytest.raises(ValueError, match="Linear holds no module that has a fast form"):
        dpt.accelerate(nn.Linear(2, 2))


def test_the_report_says_where_it_runs():
    """Blind spot: a report that claims kernels on a CPU."""
    text = str(dpt.fast_report(dpt.accelerate(wide())))
    assert "the same algebra in PyTorch: on cpu there are no kernels" in text
    assert "not accelerated" in str(dpt.fast_report(wide()))
