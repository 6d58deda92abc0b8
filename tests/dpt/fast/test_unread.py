"""What a head of transformers does not read: it is not kept, and whoever asks for it gets it all the same."""

import copy
import pickle
import weakref

import pytest
import torch
import transformers
from theirs import CASES, deepened, near, pair, same, those
from torch import nn

import dpt
from dpt.fast import acceleration
from dpt.fast.transformers import encoder, unread

HEADED = [name for name, case in CASES.items() if name not in ("dinov2", "dinov3", "dinov3-gated", "vit", "dpt-swin2")]
NORMED = {"dpt": ("dpt.layernorm", 1), "chmv2": ("backbone.norm", 9)}  # a norm that is called for what nobody reads: how often


CHOOSES = unread._can_select()  # older versions of transformers give all hidden states or none
choosing = pytest.mark.skipif(not CHOOSES, reason=f"transformers {transformers.__version__} cannot be asked for some hidden states alone")


@pytest.fixture
def deeper(monkeypatch):
    deepened(monkeypatch)


def states(model, name, **asked):
    with torch.inference_mode():
        return model(**CASES[name].inputs(), **asked)


@choosing
@pytest.mark.parametrize("name", HEADED)
def test_only_what_the_head_reads_is_alive(name, deeper, monkeypatch):
    """Blind spot: hidden states that nobody reads, held until the backbone has ended. Seen when the last layer begins."""
    quick, untouched = pair(name)
    made, alive = [], []
    block = encoder._block

    def watched(*args):
        alive[:] = [index for index, made_before in enumerate(made) if made_before() is not None]
        found = block(*args)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(encoder, "_block", watched)
    same(states(quick, name), states(untouched, name))
    assert len(made) == 8 and alive == ([5, 6] if name == "dpt-hybrid" else [1, 3, 5, 6])  # 6: what the last layer gets


@choosing
@pytest.mark.parametrize("name", those(*NORMED))
def test_a_norm_that_nobody_reads(name, deeper, monkeypatch):
    """Blind spot: the norm of every hidden state, or of a last one, for a head that reads four."""
    quick, untouched = pair(name)
    place, times = NORMED[name]
    tokens = []
    norm = nn.functional.layer_norm
    for model in (quick, untouched):
        weight, seen = model.get_submodule(place).weight, []

        def counted(x, shape, its_weight, *args, weight=weight, seen=seen):
            if its_weight is weight:
                seen.append(x.shape[1])
            return norm(x, shape, its_weight, *args)

        monkeypatch.setattr(nn.functional, "layer_norm", counted)
        states(model, name)
        tokens.append(seen)
    ours, theirs = tokens
    assert len(theirs) == len(ours) == times and all(theirs)
    assert sum(map(bool, ours)) == (4 if name == "chmv2" else 0)


CONFIGURED = [(name, how) for name in those("dpt", "depth-anything", "chmv2") for how in ("config", "backbone's config")]


@pytest.mark.parametrize(("name", "how"), [*((name, "argument") for name in HEADED), *CONFIGURED])
def test_who_asks_gets_all(name, how, deeper):
    """Blind spot: a hidden state that is missing or empty, asked for by argument or by a configuration."""
    models = pair(name)
    asked = {"output_hidden_states": True} if how == "argument" else {}
    for model in models:
        if how == "config":
            model.config.output_hidden_states = True
        if how == "backbone's config":
            (getattr(model, "backbone", None) or model.dpt).config.output_hidden_states = True
    ours, theirs = (states(model, name, **asked) for model in models)
    same(ours, theirs)
    assert (ours.get("hidden_states") is None) == (theirs.get("hidden_states") is None)
    if how == "argument":
        assert len(theirs.hidden_states) == 9
    for one, other in zip(ours.get("hidden_states") or (), theirs.get("hidden_states") or (), strict=True):
        near(one, other)


@choosing
def test_some_by_index(deeper):
    """Blind spot: a caller's own choice of hidden states, which transformers 5.23 takes, replaced by the head's."""
    ours, theirs = (states(model, "depth-anything", output_hidden_states=[0, -1]) for model in pair("depth-anything"))
    same(ours, theirs)
    assert [state is None for state in ours.hidden_states or ()] == [state is None for state in theirs.hidden_states or ()]


@pytest.mark.parametrize("place", ["backbone", "backbone.encoder", "backbone.layernorm"])
def test_who_looks_gets_all(place, deeper):
    """Blind spot: somebody else's hook on the backbone, who sees states without tokens."""
    quick, _ = pair("depth-anything")
    seen = []
    quick.get_submodule(place).register_forward_hook(lambda module, args, output: seen.append(output))
    states(quick, "depth-anything")
    for output in seen:
        found = [output] if isinstance(output, torch.Tensor) else output.hidden_states or output.feature_maps
        assert all(state.shape[1] == 26 for state in found)
    assert seen


def test_a_call_of_the_backbone_itself(deeper):
    """Blind spot: a call that failed, or that was before, which leaves behind what it reads."""
    quick, untouched = pair("depth-anything")
    inputs = CASES["depth-anything"].inputs()
    handle = quick.head.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quick(**inputs)
    handle.remove()
    for _ in range(2):
        with torch.inference_mode():
            ours, theirs = (model.backbone(**inputs, output_hidden_states=True) for model in (quick, untouched))
        for one, other in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            near(one, other)
        states(quick, "depth-anything")


def test_copied_pickled_and_taken_off(deeper):
    """Blind spot: hooks that a copy shares or lacks, that stand twice, or that stay behind."""
    quick, untouched = pair("dpt")
    dpt.accelerate(quick)
    for model in (quick, copy.deepcopy(quick), pickle.loads(pickle.dumps(quick))):
        hooks = [hook for module in model.modules() for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())]
        assert sorted(hook.__name__ for hook in hooks) == (sorted(hook.__name__ for hook in unread.OURS) if CHOOSES else [])
        same(states(model, "dpt"), states(untouched, "dpt"))
    acceleration.decelerate(quick)
    for module in quick.modules():
        assert not {*module._forward_pre_hooks.values(), *module._forward_hooks.values()} & {*unread.OURS}
        assert not module._forward_pre_hooks_with_kwargs and not module._forward_hooks_always_called
    same(states(quick, "dpt"), states(untouched, "dpt"))


@choosing
def test_a_version_that_cannot_choose(deeper, monkeypatch):
    """Blind spot: transformers before it took indices, which would take a list for a yes."""
    from transformers.utils import output_capturing

    monkeypatch.delattr(output_capturing, "selected_hidden_states")
    quick = dpt.accelerate(CASES["dpt"].model())
    assert not any({*module._forward_pre_hooks.values()} & {*unread.OURS} for module in quick.modules())


def test_standardised_weights_are_made_once(monkeypatch):
    """Blind spot: weights standardised in each call; or those of before, when a step or a load has changed the parameters."""
    quick, untouched = pair("dpt-hybrid")
    made, standardise = [], encoder.by_variance
    monkeypatch.setattr(encoder, "by_variance", lambda *args: made.append(args) or standardise(*args))
    for expected in (16, 0, 16, 0):
        made.clear()
        same(states(quick, "dpt-hybrid"), states(untouched, "dpt-hybrid"))
        assert len(made) == expected
        if expected == 0:
            for model in (quick, untouched):
                with torch.no_grad():
                    for parameter in model.dpt.embeddings.backbone.parameters():
                        parameter.add_(0.1 * parameter.roll(1, 0))
