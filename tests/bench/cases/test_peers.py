"""Other people's implementations, on our weights."""

import pytest
import torch

from bench.cases import models, peers
from bench.harness import runner


def test_transformers_runs_our_weights(toy):
    """Blind spot: a peer with other weights, sizes or settings, which would be timed at another task; a part it has not is told."""
    pytest.importorskip("transformers")
    for name, side in (("dpt-base-ade20k", 64), ("dpt-large-midas", 64), ("depth-anything-v2-small", 70)):
        model = models.build(name, toy).eval()
        theirs = peers.transformers_model(model, (side, side))
        with torch.inference_mode():
            x = torch.randn(1, 3, side, side)
            assert (theirs(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()
    with pytest.raises(runner.Unavailable, match="square"):
        peers.transformers_model(model, (64, 96))
    with pytest.raises(runner.Unavailable, match="no class with this model's parts: transformers.* holds "):
        peers.transformers_model(models.build("dpt-tiny-depth", toy), (64, 64))


def test_a_peer_that_is_not_installed():
    """Blind spot: an import error in the place of a skip."""
    with pytest.raises(runner.Unavailable, match="no_such_package is not installed"):
        peers.installed("no_such_package")
