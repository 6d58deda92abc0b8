"""transformers' models on the kernels' algebra, against themselves untouched: what they give, and that everything else about them stays."""

import copy
import hashlib
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from theirs import CASES, VIT, depth_anything, dinov2_config, near, pair, same, tensors, those
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.beit.modeling_beit import BeitRelativePositionBias

import dpt
from dpt.fast import acceleration
from dpt.fast.transformers import encoder

INDEXED = BeitRelativePositionBias  # whose index tensors upstream keeps for all models, also those made in inference mode, in any test
ATTENDING = ("dpt", "dpt-segmentation", "dinov2", "dinov3", "vit")  # whose own class lets its attention be set


@pytest.mark.parametrize("name", CASES)
def test_every_class_gives_what_it_gave(name, monkeypatch):
    """Blind spot: a class whose modules are passed over, compute something else, or lose or rename a tensor."""
    quick, untouched = pair(name)
    layers, block = [], encoder._block
    monkeypatch.setattr(encoder, "_block", lambda *args: layers.append(args) or block(*args))
    with torch.inference_mode():
        same(quick(**CASES[name].inputs()), untouched(**CASES[name].inputs()))
    assert len(layers) == CASES[name].layers
    report = dpt.fast_report(quick)
    assert (sum(row.fused for row in report), sum(not row.fused for row in report)) == (CASES[name].fused, CASES[name].plain), report
    assert type(quick) is type(untouched) and str(quick) == str(untouched)
    kept = untouched.state_dict()
    assert [*quick.state_dict()] == [*kept] and all(torch.equal(value, kept[key]) for key, value in quick.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", those("dpt", "dpt-hybrid", "depth-anything-metric", "chmv2", "dpt-segmentation"))
def test_half_precision_has_the_dtype_it_had(name, dtype):
    """Blind spot: a head that gives float32 where upstream gives the model's dtype; rounding worse than upstream's own."""
    quick, untouched = pair(name)
    inputs = CASES[name].inputs()
    with torch.inference_mode():
        exact = tensors(untouched(**inputs))
        ours = tensors(quick.to(dtype)(**{key: value.to(dtype) for key, value in inputs.items()}))
        theirs = tensors(untouched.to(dtype)(**{key: value.to(dtype) for key, value in inputs.items()}))
    for key, expected in exact.items():
        assert ours[key].dtype == theirs[key].dtype
        mine, upstream = ((found[key].float() - expected).square().mean().sqrt() for found in (ours, theirs))
        assert mine <= 1.5 * upstream + 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "name", ["dpt", "dpt-hybrid", "dpt-segmentation", "depth-anything", "depth-anything-metric", "zoedepth", "dinov2", "vit"]
)
def test_gradients_are_upstreams(name, checkpointing, monkeypatch):
    """Blind spot: queries, keys and values read as one tensor, whose gradient reaches none of them; checkpointing that is passed over."""
    models = pair(name)
    kept = INDEXED.__dict__["generate_relative_position_index"]
    anew = getattr(kept, "__func__", kept).__wrapped__
    monkeypatch.setattr(INDEXED, "generate_relative_position_index", staticmethod(anew) if isinstance(kept, staticmethod) else anew)
    inputs = CASES[name].inputs()
    found = []
    for model in models:
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        with torch.enable_grad():
            sum(value.square().mean() for value in tensors(model(**inputs)).values()).backward()
        found.append({key: parameter.grad for key, parameter in model.named_parameters()})
    ours, theirs = found
    largest = max(float(grad.abs().max()) for grad in theirs.values() if grad is not None)
    for key, expected in theirs.items():
        assert (ours[key] is None) == (expected is None), key
        if expected is not None:
            torch.testing.assert_close(ours[key], expected, rtol=1e-3, atol=1e-5 * largest, msg=lambda text, key=key: f"{key}: {text}")


def part(layer: nn.Module, role: str):
    """A layer's part, whatever its name is in this version of transformers."""
    return layer.get_submodule(".".join(encoder.places(layer).paths[role]))


