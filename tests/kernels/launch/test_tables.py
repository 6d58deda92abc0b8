"""The configuration tables against the ops that read them: every entry is compiled, and those of the linear ops compute the right thing."""

import functools
import json

import checks
import pytest
import torch
from linear_cases import layernorm_linear_case, layernorm_mlp_case, linear_residual_case

from dpt.kernels import launch
from dpt.kernels.tools import spaces


@pytest.mark.parametrize("family", checks.FAMILIES)
def test_every_entry_is_compiled(family):
    """An entry that no compile case of any op selects would ship without having been compiled; so would a kernel that has no case."""
    used = {entry for op in spaces.ops() for case in spaces.space(op).compile_cases(family) for entry in case.used}
    table = launch.load_table(family)
    assert {(kernel, json.dumps(entry["when"])) for kernel, entries in table.items() for entry in entries} == used


CHOICES = {  # every kernel with a choice of backends: what its launcher calls the size of a map
    "conv3x3": "pixels",
    "depth_head": "pixels",
    "depth_head_backward": "pixels",
    "layernorm_linear": "rows",
    "linear_residual": "rows",
    "activation_input_gradient": "rows",
    "readout_project": "rows",
    "readout_project_backward": "rows",
    "transposed_conv": "rows",
}


def test_a_backend_can_be_chosen_by_size(monkeypatch):
    """The launcher of each tells the table how large the map is, so that small ones can have an entry of their own."""
    asked, config = {}, launch.config

    def spied(name, *args, **shape):
        asked.setdefault(name, []).append(shape)
        return config(name, *args, **shape)

    monkeypatch.setattr(launch, "config", spied)
    for op in spaces.ops():
        list(spaces.space(op).compile_cases("sm_90"))
    for kernel, size in CHOICES.items():
        assert asked[kernel] and all(shape[size] > 0 for shape in asked[kernel])
    named = {kernel for kernel, entries in launch.load_table("sm_90").items() if any("backend" in entry["config"] for entry in entries)}
    assert named == set(CHOICES)


@pytest.mark.parametrize("kernel", ("layernorm_linear", "linear_residual", "activation_input_gradient", "readout_project"))
def test_what_follows_a_library_passes_the_gate(kernel):
    """Blind spot: an entry of cuBLAS's that can never be chosen, for what is left to do shows no tensor cores."""
    op = {"activation_input_gradient": "layernorm_mlp", "readout_project": "reassemble"}.get(kernel, kernel)
    with launch.using(kernel, {"backend": "cublas", "BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}):
        cases = [case for case in spaces.space(op).compile_cases("sm_90") if case.function.__name__.endswith("_epilogue")]
    assert cases and not any(case.tensor_cores or case.async_copies for case in cases)


SWIGLU = functools.partial(layernorm_mlp_case, activation="swiglu")


def rotated(leading, depth, columns, dtype, device):
    """Of as many rows, in pictures of 30, a layer that turns heads of 64 channels."""
    return layernorm_linear_case((leading[0] // 30, 30), depth, 384, dtype, device, head=64)


TUNED = {  # of every kernel's configurations: the calls that take each
    "layernorm": [layernorm_linear_case],
    "layernorm_linear": [functools.partial(layernorm_linear_case, activation="gelu"), SWIGLU, rotated],
    "linear_residual": [linear_residual_case],
    "activation_input_gradient": [layernorm_mlp_case, SWIGLU],
    "weight_gradient": [layernorm_mlp_case, SWIGLU, linear_residual_case],
    "layernorm_backward": [layernorm_linear_case],
}
CONFIGURATIONS = {f"{kernel} {name}": c for kernel in TUNED for name, c in checks.shipped_configurations(kernel).items()}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_shipped_configuration(name, device):
    """Tiles that the tables keep for other dtypes, sizes or GPUs compute the same: several of them, the last partial, in all directions."""
    shipped = CONFIGURATIONS[name]
    for make in TUNED[shipped.kernel]:
        case = make((150,), 72, 136, shipped.dtype, device)
        with shipped.used():
            case.assert_parity()


ENTRIES = [  # conditions, and what an entry of them is tested in on a GPU: the first of bfloat16, TF32 and exact float32 that it serves
    ({"dtype": "float32", "precision": "ieee", "D_max": 64}, (torch.float32, "ieee")),
    ({"dtype": "float32", "precision": "ieee"}, (torch.float32, "ieee")),
    ({"C_max": 32}, (torch.bfloat16, "ieee")),
    ({"dtype": "float32"}, (torch.float32, "tf32")),
    ({"D_max": 64}, (torch.bfloat16, "ieee")),
    ({}, (torch.bfloat16, "ieee")),
]


def test_what_an_entry_serves():
    """Blind spot: on a GPU, float32 in tiles that the table keeps for half precision, or the reverse. By hand, and in every table."""
    entries = [{"when": when} for when, _ in ENTRIES]
    assert [checks._first_served(entries, index) for index in range(len(entries))] == [kind for _, kind in ENTRIES]
    with pytest.raises(ValueError, match="serves none"):
        checks._first_served([{"when": {}}, {"when": {"D_max": 64}}], 1)
    for family in checks.FAMILIES:
        for entries in launch.load_table(family).values():
            for index, entry in enumerate(entries):
                dtype, _ = checks._first_served(entries, index)
                assert (dtype == torch.float32) == (entry["when"].get("dtype") == "float32")


@pytest.mark.parametrize("parts", (1, 2, 4))
@pytest.mark.parametrize("descriptor", (False, True))
@pytest.mark.parametrize(("group", "persistent"), ((1, True), (2, False), (3, True)))
def test_parts_and_groups(group, persistent, descriptor, parts, device, monkeypatch):
    """Every tile is computed once in whatever order, the last group's rows too, which are fewer, and by fewer programs than tiles; and
    stored in pieces."""
    if device.type == "cuda" and descriptor and torch.cuda.get_device_capability(device)[0] < 9:
        pytest.skip("descriptors need compute capability 9.0")
    blocks = {"backend": "triton", "BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    config = {**blocks, "PARTS": parts, "GROUP": group, "descriptor": descriptor, "persistent": persistent}
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 3)
    for activation in ("gelu", "swiglu"):
        case = layernorm_mlp_case((150,), 72, 136, torch.float16, device, activation=activation)
        with (
            launch.using("layernorm_linear", config),
            launch.using("linear_residual", config),
            launch.using("activation_input_gradient", config),
        ):
            case.assert_parity()
