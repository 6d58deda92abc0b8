"""A card that records graphs, and a model to run there."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from cuda_graphs import Card, Model


@pytest.fixture
def card(monkeypatch) -> Card:
    return Card(monkeypatch)


@pytest.fixture(autouse=True)
def quiet_and_without_gradients() -> Iterator[None]:
    """A warning is an error: a capture that failed in silence passes every comparison of numbers. Predictions want no gradients."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.fixture
def model() -> Model:
    with torch.inference_mode(False):
        return Model()
