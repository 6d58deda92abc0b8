"""Maps that are not finite: an error that names the picture and the stage. Blind spots: CUDA, where the fused head is one stage."""

from __future__ import annotations

import copy
import re

import numpy as np
import pictures
import pytest
import torch
from PIL import Image
from small import config, small, wide
from torch import nn

import dpt
from dpt.commands import main
from dpt.inference.finite import INPUT, NotFinite, Watch, first_stage
from dpt.inference.prediction import predict_iter

PICTURE = pictures.scene(64, 64)
GREY = np.full((64, 64, 3), 128, np.uint8)  # 0.004 once it is normalised
BAD = {  # of a model of depth: a weight, and the stage that it spoils, plain and fused
    "encoder.patch_embed.weight": ("encoder.patch_embed", "encoder.patch_embed"),
    "encoder.blocks.2.mlp.fc1.weight": ("encoder.blocks.2.mlp.fc1", "encoder.blocks.2"),
    "encoder.blocks.0.norm1.weight": ("encoder.blocks.0.norm1", "encoder.blocks.0"),
    "reassemble.1.project.weight": ("reassemble.1.project", "reassemble.1"),
    "fusion.convs.3.weight": ("fusion.convs.3", "fusion.convs.3"),
    "fusion.blocks.1.unit2.conv1.weight": ("fusion.blocks.1.unit2.conv1", "fusion.blocks.1.unit2"),
    "head.conv3.weight": ("head.conv3", "head"),
}


def spoilt(model: nn.Module, weight: str, value: float) -> nn.Module:
    with torch.no_grad():
        parameter = model.get_parameter(weight)
        parameter[(0,) * parameter.dim()] = value
    return model


def accelerated(model: dpt.DPT, fast: bool) -> dpt.DPT:
    return dpt.accelerate(model) if fast else model


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("weight", BAD)
def test_a_weight_that_is_none_names_its_stage(weight, value, fast):
    """Blind spot: a black picture; the last stage named, or all; the parent before its child; a file's damage taken for an overflow."""
    model = spoilt(accelerated(wide(), fast), weight, value)
    with pytest.raises(
        NotFinite, match=f"the array: .* {re.escape(weight)} itself is not finite in float32: the file is damaged"
    ) as caught:
        model.predict(PICTURE)
    stage, expected = caught.value.stage, BAD[weight][fast]
    assert stage == expected or (fast and stage.startswith(f"{expected}.")), stage
    assert f"{stage} ({type(model.get_submodule(stage)).__name__}), in float32;" in str(caught.value)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_an_overflow_of_float16(fast):
    """Blind spot: activations beyond 65504 by weights that are finite, in a layer or in the sum behind it; advice that does not help."""
    model = wide()
    with torch.no_grad():
        model.encoder.blocks[1].mlp.fc2.weight *= 1e5
    half = accelerated(copy.deepcopy(model).half(), fast)
    said = r"in float16; the weights are finite; float16 ends at 65504, and --dtype bfloat16 or float32 \(dtype=torch.bfloat16\)"
    with pytest.raises(NotFinite, match=said) as caught:
        half.predict(PICTURE)
    assert caught.value.stage == ("encoder.blocks.1" if fast else "encoder.blocks.1.mlp.fc2")
    for dtype in (torch.bfloat16, torch.float32):
        assert np.isfinite(accelerated(copy.deepcopy(model).to(dtype), fast).predict(PICTURE).depth).all()
    half = accelerated(wide().half(), fast)
    for block in half.encoder.blocks[:2]:
        nn.init.constant_(block.mlp.fc2.bias, 60000.0)
    with pytest.raises(NotFinite, match="float16 ends at 65504") as caught:
        half.predict(PICTURE)
    assert caught.value.stage == "encoder.blocks.1"  # whose branches are finite


def test_a_weight_that_float16_cannot_hold():
    """Blind spot: a sound file blamed for what the cast has made of it."""
    model = spoilt(small(), "reassemble.2.project.bias", 1e6).half()
    said = r"project.bias itself is not finite in float16: it is too large for it, which --dtype bfloat16 or float32 .* mends"
    with pytest.raises(NotFinite, match=said):
        model.predict(PICTURE)


def loud() -> dpt.DPT:
    """A model in float16 whose patches of a picture with contrast are too large."""
    model = small().half()
    with torch.no_grad():
        model.encoder.patch_embed.weight.fill_(2e3)
    return model


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_one_picture_of_a_batch(fast):
    """Blind spot: the others of the batch lost with it, or another one blamed."""
    model = accelerated(loud(), fast)
    white = np.full((64, 64, 3), 255, np.uint8)
    results = list(predict_iter(model, [GREY, white, GREY], batch_size=3))
    assert [type(result.error) for result in results] == [type(None), NotFinite, type(None)]
    assert results[1].error.stage == "encoder.patch_embed" and results[1].prediction is None
    expected = list(predict_iter(model, [GREY, GREY, GREY], batch_size=3))
    for index in (0, 2):
        np.testing.assert_array_equal(results[index].prediction.depth, expected[index].prediction.depth)


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
@pytest.mark.parametrize("options", [{}, {"probability": True}, {"tta": True}, {"window": 32, "stride": 32}], ids=str)
def test_labels_of_logits_that_are_none(fast, options):
    """Blind spot: NaN is a class like any other once the largest is taken, and a mean or a window may hide where it came from."""
    model = spoilt(accelerated(small("dpt-base-ade20k"), fast), "head.classifier.bias", torch.nan)
    with pytest.raises(NotFinite) as caught:
        model.predict(PICTURE, **options)
    assert caught.value.stage == ("head" if fast else "head.classifier")


