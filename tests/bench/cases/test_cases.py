"""The real workloads at their toy size: what the gate would catch in them, and what their contenders are."""

import contextlib
import types

import pytest
import torch

from bench.card import profile_model
from bench.cases import kernels, models, peers, steps, training
from bench.harness import measure, runner
from bench.harness.records import Skip

CPU = torch.device("cpu")


@pytest.fixture
def toy() -> runner.Context:
    return runner.Context(CPU, measure.Budget(1e9), measure.Rounds(1, 1, 0.0), toy=True)


SIZES = models.Sizes(1, 64, 64)


@pytest.mark.parametrize("break_it", ["head", "encoder", "fusion"])
def test_a_broken_model_does_not_pass(toy, break_it, monkeypatch):
    """Blind spot: random weights for which the output does not depend on a part of the model. One bias of it is shifted a little."""
    original = models.dpt.accelerate

    def broken(model):
        model = original(model)
        part = {"head": model.head, "encoder": model.encoder, "fusion": model.fusion}[break_it]
        name, bias = [(n, p) for n, p in part.named_parameters() if n.endswith("bias")][0]
        owner = part.get_submodule(name.rpartition(".")[0])
        owner.bias = torch.nn.Parameter(bias + 0.01)
        return model

    monkeypatch.setattr(models.dpt, "accelerate", broken)
    [case] = models.cases(
        [models.ModelRow("dpt-large-midas", 64, (1,), 0)], "models", ["plain", "fast"], [torch.float32], models.OpenedModel
    )
    rows, _ = runner.measure_case(case, case.contenders, toy)
    assert {row.contender: row.status for row in rows} == {"plain": "ok", "fast": "failed"}


def test_a_lost_gradient_does_not_pass(toy, monkeypatch):
    """Blind spot: a training gate that a step without one parameter's gradient would pass."""

    def broken(model):
        unit = model.fusion.blocks[1].unit1.conv1
        unit.weight.register_hook(torch.zeros_like)
        return model

    monkeypatch.setitem(training.CONTENDERS, "fast", broken)
    row = models.ModelRow("dpt-base-ade20k", 64, (2,), 0)
    [case] = models.cases([row], "training", training.CONTENDERS, [torch.bfloat16], training.OpenedTraining)
    rows, _ = runner.measure_case(case, case.contenders, toy)
    found = {row.contender: row for row in rows}
    assert found["plain"].status == "ok" and found["fast"].status == "failed" and "root mean square" in found["fast"].problem


def test_wrong_labels_do_not_pass(toy):
    """Blind spot: logits that pass while the labels made of them are another class's."""
    opened = steps.OpenedSteps("dpt-base-ade20k", SIZES, torch.float32, toy)
    prepared = opened.prepare("plain float32")
    exact, (logits, chosen) = opened.exact(), prepared.judged()
    assert (chosen - exact[1]).abs().max() <= 1e-5
    labels = prepared.run(0)[1].long()
    wrong = opened._judged(logits, (labels + 1) % 5)[1]
    assert (wrong - exact[1]).abs().max() > 1e-2


def test_steps_that_need_kernels_are_skipped_with_the_reason(toy):
    """Blind spot: a row of a fused step on a machine that has no kernels."""
    [case] = models.cases([models.ModelRow("dpt-large-midas", 64, (1,), 0)], "steps", steps.STEPS, [torch.float32], steps.OpenedSteps)
    rows, skips = runner.measure_case(case, case.contenders, toy)
    assert [row.contender for row in rows] == ["plain float32", "+ channels_last", "+ exact rewrites"]
    assert {skip.contender for skip in skips} == set(steps.STEPS) - {row.contender for row in rows}
    assert all("GPU" in skip.reason or "float32" in skip.reason for skip in skips)


def test_a_cpu_never_claims_a_kernel(toy):
    """Blind spot: the same algebra in PyTorch, shown as the kernel's time."""
    for op in kernels.ops():
        opened = kernels.OpenedOp(op, op.toy, kernels.FORWARD, torch.float32, toy)
        assert opened.prepare("fused").note == "PyTorch algebra, no kernel on this device"


def test_a_wrong_op_does_not_pass(toy):
    """Blind spot: a gate that an op's error passes: each op's result with one value moved by a hundredth of the largest."""
    for op in kernels.ops():

        def broken(shape, *tensors, op=op):
            out = op.call(shape, *tensors).clone()
            if out.dtype == torch.uint8:
                out[0, 0, 0] = (out[0, 0, 0] + 1) % 5
            else:
                out[(-1,) * out.dim()] += 0.01 * out.abs().max()
            return out

        wrong = kernels.Op(**{**vars(op), "call": broken})
        case = kernels._case(wrong, op.toy, kernels.FORWARD, torch.float32, 0, 0.0)
        rows, _ = runner.measure_case(case, ["eager", "fused"], toy)
        assert {row.contender: row.status for row in rows} == {"eager": "ok", "fused": "failed"}, op.name


