"""The Dense Prediction Transformer, stage by stage (Ranftl, Bochkovskiy, Koltun 2021, arXiv 2103.13413)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import DPTConfig
from .decoder import Fusion, Reassemble, ReassembleMap
from .encoder import Encoder
from .head import HEADS, SegmentationHead


class DPT(nn.Module):
    """Encoder, Reassemble, Fusion, head.

    Args:
        config: which model; `dpt.build` takes the named ones.
    """

    def __init__(self, config: DPTConfig):
        super().__init__()
        self.config = config
        encoder, decoder = config.encoder, config.decoder
        self.encoder = Encoder(encoder)
        self.reassemble = nn.ModuleList(
            ReassembleMap()
            if level < len(encoder.stem_hooks)
            else Reassemble(encoder.embed_dim, channels, level, decoder.readout, decoder.readout_activation)
            for level, channels in enumerate(decoder.neck_channels)
        )
        self.fusion = Fusion(decoder)
        self.head = HEADS[config.head.task](decoder.features, config.head)
        if config.head.auxiliary:
            self.auxiliary_head = SegmentationHead(decoder.features, config.head)
        self.apply(_initialise)
        nn.init.trunc_normal_(self.encoder.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.encoder.cls_token, std=0.02)
        if config.head.task == "depth":
            nn.init.ones_(self.head.conv3.bias)  # a last ReLU that starts below zero gets no gradient and never leaves it

    def features(self, x: Tensor, deeper: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Picture (B, 3, H, W) -> the fused map (B, F, H/2, W/2); if `deeper`, also the one a level deeper (B, F, H/4, W/4)."""
        grid = self.encoder.grid(x)
        tokens = self.encoder(x)
        return self.fusion([reassemble(t, grid) for reassemble, t in zip(self.reassemble, tokens, strict=True)], deeper)

    def forward(self, x: Tensor) -> Tensor:
        """Picture (B, 3, H, W), normalised as `config.input` says -> depth (B, H, W) or logits (B, K, H, W).

        Depth is inverse depth up to scale and shift where `config.head.inverse`, else metres. H and W are multiples of
        the patch size; ValueError otherwise.
        """
        return self.head(self.features(x), tuple(x.shape[2:]))

    def forward_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and with it the auxiliary head's logits (B, K, H, W), for training."""
        size = tuple(x.shape[2:])
        fused, deeper = self.features(x, deeper=True)
        return self.head(fused, size), self.auxiliary_head(deeper, size)

    def predict(self, images, **options):
        """Pictures -> `dpt.predict.Prediction`(s) at each picture's own size; see `dpt.predict.predict` for the options."""
        from .predict import predict  # the model does not need image libraries; predicting does

        return predict(self, images, **options)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """The initialisation of ViT (linear layers) and of PyTorch's convolutions with zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.bias is not None:
        nn.init.zeros_(module.bias)
