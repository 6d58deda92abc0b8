"""ZoeDepth's head: metres, as the mean of bins that each pixel weighs, and that attractors move from level to level.

Source: https://github.com/isl-org/ZoeDepth, zoedepth/models (Bhat et al. 2023, arXiv 2302.12288).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import HeadConfig
from .encoders.vit import MLP, sdpa
from .functional import LastConv2d
from .heads import finished, own_size

STRENGTH = 300.0  # of attractors: that of the published code, which never reads the one of its configurations
LEAST = 1e-3  # of a bin's width, and of a point, where they are bounded
LEAST_SHARE, LEAST_PROBABILITY, LEAST_COUNT = 1e-4, 1e-4, 1e-7


def resized(x: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)


def pointwise(
    channels: int, hidden: int, outputs: int, activation: type[nn.Module] = nn.ReLU, last: type[nn.Conv2d] = nn.Conv2d
) -> nn.Sequential:
    """Two 1x1 convolutions: an MLP on each pixel."""
    return nn.Sequential(nn.Conv2d(channels, hidden, 1), activation(), last(hidden, outputs, 1))


def shifts(centres: Tensor, points: Tensor) -> Tensor:
    """How far points (B, A, h, w) move centres (B, K, h, w): the mean of dx / (1 + 300 dx^2), strongest on those nearby."""
    moved = torch.zeros_like(centres)
    for point in points.split(1, dim=1):  # one at a time: together they would be A times as large as the bins
        apart = point - centres
        moved = moved + apart / (1 + STRENGTH * apart.square())
    return moved / points.shape[1]


def log_binomial(probability: Tensor, temperature: Tensor, count: int) -> Tensor:
    """The weights of `count` bins (B, count, H, W): a softmax of the binomial distribution's logarithm over the temperature.

    Binomial coefficients by Stirling's formula; both maps are (B, 1, H, W).
    """
    k = torch.arange(count, device=probability.device, dtype=probability.dtype).view(1, count, 1, 1)
    rest = count - 1 - k
    coefficient = (count - 1) * math.log(count - 1) - (k + LEAST_COUNT) * (k + LEAST_COUNT).log() - rest * (rest + LEAST_COUNT).log()
    success, failure = probability.clamp(LEAST_PROBABILITY, 1.0).log(), (1 - probability).clamp(LEAST_PROBABILITY, 1.0).log()
    return ((coefficient + k * success + rest * failure) / temperature).softmax(dim=1)


class Bins(nn.Module):
    """The bins of one domain, indoors or outdoors: each MLP's last convolution, and all that follows, in float32 at least.

    Args:
        features: channels of the bottleneck.
        inputs: channels of what bins are weighed by, beside the embedding.
        seed_hidden, hidden, share: widths, which differ between the published models: of the MLPs of seeds and of attractors, and of that
            of the weights, as a share of what goes in.
    """

    def __init__(self, config: HeadConfig, features: int, inputs: int, seed_hidden: int, hidden: int, share: int):
        super().__init__()
        self.config = config
        self.bounded = config.bin_centres == "normed"
        width = config.bin_width
        self.seed = pointwise(features, seed_hidden, config.bins, last=LastConv2d)
        self.attractors = nn.ModuleList(
            pointwise(width, hidden, (1 + self.bounded) * count, last=LastConv2d) for count in config.attractors
        )
        self.weights = pointwise(inputs + width, (inputs + width) // share, 4, nn.GELU, last=LastConv2d)

    def centres(self, bottleneck: Tensor, embeddings: list[Tensor]) -> Tensor:
        """Bottleneck (B, F, h, w) and embeddings of the levels, deep to shallow -> metres of the bins (B, K, H/2, W/2)."""
        x = self.seed(bottleneck)
        if self.bounded:  # shares of the range, each in the middle of its bin
            widths = F.relu(x) + LEAST
            widths = widths / widths.sum(1, keepdim=True)
            x = widths.cumsum(1) - widths / 2
        else:
            x = F.softplus(x)
        for attractor, embedding in zip(self.attractors, embeddings, strict=True):
            points = attractor(embedding)
            # Of a bounded pair the published code divides one by the sum of both, and then goes on with what it divided.
            points = F.relu(points[:, ::2]) + LEAST if self.bounded else F.softplus(points)
            x = resized(x, embedding.shape[2:])
            x = x + shifts(x, points)
        if not self.bounded:
            return x
        near, far = self.config.bin_range
        return (near + (far - near) * x).sort(dim=1).values.clamp(near, far)

    def forward(self, features: Tensor, bottleneck: Tensor, embeddings: list[Tensor], last: Tensor) -> Tensor:
        """Features (B, inputs, H, W), and the last level's own embedding (B, D, H/2, W/2) -> metres (B, H, W), at least float32."""
        size = features.shape[2:]
        pairs = F.softplus(self.weights(torch.cat((features, resized(last, size)), dim=1))) + LEAST_SHARE
        share, heat = (pair[:, :1] / pair.sum(1, keepdim=True) for pair in pairs.chunk(2, dim=1))
        coldest, hottest = self.config.temperature
        weights = log_binomial(share, coldest + (hottest - coldest) * heat, self.config.bins)
        return (weights * resized(self.centres(bottleneck, embeddings), size)).sum(1)


