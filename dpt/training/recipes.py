"""What decides a training, besides the data: `Recipe`, and the named ones."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any

from ..data.augmentation import Augmentation
from ..rules import NAME, POSITIVE, TEXT, TRUTH, Checked, Rule, instance_of, nearest, number, one_of, or_none, tuple_of, whole
from ..zoo import CONFIGS, config_of

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("cosine", "polynomial")
DTYPES = ("bfloat16", "float16")
MAX_STEPS = 1 << 31
_STEPS, _SHARE = whole(1, MAX_STEPS), number("from 0 to 1", lambda value: 0 <= value <= 1)
_STEPS_OR_NEVER = whole(0, MAX_STEPS)
_BELOW_ONE = number("from 0 to below 1", lambda value: 0 <= value < 1)
_NOT_NEGATIVE = number("from 0", lambda value: value >= 0)


@dataclass(frozen=True)
class Recipe(Checked):
    """Everything that decides what a training gives, besides the data. Steps are of the optimiser."""

    model: str
    crop: tuple[int, int]  # height and width of what the network sees
    name: str = "own"
    classes: str = "model"  # whose classes the head has: the named model's, or the data's
    data: str = "folder"  # how the data lies on the disk: a kind of `dpt.data`
    protocol: str = "folder"  # by which it is validated: one of `dpt.evaluation.protocols`
    start_from: str | None = None  # a named model, a checkpoint, its address, or a ViT of timm's: see `Training`
    steps: int = 1000
    batch_size: int = 32  # pictures a step, of all processes together
    accumulate: int = 1  # parts that each process computes its pictures of a step in
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam and AdamW
    momentum: float = 0.9  # of SGD
    weight_decay: float = 0.05
    undecayed: str = "vectors"  # without weight decay: one of `UNDECAYED`
    encoder_rate: float = 1.0  # factor on the encoder's learning rate
    layer_decay: float = 1.0  # factor on it from each block to the one before
    schedule: str = "cosine"  # after warm-up, to zero
    power: float = 1.0  # of the polynomial
    warmup: int = 200
    warmup_start: float = 0.005  # share of the learning rate that the first step has
    clip: float | None = 1.0  # largest gradient norm
    drop_path: float = 0.0  # of the encoder's last block; from 0 at the first it rises linearly
    checkpointing: bool = False  # the encoder's blocks are computed again in the backward pass
    amp: str | None = None  # autocast dtype; float16 with a scaler
    sync_batch_norm: bool = True  # of several processes on GPUs: statistics are those of all
    ema: float | None = None  # decay a step of an average of the weights, which is then what is validated and saved
    seed: int = 0
    coarse: float = 0.0  # this share of the steps, the first, sees pictures of coarse_size; the rest, of `crop`
    coarse_size: tuple[int, int] = (128, 128)
    augmentation: Augmentation = field(default_factory=Augmentation)
    data_term: str = "squared"  # of the loss of inverse depth, as are the next two
    gradient_weight: float = 0.5
    sky: bool = True  # inverse depth is 0 where the data says that the sky is; or else unknown there, as metres are
    variance_focus: float = 0.5  # of the loss of metres
    max_depth: float | None = None  # metres; what is farther counts as unknown; None: see `dpt.evaluation.metrics.depth_limit`
    averaged_over: str = "labelled"  # pixels that cross-entropy is averaged over; "all", those without a label, too, as mmsegmentation's is
    auxiliary_weight: float = 0.2  # of the auxiliary head's loss, where the model has that head
    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 100
    keep_every: int = 0  # every so many steps the checkpoint of then is kept too; 0: never
    pictures_every: int = 0  # every so many steps what is predicted of the first validation pictures is drawn; 0: at each validation
    saved_dtype: str = "float32"  # of model.safetensors

    RULES = {
        "model": Rule("a model that dpt info lists", lambda value: type(value) is str and value in CONFIGS),
        "crop": tuple_of(whole(1, 1 << 14), 2),
        "name": NAME,
        "classes": one_of("model", "data"),
        "data": NAME,
        "protocol": NAME,
        "start_from": or_none(TEXT),
        "steps": _STEPS,
        "batch_size": whole(1, 1 << 20),
        "accumulate": whole(1, 1 << 20),
        "optimizer": one_of(*OPTIMIZERS),
        "learning_rate": POSITIVE,
        "betas": tuple_of(_BELOW_ONE, 2),
        "momentum": _BELOW_ONE,
        "weight_decay": _NOT_NEGATIVE,
        "undecayed": one_of("vectors", "positions", "nothing"),
        "encoder_rate": POSITIVE,
        "layer_decay": number("above 0, to 1", lambda value: 0 < value <= 1),
        "schedule": one_of(*SCHEDULES),
        "power": POSITIVE,
        "warmup": _STEPS_OR_NEVER,
        "warmup_start": _SHARE,
        "clip": or_none(POSITIVE),
        "drop_path": _BELOW_ONE,
        "checkpointing": TRUTH,
        "amp": or_none(one_of(*DTYPES)),
        "sync_batch_norm": TRUTH,
        "ema": or_none(number("above 0 and below 1", lambda value: 0 < value < 1)),
        "seed": whole(0, (1 << 32) - 1),
        "coarse": _SHARE,
        "coarse_size": tuple_of(whole(1, 1 << 14), 2),
        "augmentation": instance_of(Augmentation),
        "data_term": one_of("squared", "absolute"),
        "gradient_weight": _NOT_NEGATIVE,
        "sky": TRUTH,
        "variance_focus": _SHARE,
        "max_depth": or_none(POSITIVE),
        "averaged_over": one_of("labelled", "all"),
        "auxiliary_weight": _NOT_NEGATIVE,
        "log_every": _STEPS,
        "validate_every": _STEPS,
        "checkpoint_every": _STEPS,
        "keep_every": _STEPS_OR_NEVER,
        "pictures_every": _STEPS_OR_NEVER,
        "saved_dtype": one_of("float32", "float16", "bfloat16"),
    }

    def _conflicts(self) -> Iterable[tuple[bool, str]]:
        patch = config_of(self.model).encoder.patch_size
        for name, size in {"crop": self.crop, **({"coarse_size": self.coarse_size} if self.coarse else {})}.items():
            wrong = any(side < patch or side % patch for side in size)
            yield wrong, f"{name}={size}: height and width must be multiples of the patch size {patch} of {self.model}"
        yield self.batch_size % self.accumulate != 0, f"accumulate={self.accumulate}: it must divide batch_size, {self.batch_size}"

    @classmethod
    def of(cls, name: str) -> Recipe:
        """The recipe of that name, or of a model's name its pretrained weights fine-tuned on a folder of pairs, at the rates of `nyuv2`, on
        squares of the shorter side of its own size; ValueError for others."""
        if name in RECIPES:
            return RECIPES[name]
        if name not in CONFIGS:
            near = nearest(name, [*RECIPES, *CONFIGS])
            raise ValueError(f"no recipe is named {name!r}{near}; there are {', '.join(RECIPES)}, and the models that dpt info lists")
        config = config_of(name)
        patch = config.encoder.patch_size
        crop = (max(min(config.input.size) // patch, 1) * patch,) * 2
        return cls(model=name, name=name, crop=crop, start_from=name if config.source else None, **_FINE_TUNING)

    def with_changes(self, changes: Sequence[str]) -> Recipe:
        """The recipe with changes such as "batch_size=8", "crop=512,512", "amp=none" or "augmentation.flip=0"; ValueError for a mistake."""
        values: dict[str, Any] = {}
        inner: dict[str, dict[str, Any]] = {}
        for change in changes:
            key, equals, text = change.partition("=")
            if not equals:
                raise ValueError(f"{change!r}: a change is NAME=VALUE, such as batch_size=8")
            section, dot, name = key.strip().partition(".")
            _must_be_field(section, self, key)
            if dot:
                _must_be_field(name, getattr(self, section), key)
                inner.setdefault(section, {})[name] = _value(text, getattr(getattr(self, section), name))
            else:
                values[section] = _value(text, getattr(self, section))
        sections = {section: replace(getattr(self, section), **new) for section, new in inner.items()}
        return replace(self, **values, **sections)

    def as_text(self) -> str:
        """A line a field, each as `with_changes` reads it."""
        lines = {}
        for name, value in asdict(self).items():
            lines.update({f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value})
        return "\n".join(f"{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for name, value in lines.items())


def _must_be_field(name: str, of: Any, key: str) -> None:
    known = [item.name for item in fields(of)] if is_dataclass(of) else []
    if name not in known:
        raise ValueError(f"{key!r}: {type(of).__name__} has no field {name!r}{nearest(name, known)}; it has {', '.join(known) or 'none'}")


def _value(text: str, now: Any) -> Any:
    """What a text on the command line stands for, where a field is now this: rules say later whether it may be."""
    words = text.strip()
    if words.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[words.lower()]
    try:
        value = ast.literal_eval(words)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return words
    if isinstance(now, str) and not isinstance(value, str):  # a model or a file whose name is a number
        return words
    return tuple(value) if isinstance(value, list) else value


_TINY = Recipe(
    name="scenes-depth",
    model="dpt-tiny-depth",
    crop=(192, 192),
    batch_size=16,
    saved_dtype="float16",  # as the package carries it
)
_SCENES_DEPTH = replace(
    _TINY,
    start_from="runs/scenes/model.safetensors",
    augmentation=Augmentation(smallest=0.7, aspect=1.1),
    data_term="absolute",
    gradient_weight=0.1,
    sky=False,
)
_TIMM = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-vitjx/"  # ViTs of ImageNet-21k and 1k, JAX' by timm
# mmsegmentation's dpt_vit-b16_8xb2-160k_ade20k-512x512: 8 GPUs with 2 pictures each, 46.97 mIoU. Its weight decay is as it acts.
_ADE20K = Recipe(
    name="ade20k-160k",
    model="dpt-base-ade20k",
    data="ade20k",
    protocol="ade20k",
    start_from=f"{_TIMM}jx_vit_base_p16_224-80ecf9dd.pth",
    crop=(512, 512),
    steps=160_000,
    batch_size=16,
    learning_rate=6e-5,
    weight_decay=0.01,
    undecayed="positions",
    schedule="polynomial",
    warmup=1500,
    warmup_start=1e-6,
    clip=None,
    averaged_over="all",
    augmentation=Augmentation(crop="window", scale=(2048, 512), ratio=(0.5, 2.0), cat_max_ratio=0.75, distortion=True, colour=0),
    validate_every=16_000,
    checkpoint_every=1000,
    keep_every=16_000,
)
# Ranftl et al. 2021, section 4.2: SGD, batch 48, 240 epochs of 20210 pictures, an auxiliary loss of 0.2, sizes of 0.5 to 2 times 520:
# from memory, for the paper could not be looked up here. The weight decay is PyTorch-Encoding's, whose protocol it follows.
_PAPER = replace(
    _ADE20K,
    name="ade20k-paper",
    model="dpt-large-ade20k",
    start_from=f"{_TIMM}jx_vit_large_p16_384-b3be5167.pth",
    crop=(480, 480),
    steps=101_050,
    batch_size=48,
    optimizer="sgd",
    learning_rate=2e-3,
    weight_decay=1e-4,
    undecayed="nothing",
    averaged_over="labelled",
    power=0.9,
    warmup=0,
    augmentation=Augmentation(crop="window", scale=(1 << 14, 520), ratio=(0.5, 2.0), colour=0),
    validate_every=10_000,
    keep_every=10_000,
)
# Depth Anything V2's metric fine-tuning: AdamW, ten times the encoder's rate for the decoder, SILog, 120 epochs; here on other data.
_FINE_TUNING: dict[str, Any] = {
    "learning_rate": 5e-5,
    "encoder_rate": 0.1,
    "weight_decay": 0.01,
    "schedule": "polynomial",
    "power": 0.9,
    "warmup": 0,
    "clip": None,
}
_METRES = Recipe(
    name="nyuv2",
    model="depth-anything-v2-metric-hypersim-small",
    data="nyuv2",
    protocol="nyu-eigen",
    start_from="depth-anything-v2-small",
    crop=(518, 518),
    steps=90_866,
    **_FINE_TUNING,
    max_depth=10.0,
    augmentation=Augmentation(crop="window", scale=(1 << 14, 518), colour=0),
    validate_every=5000,
    checkpoint_every=500,
)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        replace(
            _TINY,
            name="scenes",
            model="dpt-tiny-scenes",
            steps=3000,
            validate_every=300,
            augmentation=Augmentation(smallest=0.5, aspect=1.2),
        ),
        replace(_SCENES_DEPTH, name="scenes-depth", steps=6000, coarse=0.75),
        replace(
            _SCENES_DEPTH,
            name="scenes-depth-again",
            start_from="runs/scenes-depth/model.safetensors",
            steps=4000,
            learning_rate=7e-4,
            seed=1,
        ),
        replace(
            _SCENES_DEPTH,
            name="scenes-depth-sky",
            start_from="runs/scenes-depth-again/model.safetensors",
            steps=2000,
            learning_rate=4e-4,
            seed=2,
            sky=True,
        ),
        _ADE20K,
        _PAPER,
        # The paper's DPT-Hybrid, fine-tuned from its ADE20K weights for 50 epochs of 4998 pictures.
        replace(
            _PAPER,
            name="pascal-context",
            model="dpt-hybrid-ade20k",
            classes="data",
            data="pascal-context",
            protocol="pascal-context",
            start_from="dpt-hybrid-ade20k",
            steps=5206,
            validate_every=500,
            keep_every=0,
            checkpoint_every=100,
        ),
        _METRES,
        replace(
            _METRES,
            name="kitti",
            model="depth-anything-v2-metric-vkitti-small",
            data="kitti",
            protocol="kitti-eigen",
            steps=86_842,
            max_depth=80.0,
        ),
    )
}
