"""A case is opened at its toy size here."""

import pytest
import torch

from bench.harness import measure, runner


@pytest.fixture
def toy() -> runner.Context:
    return runner.Context(torch.device("cpu"), measure.Budget(1e9), measure.Rounds(1, 1, 0.0), toy=True)
