"""Exported models beside PyTorch's: every kind of encoder, inputs and outputs by name, and what cannot be exported."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import config, randomise, wide
from torch import nn

import dpt
import dpt.exporting as exporting
from dpt.config import DPTConfig
from dpt.exporting import Differs, ExportError, MissingPackage, checking, export, onnx_files, packages
from dpt.exporting.graphs import Graph
from dpt.model import DPT

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def of_few_pixels(full: DPTConfig) -> DPTConfig:
    """With a nominal size of four patches square: what is checked first."""
    side = 4 * full.encoder.patch_size
    return full.with_("input", size=(side, side))


class Stub(nn.Module):
    """What a model takes and gives, by its configuration, and one layer: a whole model takes the exporter twenty seconds."""

    def __init__(self, name: str = "dpt-large-midas", behind: nn.Module | None = None):
        super().__init__()
        self.config = config(name) if config(name).encoder.fixed_size else of_few_pixels(config(name))
        self.layer = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), behind or nn.Identity())

    def forward(self, x: torch.Tensor, prompt: torch.Tensor | None = None) -> torch.Tensor | dict[str, torch.Tensor]:
        y = self.layer(x)
        if prompt is not None:
            y = y + F.interpolate(prompt[:, None], size=x.shape[2:], mode="bilinear")
        maps = {"depth": y[:, 0], "segmentation": y, "normals": y[:, :3]}
        found = {head.task: maps[head.task] for head in self.config.heads}
        return found if len(found) > 1 else found[self.config.head.task]


def metric_bins() -> DPT:
    """ZoeDepth with few attractors, each of which is a part of the graph."""
    return randomise(DPT(of_few_pixels(config("zoedepth-n").with_("head", attractors=(1, 1, 1, 1)))))


def sides(value) -> list[int | str]:
    return [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]


# A model, whether its processing is in the graph, its inputs and outputs, and what part of its map's range is allowed. Rounding is below
# 1e-5, but in the mean of bins, of which random weights make a small range. Every other encoder was exported once by hand (docs/export.md).
KINDS = {
    "depth": (Stub, False, ["image"], ["depth"], 1e-5),
    "three tasks": (lambda: Stub("tipsv2-base"), False, ["image"], ["depth", "logits", "normals"], 1e-5),
    "three tasks of pictures": (lambda: Stub("tipsv2-base"), True, ["image"], ["depth", "labels", "normals"], 1e-3),
    "prompt": (lambda: Stub("prompt-depth-anything-small"), False, ["image", "prompt"], ["depth"], 1e-5),
    "focal length, two resizes": (lambda: Stub("depth-anything-3-metric-large"), True, ["image", "focal"], ["depth"], 1e-3),
    "one size": (lambda: Stub("midas-3.1-swin2-tiny-256"), False, ["image"], ["depth"], 1e-5),
    "bins, border and mirror": (metric_bins, True, ["image"], ["depth"], 1e-4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_of_every_form(kind, tmp_path, monkeypatch, capfd):
    """Blind spot: sides of the example that became constants of the graph; outputs in another order; an input that is lost."""
    make, processing, inputs, outputs, bound = KINDS[kind]
    model, path = make().eval(), tmp_path / "model.onnx"
    one_size = model.config.encoder.fixed_size is not None
    if one_size:
        monkeypatch.setattr(onnx_files, "INLINE", 100)
    found = export(model, path, processing=processing)
    assert capfd.readouterr() == ("", ""), "the exporter's own words"
    assert len(found.checked) == (2 if one_size else 3) and len({batch for _, batch, _ in found.checked}) == 2
    assert max(apart for *_, apart in found.checked) <= bound
    read = onnx.load(path, load_external_data=False)
    assert [value.name for value in read.graph.input] == inputs and [value.name for value in read.graph.output] == outputs
    assert found.files == ((tmp_path / "model.onnx.data",) if one_size else ()) + (path,)
    assert sorted(tmp_path.iterdir()) == sorted(found.files)
    if one_size:
        assert found.files[0].stat().st_size >= model.layer[0].weight.nbytes, "the weights stand beside it"
        assert b"model.onnx.data" in path.read_bytes()
        assert sides(read.graph.input[0]) == ["batch", 3, 64, 64] and sides(read.graph.output[0]) == ["batch", 64, 64]
    elif processing:
        assert sides(read.graph.input[0]) == ["batch", "height", "width", 3]
    else:
        patch = model.config.encoder.patch_size
        assert sides(read.graph.input[0]) == ["batch", 3, f"{patch}*rows", f"{patch}*columns"]
    if kind == "prompt":
        assert sides(read.graph.input[1]) == ["batch", "prompt_height", "prompt_width"]
        run, x = onnx_files.session(path), torch.randn(2, 3, 56, 84)
        for prompt in (1 + torch.rand(2, 5, 9), 3 + torch.rand(2, 8, 4)):
            torch.testing.assert_close(run(x, prompt)[0], model(x, prompt).detach(), rtol=1e-4, atol=1e-4)


def test_an_end_between_two_files(tmp_path, monkeypatch):
    """Blind spot: the graph of an earlier export beside the weights of this one, which it would read as its own."""
    path, whole = tmp_path / "model.onnx", exporting.write_whole
    monkeypatch.setattr(onnx_files, "INLINE", 100)
    path.write_bytes(b"of before")

    def full(target, writer):
        if target == path:
            raise OSError(28, "No space left on device")
        whole(target, writer)

    monkeypatch.setattr(exporting, "write_whole", full)
    with pytest.raises(OSError, match="No space"):
        export(Stub("midas-3.1-swin2-tiny-256").eval(), path, check=False)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx.data"]


def test_a_package_of_aotinductor(tmp_path):
    """Blind spot: a package of one size. Without vector instructions and compiled headers, whose trials take longer than the rest."""
    import torch._inductor.config as inductor

    path = tmp_path / "model.pt2"
    with inductor.patch({"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}):
        found = export(Stub().eval(), path, aot=True)
    assert found.load == 'torch._inductor.aoti_load_package("model.pt2")' and len(found.checked) == 3
    assert max(apart for *_, apart in found.checked) <= 1e-5


@torch.library.custom_op("made_up::twist", mutates_args=())
def twist(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1).clone()


@twist.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Twist(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return twist(x)


class Choice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_an_operator_without_a_translation_is_named(tmp_path, capsys):
    """Blind spot: a hundred lines of the exporter's stack, of which none says what to change; a file that is there all the same."""
    model = Stub(behind=Twist())
    with pytest.raises(ExportError) as raised:
        export(model, tmp_path / "model.onnx")
    assert str(raised.value) == "the operator made_up.twist.default in layer.1 (Twist) has no translation to ONNX"
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_a_choice_by_numbers_is_named(tmp_path, capsys):
    """Blind spot: as above, where torch.export stops."""
    model = Stub(behind=Choice())
    with pytest.raises(ExportError) as raised:
        export(model, tmp_path / "model.pt2")
    told = str(raised.value)
    assert re.match(r"torch.export cannot trace it in layer.1 \(Choice\), test_export.py:\d+ \(return x if x.sum\(\) > 0 else -x\): ", told)
    assert "data-dependent" in told and "\n" not in told
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def fake(apart: float):
    """What makes a file whose maps are off by so much of their range."""

    def program(graph: Graph, path: Path, check: bool):
        path.write_bytes(b"new")

        def run(*given):
            maps = graph.module(*given)
            return maps + apart * (maps.max() - maps.min())

        return [path], "", run if check else None

    return program


