"""The layers of transformers' Vision Transformers in seven launches, as `dpt.fast.modules.FastBlock`; and the hybrids' stem.

One form for all: where the parts of a layer are is read off its children's names, `ROLES`. A call that asks for something the kernels do
not give (attentions, a mask, dropout) is upstream's own.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.layernorm_mlp import layernorm_linear, layernorm_mlp, linear_residual
from ...nets.encoders.resnetv2 import by_variance
from ..modules import _block, _weights, has_hooks
from . import reading

ROLES: dict[str, tuple[str, ...]] = {  # the names that a part of a layer has in the classes and versions of transformers
    "attention": ("attention.attention", "attention"),
    "norm1": ("norm1", "layernorm_before"),
    "query": ("attention.q_proj", "attention.attention.query"),
    "key": ("attention.k_proj", "attention.attention.key"),
    "value": ("attention.v_proj", "attention.attention.value"),
    "projection": ("attention.o_proj", "attention.output.dense"),
    "norm2": ("norm2", "layernorm_after"),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.fc1", "mlp.up_proj", "mlp.weights_in", "intermediate.dense"),
    "activation": ("mlp.activation_fn", "mlp.act_fn", "mlp.activation", "intermediate.intermediate_act_fn"),
    "down": ("mlp.fc2", "mlp.down_proj", "mlp.weights_out", "output.dense"),
}
LINEAR = ("query", "key", "value", "projection", "gate", "up", "down")
SCALES = (("layer_scale1", "layer_scale2"), ("lambda_1", "lambda_2"))  # modules with a `lambda1`, or parameters
BIAS = ("relative_position_bias", "attention.attention.relative_position_bias")  # BEiT's, which is called as it is
OURS = ("sdpa", None)  # attention as it is by default, which the kernel computes
NOTHING = (None, False)  # what an argument is that asks for nothing


@dataclass(frozen=True)
class Places:
    """Where the parts of a layer are, by role; and all modules in it that its form does not call."""

    paths: Mapping[str, tuple[str, ...]]
    passed_over: tuple[tuple[str, ...], ...]
    packed: bool  # gate and up are one layer, the gate first


def _split(path: str) -> tuple[str, ...]:
    return tuple(path.split("."))


_PLACES: dict[tuple[Any, ...], Places] = {}


def places(layer: nn.Module) -> Places:
    """By role; a part that the layer has not is left out."""
    mlp = layer._modules.get("mlp")
    key = (type(layer), type(mlp))
    found = _PLACES.get(key)
    if found is None:
        paths = {}
        for role, names in ROLES.items():
            known = next((_split(name) for name in names if reading.child(layer, _split(name)) is not None), None)
            if known is not None:
                paths[role] = known
        passed_over = tuple(_split(name) for name, _ in layer.named_modules() if name and not name.startswith(BIAS))
        found = _PLACES[key] = Places(paths, passed_over, packed=paths.get("up") == ("mlp", "weights_in"))
    return found


def activation(module: Any) -> str | None:
    """The kernels' name of an activation module; None of one that they have not."""
    kind = type(module)
    if kind is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    if kind is nn.SiLU:
        return "silu"
    if not kind.__module__.startswith("transformers."):
        return None
    return {"GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh", "SiLUActivation": "silu"}.get(kind.__name__)


def mlp_kind(layer: nn.Module) -> str | None:
    """The activation of a layer's MLP as the kernels name it; None of one that they have not."""
    where = places(layer)
    if where.packed:
        return "swiglu"
    module = reading.child(layer, where.paths["activation"]) if "activation" in where.paths else None
    name = activation(module) if module is not None else _stated(layer)
    return {"silu": "swiglu"}.get(str(name)) if "gate" in where.paths else (name if name in ("gelu", "gelu_tanh") else None)


def _stated(layer: nn.Module) -> str | None:
    """Of an activation that is a function, by the function."""
    for path in ROLES["activation"]:
        *above, name = _split(path)
        owner = reading.child(layer, tuple(above))
        function = getattr(owner, name, None)
        if function is torch.nn.functional.gelu:
            return "gelu"
    return None


def refused(layer: Any) -> str | None:
    """What of a layer the kernels do not compute."""
    where = places(layer)
    missing = [role for role in ROLES if role not in where.paths and role not in ("gate", "activation")]
    if missing:
        return f"it has no {missing[0]} under a name that is known"
    attention = reading.child(layer, where.paths["attention"])
    size = reading.child(layer, where.paths["projection"]).in_features // heads(attention)
    if size % 8 or not 32 <= size <= 128:
        return f"heads of {size} channels: the attention kernel takes multiples of 8 from 32 to 128"
    if abs(getattr(attention, "scaling", size**-0.5) - size**-0.5) > 1e-6 or getattr(attention, "is_causal", False):
        return "its attention is scaled otherwise than by the root of a head's channels, or causal"
    if mlp_kind(layer) is None:
        return "its MLP has an activation that the kernels have not"
    return None