def test_a_task_among_several():
    """Blind spot: only the first task's maps looked at."""
    model = small("tipsv2-base", classes=3)
    task = next(name for name in model.further if name == "normals")
    spoilt(model, f"further.{task}.head.linear.bias", torch.inf)
    with pytest.raises(NotFinite) as caught:
        model.predict(PICTURE)
    assert caught.value.stage == f"further.{task}.head.linear"


class Once(nn.Module):
    """A model whose map is finite but for one pixel, of its first call alone, or always."""

    def __init__(self, value: float, always: bool):
        super().__init__()
        self.config, self.value, self.always, self.calls = config(), value, always, 0
        self.parameter, self.head = nn.Parameter(torch.zeros(())), nn.Identity()

    def forward(self, x):
        self.__dict__["calls"] += 1
        found = x.mean(1)
        if self.always or self.calls == 1:
            found[:, 5, 7] = self.value
        return found


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_one_pixel_is_enough(value):
    """Blind spot: an infinity of one sign; a second forward that gives other numbers; a stage without a name."""
    with pytest.raises(
        NotFinite, match="first number that is none came from the model \\(Once\\), in float32; the weights are finite, and float32"
    ):
        dpt.inference.prediction.predict(Once(value, always=True), PICTURE)
    model = Once(value, always=False)
    error = next(iter(predict_iter(model, [PICTURE]))).error
    assert error is None or error.stage is None


def test_what_is_finite_costs_one_forward_and_waits_for_nothing():
    """Blind spot: a second forward, hooks, or a look at values, for which a GPU is waited, where nothing is wrong."""
    model, calls = small(), []
    model.register_forward_hook(lambda *_: calls.append(None))
    model.predict(PICTURE)
    assert len(calls) == 1
    maps = {"depth": torch.empty(2, 1, 8, 8, device="meta")}  # whose values cannot be looked at
    assert list(Watch().over(iter([maps]))) == [maps]


def test_the_model_stays_as_it_is():
    """Blind spot: hooks that are left behind, or that another thread's forward meets; the caller's own hooks unused in the search."""
    model, seen = spoilt(wide(), "head.conv3.bias", torch.nan), []
    model.encoder.blocks[0].register_forward_hook(lambda module, *_: seen.append(module))
    during: list[int] = []
    model.register_forward_hook(lambda *_: during.append(sum(len(module._forward_hooks) for module in model.modules())))
    with pytest.raises(NotFinite):
        model.predict(PICTURE)
    assert during == [2, 2] and len(seen) == 2  # the prediction and the search
    assert sum(len(module._forward_hooks) for module in model.modules()) == 2
    block, again = seen
    assert block is model.encoder.blocks[0] and again is not block
    assert list(map(id, again.parameters())) == list(map(id, block.parameters()))


def test_a_compiled_model_is_searched_as_it_is_written(monkeypatch):
    """Blind spot: a compiled graph has no stages."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = spoilt(small(), "encoder.blocks.3.attn.proj.weight", torch.nan)
    for compiled in (torch.compile(model, backend=backend), model):
        if compiled is model:
            model.compile(backend=backend)
        with pytest.raises(NotFinite) as caught:
            compiled.predict(PICTURE)
        assert caught.value.stage == "encoder.blocks.3.attn.proj"
    assert graphs


def test_the_input_is_a_stage():
    """Blind spot: the patches blamed for a picture that is not finite."""
    model = small()
    stage = first_stage(model, lambda network: iter([network(torch.full((1, 3, 64, 64), torch.nan))]))
    assert stage is not None and stage.path == INPUT


def test_the_command_and_the_rows(tmp_path, capsys):
    """Blind spot: a traceback, or a black file, for one picture of a folder; a row without a reason."""
    (tmp_path / "photos").mkdir()
    for name, picture in (("a.png", GREY), ("b.png", np.full_like(GREY, 255)), ("c.png", GREY)):
        Image.fromarray(picture).save(tmp_path / "photos" / name)
    file = tmp_path / "loud.safetensors"
    dpt.save(loud().float(), file)
    arguments = ["predict", str(tmp_path / "photos"), "-o", str(tmp_path / "out"), "--weights", str(file), "--device", "cpu"]
    assert main.main([*arguments, "--dtype", "float16", "--batch-size", "3"]) == 1
    said = capsys.readouterr().err
    assert "b.png: the map is not finite" in said and "encoder.patch_embed" in said and "Traceback" not in said
    assert {path.name[0] for path in (tmp_path / "out").iterdir()} == {"a", "c"}
    assert main.main([*arguments, "--dtype", "bfloat16"]) == 0  # the advice
    predictor = dpt.Predictor(weights=file, device="cpu", dtype=torch.float16, batch_size=2)
    rows = predictor({"path": np.array([str(tmp_path / "photos" / name) for name in ("a.png", "b.png")], object)})
    assert rows["error"][0] == "" and "not finite" in rows["error"][1] and rows["depth"][1].size == 0
