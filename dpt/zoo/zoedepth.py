"""ZoeDepth: metres, by bins behind MiDaS 3.1's BEiT-L. N is of NYU, K of KITTI, and NK has bins of both and a router.

Sources: https://github.com/isl-org/ZoeDepth, https://huggingface.co/docs/transformers/model_doc/zoedepth
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from ..config import HALF, DecoderConfig, DPTConfig, HeadConfig, InputConfig
from . import transformers_dpt
from .keys import NECK, QKV, under
from .layout import Layout, Row, Stated
from .midas import (
    BACKBONE,
    BACKBONE_MARKERS,
    BACKBONE_UNUSED,
    LARGE_NECK,
    ORIGINAL_FILLED,
    ORIGINAL_ROWS,
    ORIGINAL_UNUSED,
    beit,
    beit_of,
    written_beit,
)
from .stated import (
    PROCESSOR,
    TRUTH,
    Document,
    Field,
    Table,
    check_writable,
    default,
    fixed,
    number,
    processed,
    whole,
    wholes,
    written_processor,
)

DOMAINS = ("nyu", "kitti")
_WIDTH = 128  # of embeddings
_BORDER = 3.0  # reflected beyond the picture's edges
EACH = (16, 16, 16, 16)  # attractors of NK, whose code passes the configured (16, 8, 4, 1) on as something else


def _model(name: str, width: int = 512, **head: Any) -> DPTConfig:
    return DPTConfig(
        name=f"zoedepth-{name.lower()}",
        encoder=beit(1024, 24, 16, (5, 11, 17, 23), 24),
        decoder=DecoderConfig(neck_channels=LARGE_NECK, match_size=True, dead_unit=True),
        head=HeadConfig(task="depth", inverse=False, bins=64, **{"attractors": (16, 8, 4, 1), "depth_scale": 256.0, **head}),
        input=InputConfig(
            mean=HALF, std=HALF, size=(384, width), multiple=32, mode="bilinear", align_corners=True, border=_BORDER, flip=True
        ),
        source=f"https://github.com/isl-org/ZoeDepth/releases/download/v1.0/ZoeD_M12_{name}.pt",
        licence="MIT",
    )


MODELS = (
    _model("N"),
    # Up to 80 m, in which it was trained and is evaluated. Its code for others' pictures, and what transformers states, leave 10 m there:
    # metres come out an eighth of what they are.
    _model("K", 768, bin_centres="normed", bin_range=(0.001, 80.0)),
    _model("NK", attractors=EACH, domains=DOMAINS),
)
PARAMETERS = {"zoedepth-n": 343_814_274, "zoedepth-k": 343_818_015, "zoedepth-nk": 345_097_883}


def _metric(routed: bool) -> tuple[Row, ...]:
    """The rows of the bins in isl-org's names, but that `@0` and `@2` stand before a layer of an MLP of two."""
    rows: list[Row] = [
        ("head.bottleneck.{p}", "conv2.{p}"),
        ("head.seed_projector.0.{p}", "seed_projector.@0.{p}"),
        ("head.seed_projector.2.{p}", "seed_projector.@2.{p}"),
        ("head.projectors.{i}.0.{p}", "projectors.{i}.@0.{p}"),
        ("head.projectors.{i}.2.{p}", "projectors.{i}.@2.{p}"),
    ]
    for index, name in enumerate(DOMAINS if routed else ("",)):
        ours, theirs = f"head.domains.{index}.", f".{name}" if routed else ""
        rows += [(ours + "weights.{p}", f"conditional_log_binomial{theirs}.mlp.{{p}}")]
        for layer in (0, 2):
            rows += [
                (f"{ours}seed.{layer}.{{p}}", f"seed_bin_regressor{'s' if routed else ''}{theirs}.@{layer}.{{p}}"),
                (f"{ours}attractors.{{i}}.{layer}.{{p}}", f"attractors{theirs}.{{i}}.@{layer}.{{p}}"),
            ]
    return tuple(rows)


def _router(blocks: str, qkv: tuple[str, ...], classifier: tuple[str, str]) -> tuple[Row, ...]:
    """The rows of the router; `qkv` and `classifier` by their keys, but for what follows."""
    block = f"patch_transformer.{blocks}.{{n}}."
    return (
        ("head.router.embed.{p}", "patch_transformer.embedding_convPxP.{p}"),
        ("head.router.blocks.{n}.qkv.{p}", tuple(f"{block}self_attn.{part}{{p}}" for part in qkv)),
        ("head.router.blocks.{n}.proj.{p}", block + "self_attn.out_proj.{p}"),
        ("head.router.blocks.{n}.mlp.fc1.{p}", block + "linear1.{p}"),
        ("head.router.blocks.{n}.mlp.fc2.{p}", block + "linear2.{p}"),
        ("head.router.blocks.{n}.{p}", block + "{p}"),
        ("head.router.classifier.0.{p}", f"mlp_classifier.{classifier[0]}.{{p}}"),
        ("head.router.classifier.2.{p}", f"mlp_classifier.{classifier[1]}.{{p}}"),
    )


