"""ZoeDepth's bins, each part against what the paper says of it, written out."""

import math
from dataclasses import replace

import pytest
import torch
from small import config, randomise, small

from dpt.nets.metric_bins import Bins, MetricBinsHead, Router, log_binomial, resized, shifts


def test_attractors_by_hand():
    """Blind spot: a sum for a mean, the centre drawn away, the exponential attractor, the strength of the configurations."""
    centres, points = torch.randn(2, 5, 3, 4), torch.randn(2, 3, 3, 4)
    expected = torch.stack([(p - centres) / (1 + 300 * (p - centres) ** 2) for p in (points[:, i : i + 1] for i in range(3))])
    torch.testing.assert_close(shifts(centres, points), expected.mean(0))


def test_weights_are_binomial():
    """Blind spot: the probabilities of failure, coefficients of another number of bins, a temperature that multiplies."""
    share = torch.tensor([0.2, 0.7]).view(2, 1, 1, 1)
    found = log_binomial(share, torch.ones_like(share), 40)[:, :, 0, 0]
    for row, p in zip(found.tolist(), (0.2, 0.7), strict=True):
        # the coefficients by Stirling's formula without its last factor, 0 log 0 being 0
        logs = [39 * math.log(39) - (k and k * math.log(k)) - (39 - k and (39 - k) * math.log(39 - k)) for k in range(40)]
        weights = [math.exp(log + k * math.log(p) + (39 - k) * math.log(1 - p)) for k, log in enumerate(logs)]
        assert row == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-4, abs=1e-7)
        assert abs(row.index(max(row)) - 39 * p) < 1  # the binomial distribution's own
    flat = log_binomial(share, torch.full_like(share, 50.0), 40)
    assert flat.max() < 0.06 and flat.min() > 0.005  # near a uniform one


def bins(name: str) -> Bins:
    head = replace(config(name).head, bins=6, bin_width=8)
    return randomise(Bins(head, 16, 33, 256, 128, 2))


def test_bounded_bins_stay_within_their_range():
    """Blind spot: metres beyond the farthest, bins out of order, the range of another model."""
    made = bins("zoedepth-k")
    bottleneck, embeddings = torch.randn(2, 16, 2, 3), [10 * torch.randn(2, 8, 2 << i, 3 << i) for i in range(4)]
    with torch.inference_mode():
        centres = made.centres(bottleneck, embeddings)
    assert centres.shape == (2, 6, 16, 24) and (centres.diff(dim=1) >= 0).all()
    assert centres.min() >= 0.001 and 10 < centres.max() <= 80
    unbounded = bins("zoedepth-n")
    with torch.inference_mode():
        unbounded.seed[2].bias += 40
        assert unbounded.centres(bottleneck, embeddings).max() > 10


def test_seeds_are_the_middles_of_their_bins():
    """Blind spot: the edges of the bins, or widths that do not fill the range."""
    made = bins("zoedepth-k")
    bottleneck = torch.randn(1, 16, 2, 2)
    made.attractors = torch.nn.ModuleList()
    widths = made.seed(bottleneck).relu() + 1e-3
    edges = torch.cat((torch.zeros(1, 1, 2, 2), (widths / widths.sum(1, keepdim=True)).cumsum(1)), dim=1)
    expected = 0.001 + (80 - 0.001) * (edges[:, 1:] + edges[:, :-1]) / 2
    torch.testing.assert_close(made.centres(bottleneck, []), expected)


def test_each_picture_of_a_batch_has_its_own_domain():
    """Blind spot: the vote of a batch, by which the pictures beside it change a picture's metres; a router that is never asked."""
    model = small("zoedepth-nk")
    assert isinstance(model.head, MetricBinsHead) and isinstance(model.head.router, Router)
    x = torch.cat((torch.randn(1, 3, 64, 64), 3 + 3 * torch.randn(3, 3, 64, 64), torch.zeros(1, 3, 64, 64)))
    chosen = []
    model.head.router.register_forward_hook(lambda module, inputs, output: chosen.append(output))
    with torch.inference_mode():
        model(x)
        # Between the two largest differences of the domains' scores some are chosen the one way, and some the other.
        logits = []
        model.head.router.classifier.register_forward_hook(lambda module, inputs, output: logits.append(output))
        model(x)
        apart = (logits[0][:, 0] - logits[0][:, 1]).sort().values
        model.head.router.classifier[2].bias[1] += (apart[0] + apart[-1]) / 2
        together = model(x)
        assert 0 < chosen[-1].sum() < len(x)
        for index, picture in enumerate(x.split(1)):
            assert (model(picture) - together[index]).abs().max() <= 1e-5 * together[index].abs().max()
            assert chosen[-1] == chosen[2][index]


@pytest.mark.parametrize("domain", [0, 1])
def test_the_chosen_domain_alone_decides(domain):
    """Blind spot: the bins of the other domain, or a mixture of both."""
    model = small("zoedepth-nk")
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        model.head.router.classifier[2].bias.copy_(torch.tensor([100.0, 0.0]).roll(domain))
        before = model(x)
        for value in model.head.domains[1 - domain].parameters():
            value.add_(1.0)
        assert torch.equal(model(x), before)
        for value in model.head.domains[domain].parameters():
            value.add_(1.0)
        assert not torch.equal(model(x), before)


def test_relative_depth_is_read_where_there_is_no_router():
    """Blind spot: a last channel that is left out or always zero."""
    for name, reads in (("zoedepth-n", True), ("zoedepth-k", True), ("zoedepth-nk", False)):
        model, x = small(name), torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            before = model(x)
            model.head.conv3.bias += 5
            assert torch.equal(model(x), before) != reads


def test_gradients_reach_every_parameter_but_the_routers():
    """Blind spot: a parameter that is never trained. A choice has no gradient."""
    for name in ("zoedepth-n", "zoedepth-k", "zoedepth-nk"):
        model = small(name)
        depth = model(torch.randn(2, 3, 64, 64))
        depth.log().mean().backward()
        without = {key for key, value in model.named_parameters() if value.grad is None}
        # the dead unit, and what a router leaves out
        allowed = ("fusion.blocks.3.unit1.", "head.router.", "head.conv3.") if name == "zoedepth-nk" else ("fusion.blocks.3.unit1.",)
        assert all(key.startswith(allowed) for key in without), without


def test_metres_are_of_float32():
    """Blind spot: weights of bins at the lowest temperature, whose exponents are ten thousands, in half precision."""
    model = small("zoedepth-n")
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        found = model.bfloat16()(x.bfloat16())
    assert found.dtype == torch.float32 and (found - expected).abs().max() <= 0.2 * expected.abs().max()


def test_resized_keeps_the_corners():
    """Blind spot: the corners of the embeddings in other places than upstream's."""
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(resized(x, (6, 9))[..., ::5, ::8], x[..., ::2, ::3])
