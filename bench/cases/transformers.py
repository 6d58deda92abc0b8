"""A model of transformers with our weights, as it comes and accelerated in place; the gate is the one of our models."""

from __future__ import annotations

import dpt

from ..harness.runner import Prepared
from . import models, peers


class OpenedTheirs(models.OpenedModel):
    """Forward passes of transformers' class of a model; ``exact`` is our model's, of the same weights."""

    def prepare(self, contender: str) -> Prepared:
        theirs = peers.transformers_model(self.plain, (self.sizes.height, self.sizes.width))
        note = peers.TRANSFORMERS_NOTE
        if contender == ACCELERATED:
            note = models.report_note(dpt.accelerate(theirs.model))
        return Prepared(models.run_of(self, theirs), held=lambda: models.held_bytes(theirs), note=note)


AS_IT_COMES, ACCELERATED = CONTENDERS = ("transformers", "transformers, accelerated")