def test_a_step_of_training_is_seen(monkeypatch):
    """Blind spot: weights side by side that were copied once and stay behind when an optimiser moves the parameters, or a load does."""
    quick, untouched = pair("depth-anything")
    inputs = CASES["depth-anything"].inputs()
    with torch.no_grad():
        quick(**inputs)
        for model in (quick, untouched):
            for parameter in model.parameters():
                parameter.mul_(1.05)
        same(quick(**inputs), untouched(**inputs))
        other = {key: value * 0.97 for key, value in untouched.state_dict().items()}
        for model in (quick, untouched):
            model.load_state_dict(other)
        same(quick(**inputs), untouched(**inputs))
        for model in (quick, untouched):
            for parameter in model.parameters():
                parameter.data = parameter.data.clone().mul_(1.03)
        same(quick(**inputs), untouched(**inputs))


def test_queries_keys_and_values_take_no_memory_twice():
    """Blind spot: a concatenation kept beside the parameters; one that is made anew in each call."""
    quick, _ = pair("depth-anything-metric")
    layer = quick.backbone.encoder.layer[0]
    pairs = [("query", "key"), ("key", "value"), *([("gate", "up")] if "gate" in encoder.places(layer).paths else [])]
    for _ in range(2):
        for one, other in ((part(layer, first), part(layer, second)) for first, second in pairs):
            assert other.weight.data_ptr() == one.weight.data_ptr() + one.weight.numel() * 4
            assert other.bias.data_ptr() == one.bias.data_ptr() + one.bias.numel() * 4
        for parameter in quick.parameters():  # moved, as by `.to(device)`
            parameter.data = parameter.data.clone()
        with torch.inference_mode():
            quick(**CASES["depth-anything-metric"].inputs())


@pytest.mark.parametrize("name", those("dpt", "depth-anything", "zoedepth", "chmv2", "dinov3"))
def test_what_a_call_asks_for_is_there(name):
    """Blind spot: attentions that are an empty tuple, hidden states that are missing or of another layer."""
    quick, untouched = pair(name)
    inputs = CASES[name].inputs(1)
    if name in ATTENDING:
        for model in (quick, untouched):
            model.set_attn_implementation("eager")
    else:
        for model in (quick, untouched):
            model.backbone.set_attn_implementation("eager")
    with torch.inference_mode():
        ours, theirs = (model(**inputs, output_hidden_states=True, output_attentions=True) for model in (quick, untouched))
        same(ours, theirs)
        for kind, number in (("hidden_states", 5), ("attentions", 4)):
            assert len(ours[kind]) == len(theirs[kind]) == number
            for one, other in zip(ours[kind], theirs[kind], strict=True):
                near(one, other)
        assert quick(**inputs).get("attentions") is None
        same(quick(**inputs), theirs.__class__(**tensors(theirs)))


@pytest.mark.parametrize("name", ATTENDING)
def test_an_attention_that_the_user_set_is_kept(name, monkeypatch):
    """Blind spot: our attention in place of one that was chosen; the rest of the layer not fused for it."""
    quick, untouched = pair(name)
    calls = []

    def chosen(module, query, key, value, mask, **kwargs):
        calls.append(module)
        scores = query @ key.transpose(2, 3) * kwargs["scaling"]
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "chosen", chosen)
    for model in (quick, untouched):
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation_internal = "chosen"
    products = []
    whole = encoder.layernorm_mlp
    monkeypatch.setattr(encoder, "layernorm_mlp", lambda *args: products.append(args) or whole(*args))
    with torch.inference_mode():
        same(quick(**CASES[name].inputs()), untouched(**CASES[name].inputs()))
    assert len(calls) == 8 and len(products) == 4


def test_a_mask_is_upstreams():
    """Blind spot: an attention mask that is dropped."""
    if "attention_mask" not in inspect.signature(transformers.Dinov2Model.forward).parameters:
        pytest.skip("this version's takes none")
    quick, untouched = pair("dinov2")
    inputs = CASES["dinov2"].inputs()
    mask = torch.ones(2, 26)
    mask[:, 13:] = 0
    with torch.inference_mode():
        ours, theirs = (model(**inputs, attention_mask=mask) for model in (quick, untouched))
        same(ours, theirs)
        assert not torch.allclose(theirs.last_hidden_state, untouched(**inputs).last_hidden_state, atol=1e-3)


