"""`Predictor`: a model as a class whose objects add its maps to batches of rows, as the actors of Ray Data do on many machines."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .. import devices, factory
from ..checkpoints import Source
from ..config import DPTConfig, HeadConfig
from ..rules import nearest
from .images import Picture
from .options import PredictOptions
from .prediction import predict_iter

if TYPE_CHECKING:
    from typing_extensions import Unpack

PICTURES = ("image", "bytes", "path")  # columns, of which a batch's first has its pictures
NAME, PROMPT, ERROR = "path", "prompt", "error"  # columns: what a picture is called, a sensor's depth of it, why it has no map
NONE: dict[str, Callable[[HeadConfig], dict[str, np.ndarray]]] = {  # by task, the map in each column of a picture that has none
    "depth": lambda head: {"depth": np.empty((0, 0), np.float32)},
    "segmentation": lambda head: {"labels": np.empty((0, 0), np.uint8 if len(head.classes) <= 256 else np.int16)},
    "normals": lambda head: {"normals": np.empty((0, 0, 3), np.float32)},
}


class Predictor:
    """A model that adds its maps to batches of rows. `ray.data.Dataset.map_batches` takes the class, and makes an object in each actor.

    The model is built once, with the object. A pickled object is its arguments, and builds the model anew where it is unpickled.

    Args:
        name: one of `dpt.models()`, or a `DPTConfig`.
        weights: whatever `dpt.load` takes, which then needs `name` only where a file does not say what it holds. On other machines, and in
            Ray's processes, a path is another's: give a whole one. By default the pretrained ones of `name`, which each machine downloads
            once.
        device: by default CUDA or MPS where the process sees one, else the CPU. Ray shows an actor the GPUs that it has asked for.
        fast: run on the fused kernels; by default on CUDA where Triton is installed.
        dtype: of the parameters, as in `dpt.build`; by default what PyTorch's is.
        accept_license: as in `dpt.build`.
        options: what `model.predict` takes, `prompt` apart, which is a column. Of a batch of rows, the network sees `batch_size` pictures
            at a time.

    Attributes:
        model: the `dpt.DPT`.

    Raises:
        ValueError, TypeError: neither a name nor weights; an option that there is not, or not for this model. The others are
        `dpt.build`'s and `dpt.load`'s.
    """

    def __init__(
        self,
        name: str | DPTConfig | None = None,
        *,
        weights: Source | None = None,
        device: str | torch.device | None = None,
        fast: bool | None = None,
        dtype: torch.dtype | None = None,
        accept_license: bool = False,
        **options: Unpack[PredictOptions],
    ):
        for option in options:
            if option == PROMPT or option not in PredictOptions.__annotations__:
                known = PredictOptions.__annotations__.keys() - {PROMPT}
                raise TypeError(f"no option of Predictor is named {option!r}{nearest(option, known)}; it takes {', '.join(sorted(known))}")
        self._arguments: dict[str, Any] = {"name": name, "weights": weights, "device": device, "fast": fast, "dtype": dtype}
        self._arguments |= {"accept_license": accept_license, **options}
        self._options: dict[str, Any] = dict(options)
        device = devices.automatic() if device is None else torch.device(device)
        how: dict[str, Any] = {"device": device, "dtype": dtype, "fast": devices.runs_fast(fast, device)}
        if weights is not None:
            self.model = factory.load(weights, name, **how)
        elif name is not None:
            self.model = factory.build(name, weights="pretrained", accept_license=accept_license, **how)
        else:
            raise ValueError("name=None, weights=None: a Predictor needs the name of a model, or weights, or both")
        self._none: dict[str, np.ndarray] = {}
        for head in self.model.config.heads:
            self._none |= NONE[head.task](head)
        if options.get("probability"):
            self._none["probability"] = np.empty((0, 0), np.float32)
        self._predicted([], [])  # which checks the options

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), **self._arguments), ()

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch's columns, and with them, row by row, the maps, each at its picture's own size, and `error`.

        Args:
            batch: columns of B rows each. The pictures are in `image`, arrays as `model.predict` takes them, (B, H, W, 3) or of different
                sizes; or else in `bytes`, the contents of files, as `ray.data.read_binary_files` reads them; or else in `path`, of files
                that this process can open. Beside the first two, `path` is what errors call a picture. Models that need a prompt have it in
                `prompt`: metres (h, w) or a file.

        Returns:
            The batch with object arrays (B,) added: by the model's tasks `depth`, float32 (H, W), `labels`, uint8 or int16 (H, W), and
            `normals`, float32 (H, W, 3), as `dpt.Prediction` has them, and `probability` if asked for; and `error`, which is empty or says
            why a picture could not be used: its maps are then of 0 x 0 pixels.

        Raises:
            ValueError: a column is missing, or one that is to be added is there already.
        """
        column = next((name for name in PICTURES if name in batch), None)
        if column is None:
            raise ValueError(f"the batch has the columns {sorted(batch)}: it needs one of {', '.join(PICTURES)}")
        if self.model.config.decoder.prompt and PROMPT not in batch:
            raise ValueError(f"the batch has the columns {sorted(batch)}: {self.model.config.name} needs {PROMPT!r}, a sensor's depth")
        if taken := sorted(batch.keys() & {*self._none, ERROR}):
            raise ValueError(f"the batch has the column {taken[0]!r} already, which is to be added: rename or drop it")
        names = batch.get(NAME, [None] * len(batch[column]))
        pictures = [_picture(value, name) for value, name in zip(batch[column], names, strict=True)]
        added = {name: np.empty(len(pictures), object) for name in (*self._none, ERROR)}
        for row, result in enumerate(self._predicted(pictures, batch.get(PROMPT, []))):
            for name, none in self._none.items():
                added[name][row] = none if result.prediction is None else getattr(result.prediction, name)
            added[ERROR][row] = "" if result.error is None else str(result.error)
        return {**batch, **added}

    def _predicted(self, pictures: list[Picture], prompts: Iterable[Any]) -> Iterable[Any]:
        prompt: dict[str, Any] = {"prompt": list(prompts)} if self.model.config.decoder.prompt else {}
        return predict_iter(self.model, pictures, **self._options, **prompt)


class _File(io.BytesIO):
    """The content of a file, with its name."""

    def __init__(self, content: bytes | bytearray | memoryview, name: str):
        super().__init__(content)
        self.name = name


def _picture(value: Any, name: str | None) -> Any:
    """What `load_image` takes; a value of another type it will name."""
    return _File(value, name or "the bytes") if isinstance(value, bytes | bytearray | memoryview) else value
