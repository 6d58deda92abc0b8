"""The checkpoint of a training: all that decides how it goes on, whole whatever the processes shared out, and read back only if it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..system.disk import open_regular
from .parallel import fitted, whole

if TYPE_CHECKING:
    from .runs import Training

KEYS = ("recipe", "model", "optimizer", "average", "scaler", "step", "seconds", "best", "unlogged", "since")


def of(run: Training) -> dict[str, Any]:
    """What `resume` reads. All processes must ask: what they share is put together."""
    return {
        "recipe": asdict(run.recipe),
        "model": whole(run.model.state_dict()),
        "optimizer": {name: whole(dict(run.optimizer.state[parameter])) for name, parameter in _learnt(run.optimizer)},
        "average": None if run.average is None else whole(dict(run.average.tensors())),
        "scaler": run.scaler.state_dict(),
        "step": run.step,
        "seconds": run.seconds,
        "best": run.best,
        "unlogged": run.unlogged.item(),
        "since": run.since,
    }


def resume(run: Training) -> None:
    """Bring a run to where its checkpoint was written; ValueError where that is none, or of another recipe."""
    try:
        with open_regular(run.checkpoint) as file:
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds a {type(state).__name__}")
        another = state["recipe"] != asdict(run.recipe)
        if not another:
            _take_up(run, state)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # bytes that are no checkpoint lead their reader to any error there is, and so do wrong values
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        rule = "it is what a training of the same recipe wrote: remove it, or give another folder"
        raise ValueError(f"{run.checkpoint}: not a checkpoint ({reason}): {rule}") from error
    if another:
        wrong = _differences(state["recipe"], asdict(run.recipe))
        raise ValueError(f"{run.directory} holds a run of another recipe ({wrong}): give another folder")


def _learnt(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimiser's parameters by their names."""
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def _differences(one: Any, other: dict[str, Any]) -> str:
    """What two recipes differ in: the checkpoint's value, and the one that is asked for."""
    if not isinstance(one, dict):
        return "it holds none"
    wrong = [f"{key}={one.get(key)!r}, not {value!r}" for key, value in other.items() if one.get(key) != value]
    return ", ".join([*wrong, *(f"{key}, which recipes have not" for key in one.keys() - other.keys())])[:400]


def _take_up(run: Training, state: dict[str, Any]) -> None:
    """Go on from what `of` made; any error there is where it is something else."""
    if state.keys() != set(KEYS):
        raise ValueError(f"its keys are {', '.join(map(str, state))}")
    own = run.model.state_dict()
    _same_names("model", state["model"], own)
    run.model.load_state_dict({name: _like(value, own[name], name) for name, value in state["model"].items()})
    learnt = dict(_learnt(run.optimizer))
    _same_names("optimizer", state["optimizer"], learnt)
    for name, values in state["optimizer"].items():
        run.optimizer.state[learnt[name]] = {key: _moment(value, learnt[name], f"{name}'s {key}") for key, value in values.items()}
    if (state["average"] is None) != (run.average is None):
        raise ValueError("it has an average of the weights, or none")
    if run.average is not None:
        _same_names("average", state["average"], run.average.values)
        run.average.values = {name: _like(value, run.average.values[name], name) for name, value in state["average"].items()}
    _same_names("scaler", state["scaler"], run.scaler.state_dict())
    run.scaler.load_state_dict(state["scaler"])
    run.step, run.since, run.seconds = int(state["step"]), int(state["since"]), float(state["seconds"])
    run.best = None if state["best"] is None else float(state["best"])
    run.unlogged = torch.full_like(run.unlogged, float(state["unlogged"]))
    if not 0 <= run.since <= run.step <= run.recipe.steps:
        raise ValueError(f"step {run.step} of {run.recipe.steps}, of which {run.since} are in no log")


def _same_names(what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    if found.keys() != wanted.keys():
        raise ValueError(f"the {what}'s names are not those of the recipe's model")


def _like(value: Tensor, like: Tensor, name: str) -> Tensor:
    if value.shape != like.shape:
        raise ValueError(f"{name} is {tuple(value.shape)}, not {tuple(like.shape)}")
    return fitted(value.to(like.device, like.dtype), like)


def _moment(value: Any, parameter: nn.Parameter, name: str) -> Any:
    """A value of the optimiser's state of a parameter: as large as that, or a number of steps, which stays where it is."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    return _like(value, parameter, name)