def heads(attention: Any) -> int:
    return int(attention.num_attention_heads if hasattr(attention, "num_attention_heads") else attention.num_heads)


def tensors_together(layer: nn.Module) -> list[list[Any]]:
    """The parameters that the kernels read as one, to be moved into one piece of memory."""
    where = places(layer)
    groups = [("query", "key", "value"), *([("gate", "up")] if "gate" in where.paths else [])]
    found = []
    for roles in groups:
        layers = [reading.child(layer, where.paths[role]) for role in roles]
        for name in ("weight", "bias"):
            tensors = [linear._parameters[name] for linear in layers]
            if all(tensor is not None for tensor in tensors):
                found.append(tensors)
    return found


def _scale(layer: Any, index: int) -> Any:
    """LayerScale's factor behind attention (0) or MLP (1); None without one, or where it is 1."""
    module = layer._modules.get(SCALES[0][index])
    if module is not None:
        return module._parameters["lambda1"]
    return layer._parameters.get(SCALES[1][index])


def _rotation(x: Tensor, given: Any) -> Tensor:
    """Cosine and sine of the patches, (N', D) each, to a table of all tokens (2, N, D/2), made once a forward."""
    cos, sin = given
    made = None if torch.compiler.is_compiling() else cos.__dict__.get("_dpt_rotation")
    if made is None:
        half, before = cos.shape[-1] // 2, x.shape[1] - cos.shape[-2]
        cos, sin = (part.reshape(-1, part.shape[-1])[:, :half].float() for part in given)
        cos = torch.cat((cos.new_ones(before, half), cos))
        made = torch.stack((cos, torch.cat((sin.new_zeros(before, half), sin))))
        if not torch.compiler.is_compiling():
            given[0]._dpt_rotation = made
    return made


def _bias(layer: Any, x: Tensor, resolution: Any, interpolate: Any) -> Tensor | None:
    """BEiT's bias by relative position (H, N, N), made again only when its table has changed; None of a layer that has none."""
    module: Any = next((found for name in BIAS if (found := reading.child(layer, _split(name))) is not None), None)
    if module is None:
        return None
    patch = reading.child(layer, places(layer).paths["attention"]).config.patch_size
    window = (resolution[0] // patch, resolution[1] // patch)

    def made() -> Tensor:
        found: Tensor = module(window, bool(interpolate), dim_size=x.shape[1])
        return found[0] if found.dim() == 4 else found

    if torch.compiler.is_compiling():
        return made()
    return reading.kept(module).get((window, bool(interpolate)), module.relative_position_bias_table, made)


class Layer:
    """A layer's forward on the kernels; mixed into the class that `table.fast` makes of upstream's."""

    POSITIONAL: tuple[str, ...] = ()  # the names of the forward's arguments behind the hidden states

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.POSITIONAL, args, strict=False)), **kwargs}
        rotation, resolution = given.pop("position_embeddings", None), given.pop("resolution", None)
        interpolate = given.pop("interpolate_pos_encoding", None)
        given.pop("output_hidden_states", None)
        found = None if any(value not in NOTHING for value in given.values() if not isinstance(value, Tensor)) else _parts(self)
        if found is None or any(isinstance(value, Tensor) for value in given.values()):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        layer: Any = self
        table = None if rotation is None else _rotation(hidden_states, rotation)
        bias = _bias(layer, hidden_states, resolution, interpolate)
        x = _whole(layer, *found, hidden_states, table, None if bias is None else bias.to(hidden_states.dtype))
        return (x,) if "output_attentions" in self.POSITIONAL else x  # an older layer's result, which is asked for attentions one by one


class Seen(NamedTuple):
    """A layer's children as they were found fit: by role; and where each of all is found again, with its type and its attributes."""

    parts: dict[str, Any]
    links: list[tuple[dict[str, Any], str, nn.Module, type[nn.Module], dict[str, Any], type | None]]


_SEEN: weakref.WeakKeyDictionary[nn.Module, Seen] = weakref.WeakKeyDictionary()


def _is_as_seen(seen: Seen) -> bool:
    """Whether nobody has exchanged, hooked, or given a forward or another weight to any of the children. In each call: a loop, no calls."""
    for children, name, module, kind, own, weight in seen.links:
        if children.get(name) is not module or type(module) is not kind or "forward" in own:
            return False
        if own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if own["_forward_hooks"] and has_hooks(module):
            return False
        if weight is not None and type(own["_parameters"].get("weight")) is not weight:
            return False
    return True


