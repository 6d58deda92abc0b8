"""The resized positional embedding is kept by size, and is never another than the parameter would give now."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from small import depth_anything, randomise, small
from torch import nn
from torch.nn.utils import parametrize

from dpt.nets.encoders.kept import KeptBySize
from dpt.nets.encoders.vit import ViT

GRID, OTHER = (3, 5), (2, 7)


@pytest.fixture
def encoder() -> ViT:
    return small().encoder


@pytest.fixture
def resizes(monkeypatch) -> list[tuple[int, int]]:
    """The sizes that were resized to, as it happens."""
    made, original = [], ViT._resized
    monkeypatch.setattr(ViT, "_resized", lambda self, grid: (made.append(grid), original(self, grid))[1])
    return made


def fresh(encoder: ViT, grid: tuple[int, int] = GRID) -> torch.Tensor:
    with torch.no_grad():
        return encoder._resized(grid)


@torch.no_grad()
def agree(encoder: ViT, grid: tuple[int, int] = GRID) -> bool:
    """Whether what is kept is what would be made now, in values, dtype and device."""
    kept, made = encoder.position(grid), fresh(encoder, grid)
    return kept.dtype == made.dtype and kept.device == made.device and torch.equal(kept, made)


@torch.no_grad()
def test_each_size_is_resized_once(encoder, resizes):
    """Blind spot: a cache that never hits, one that gives one size for another, and one that grows with the sizes of the pictures."""
    one, other = encoder.position(GRID), encoder.position(OTHER)
    assert encoder.position(GRID) is one and encoder.position(OTHER) is other and resizes == [GRID, OTHER]
    assert one.shape == (1, 16, 32) and other.shape == (1, 15, 32) and not one.requires_grad
    for columns in range(5, 30):
        assert agree(encoder, (3, columns))
    assert len(encoder.positions._kept) == KeptBySize.MOST
    assert encoder.position((4, 4)) is encoder.pos_embed


def test_it_is_no_state_and_copies_begin_empty(encoder):
    """Blind spot: a buffer in the checkpoint; a copy that shares what its original keeps, or carries it in a pickle."""
    with torch.no_grad():
        kept = encoder.position(GRID)
    assert set(encoder.state_dict()) == set(small().encoder.state_dict()) and not list(encoder.buffers())
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder)), loaded):
        assert not other.positions._kept and other.positions is not encoder.positions
        randomise(other, seed=1)
        assert agree(other) and not torch.equal(other.position(GRID), kept)
    with torch.no_grad():
        assert encoder.position(GRID) is kept
        shallow = copy.copy(encoder)
        shallow.positions.get(GRID, nn.Parameter(torch.zeros(1)), lambda: torch.zeros(1))
    assert agree(encoder) and agree(shallow)


@pytest.mark.parametrize("grid", [(3, 5), (7, 4), (4, 9), (12, 13), (1, 2), (37, 50)])
@torch.no_grad()
def test_an_offset_resizes_by_a_factor(grid):
    """Blind spot: DINOv2's resize by (n + 0.1) / stored, taken for one to n, or centred otherwise. Against `interpolate` by that factor."""
    encoder = depth_anything().encoder
    cls, patches = encoder.pos_embed[:, :1], encoder.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    factors = tuple((n + 0.1) / 4 for n in grid)
    wanted = F.interpolate(patches, scale_factor=factors, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.position(grid), torch.cat((cls, wanted), dim=1), rtol=1e-5, atol=1e-5)
    other = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    assert (wanted - other).abs().max() > 1e-3


def load(encoder: ViT) -> None:
    encoder.load_state_dict(randomise(copy.deepcopy(encoder), seed=2).state_dict())


def assign(encoder: ViT) -> None:
    encoder.load_state_dict(randomise(copy.deepcopy(encoder), seed=2).state_dict(), assign=True)


@torch.no_grad()
def add(encoder: ViT) -> None:
    encoder.pos_embed.add_(1)


@torch.inference_mode()
def add_in_inference_mode(encoder: ViT) -> None:
    encoder.pos_embed.add_(1)


def write_data(encoder: ViT) -> None:
    encoder.pos_embed.data = encoder.pos_embed.data + 1


def replace(encoder: ViT) -> None:
    encoder.pos_embed = nn.Parameter(encoder.pos_embed.detach() + 1)


def swapped(encoder: ViT) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        encoder.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def step(encoder: ViT) -> None:
    optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
    encoder(torch.randn(1, 3, 48, 80))[-1].sum().backward()
    optimizer.step()


def step_by_data(encoder: ViT) -> None:
    """As older optimizers do, which no version counts."""
    encoder(torch.randn(1, 3, 32, 32))[-1].sum().backward()
    for parameter in encoder.parameters():
        if parameter.grad is not None:
            parameter.data.sub_(parameter.grad)


def average(encoder: ViT) -> None:
    """A running average as DINO keeps its teacher: no version counts it, and no gradient is ever wanted."""
    encoder.pos_embed.data.mul_(0.9).add_(0.1)


def write_numpy(encoder: ViT) -> None:
    encoder.pos_embed.detach().numpy()[0, 3] = 7


CHANGES = [load, assign, add, add_in_inference_mode, write_data, replace, swapped, step, step_by_data, average, write_numpy]
CHANGES += [lambda encoder: encoder.to(torch.float16), lambda encoder: encoder.double()]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_parameter_is_seen(encoder, change):
    """Blind spot: an evaluation with the embedding from before the last training step, the last load, or in the last dtype."""
    with torch.no_grad():
        before = encoder.position(GRID)
        encoder.position(OTHER)
    change(encoder)
    assert agree(encoder) and agree(encoder, OTHER)
    after = encoder.position(GRID)
    assert after.dtype != before.dtype or not torch.equal(after, before)


