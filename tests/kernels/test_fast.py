"""The whole model on the kernels, against the plain one in float64 and in the same dtype."""

import copy

import pytest
import torch
from dpt.kernels import launch
from parity import assert_parity

import dpt

INPUT = (1, 3, 32, 48)
MODELS = ("dpt-tiny-depth", "dpt-tiny-scenes")


def models(name: str, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Module]:
    """[fast, plain in float64, plain], the same random weights, none of them at its initial value."""
    generator = torch.Generator().manual_seed(0)
    plain = dpt.build(name)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    plain = plain.to(device, dtype)
    return [dpt.accelerate(copy.deepcopy(plain), strict=True), copy.deepcopy(plain).double(), plain]


@pytest.mark.parametrize("name", MODELS)
def test_forward(name, dtype, device, path):
    """Blind spot: parameters handed to the wrong kernel, which no test of one op sees."""
    x = torch.randn(INPUT).to(device, dtype)
    with torch.inference_mode():
        fast, ref64, plain = (model(x.to(next(model.parameters()).dtype)) for model in models(name, dtype, device))
    assert_parity(fast, ref64, plain)


@pytest.mark.parametrize("name", MODELS)
def test_one_training_step(name, device, path):
    """Blind spot: a gradient that does not arrive, or arrives elsewhere. Every parameter's, and the parameters after the step."""
    x = torch.randn(INPUT, device=device)
    trained = []
    for model in models(name, torch.float32, device):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        out = model(x.to(next(model.parameters()).dtype))
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out))
        optimizer.step()
        trained.append(dict(model.named_parameters()))
    for key in trained[0]:
        grads = [parameters[key].grad for parameters in trained]
        assert_parity(*grads, name=f"gradient of {key}", magnitude=max(1e-2 * _largest(trained[1]), grads[1].abs().max().item()))
        assert_parity(*(parameters[key] for parameters in trained), name=key)


def _largest(parameters: dict[str, torch.Tensor]) -> float:
    return max(parameter.grad.abs().max().item() for parameter in parameters.values())


def test_a_block_is_five_launches(device, monkeypatch):
    """Blind spot: work that has slipped out of the fused kernels."""
    model = dpt.accelerate(dpt.build("dpt-tiny-depth", device=device))
    launches = []
    original = launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda kernel, *args, **kwargs: (launches.append(kernel.__name__), original(kernel, *args, **kwargs))
    )
    with torch.inference_mode():
        model.encoder.blocks[0](torch.randn(1, 7, 192, device=device))
    assert launches == ["linear_kernel", "attention_forward", "linear_kernel", "linear_kernel", "linear_kernel"]


def test_the_report_says_kernels(device):
    """Blind spot: a report that says PyTorch where kernels run."""
    report = dpt.fast_report(dpt.accelerate(dpt.build("dpt-tiny-depth", device=device)))
    assert {row.how for row in report if row.kind == "FastBlock"} == {"kernels"}
