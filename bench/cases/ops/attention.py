"""Attention over packed queries, keys and values, and over three tensors, with a bias, rotated; beside PyTorch's backends one by one, and
xformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpt.kernels.attention import attention, attention_qkv, attention_qkv_ref, attention_ref

from ...harness.runner import Unavailable
from .. import peers
from ..shapes import DINOV3, ENCODERS, LONG, Argument, Tokens, rotation, tokens
from . import Op, both

if TYPE_CHECKING:
    from ..kernels import OpenedOp

SDPA = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def on_backend(backend: SDPBackend) -> Callable[[OpenedOp], Callable[..., Tensor]]:
    """PyTorch's attention on one backend; Unavailable where that has no code for the device or the shape."""

    def attend(shape: Tokens, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        with sdpa_kernel(backend):
            return attention_ref(qkv, shape.heads, bias=bias)

    def of(opened: OpenedOp) -> Callable[..., Tensor]:
        if opened.context.device.type == "cpu" and backend not in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            raise Unavailable("on a CPU PyTorch has the backends flash and math only")
        try:
            opened.once(attend)
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise Unavailable("this backend has no kernel for this device, dtype and shape") from error
            raise
        return attend

    return of


def xformers(opened: OpenedOp) -> Callable[..., Tensor]:
    peers.installed("xformers")
    from dpt.nets.encoders.vit import xformers_attention

    return lambda shape, qkv: xformers_attention(qkv, shape.heads)


TOY = Tokens(2, 17, 64, 2)
BEIT = (Tokens(1, 1025, 1024, 16), Tokens(16, 577, 1024, 16))

OPS = (
    Op(
        "attention",
        lambda s: [tokens(s.batch, s.tokens, 3 * s.width)],
        **both(attention, attention_ref, lambda f, s, qkv: f(qkv, s.heads)),
        shapes=(*ENCODERS, *LONG),
        toy=TOY,
        peers={**{name: on_backend(backend) for name, backend in SDPA.items()}, "xformers": xformers},
    ),
    Op(
        "attention with a bias",
        lambda s: [tokens(s.batch, s.tokens, 3 * s.width), Argument((s.heads, s.tokens, s.tokens))],
        **both(attention, attention_ref, lambda f, s, qkv, bias: f(qkv, s.heads, bias=bias)),
        shapes=BEIT,
        toy=TOY,
        peers={name: on_backend(backend) for name, backend in SDPA.items() if name != "SDPA flash"},  # which takes no bias
    ),
    Op(
        "attention, rotated",
        lambda s: [tokens(s.batch, s.tokens, 3 * s.width), rotation(s)],
        **both(attention, attention_ref, lambda f, s, qkv, rotation: f(qkv, s.heads, rotation=rotation.float())),
        shapes=DINOV3,
        toy=TOY,
    ),
    Op(
        "attention of three tensors",
        lambda s: [tokens(s.batch, s.heads, s.tokens, s.width // s.heads)] * 3,
        **both(attention_qkv, attention_qkv_ref, lambda f, s, *qkv: f(*(x.transpose(1, 2) for x in qkv))),
        shapes=ENCODERS,
        toy=TOY,
    ),
)