def _named(rows: tuple[Row, ...], first: str, second: str) -> tuple[Row, ...]:
    """The rows with the names of an MLP's layers."""
    return tuple((ours, cast(str, theirs).replace("@0", first).replace("@2", second)) for ours, theirs in rows)


def _original(routed: bool) -> Layout:
    seed = "seed_bin_regressors.nyu" if routed else "seed_bin_regressor"
    return Layout(
        name=f"ZoeDepth{' with a router' if routed else ''}",
        format="isl",
        markers=("core.core.pretrained.model.patch_embed.proj.weight", f"{seed}._net.0.weight"),
        rows=(
            *under("core.core.", *ORIGINAL_ROWS),
            *_named(_metric(routed), "_net.0", "_net.2"),
            *(_router("transformer_encoder.layers", ("in_proj_",), ("0", "2")) if routed else ()),
        ),
        unused=(rf"core\.core\.{ORIGINAL_UNUSED}", r"conditional_log_binomial\.(\w+\.)?log_binomial_transform\.(k_idx|K_minus_1)"),
        filled=tuple((f"core.core.{key}", shape, value) for key, shape, value in ORIGINAL_FILLED),
    )


_CENTRES = ("softplus", "normed")
_ROUTER = {
    "num_patch_transformer_layers": 4,
    "patch_transformer_hidden_size": 128,
    "patch_transformer_intermediate_size": 1024,
    "patch_transformer_num_attention_heads": 4,
}
_POSITIVE: Field = (None, "a number above 0", lambda value: number(value) and value > 0)
_SHARED = transformers_dpt.DPT.keys() - {
    "model_type",
    "architectures",
    "use_auxiliary_head",
    "semantic_classifier_dropout",
    "add_projection",
}
TABLE: Table = {  # of transformers' ZoeDepthConfig, but for its backbone and the router
    **{name: field for name, field in transformers_dpt.DPT.items() if name in _SHARED},
    "model_type": (None, "'zoedepth'", fixed("zoedepth")),
    "readout_type": ("project", "'project': its class runs no other", fixed("project")),
    "batch_norm_eps": (1e-5, "1e-5, PyTorch's", fixed(1e-5)),
    "num_relative_features": (32, "a whole number above 0", whole),
    "add_projection": (False, "false: ZoeDepth's head has none", fixed(False, None)),
    "bottleneck_features": (256, "a whole number above 0", whole),
    "num_attractors": ([16, 8, 4, 1], "four whole numbers above 0", lambda value: wholes(value, 4)),
    "bin_embedding_dim": (128, "a whole number above 1", lambda value: whole(value, 2)),
    "attractor_kind": ("mean", "'mean'", fixed("mean")),
    "min_temp": default(_POSITIVE, 0.0212),
    "max_temp": default(_POSITIVE, 50.0),
    "bin_centers_type": ("softplus", f"one of {', '.join(_CENTRES)}", fixed(*_CENTRES)),
    "bin_configurations": (
        [{"n_bins": 64, "min_depth": 0.001, "max_depth": 10.0}],
        f"one object, or two of as many bins, named {' and '.join(DOMAINS)}, each with n_bins, min_depth and max_depth",
        lambda value: isinstance(value, list) and _are_bins(value),
    ),
}


def _are_bins(value: list[Any]) -> bool:
    if not all(isinstance(item, dict) for item in value):
        return False
    right = all(whole(item.get("n_bins"), 2) and number(item.get("min_depth")) and number(item.get("max_depth")) for item in value)
    names = tuple(item.get("name") for item in value)
    return bool(right and (len(value) == 1 or (names == DOMAINS and value[0]["n_bins"] == value[1]["n_bins"])))


# transformers' ZoeDepthImageProcessor, which resizes without antialiasing, with the corners of both sizes in the same places
INPUT: Table = {
    **PROCESSOR,
    "size": default(PROCESSOR["size"], {"height": 384, "width": 512}),
    "resample": default(PROCESSOR["resample"], 2),
    "keep_aspect_ratio": default(TRUTH, True),
    "ensure_multiple_of": default(PROCESSOR["ensure_multiple_of"], 1 / 32),  # an error of 5.23: its files, which are older, have 32
    "do_resize": (True, "true: the network's sides are whole patches", fixed(True)),
    "do_pad": default(TRUTH, True),
}


def _inputs(processor: Document | None) -> InputConfig:
    processor = processor or Document("preprocessor_config.json", {"ensure_multiple_of": 32})
    border = _BORDER if processor.obeyed(INPUT)["do_pad"] else 0.0
    unpadded = Document(processor.path, {**processor.values, "do_pad": False})  # its padding is no padding of what is resized
    found = processed(unpadded, 384, 16, "bicubic", INPUT)
    return replace(found, antialias=False, grey_levels=False, align_corners=True, border=border)