def test_another_parameter_of_the_same_memory():
    """Blind spot: a parameter that took the place of another, and of its memory, told apart by its address alone."""
    kept, one = KeptBySize(), nn.Parameter(torch.zeros(3))
    for number, parameter in enumerate((one, nn.Parameter(one.data)), 1):
        assert kept.get(GRID, parameter, lambda number=number: torch.tensor(number)) == number


def test_to_another_device_and_back(encoder):
    """Blind spot: what was kept on the device the model has left."""
    with torch.no_grad():
        encoder.position(GRID)
        state = copy.deepcopy(encoder.state_dict())
        assert encoder.to("meta").position(GRID).is_meta
        encoder.to_empty(device="cpu")
        encoder.load_state_dict(state)
    assert agree(encoder)


def test_gradients_arrive_as_ever(encoder, resizes):
    """Blind spot: a kept embedding in a training step, through which no gradient goes; memory kept through training."""
    with torch.no_grad():
        encoder.position(GRID)
    encoder(torch.randn(1, 3, 48, 80))[-1].sum().backward()
    assert encoder.pos_embed.grad.abs().sum() > 0 and not encoder.positions._kept
    encoder.pos_embed.requires_grad_(False)  # frozen: kept while the rest trains
    for _ in range(2):
        encoder(torch.randn(1, 3, 48, 80))[-1].sum().backward()
    assert encoder.position(GRID) is encoder.position(GRID) and len(resizes) == 3


def test_kept_in_inference_mode_and_used_in_training(encoder):
    """Blind spot: an inference tensor that autograd refuses later."""
    with torch.inference_mode():
        kept = encoder.position(GRID)
        assert not kept.is_inference() and encoder.position(GRID) is kept
    encoder.pos_embed.requires_grad_(False)
    assert encoder.position(GRID) is kept
    weight = torch.ones_like(kept, requires_grad=True)
    (weight * kept).sum().backward()  # saves it for the backward
    assert torch.equal(weight.grad, kept)


def test_a_model_made_in_inference_mode(resizes):
    """Blind spot: parameters without a version, whose changes nobody sees: nothing is kept of them."""
    with torch.inference_mode():
        encoder = small().encoder
        assert encoder.pos_embed.is_inference()
        before = encoder.position(GRID)
        encoder.pos_embed.add_(1)
        assert not torch.equal(encoder.position(GRID), before) and not encoder.positions._kept


def test_stand_ins_for_the_parameter_are_not_kept(encoder):
    """Blind spot: what torch.func, a parametrization or a mode computes with, kept beyond them."""
    model = small()
    x = torch.randn(1, 3, 48, 80)
    stored = model.encoder.pos_embed.detach()
    stacked = {"encoder.pos_embed": torch.stack((stored, 2 * stored))}
    with torch.no_grad():
        both = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (x,)))(stacked)
        for index in range(2):
            alone = torch.func.functional_call(model, {name: value[index] for name, value in stacked.items()}, (x,))
            torch.testing.assert_close(both[index], alone, rtol=1e-4, atol=1e-4)
        assert not model.encoder.positions._kept

        class Twice(nn.Module):
            def forward(self, value):
                return 2 * value

        before = encoder.position(GRID)
        parametrize.register_parametrization(encoder, "pos_embed", Twice())
        torch.testing.assert_close(encoder.position(GRID), 2 * before)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model(torch.empty(1, 3, 48, 80))
    assert not model.encoder.positions._kept


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_read_the_parameter():
    """Blind spot: an embedding kept from before, as a constant of the program."""
    model = small()
    x = torch.randn(1, 3, 48, 80)
    with torch.no_grad():
        model.encoder.position(GRID)
        programs = [
            torch.export.export(model, (x,)).module(),
            torch.compile(model, backend="eager", fullgraph=True),
            torch.jit.trace(model, x, check_trace=False),
        ]
        assert list(model.encoder.positions._kept) == [(GRID, None)]
        for program in programs:
            torch.testing.assert_close(program(x), model(x))
            names = dict(program.named_parameters())
            changed = next(value for name, value in names.items() if name.endswith("encoder.pos_embed"))
            before = program(x)
            changed.add_(1)
            assert (program(x) - before).abs().max() > 1e-3
            changed.sub_(1)


def test_threads(encoder):
    """Blind spot: one thread that gets another's size while both make room, or an error while the parameter changes."""
    grids = [(2, n) for n in range(3, 12)]
    wanted = {grid: fresh(encoder, grid) for grid in grids}
    wrong = []

    def work(order: list[tuple[int, int]]) -> None:
        try:
            with torch.inference_mode():
                for grid in order * 20:
                    if not torch.equal(encoder.position(grid), wanted[grid]):
                        wrong.append(grid)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(grids[n:] + grids[:n],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(encoder.positions._kept) <= KeptBySize.MOST


@pytest.mark.parametrize("make", [lambda: small("dpt-base-ade20k"), lambda: small("dpt-tiny-depth"), depth_anything])
def test_predictions_are_the_same_twice(make, resizes):
    """Blind spot: a model that keeps a wrong embedding of its own kind of resizing."""
    model = make()
    x = torch.randn(1, 3, 3 * model.config.encoder.patch_size, 5 * model.config.encoder.patch_size)
    wanted = model(x)
    for _ in range(2):
        with torch.inference_mode():
            assert torch.equal(model(x), wanted)
    assert resizes == [GRID] * 2  # with gradients, and once without
