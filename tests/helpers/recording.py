"""What the oracles record and the tests read: random weights, inputs and pictures by formula, and maps at some of their pixels.

The programs in `tests/dpt/nets/oracles` run this beside other people's code, in environments without ours, with NumPy and PyTorch alone.
Every random number comes from `numpy.random.RandomState`, whose streams NumPy keeps unchanged between versions.
"""

import math
import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

INPUT_SEED = 1
WEIGHT_SEED = 0

# Coprime to every factor of a decoder's upsampling, and to every patch: what is recorded falls on all of their phases.
INPUT_STRIDE = PICTURE_STRIDE = 11
PICTURE_STRIDES = {"tensor": 23, "plain_tensor": 23, "logits": 23}

Shape = tuple[int, int, int]  # batch, height, width
Arrays = Mapping[str, numpy.ndarray]


def random_weights(
    state: Mapping[str, Tensor], gains: Mapping[str, float], fixed: Mapping[str, float], spread: str = "$^", kept: str = "$^"
) -> dict[str, Tensor]:
    """A state dict with every floating tensor drawn anew, exact in float16, none left at a default value.

    Matrices have unit gain, gains of normalisations lie around 1, shifts around 0; a variance is positive. `gains` scales what is drawn
    for the keys that a pattern is found in, the first that is; `fixed` gives all of a tensor one value; `spread` keys have filters of all
    sizes; `kept` are keys whose values are computed and not learned, and stay.
    """
    random = numpy.random.RandomState(WEIGHT_SEED)
    drawn = {}
    for key, value in state.items():
        if re.search(kept, key):
            drawn[key] = value
        elif not value.is_floating_point():
            drawn[key] = torch.full_like(value, 160_000)  # num_batches_tracked
        else:
            array = _random_array(key, tuple(value.shape), _first(gains, key, 1.0), random)
            if re.search(spread, key):
                array *= numpy.exp(random.standard_normal((len(array), *[1] * (array.ndim - 1))))
            if _first(fixed, key, 0.0):
                array = numpy.full_like(array, _first(fixed, key, 0.0))
            drawn[key] = torch.from_numpy(array.astype(numpy.float16)).to(value.dtype)
    return drawn


def _first(table: Mapping[str, float], key: str, default: float) -> float:
    return next((value for pattern, value in table.items() if re.search(pattern, key)), default)


def _random_array(key: str, shape: tuple[int, ...], gain: float, random: numpy.random.RandomState) -> numpy.ndarray:
    """Values for one tensor, by its role: a variance, a normalisation's gain, a shift, or a weight matrix."""
    normal = random.standard_normal(shape)
    if key.endswith("running_var"):
        return numpy.exp(0.5 * normal)
    if key.endswith("weight") and len(shape) == 1:
        return gain * (1 + 0.3 * normal)
    if key.endswith("weight"):
        return gain * normal / math.sqrt(math.prod(shape[1:]))
    return gain * (0.3 if len(shape) <= 1 else 1.0) * normal


