"""What the ops share: the choice of a configuration, of a device family, of a precision, and the recording of launches."""

import json
import types

import pytest
import torch

from dpt.kernels import launch
from dpt.kernels.launch import devices

ENTRIES = [
    {"when": {"D": 64, "N_max": 1100, "dtype": "bfloat16"}, "config": {"n": 0}},
    {"when": {"D_max": 64, "N_min": 2000}, "config": {"n": 1}},
    {"when": {}, "config": {"n": 2}},
]


@pytest.mark.parametrize(
    ("shape", "chosen"),
    [
        ({"D": 64, "N": 1100, "dtype": "bfloat16"}, 0),  # an upper bound is inclusive
        ({"D": 64, "N": 1101, "dtype": "bfloat16"}, 2),
        ({"D": 64, "N": 1100, "dtype": "float16"}, 2),
        ({"D": 32, "N": 2000, "dtype": "float16"}, 1),  # and so is a lower one
        ({"D": 80, "N": 2000, "dtype": "float16"}, 2),
    ],
)
def test_select(shape, chosen):
    """Equality, both bounds, several conditions at once, the first entry that holds, the default."""
    assert launch.select(ENTRIES, shape)["config"] == {"n": chosen}


def test_select_refuses_an_unknown_condition():
    """A misspelt condition must not silently never hold."""
    with pytest.raises(ValueError, match="condition on 'M'.*gives D, N"):
        launch.select([{"when": {"M": 1}, "config": {}}], {"D": 1, "N": 2})


def test_select_without_default_finds_nothing():
    """The caller is told, not given the last entry."""
    assert launch.select(ENTRIES[:1], {"D": 32, "N": 1, "dtype": "float16"}) is None


def test_config_errors(monkeypatch):
    """A kernel that is not in the table, and a table that covers not every shape, are named."""
    with pytest.raises(ValueError, match="no configuration of kernel 'nothing' in configs/sm_90.json"):
        launch.config("nothing", "sm_90", torch.float16)
    monkeypatch.setitem(launch.load_table("sm_90"), "partial", ENTRIES[:1])
    with pytest.raises(ValueError, match="no entry of 'partial'"):
        launch.config("partial", "sm_90", torch.float16, D=64, N=5)


def test_config_is_a_copy():
    """A launcher that changes its configuration does not change the table."""
    launch.config("attention_forward", "sm_90", torch.float16, D=64, N=5, precision="ieee", describable=1, bias=0, B=1, H=1, queries=5)[
        "num_warps"
    ] = -1
    again = launch.config(
        "attention_forward", "sm_90", torch.float16, D=64, N=5, precision="ieee", describable=1, bias=0, B=1, H=1, queries=5
    )
    assert again["num_warps"] > 0


def test_using_overrides_one_kernel_only():
    """The tuning command's way in; it ends with the context, also after an error."""
    shape = {"D": 64, "N": 5, "precision": "ieee", "describable": 1, "bias": 0, "B": 1, "H": 1, "queries": 5}
    before = launch.config("attention_forward", "sm_90", torch.float16, **shape)
    with pytest.raises(RuntimeError), launch.using("attention_forward", {"n": 7}):
        assert launch.config("attention_forward", "sm_90", torch.float16, **shape) == {"n": 7}
        assert launch.config("attention_backward_dq", "sm_90", torch.float16, **shape) != {"n": 7}
        raise RuntimeError
    assert launch.config("attention_forward", "sm_90", torch.float16, **shape) == before
    with launch.using("attention_forward", {"n": 7}), launch.using("attention_backward_dq", {"n": 8}):
        assert launch.config("attention_forward", "sm_90", torch.float16, **shape) == {"n": 7}
        assert launch.config("attention_backward_dq", "sm_90", torch.float16, **shape) == {"n": 8}


@pytest.mark.parametrize(
    ("capability", "family"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 7), "sm_86"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 0), "sm_100"),
     ((10, 3), "sm_100"), ((12, 0), "sm_120"), ((12, 1), "sm_120")],
)  # fmt: skip
def test_family_of_capability(capability, family):
    """A device belongs to the newest family that is not newer than itself."""
    assert launch.family_of_capability(capability) == family


def test_old_devices_are_refused():
    """No kernel for what came before sm_80."""
    with pytest.raises(ValueError, match="7.5: the kernels need 8.0"):
        launch.family_of_capability((7, 5))