def test_saved_copied_and_pickled(tmp_path):
    """Blind spot: files that are not upstream's to the byte, copies that are plain, or that a new process cannot read."""
    quick, untouched = pair("dpt")
    written = []
    for name, model in (("quick", quick), ("untouched", untouched)):
        model.save_pretrained(tmp_path / name)
        written.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1] and "model.safetensors" in written[0]
    inputs = CASES["dpt"].inputs()
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(quick))  # before transformers hooks it, whose hooks cannot be pickled
    expected = quick(**inputs).predicted_depth
    copied = copy.deepcopy(quick)
    assert torch.equal(copied(**inputs).predicted_depth, expected)
    assert [row.fused for row in dpt.fast_report(copied)] == [row.fused for row in dpt.fast_report(quick)]
    script = (
        "import pickle, sys, torch, dpt\n"
        "model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "assert sum(row.fused for row in dpt.fast_report(model)) == 23\n"
        "print(type(model.dpt.encoder.layer[0]).__mro__[1].__module__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "model.pickle"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "dpt.fast.transformers.encoder"
    loaded = dpt.accelerate(transformers.AutoModelForDepthEstimation.from_pretrained(tmp_path / "quick"))
    with torch.inference_mode():
        same(loaded(**inputs), untouched(**inputs))


@pytest.mark.parametrize("name", those("dpt-hybrid", "zoedepth", "chmv2"))
def test_made_in_inference_mode(name):
    """Blind spot: parameters without a version, which can be neither moved nor looked at for a change."""
    with torch.inference_mode():
        untouched = CASES[name].model()
        quick = dpt.accelerate(copy.deepcopy(untouched))
        for _ in range(2):
            same(quick(**CASES[name].inputs()), untouched(**CASES[name].inputs()))


def test_taken_off_again():
    """Blind spot: a class that stays behind, so that a model cannot be as it was."""
    quick, untouched = pair("zoedepth")
    acceleration.decelerate(quick)
    assert [type(module) for module in quick.modules()] == [type(module) for module in untouched.modules()]


@pytest.mark.parametrize("name", those("dpt", "depth-anything", "dinov3"))
def test_compiled_in_one_graph(name):
    """Blind spot: what transformers asks about outputs, or what we keep, as a break in a graph that upstream compiles whole."""
    quick, untouched = pair(name)
    torch._dynamo.reset()
    with torch.no_grad():
        quick(**CASES[name].inputs())  # in which transformers hooks its model, behind a lock that is no part of a graph
        same(torch.compile(quick, fullgraph=True, backend="aot_eager")(**CASES[name].inputs()), untouched(**CASES[name].inputs()))


class Adapted(nn.Module):
    """A linear layer with a branch beside it, as LoRA puts it in a layer's place."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer = base
        self.branch = nn.Linear(base.in_features, base.out_features, bias=False)
        nn.init.normal_(self.branch.weight, std=0.5)

    @property
    def weight(self) -> nn.Parameter:
        return self.base_layer.weight

    @property
    def bias(self) -> nn.Parameter:
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.branch(x)


class Wrapped(torch.Tensor):
    """A weight that stands for other numbers than its memory holds, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = [argument.as_subclass(torch.Tensor) * 5 if isinstance(argument, cls) else argument for argument in args]
        return (
            function(*plain, **(kwargs or {}))
            if function is nn.functional.linear
            else super().__torch_function__(function, types, args, kwargs)
        )


def adapt(model: nn.Module) -> None:
    torch.manual_seed(5)
    for layer in model.backbone.encoder.layer[:2]:
        for role in ("query", "value"):
            layer.set_submodule(".".join(encoder.places(layer).paths[role]), Adapted(part(layer, role)))


def quantise(model: nn.Module) -> None:
    for layer in model.backbone.encoder.layer[:2]:
        linear = part(layer, "value")
        linear._parameters["weight"] = nn.Parameter(linear.weight.detach().as_subclass(Wrapped), requires_grad=False)


CALLED: list[nn.Module] = []


def hook(model: nn.Module) -> None:
    for module in (
        *(part(layer, "key") for layer in model.backbone.encoder.layer[:2]),
        model.neck.convs[0],
        model.head.conv1,
        model.neck.fusion_stage.layers[1].projection,
        model.neck.fusion_stage.layers[1].residual_layer1.convolution2,
        model.neck.reassemble_stage.layers[0].projection,
    ):
        module.register_forward_hook(lambda module, args, output: CALLED.append(module) or output * 1.5)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", [adapt, quantise, hook])
def test_what_became_of_a_child_is_obeyed(change, before):
    """Blind spot: an adapter, a quantised weight or a hook, put in before or after, whose parameters are read past it."""
    quick, untouched = (CASES["depth-anything"].model() for _ in range(2))
    inputs = CASES["depth-anything"].inputs()
    with torch.inference_mode():
        as_it_was = untouched(**inputs).predicted_depth
    change(untouched)
    if before:
        change(quick)
    dpt.accelerate(quick)
    if not before:
        quick(**inputs)
        change(quick)
    CALLED.clear()
    with torch.inference_mode():
        ours, theirs = quick(**inputs), untouched(**inputs)
    same(ours, theirs)
    assert not torch.allclose(theirs.predicted_depth, as_it_was, rtol=1e-3)
    if change is hook:
        assert len(CALLED) == 14
    rows = {row.name: row for row in dpt.fast_report(quick)}
    plain = [name for name, row in rows.items() if not row.fused]
    assert {"backbone.encoder.layer.0", "backbone.encoder.layer.1"} <= set(plain)
    assert rows["backbone.encoder.layer.2"].fused and "attention." in rows["backbone.encoder.layer.0"].how


def test_a_hook_on_a_fused_module_is_called():
    """Blind spot: the module itself hooked, which is called as ever; and a residual unit that the fusion calls with more than upstream."""
    quick, untouched = pair("depth-anything")
    seen = {}
    for model in (quick, untouched):
        unit = model.neck.fusion_stage.layers[1].residual_layer1
        unit.register_forward_hook(lambda module, args, output, model=model: seen.update({model: (args, output)}))
        model.backbone.encoder.layer[0].register_forward_hook(lambda module, args, output: output * 1.1)
    with torch.inference_mode():
        same(quick(**CASES["depth-anything"].inputs()), untouched(**CASES["depth-anything"].inputs()))
    (ours, given), (theirs, expected) = seen[quick], seen[untouched]
    assert len(ours) == len(theirs) == 1
    near(ours[0], theirs[0])
    near(given, expected)


def scaled(output):
    return tuple(part if part is None else part * 1.5 for part in output) if isinstance(output, tuple) else output * 1.5


def hooked_in(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: scaled(output))


def given_a_forward(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda *args, **kwargs: scaled(before(*args, **kwargs))


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("depth-anything", "backbone.encoder.layer.1.mlp"),
        ("depth-anything", "backbone.encoder.layer.1.attention"),
        ("depth-anything", "backbone.encoder.layer.1.layer_scale1"),
        ("dpt", "dpt.encoder.layer.1.attention"),
        ("dpt", "dpt.encoder.layer.1.attention.output.dropout"),
        ("dpt", "head.head"),
        ("dpt", "neck.fusion_stage.layers.2.residual_layer1.activation2"),
        ("dpt", "neck.reassemble_stage.readout_projects.1"),
        ("dpt", "neck.reassemble_stage.layers.1"),
        ("dpt", "neck.fusion_stage.layers.2.residual_layer1"),
    ],
)
@pytest.mark.parametrize("put_in", [hooked_in, given_a_forward])
def test_what_is_put_in_later_anywhere_is_called(put_in, name, place):
    """Blind spot: a module between those whose parameters are read, hooked or given a forward after the model was accelerated, and never
    called."""
    quick, untouched = pair(name)
    before = tensors(untouched(**CASES[name].inputs()))["predicted_depth"]
    for model in (quick, untouched):
        model(**CASES[name].inputs())  # in which a fast form looks at its children for the first time
        put_in(model.get_submodule(place))
    with torch.inference_mode():
        theirs = untouched(**CASES[name].inputs())
        same(quick(**CASES[name].inputs()), theirs)
    assert not torch.allclose(theirs.predicted_depth, before, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"hidden_act": "relu"}, "activation"),
        ({"num_attention_heads": 1, "hidden_size": 24}, "24 channels"),
    ],
)
def test_layers_that_the_kernels_do_not_compute_stay_plain(fields, reason):
    """Blind spot: another activation or size of heads taken for the usual one."""
    torch.manual_seed(0)
    untouched = transformers.Dinov2Model(dinov2_config(**fields)).eval()
    quick = copy.deepcopy(untouched)
    with pytest.raises(ValueError, match=reason):
        dpt.accelerate(quick, strict=True)
    dpt.accelerate(quick)
    assert all(not row.fused and reason in row.how for row in dpt.fast_report(quick))
    with torch.inference_mode():
        assert torch.equal(quick(**CASES["dinov2"].inputs()).last_hidden_state, untouched(**CASES["dinov2"].inputs()).last_hidden_state)