class RouterBlock(nn.Module):
    """Post-norm transformer block."""

    def __init__(self, dim: int, hidden: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden, "relu")
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.proj(sdpa(self.qkv(x), self.num_heads)))
        return self.norm2(x + self.mlp(x))


class Router(nn.Module):
    """Which domain a picture is of, from the bottleneck (B, F, h, w): (B,). The published one lets a batch decide as a whole."""

    WIDTH, HIDDEN, HEADS, DEPTH = 128, 1024, 4, 4

    def __init__(self, features: int, domains: int):
        super().__init__()
        self.embed = nn.Conv2d(features, self.WIDTH, 1)
        self.blocks = nn.ModuleList(RouterBlock(self.WIDTH, self.HIDDEN, self.HEADS) for _ in range(self.DEPTH))
        self.classifier = nn.Sequential(nn.Linear(self.WIDTH, self.WIDTH), nn.ReLU(), nn.Linear(self.WIDTH, domains))

    def position(self, tokens: Tensor) -> Tensor:
        """Sines, then cosines, of the token's number times frequencies from 1 to 1 / 10000."""
        number, index = (torch.arange(count, device=tokens.device, dtype=torch.float32) for count in (tokens.shape[1], self.WIDTH // 2))
        angle = number[:, None] * (index * (-2 * math.log(10000.0) / self.WIDTH)).exp()
        return torch.cat((angle.sin(), angle.cos()), dim=1).to(tokens.dtype)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.pad(self.embed(x).flatten(2).transpose(1, 2), (0, 0, 1, 0))  # (B, 1 + h*w, D), the first one zero
        tokens = tokens + self.position(tokens)
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.classifier(tokens[:, 0])
        return logits.argmax(dim=1)


class MetricBinsHead(nn.Module):
    """The maps of all levels -> metres (B, H, W), at least float32: DPT's depth head, whose features and relative depth weigh the bins.

    With several `config.domains` each has bins of its own, and a router chooses; relative depth has no part then.
    """

    DEEPER = 4

    def __init__(self, features: int, config: HeadConfig):
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv2d(features, features // 2, 3, padding=1)
        self.conv2 = nn.Conv2d(features // 2, config.hidden, 3, padding=1)
        self.conv3 = nn.Conv2d(config.hidden, 1, 1)
        width, routed = config.bin_width, len(config.domains) > 1
        hidden, *widths = (width // 2, width // 2, width, 4) if routed else (128, 256, 128, 2)
        inputs = config.hidden if routed else config.hidden + 1
        self.bottleneck = nn.Conv2d(features, features, 1)
        self.seed_projector = pointwise(features, hidden, width)
        self.projectors = nn.ModuleList(pointwise(features, hidden, width) for _ in config.attractors)
        self.domains = nn.ModuleList(Bins(config, features, inputs, *widths) for _ in config.domains or ("all",))
        self.router = Router(features, len(config.domains)) if routed else nn.Identity()

    def forward(self, maps: tuple[Tensor, ...], size: tuple[int, int]) -> Tensor:
        """`maps`: of the four levels, shallow to deep, (B, F, H/2, W/2) to (B, F, H/16, W/16), and the deepest before its fusion."""
        x = resized(self.conv1(maps[0]), own_size(maps[0], size, self.config))
        return self.metres(F.relu(self.conv2(x)), maps)

    def metres(self, features: Tensor, maps: tuple[Tensor, ...]) -> Tensor:
        """What follows the features (B, hidden, H, W) of the depth head."""
        *levels, deepest = maps
        bottleneck = self.bottleneck(deepest)
        previous = self.seed_projector(bottleneck)
        embeddings = []
        for projector, x in zip(self.projectors, reversed(levels), strict=True):
            own = projector(x)
            embeddings.append(own + resized(previous, own.shape[2:]))
            previous = own
        if not isinstance(self.router, Router):
            features = torch.cat((features, F.relu(self.conv3(features))), dim=1)
        found = torch.stack([bins(features, bottleneck, embeddings, previous) for bins in self.domains], dim=1)  # (B, domains, H, W)
        if isinstance(self.router, Router):
            chosen = self.router(bottleneck).view(-1, 1, 1, 1)
            depth = found.gather(1, chosen.expand(-1, 1, *found.shape[2:])).squeeze(1)
        else:
            depth = found.squeeze(1)
        return finished(depth, self.config)