def _look(layer: Any) -> Seen | None:
    """The children by role; None where what became of one is not for the kernels."""
    where = places(layer)
    found = {role: reading.child(layer, path) for role, path in where.paths.items()}
    for role, module in found.items():
        if module is None:
            return None
        kind = nn.Linear if role in LINEAR else nn.LayerNorm if role in ("norm1", "norm2") else type(module)
        if not reading.as_it_was(module, kind):
            return None
    links = []
    for path in where.passed_over:
        owner, module = reading.child(layer, path[:-1]), reading.child(layer, path)
        if not reading.is_unchanged(module):
            return None
        weight = module._parameters.get("weight")
        links.append((owner._modules, path[-1], module, type(module), vars(module), None if weight is None else type(weight)))
    return Seen(found, links)


def _parts(layer: Any) -> tuple[dict[str, Any], str | None] | None:
    """The children by role, and the attention that was set; None where this call, or what became of a child, is not for the kernels."""
    seen = None if torch.compiler.is_compiling() else _SEEN.get(layer)
    if seen is None or not _is_as_seen(seen):
        seen = _look(layer)
        if seen is None:
            return None
        if not torch.compiler.is_compiling():
            _SEEN[layer] = seen
    found = seen.parts
    if reading.collects("attentions"):
        return None
    if layer.training and any(isinstance(m, nn.Dropout) and m.p > 0 or getattr(m, "drop_prob", 0) for m in layer.modules()):
        return None
    attention = found["attention"]
    if layer.training:
        dropout = getattr(attention, "attention_dropout", getattr(attention, "dropout_prob", getattr(attention, "dropout", 0.0)))
        if dropout.p if isinstance(dropout, nn.Module) else dropout:
            return None
    chosen = attention.config._attn_implementation
    return None if chosen not in OURS and _function(attention, chosen) is None else (found, chosen)


def _whole(layer: Any, found: dict[str, Any], chosen: Any, x: Tensor, rotation: Tensor | None, bias: Tensor | None) -> Tensor:
    norm1, norm2, attention = found["norm1"], found["norm2"], found["attention"]
    qkv = reading.side_by_side(attention, (found["query"], found["key"], found["value"]))
    first = reading.side_by_side(found["gate"], (found["gate"], found["up"])) if "gate" in found else _weights(found["up"])
    mlp, projection = (*first, *_weights(found["down"])), _weights(found["projection"])
    scale1, scale2, kind = _scale(layer, 0), _scale(layer, 1), str(mlp_kind(layer))
    if chosen in OURS:
        whole = (heads(attention), _weights(norm1), norm1.eps, qkv, (*projection, scale1), _weights(norm2), norm2.eps, mlp, scale2, kind)
        fused: Tensor = _block(x, rotation, bias, *whole)
        return fused
    packed = layernorm_linear(x, *_weights(norm1), *qkv, norm1.eps, None, rotation)
    mixed = _attention_as_set(layer, attention, chosen, packed, bias)
    fused = layernorm_mlp(linear_residual(mixed, *projection, x, scale1), *_weights(norm2), *mlp, norm2.eps, scale2, kind)
    return fused


def _function(attention: Any, chosen: str) -> Any:
    """The function that computes a chosen attention; None where a module computes it itself."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(chosen, getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None))


def _attention_as_set(layer: Any, attention: Any, chosen: str, packed: Tensor, bias: Tensor | None) -> Tensor:
    """The attention that the model's user has set: packed qkv (B, N, 3*H*D) -> (B, N, H*D)."""
    batch, tokens, width = packed.shape
    q, k, v = packed.view(batch, tokens, 3, heads(attention), -1).permute(2, 0, 3, 1, 4)
    mask = None if bias is None else bias[None]
    found: Tensor = _function(attention, chosen)(attention, q, k, v, mask, dropout=0.0, scaling=attention.scaling)[0]
    return found.reshape(batch, tokens, width // 3)


class StandardisedConv:
    """A convolution of BiT, whose filters have mean 0 and variance 1: made again only when the parameter has changed."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        layer: Any = self
        parameter = layer.weight
        if torch.compiler.is_compiling() or type(parameter) is not nn.Parameter:
            found: Tensor = super().forward(hidden_state)  # type: ignore[misc]
            return found

        def made() -> Tensor:
            return by_variance(parameter.to(torch.promote_types(parameter.dtype, torch.float32)), layer.eps).to(parameter.dtype)

        weight = reading.kept(layer).get((), parameter, made)
        x = hidden_state if layer.pad is None else layer.pad(hidden_state)
        return nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
