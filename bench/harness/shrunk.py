"""Named models made small, the one way: the benchmarks' toys, those whose launches stand for the named ones', and the tests'."""

from __future__ import annotations

import itertools
from dataclasses import replace

from dpt.config import DecoderConfig, DPTConfig, HeadConfig, TaskConfig

BLOCKS = 4  # of an encoder: each is like the next
STAGE_BLOCKS = 2  # of a stage: one whose windows are shifted, one whose are not


def shortened(config: DPTConfig) -> DPTConfig:
    """The model with an encoder of few blocks: what it launches is the same, a block being like the next."""
    if config.encoder.stage_depths:
        depths = tuple(min(depth, STAGE_BLOCKS) for depth in config.encoder.stage_depths)
        return config.with_("encoder", depth=sum(depths), stage_depths=depths, hooks=tuple(itertools.accumulate(depths, initial=-1))[1:])
    hooks = tuple(range(BLOCKS))[len(config.encoder.stem_hooks) :]  # the stem gives the other maps
    stem = {"stem_depths": (1, 1, 1)} if config.encoder.stem == "resnetv2" else {}
    return config.with_("encoder", depth=BLOCKS, hooks=hooks, **stem)


def shrunk(
    config: DPTConfig,
    kind: str,
    /,
    *,
    width: int,
    features: int,
    grid: int,
    neck: tuple[int, ...] | None = None,
    classes: int = 5,
    **encoder,
) -> DPTConfig:
    """The model with every part it had: few blocks of ``width`` and two heads, ``features`` in its decoder, ``grid`` x ``grid`` positions.

    ``kind``: before its name. ``neck``: the channels of the four maps; by default those of the encoder's own maps, or else a quarter and
    half of the tokens' width, and the decoder's. ``classes``: of a segmentation head. ``encoder``: its further changes. An encoder of
    stages, which has patches of 4, gets four times as many positions, and windows of ``grid``.
    """
    sizes = {"embed_dim": width, "num_heads": 2}
    if config.encoder.kind != "dinov3":  # which has no parameter of positions, and whose files say no grid
        sizes["pos_grid"] = (grid, grid)
    if config.encoder.stem == "resnetv2":
        sizes |= {"stem_width": 8, "stem_depths": (1, 2, 1), "stem_groups": 4}
    if config.encoder.stage_depths:
        sizes |= {"pos_grid": (4 * grid, 4 * grid), "stage_heads": (2,) * 4, "window": grid}
    small = shortened(config).with_("encoder", **{**sizes, **encoder})
    hooked = small.encoder.map_widths
    channels = neck or hooked + (width // 4, width // 2, features, features)[len(hooked) :]
    if small.encoder.fixed_size:
        small = small.with_("input", size=small.encoder.fixed_size)
    names = tuple(f"class {index}" for index in range(classes))

    def task(decoder: DecoderConfig, head: HeadConfig) -> TaskConfig:
        if head.task == "segmentation":
            head = replace(head, classes=names, palette=head.palette[:classes])
        return TaskConfig(replace(decoder, neck_channels=channels, features=features), head)

    first, *further = (task(one.decoder, one.head) for one in (config, *config.further))
    return replace(small, name=f"{kind} {config.name}", decoder=first.decoder, head=first.head, further=tuple(further))