@pytest.mark.parametrize("apart", [0.9 * checking.BOUND, 1.1 * checking.BOUND, np.nan])
def test_what_differs_is_not_written(apart, tmp_path, monkeypatch):
    """Blind spot: a check that nothing fails; a former file that is lost."""
    path = tmp_path / "model.pt2"
    path.write_bytes(b"former")
    monkeypatch.setattr(exporting, "_program", fake(apart))
    model = Stub().train()
    if apart <= checking.BOUND:
        assert [round(found[2] / apart, 3) for found in export(model, path).checked] == [1, 1, 1] and path.read_bytes() == b"new"
    else:
        with pytest.raises(Differs, match=r"depth of 1 of 64x64 differs from PyTorch's by (0.0011|inf) of its range, more than 0.001"):
            export(model, path)
        assert path.read_bytes() == b"former"
    assert all(module.training for module in model.modules())
    assert export(model, path, check=False).checked == () and path.read_bytes() == b"new"


def test_maps_are_compared_whole():
    one = torch.linspace(2, 4, 6).reshape(1, 2, 3)
    assert checking.difference(one, one + 0.5) == pytest.approx(0.25)
    assert checking.difference(one, one.double()) == checking.difference(one, one[..., :2]) == torch.inf
    labels = torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8)
    assert checking.difference(labels, torch.tensor([[1, 2, 3, 9]], dtype=torch.uint8)) == 0.25
    assert checking.difference(torch.zeros(1, 2), torch.full((1, 2), 0.5)) == 0.5, "a map of one value has no range"


def test_what_is_missing_is_told_before_the_work(tmp_path, monkeypatch):
    """Blind spot: an ImportError behind a minute of tracing."""
    monkeypatch.setattr(Graph, "traced", lambda graph: pytest.fail("it was traced"))
    find = packages.importlib.util.find_spec
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None if name.startswith("onnxruntime") else find(name))
    with pytest.raises(MissingPackage, match=r"onnxruntime must be installed for that: pip install '\.\[export\]'"):
        export(Stub(), tmp_path / "model.onnx")
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="onnx and onnxscript must be"):
        export(Stub(), tmp_path / "model.onnx", check=False)
    import torch._inductor.config as inductor

    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(MissingPackage, match="needs a C.. compiler, and none is found"):
        export(Stub(), tmp_path / "model.pt2", aot=True)
    assert not list(tmp_path.iterdir())


def test_what_is_asked_for_wrongly(tmp_path):
    model = Stub()
    for path, how, told in (
        ("model.pb", {}, "model.pb: it must end in .pt2 or .onnx"),
        ("model.onnx", {"aot": True}, "model.onnx: it must end in .pt2"),
        ("model.onnx", {"opset": 5}, "opset 5: it must be from 18 to 23"),
        ("model.pt2", {"size": (100, 64)}, "both must be multiples of 16"),
    ):
        with pytest.raises(ValueError, match=re.escape(told)):
            export(model, tmp_path / path, **how)
    with pytest.raises(ExportError, match="fused kernels, which no other runtime has: build it without fast=True"):
        export(dpt.accelerate(wide()), tmp_path / "model.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        export(model, tmp_path / "folder.onnx")
