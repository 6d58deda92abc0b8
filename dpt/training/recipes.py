"""What decides a training, besides the data: `Recipe`, and those of the carried models."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..data.augmentation import Augmentation
from ..zoo import config_of


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a training gives, besides the data."""

    model: str
    crop: tuple[int, int]  # height and width of what the network sees
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: int = 200
    clip: float = 1.0  # largest gradient norm
    seed: int = 0
    amp: str | None = None  # autocast dtype, e.g. "bfloat16"
    start_from: str | None = None  # a named model or a checkpoint file: see `Training`
    coarse: float = 0.0  # this share of the steps, the first, sees pictures of coarse_size; the rest, of `crop`
    coarse_size: tuple[int, int] = (128, 128)
    validate_every: int = 500
    checkpoint_every: int = 100
    augmentation: Augmentation = field(default_factory=Augmentation)
    data_term: str = "squared"  # of the loss of inverse depth, as are the next two
    gradient_weight: float = 0.5
    sky: bool = True  # inverse depth is 0 where the data says that the sky is; or else unknown there, as metres are
    variance_focus: float = 0.5  # of the loss of metres
    max_depth: float | None = None  # metres; what is farther counts as unknown; None: see `dpt.evaluation.metrics.depth_limit`
    auxiliary_weight: float = 0.2  # of the auxiliary head's loss, where the model has that head

    def __post_init__(self) -> None:
        if not 0 <= self.coarse <= 1:
            raise ValueError(f"coarse is {self.coarse}: must be a share of the steps, from 0 to 1")

    @classmethod
    def of(cls, name: str) -> Recipe:
        """The recipe of a named model: its own, or else the defaults, with squares of the shorter side of the model's own size."""
        return RECIPES.get(name) or cls(model=name, crop=(min(config_of(name).input.size),) * 2)


RECIPES = {
    recipe.model: recipe
    for recipe in (
        Recipe(
            model="dpt-tiny-scenes",
            crop=(192, 192),
            steps=3000,
            batch_size=16,
            warmup=200,
            validate_every=300,
            augmentation=Augmentation(smallest=0.5, aspect=1.2),
        ),
        Recipe(
            model="dpt-tiny-depth",
            crop=(192, 192),
            steps=6000,
            batch_size=16,
            warmup=200,
            validate_every=500,
            coarse=0.75,
            start_from="dpt-tiny-scenes",
            augmentation=Augmentation(smallest=0.7, aspect=1.1),
            data_term="absolute",
            gradient_weight=0.1,
        ),
    )
}
