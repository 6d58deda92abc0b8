"""fast=True in training, as trainings are run: on two processes, accumulated, checkpointed, under autocast, with dropped branches.

Each way is taken by the plain model in float64, by it in float32, and by the fast one, in both processes, whose pictures differ.
"""

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small import wide
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import dpt
from dpt.model import DPT
from dpt.nets.hollow import TrainingForward, freeze_unreached, unreached

WORLD, BATCH, SIZE = 2, 4, (48, 64)  # pictures of all processes together
WAYS = {
    "whole batches": {},
    "parts, checkpointed": {"checkpointing": True, "parts": 2},
    "parts, checkpointed, in bfloat16, with dropped branches": {
        **{"checkpointing": True, "parts": 2, "drop_path": 0.6},
        "autocast": torch.bfloat16,
    },
}
KINDS = {"exact": (torch.float64, False), "plain": (torch.float32, False), "fast": (torch.float32, True)}
Gradients = dict[str, torch.Tensor]


def model_of(kind: str, frozen: Sequence[str]) -> DPT:
    """With an auxiliary head and a unit that never runs. Norms are in evaluation form: a batch's statistics are of one process alone."""
    dtype, fast = KINDS[kind]
    model = wide("dpt-large-ade20k").to(dtype)
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return dpt.accelerate(model, strict=True) if fast else model


def gradients(step: nn.Module, x: torch.Tensor, parts: int = 1, autocast: torch.dtype | None = None) -> Gradients:
    """Of the mean over all pictures and over the parts of a batch, each of which goes forward and backward by itself."""
    step.zero_grad()
    autocast = None if next(step.parameters()).dtype == torch.float64 else autocast
    for index, part in enumerate(x.chunk(parts)):
        alone = isinstance(step, DistributedDataParallel) and index < parts - 1
        with step.no_sync() if alone else contextlib.nullcontext():
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                outputs = step(part)
            single = (output.to(torch.promote_types(output.dtype, torch.float32)) for output in outputs)
            (sum(output.square().mean() for output in single) / parts).backward()
    named = ((name.removeprefix("module.").removeprefix("model."), p) for name, p in step.named_parameters())
    return {name: p.grad.double() for name, p in named if p.grad is not None}


def pictures(kind: str) -> torch.Tensor:
    return torch.randn(BATCH, 3, *SIZE, generator=torch.Generator().manual_seed(1)).to(KINDS[kind][0])


def process(rank: int, port: int, folder: str, frozen: Sequence[str]) -> None:
    """One of the processes of a training."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    found: dict[tuple[str, str], Gradients] = {}
    for kind in KINDS:
        model = model_of(kind, frozen)
        step = DistributedDataParallel(TrainingForward(model))
        for way, options in WAYS.items():
            model.set_drop_path(options.get("drop_path", 0.0))
            model.set_checkpointing(options.get("checkpointing", False))
            torch.manual_seed(rank)
            found[way, kind] = gradients(step, pictures(kind)[rank::WORLD], options.get("parts", 1), options.get("autocast"))
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(model_of("fast", ()).train())  # which runs on no CPU now
    assert unreached(shared) == frozen
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def frozen() -> list[str]:
    return freeze_unreached(model_of("plain", ()))


@pytest.fixture(scope="module")
def found(frozen, tmp_path_factory) -> list[dict[tuple[str, str], Gradients]]:
    """What each process got."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(process, (port, str(folder), frozen), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def losses(found: Gradients, exact: Gradients) -> dict[str, float]:
    """How much of each parameter's gradient was lost: the error's length over its own, or over a thousandth of the longest."""
    assert found.keys() == exact.keys()
    floor = 1e-3 * max(gradient.norm() for gradient in exact.values())
    return {name: ((found[name] - g).norm() / g.norm().clamp_min(floor)).item() for name, g in exact.items()}


@pytest.mark.parametrize("way", WAYS)
def test_the_gradients_of_a_step_are_the_plain_ones(found, way):
    """Blind spot: a gradient that does not arrive through a fused module where it is checkpointed, accumulated or handed to the others, or
    arrives twice; other branches dropped than the plain model drops. Ours lose at most three times what the plain model's lose where they
    lose most: under autocast the fused blocks keep the tokens in bfloat16, too. A term that is missing or wrong is off by its own size."""
    plain, fast = (max(losses(found[0][way, kind], found[0][way, "exact"]).values()) for kind in ("plain", "fast"))
    assert fast <= 3 * plain < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_processes_agree(found, way, kind):
    """Blind spot: a parameter whose gradient stays that of one process, so that the models part."""
    first, second = (of_process[way, kind] for of_process in found)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", [way for way, options in WAYS.items() if "drop_path" not in options])
def test_processes_make_the_step_of_one_on_the_whole_batch(found, frozen, way):
    """Blind spot: gradients that are summed where a mean is meant, once too often with parts; pictures that count twice. In float64,
    but that the positional embedding is resized in float32; and the fast model's to rounding."""
    wanted = gradients(TrainingForward(model_of("exact", frozen)), pictures("exact"))
    assert max(losses(found[0][way, "exact"], wanted).values()) < 1e-7
    single = gradients(TrainingForward(model_of("fast", frozen)), pictures("fast"))
    assert max(losses(found[0][way, "fast"], wanted).values()) <= 3 * max(losses(single, wanted).values()) < 1e-3


def test_what_gets_no_gradient_is_frozen(found, frozen):
    """Blind spot: DistributedDataParallel, which waits for every gradient, only does not raise because nothing was to be waited for."""
    names = {name for name, _ in model_of("plain", ()).named_parameters()}
    assert frozen and set(found[0]["whole batches", "fast"]) == names - set(frozen)