def test_family_of_the_interpreter(monkeypatch):
    """The environment chooses the table of CPU tensors; a name that is none is refused."""
    cpu = torch.device("cpu")
    monkeypatch.delenv(launch.INTERPRETED_FAMILY_VARIABLE, raising=False)
    assert launch.device_family(cpu) == "sm_80"
    monkeypatch.setenv(launch.INTERPRETED_FAMILY_VARIABLE, "sm_100")
    assert launch.device_family(cpu) == "sm_100"
    monkeypatch.setenv(launch.INTERPRETED_FAMILY_VARIABLE, "hopper")
    with pytest.raises(ValueError, match="DPT_KERNELS_FAMILY=hopper: must be one of sm_80"):
        launch.device_family(cpu)


def test_multiprocessors(monkeypatch):
    """A GPU's own number, each GPU's; where none is, or launches are recorded for another, the family's."""
    asked = {0: 114, 1: 132}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(multi_processor_count=asked[index]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    devices._multiprocessors_of_gpu.cache_clear()
    assert [launch.multiprocessors(torch.device(name)) for name in ("cuda:0", "cuda:1", "cuda")] == [114, 132, 132]
    devices._multiprocessors_of_gpu.cache_clear()
    monkeypatch.setenv(launch.INTERPRETED_FAMILY_VARIABLE, "sm_100")
    assert launch.multiprocessors(torch.device("cpu")) == launch.MULTIPROCESSORS["sm_100"]
    assert set(launch.MULTIPROCESSORS) == set(launch.TABLES)
    found = []
    launch.record("sm_90", "x", lambda: found.append(launch.multiprocessors(torch.device("cuda:0"))))
    assert found == [launch.MULTIPROCESSORS["sm_90"]]


def test_runs_kernels(device):
    """Here, and not on the meta device."""
    tensor = torch.zeros(1, device=device)
    assert launch.runs_kernels(tensor, "attention")
    assert not launch.runs_kernels(tensor.to("meta"), "attention")


def test_only(device):
    """The ops that are named run their kernels and no others do; it ends with the context."""
    tensor = torch.zeros(1, device=device)
    with launch.only("attention", "upsample"):
        assert launch.runs_kernels(tensor, "upsample") and not launch.runs_kernels(tensor, "depth_head")
        with launch.only():
            assert not launch.runs_kernels(tensor, "attention")
        assert launch.runs_kernels(tensor, "attention")
    assert launch.runs_kernels(tensor, "depth_head")


@pytest.mark.parametrize("switch", ("allow_tf32", "fp32_precision", "set_float32_matmul_precision"))
def test_tf32_follows_pytorch(switch, monkeypatch):
    """All three of PyTorch's switches are heard, for float32 only, and the default is exact."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "none"  # PyTorch's default
    assert launch.input_precision(torch.float32) == "ieee"
    try:
        if switch == "set_float32_matmul_precision":
            torch.set_float32_matmul_precision("high")
        else:
            setattr(matmul, switch, True if switch == "allow_tf32" else "tf32")
        assert launch.input_precision(torch.float32) == "tf32"
        assert launch.input_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_describable():
    """TMA's rules: base on 16 bytes, strides but the last multiples of 16 bytes, the last 1, none of them 0."""
    x = torch.zeros(8, 16, 32, dtype=torch.float16)
    assert launch.describable(x, x[2:], x[:, :, 8:])
    assert not launch.describable(x[:, :, 1:])
    assert not launch.describable(x.transpose(1, 2))
    assert not launch.describable(torch.zeros(4, 12, dtype=torch.float16))
    assert not launch.describable(x, x[:1].expand(8, -1, -1))


def test_autocast():
    """Autocast's dtype inside, nothing outside, integers and None as they are."""
    x, i = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    assert launch.autocast(x, None)[0] is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, none, integer = launch.autocast(x, None, i)
    assert cast.dtype == torch.bfloat16 and none is None and integer is i


def test_recording_launches_nothing_and_drops_repeats():
    """Recorded: what would be launched, with the table's entries it used; two shapes that compile to the same code are one case."""

    def launcher(x, n):
        launch.config("attention_forward", launch.device_family(x.device), x.dtype, D=64, N=n, precision="ieee", describable=1)
        launch.launch(print, (1,), x, n, num_warps=4)

    def record(n):
        return launch.record("sm_90", f"n={n}", launcher, torch.empty(4, device="meta"), n)

    kept = list(launch.distinct([*record(33), *record(35), *record(48), *record(1)]))
    assert [case.name for case in kept] == ["print n=33", "print n=48", "print n=1"]
    assert kept[0].family == "sm_90" and len(kept[0].used) == 2
    assert json.loads(kept[0].used[0][1]) in [entry["when"] for entry in launch.load_table("sm_90")["attention_forward"]]
