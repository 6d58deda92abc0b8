"""The ops' cases at their toy size: what the gate catches, and what is counted."""

import torch

from bench import ROOT
from bench.cases import kernels, ops, shapes, steps
from bench.harness import runner


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
    shape = shapes.Tokens(1, 100, 64, 2)
    flops, moved = kernels.count(op, shape, kernels.FORWARD, torch.bfloat16)
    parameters = 2 * 64 + 2 * 64 * 256 + 256 + 64
    assert flops == 4 * 100 * 64 * 256 and moved == 2 * (2 * 100 * 64 + parameters)
    assert kernels.count(op, shape, kernels.BOTH, torch.bfloat16)[0] == 3 * flops


def test_every_op_is_measured_and_named_by_a_step():
    """Blind spot: a new kernel that no benchmark knows. Modules in kernels/ that decide whether they run their kernels."""
    source = {path.stem: path.read_text() for path in (ROOT / "kernels").glob("*.py")}
    ops = {
        name for name, text in source.items() if f'runs_kernels(x, "{name}")' in text or f', "{name}")' in text and "runs_kernels" in text
    }
    assert "attention" in ops and "depth_head" in ops
    assert {op.module for op in kernels.ops()} >= ops
    assert set(steps.HEADS) >= ops


OP = """
from bench.cases.ops import Op, both
from bench.cases.shapes import Tokens, tokens

OPS = (
    Op(
        "negative",
        lambda s: [tokens(s.batch, s.tokens, s.width)],
        **both(lambda x: -x, lambda x: 0 - x, lambda f, s, x: f(x)),
        shapes=(Tokens(1, 5, 64, 2),),
        toy=Tokens(1, 5, 64, 2),
    ),
)
"""


def test_an_op_is_one_file(tmp_path, monkeypatch):
    """Blind spot: a list of the ops somewhere else, on which a new file has to be put."""
    before = {case.name for case in kernels.cases("cpu", [torch.float32], 0.0)}
    (tmp_path / "made_up_negation.py").write_text(OP)
    monkeypatch.setattr(ops, "__path__", [*ops.__path__, str(tmp_path)])
    monkeypatch.setattr(kernels, "ops", ops.ops.__wrapped__)
    found = {case.name: case for case in kernels.cases("cpu", [torch.float32], 0.0)}
    added = found.keys() - before
    assert added == {"negative forward, B=1 N=5 D=64 H=2, float32", "negative forward+backward, B=1 N=5 D=64 H=2, float32"}
    assert {found[name].facts["op"] for name in added} == {"made_up_negation"} and before < found.keys()