def stored_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in float16, for a file of half the size; a tensor that float16 cannot hold exactly is an error."""
    stored = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    for key, value in state.items():
        assert torch.equal(stored[key].to(value.dtype), value), f"{key} is not exact in float16"
    return stored


def network_input(shape: Shape) -> Tensor:
    """Multiples of 1/64 in [-2, 2), exact in every floating-point format down to bfloat16. float32 (B, 3, H, W)"""
    batch, height, width = shape
    values = numpy.random.RandomState(INPUT_SEED).randint(-128, 128, (batch, 3, height, width))
    return torch.from_numpy(values).float() / 64


def picture(height: int, width: int) -> numpy.ndarray:
    """Slopes, edges and a checkerboard, another in each channel: RGB, uint8 (H, W, 3)."""
    y, x, channel = numpy.mgrid[:height, :width, :3]
    board = (x // 16 + y // 16 + channel) % 2
    return ((x * (2 + channel) + y * (5 - channel) + 64 * board + (x * y >> 6)) % 256).astype(numpy.uint8)


def lines(length: int, stride: int) -> numpy.ndarray:
    """Indices of the recorded rows or columns: every so many, and the two at either border."""
    return numpy.unique(numpy.clip([*range(0, length, stride), 1, length - 2, length - 1], 0, length - 1))


def sampled(values: Tensor | numpy.ndarray, stride: int, name: str) -> dict[str, numpy.ndarray]:
    """What is recorded of a map (..., H, W): `NAME.shape` of all of it, `NAME.rows`, `NAME.columns`, and `NAME.values` where they cross."""
    array = numpy.asarray(values)
    rows, columns = lines(array.shape[-2], stride), lines(array.shape[-1], stride)
    values = array[..., rows[:, None], columns].astype(numpy.float32)
    return {f"{name}.shape": numpy.array(array.shape), f"{name}.rows": rows, f"{name}.columns": columns, f"{name}.values": values}


def difference(arrays: Arrays, name: str, values: Tensor | numpy.ndarray) -> numpy.ndarray:
    """|values - recorded| over the largest recorded value, at each recorded pixel; ValueError if the map has another shape."""
    array = numpy.asarray(values.detach() if isinstance(values, Tensor) else values, numpy.float64)
    shape = tuple(arrays[f"{name}.shape"].tolist())
    if array.shape != shape:
        raise ValueError(f"{name}: a map of {array.shape}, where one of {shape} was recorded")
    recorded = arrays[f"{name}.values"].astype(numpy.float64)
    there = array[..., arrays[f"{name}.rows"][:, None], arrays[f"{name}.columns"]]
    return numpy.abs(there - recorded) / numpy.abs(recorded).max()


Maps = dict[str, Tensor | numpy.ndarray]


@dataclass(frozen=True)
class Oracle:
    """Another code's model, with its weights in it, and how it is asked for what is recorded.

    `run` gives the maps of a network input, float32 or float64 as that is, `predict` the tensor that a picture becomes, the maps at its
    size and what else there is between; `inputs` and `pictures` are their sizes by name.
    """

    model: nn.Module
    run: Callable[[Tensor], Maps]
    predict: Callable[[numpy.ndarray], Maps]
    inputs: Mapping[str, Shape]
    pictures: Mapping[str, tuple[int, int]]

    @torch.no_grad()
    def arrays(self) -> dict[str, numpy.ndarray]:
        """`input_seed`; of each input `NAME.input`, (batch, height, width), of each picture `NAME.picture`, (height, width); and the maps.

        Prints how far float32 is from float64.
        """
        arrays = {"input_seed": numpy.array(INPUT_SEED)}
        for name, shape in self.inputs.items():
            arrays[f"{name}.input"] = numpy.array(shape)
            single, double = self.run(network_input(shape)), self._run_in_double(network_input(shape))
            for key, values in single.items():
                arrays |= sampled(values, INPUT_STRIDE, f"{name}.{key}")
                rounding = (values - double[key]).abs().max() / double[key].abs().max()
                print(f"{name}.{key}: {values.min():.4g} to {values.max():.4g}, deviation {values.std():.3g}; rounding {rounding:.1e}")
        for name, (height, width) in self.pictures.items():
            arrays[f"{name}.picture"] = numpy.array((height, width))
            for key, values in self.predict(picture(height, width)).items():
                arrays |= sampled(values, PICTURE_STRIDES.get(key, PICTURE_STRIDE), f"{name}.{key}")
                print(f"{name}.{key}: {tuple(values.shape)}, {values.min():.4g} to {values.max():.4g}")
        return arrays

    def _run_in_double(self, x: Tensor) -> Maps:
        self.model.double()
        try:
            return self.run(x.double())
        finally:
            self.model.float()

    @torch.no_grad()
    def print_least_visible(self, count: int = 12) -> None:
        """Which tensors matter least: set to zero (gains and variances: to one) in turn, and the change, relative to the largest value."""
        inputs = [network_input(shape) for shape in list(self.inputs.values())[:2]]
        expected = [self.run(x) for x in inputs]
        changes = {}
        for key, value in self.model.state_dict().items():
            if value.is_floating_point():
                before = value.clone()
                value.fill_(1.0 if key.endswith("running_var") or (key.endswith("weight") and value.dim() == 1) else 0.0)
                found = [
                    float((self.run(x)[key] - y).abs().max() / y.abs().max())
                    for x, maps in zip(inputs, expected, strict=True)
                    for key, y in maps.items()
                ]
                changes[key] = max(found)
                value.copy_(before)
        for key in sorted(changes, key=lambda key: changes[key])[:count]:
            print(f"{changes[key]:.1e} {key}")


def write(path: Path, arrays: Arrays) -> None:
    numpy.savez_compressed(path, **arrays)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def let_torchvision_import() -> None:
    """Name the two operators that torchvision's wheel of PyPI, made for CUDA, lacks beside a PyTorch for CPUs. Nothing runs them."""
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(operators)  # its end would take the names with it


_KEPT: list[torch.library.Library] = []


def import_from(folder: Path, package: str) -> None:
    """Let `import PACKAGE` find FOLDER/PACKAGE, whatever else of that name is installed, or is ours."""
    if not (folder / package).is_dir():
        raise FileNotFoundError(f"{folder / package}: the checkout has no such package")
    module = types.ModuleType(package)
    module.__path__ = [str(folder / package)]
    sys.modules[package] = module
