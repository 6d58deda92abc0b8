"""Numerics of the kernels: on a GPU where there is one, else in Triton's interpreter, on the CPU.

Triton decides when a kernel is decorated whether it is interpreted, so ``TRITON_INTERPRET`` is set here, before any test module imports
the kernels; a process that imported Triton before cannot be trusted and is refused.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # for `from parity import ...` and `from small import ...`, whatever the import mode

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise pytest.UsageError("Triton was imported before tests/kernels set TRITON_INTERPRET=1: run `pytest tests/kernels` on its own")
    os.environ["TRITON_INTERPRET"] = "1"

# The interpreter multiplies the raw bits of bfloat16: that dtype is tested on a GPU, and by compiling.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU in the interpreter."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    """Every dtype that can be tested on this device."""
    return request.param


@pytest.fixture(params=("pointers", "descriptors"))
def path(request, monkeypatch) -> Iterator[str]:
    """Both ways of loading: sm_80's table (pointers) and sm_90's (descriptors), in the interpreter; a GPU has its own.

    The tables' float32 entries with descriptors are those of tf32, which is a name only in the interpreter: it multiplies float32 exactly.
    """
    if ON_GPU:
        if request.param == "pointers":
            pytest.skip("a GPU runs its own family's path")
        yield request.param
        return
    monkeypatch.setenv("DPT_KERNELS_FAMILY", {"pointers": "sm_80", "descriptors": "sm_90"}[request.param])
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param == "descriptors"
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison(monkeypatch) -> None:
    """Fresh memory comes full of NaN (integers: of their largest value), so that an element no kernel wrote fails the comparison."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.device.type == "meta" or isinstance(tensor, torch._subclasses.FakeTensor):
                return tensor
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            with torch.no_grad():
                return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return allocate_poisoned

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def far(poison, device, monkeypatch):
    """Tensors beyond 2^31 elements: see checks.Far. After ``poison``, which would fill them."""
    from checks import Far  # not at the head: it imports Triton, for which TRITON_INTERPRET has to be set first

    return Far(device, monkeypatch)