def test_counts_of_a_known_op():
    """Blind spot: FLOPs and bytes of another shape. The projections of an MLP: 2*2*M*D*4D FLOPs, thrice that with the backward pass."""
    op = next(op for op in kernels.ops() if op.name == "layernorm_mlp")
    shape = kernels.Tokens(1, 100, 64, 2)
    flops, moved = kernels.count(op, shape, kernels.FORWARD, torch.bfloat16)
    parameters = 2 * 64 + 2 * 64 * 256 + 256 + 64
    assert flops == 4 * 100 * 64 * 256 and moved == 2 * (2 * 100 * 64 + parameters)
    assert kernels.count(op, shape, kernels.BOTH, torch.bfloat16)[0] == 3 * flops


def test_transformers_runs_our_weights(toy):
    """Blind spot: a peer with other weights, sizes or settings, which would be timed at another task; a part it has not is told."""
    pytest.importorskip("transformers")
    for name in ("dpt-base-ade20k", "dpt-large-midas"):
        model = models.build(name, toy).eval()
        theirs = peers.transformers_model(model, (64, 64))
        with torch.inference_mode():
            x = torch.randn(1, 3, 64, 64)
            assert (theirs(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()
    with pytest.raises(runner.Unavailable, match="square"):
        peers.transformers_model(model, (64, 96))
    with pytest.raises(runner.Unavailable, match="convolutional stem"):
        peers.transformers_model(models.build("dpt-tiny-depth", toy), (64, 64))


def test_a_peer_that_is_not_installed():
    """Blind spot: an import error in the place of a skip."""
    with pytest.raises(runner.Unavailable, match="no_such_package is not installed"):
        peers.installed("no_such_package")


class FakeGraph:
    """A CUDA graph, which cannot be replayed before it was captured, nor captured twice."""

    def __init__(self, log):
        self.log, self.captured = log, False

    def replay(self):
        assert self.captured, "CUDA error: replayed before it was captured"
        self.log.append("replay")


@contextlib.contextmanager
def fake_capture(graph):
    assert not graph.captured
    yield
    graph.captured = True
    graph.log.append("capture")


@pytest.mark.parametrize("recorded", [False, True])
def test_a_graph_is_captured_before_it_is_replayed(toy, monkeypatch, recorded):
    """Blind spot: the toy run, which measures no memory and so never called what captures. Captured once, whoever comes first."""
    log = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(log))
    monkeypatch.setattr(torch.cuda, "graph", fake_capture)
    monkeypatch.setattr(models, "on_side_stream", lambda call, device: call())
    toy.device = types.SimpleNamespace(type="cuda")
    opened = types.SimpleNamespace(context=toy, input=lambda index: torch.full((2,), float(index)))
    prepared = models.captured(lambda x: x, opened)
    if recorded:
        prepared.recorded()
    assert torch.equal(prepared.run(5), torch.full((2,), 5.0)) and torch.equal(prepared.judged()[0], torch.zeros(2))
    assert log == ["capture", "replay", "replay"]


def test_shared_copies_share(toy):
    """Blind spot: a peak memory that counts the weights once for every contender, or a copy that changes the original."""
    model = models.build("dpt-tiny-depth", toy)
    copied = models.dpt.accelerate(models.shared_copy(model))
    pairs = zip(model.state_dict(keep_vars=True).values(), copied.state_dict(keep_vars=True).values(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    assert not any(row.fused for row in models.dpt.fast_report(model))
    assert models.held_bytes(model) == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def test_the_profile(toy, tmp_path):
    """Blind spot: the profiling step of the GPU session, which no other test starts: on a CPU, at the toy size."""
    run = profile_model.runner(profile_model.Subject("dpt-large-midas", dtype="float32"), CPU, toy=True)
    table, found = profile_model.profile(run, CPU)
    assert "aten::" in table and sum(kernel["share"] for kernel in found) == pytest.approx(1.0)
    assert [k["share"] for k in found] == sorted((k["share"] for k in found), reverse=True)


def test_a_missing_configuration_is_skipped_by_name(toy):
    """Blind spot: a case without a model that is silently left out."""
    [case] = models.cases(
        [models.ModelRow("dpt-that-never-was", 64, (1,), 0)], "models", models.CONTENDERS, [torch.float32], models.OpenedModel
    )
    assert runner.measure_case(case, case.contenders, toy) == ([], [Skip(case.name, "", "dpt.models() has no dpt-that-never-was yet")])
