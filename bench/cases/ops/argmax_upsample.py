"""Labels from logits, without the resized logits."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpt.kernels.argmax_upsample import upsample_argmax, upsample_argmax_ref

from ..shapes import Map, feature_map
from . import Op, both


def _chosen_logit(logits: Tensor, labels: Tensor) -> Tensor:
    """The resized logit of each pixel's label, in float32: the largest of its pixel where the label is right."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    resized = F.interpolate(wide, size=labels.shape[1:], mode="bilinear", align_corners=False)
    return resized.gather(1, labels[:, None].long())[:, 0]


OPS = (
    Op(
        "upsample_argmax",
        lambda s: [feature_map(s.batch, s.channels, s.side, s.side)],
        **both(upsample_argmax, upsample_argmax_ref, lambda f, s, x: f(x, (s.out_side, s.out_side), False)),
        shapes=(Map(1, 150, 512, 0, 1024), Map(16, 150, 256, 0, 512)),
        toy=Map(2, 5, 6, 0, 12),
        backward=False,
        judged=lambda s, labels, x: _chosen_logit(x, labels),
    ),
)