def read(model: Document, processor: Document | None, name: str) -> DPTConfig:
    """`Stated.read` of ZoeDepthForDepthEstimation."""
    values = model.obeyed(TABLE)
    encoder = beit_of(model.inner("backbone_config"))
    features, bins = values["fusion_hidden_size"], values["bin_configurations"]
    routed = len(bins) > 1
    if values["bottleneck_features"] != features:
        raise model.refusal("bottleneck_features", values["bottleneck_features"], f"fusion_hidden_size={features}")
    if not routed and values["bin_embedding_dim"] != _WIDTH:  # transformers' attractors are as wide, the original's 128 whatever that is
        raise model.refusal("bin_embedding_dim", values["bin_embedding_dim"], f"{_WIDTH} with one of bin_configurations")
    if routed and values["bin_centers_type"] != "softplus":
        raise model.refusal("bin_centers_type", values["bin_centers_type"], "softplus with several bin_configurations")
    if routed:
        model.obeyed({field: (None, f"{right}: our router has as many", fixed(right)) for field, right in _ROUTER.items()})
    return DPTConfig(
        name=name,
        encoder=encoder,
        decoder=transformers_dpt.decoder_of(model, values),
        head=HeadConfig(
            task="depth",
            hidden=values["num_relative_features"],
            inverse=False,
            depth_scale=256.0,
            bins=bins[0]["n_bins"],
            bin_range=(bins[0]["min_depth"], bins[0]["max_depth"]),
            attractors=EACH if routed else tuple(values["num_attractors"]),
            bin_centres=values["bin_centers_type"],
            bin_width=values["bin_embedding_dim"],
            temperature=(values["min_temp"], values["max_temp"]),
            domains=DOMAINS if routed else (),
            upsample=2,
        ),
        input=_inputs(processor),
        licence="unknown",
    )


def write(config: DPTConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`Stated.write` of ZoeDepthForDepthEstimation. Flips are the caller's there."""
    head, routed = config.head, bool(config.head.domains)
    computed: dict[str, dict[str, tuple[Any, ...]]] = {
        "head": {
            "inverse": (False,),
            "domains": ((), DOMAINS),
            "attractors": (EACH,) if routed else (head.attractors or EACH,),
            "bin_centres": ("softplus",) if routed else _CENTRES,
            "bin_width": (head.bin_width,) if routed else (_WIDTH,),
            "project": (False,),
        },
        "decoder": {"readout": ("project",)},
        "input": {"align_corners": (True,), "antialias": (False,), "border": (0.0, _BORDER), "rule": ("minimal", "square")},
    }
    check_writable(config, computed)
    shared = transformers_dpt.written_dpt(config, ("decoder.match_size",), inverse=(False,), hidden=(head.hidden,), upsample=(None, 2))
    ranges = [head.bin_range] if not routed else [(0.001, 10.0), (0.001, 80.0)]  # which unbounded bins do not read
    names = head.domains or ("metric",)
    model = {
        **{name: value for name, value in shared.items() if name in _SHARED},
        "model_type": "zoedepth",
        "architectures": ["ZoeDepthForDepthEstimation"],
        "backbone_config": written_beit(config),
        "num_relative_features": head.hidden,
        "bottleneck_features": config.decoder.features,
        "num_attractors": [16, 8, 4, 1] if routed else list(head.attractors),
        "bin_embedding_dim": head.bin_width,
        "attractor_kind": "mean",
        "min_temp": head.temperature[0],
        "max_temp": head.temperature[1],
        "bin_centers_type": head.bin_centres,
        "bin_configurations": [
            {"name": name, "n_bins": head.bins, "min_depth": near, "max_depth": far}
            for name, (near, far) in zip(names, ranges, strict=True)
        ],
        **(_ROUTER if routed else {}),
    }
    processor = written_processor(config.input)
    return model, {**processor, "image_processor_type": "ZoeDepthImageProcessor", "do_pad": config.input.border > 0}


def _transformers(routed: bool) -> Layout:
    seed = "seed_bin_regressors.nyu" if routed else "seed_bin_regressor"
    qkv = tuple(f"{part}." for part in QKV)
    router = _router("transformer_encoder", qkv, ("linear1", "linear2")) if routed else ()
    return Layout(
        name=f"transformers' ZoeDepth{' with a router' if routed else ''}",
        format="hf",
        markers=(*BACKBONE_MARKERS, f"metric_head.{seed}.conv1.weight"),
        rows=(
            *BACKBONE,
            *NECK,
            *under("metric_head.", *_named(_metric(routed), "conv1", "conv2"), *router),
            *((f"head.conv{layer}.{{p}}", f"relative_head.conv{layer}.{{p}}") for layer in (1, 2, 3)),
        ),
        unused=(BACKBONE_UNUSED,),
        differs={"encoder": {"norm_eps": 1e-12}, "decoder": {"match_size": False}, "head": {"upsample": 2}, "input": {"flip": False}},
        stated=Stated(read, write, "zoedepth"),
    )


ORIGINAL, ORIGINAL_ROUTED = _original(False), _original(True)
TRANSFORMERS, TRANSFORMERS_ROUTED = _transformers(False), _transformers(True)
LAYOUTS = (ORIGINAL, ORIGINAL_ROUTED, TRANSFORMERS, TRANSFORMERS_ROUTED)
