"""The encoders, one a file: `ENCODERS` has the class of each `EncoderConfig.kind`.

An encoder is made from its configuration, and is a module with `grid(x)`, the rows and columns of patches of a picture (B, 3, H, W), and
`forward(x)`, four hooked layers, shallow to deep: tokens (B, 1 + h*w, D), cls token first, or, of a convolutional stem's levels and of
stages, maps.
Parameters that are in no layer of PyTorch's get their first values in `reset_parameters(generator)`.
"""

from __future__ import annotations

from typing import Any

from .beit import BEiT
from .dinov3 import DINOv3
from .swinv2 import SwinV2
from .vit import ViT

ENCODERS: dict[str, type[Any]] = {"vit": ViT, "dinov3": DINOv3, "beit": BEiT, "swinv2": SwinV2}