@pytest.mark.parametrize("which", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_dropout_in_training_is_upstreams(which):
    """Blind spot: a dropout that is left out, where a training wants it."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VIT, image_size=64, patch_size=16, **{which: 0.5})
    untouched = transformers.ViTModel(config).train()
    quick = dpt.accelerate(copy.deepcopy(untouched))
    found = []
    for model in (quick, untouched):
        torch.manual_seed(1)
        found.append(model(**CASES["vit"].inputs()).last_hidden_state)
    assert torch.equal(*found)


def test_a_head_of_another_width_says_so():
    """Blind spot: a hidden width that the head's kernel has not."""
    model = depth_anything(head_hidden_size=24).eval()
    rows = {row.name: row for row in dpt.fast_report(dpt.accelerate(model))}
    assert not rows["head"].fused and "24 channels" in rows["head"].how


def test_transformers_is_imported_only_for_its_models():
    """Blind spot: seconds of import, or a missing package, for who has only ours."""
    script = (
        "import sys, dpt\n"
        "model = dpt.accelerate(dpt.build('dpt-tiny-depth'))\n"
        "dpt.fast_report(model)\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_lines_of_the_readme(tmp_path):
    """Blind spot: a pipeline that refuses an accelerated model, or gives another map; an image processor that wants torchvision."""
    CASES["depth-anything"].model().save_pretrained(tmp_path)
    processor = getattr(transformers, "DPTImageProcessorPil", transformers.DPTImageProcessor)  # the one without torchvision
    processor(size={"height": 70, "width": 70}, ensure_multiple_of=14).save_pretrained(tmp_path)
    picture = str(next(path for path in (Path(dpt.__file__).parent / "examples").iterdir()))
    untouched, quick = (transformers.AutoModelForDepthEstimation.from_pretrained(tmp_path) for _ in range(2))
    found = []
    for model in (untouched, dpt.accelerate(quick)):
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
        found.append(transformers.pipeline("depth-estimation", model=model, image_processor=processor)(picture))
    theirs, ours = found
    assert ours["depth"].size == theirs["depth"].size and ours.keys() == theirs.keys()
    near(ours["predicted_depth"], theirs["predicted_depth"])
    assert sum(row.fused for row in dpt.fast_report(quick)) == 23


def test_sides_that_differ():
    """Blind spot: something else than what the class gives, where that takes any picture for a square; and `load`, which does not."""
    quick, untouched = pair("dpt")
    whole = dpt.load(copy.deepcopy(untouched))
    with torch.inference_mode():
        square = CASES["dpt"].inputs()["pixel_values"]
        near(whole(square), untouched(square).predicted_depth)
        wide = torch.randn(1, 3, 32, 128)  # 2x8 patches, which the class lays out as 4x4
        ours, theirs = quick(wide), untouched(wide)
        same(ours, theirs)
        assert theirs.predicted_depth.shape == (1, 64, 64) and whole(wide).shape == (1, 32, 128)
        for model in (quick, untouched):
            with pytest.raises(RuntimeError, match="shape|unflatten|size"):
                model(torch.randn(1, 3, 64, 96))


def test_the_version_that_was_asked_for():
    """Blind spot: the oldest version's run made with the newest a second time, where its folder is missing."""
    root = Path(__file__).resolve().parents[3]
    pins = "tests/oldest.txt" if "oldest" in os.environ.get("PYTHONPATH", "") else "constraints.txt"
    assert f"transformers=={transformers.__version__}\n" in (root / pins).read_text()
