"""Numerics of the kernels: on a GPU where there is one, else in Triton's interpreter, on the CPU.

Triton decides when a kernel is decorated whether it is interpreted, so ``TRITON_INTERPRET`` is set here, before any test module imports
the kernels; a process that imported Triton before cannot be trusted and is refused.
"""

import contextlib
import gc
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers")]  # for `from checks import ...` and `from small import ...`

ON_STUB = "DPT_KERNELS_ON_STUB" in os.environ  # tests/host: launches are looked at and not made, numbers are not asked for
ON_GPU = ON_STUB or (torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1")
if not ON_GPU:
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise pytest.UsageError("Triton was imported before tests/kernels set TRITON_INTERPRET=1: run `pytest tests/kernels` on its own")
    os.environ["TRITON_INTERPRET"] = "1"

# The same order of additions in every call of cuBLAS, whatever workspace is free: many tests compare bits. Read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The interpreter multiplies the raw bits of bfloat16: that dtype is tested on a GPU, and by compiling.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "far: tensors of more than 2^31 elements; on a GPU one at a time, with nothing beside them")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what takes the fixture ``far``; and spreads the compilations over the workers of -n. As they stand, tests that compile much are
    neighbours, and fall to one worker, for whom all the others wait at the end; and neighbours that share a kernel would compile it at the
    same moment. So whole models, with dozens of kernels a test, come first, then the tables' configurations, and within each the order is
    that of a checksum: mixed, the same in every worker and every run."""
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        if "far" in item.fixturenames:
            item.add_marker(pytest.mark.far)
    mixed = iter(sorted(ours, key=lambda item: (_cost(item.nodeid), zlib.crc32(item.nodeid.encode()))))
    items[:] = [next(mixed) if HERE in item.path.parents else item for item in items]


def _cost(name: str) -> int:
    return 0 if "test_fast.py" in name or "test_transformers.py" in name else 1 if "configuration" in name else 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config) -> None:
    """A worker is sent one test after the other, not a hundred at once: tests differ by more than a hundredfold in what they compile."""
    config.option.maxschedchunk = config.option.maxschedchunk or 1


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """A test that the rule refuses by a little is judged by several draws of its random numbers: see kernels/tools/parity.py. That it was
    shows as a warning."""
    try:
        return (yield)
    except AssertionError as error:
        from dpt.kernels.tools.parity import BeyondRule, judge_draws

        if ON_STUB or not isinstance(error, BeyondRule):
            raise
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        warnings.warn(judge_draws(lambda: pyfuncitem.obj(**arguments), error), stacklevel=1)
        return True


@pytest.fixture(autouse=True)
def forget() -> None:
    """No test goes by what was worked out in another, where something was put in the place of something."""
    from dpt.kernels import launch

    launch.forget_choices()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU in the interpreter."""
    return torch.device("cuda" if ON_GPU and not ON_STUB else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    """Every dtype that can be tested on this device."""
    return request.param


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 products are exact, PyTorch's too, whose convolutions would be TF32 by default: TF32 is a case that a test asks for. And
    cuDNN adds in one order, for many tests compare bits."""
    from dpt.kernels.tools.parity import (
        float32_products,  # not at the head: it imports Triton, for which TRITON_INTERPRET has to be set first
    )

    deterministic = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    with float32_products("ieee"):
        yield
    torch.backends.cudnn.deterministic = deterministic


@pytest.fixture(autouse=True)
def interpreter(monkeypatch, request) -> None:
    """Where a kernel asks for TF32, the interpreter multiplies what a tensor core would see of its operands; and it is quicker. Where
    tensors are large it watches integers."""
    if not ON_GPU:
        from emulation import let_integers_overflow, quicken, truncate_operands

        truncate_operands(monkeypatch)
        quicken(monkeypatch)
        if "far" not in request.fixturenames:
            let_integers_overflow(monkeypatch)


@pytest.fixture
def tf32(exact) -> Iterator[None]:
    """float32 products in TF32, ours and PyTorch's."""
    from dpt.kernels.tools.parity import float32_products

    with float32_products("tf32"):
        yield


@contextlib.contextmanager
def _without(monkeypatch: pytest.MonkeyPatch, unwanted: Callable[[str, dict[str, Any]], bool]) -> Iterator[None]:
    """All families' tables without the entries of which ``unwanted(kernel, entry)``; not on a GPU, whose tables are what is tested."""
    from dpt.kernels import launch

    for table in () if ON_GPU else map(launch.load_table, launch.TABLES):
        for kernel, entries in table.items():
            monkeypatch.setitem(table, kernel, [entry for entry in entries if not unwanted(kernel, entry)])
    launch.forget_choices()
    yield
    launch.forget_choices()


@pytest.fixture
def own_convolution(exact, monkeypatch) -> Iterator[None]:
    """3x3 convolutions in float32 are the kernel's, though the tables leave exact ones to cuDNN: on a GPU in TF32; in the interpreter
    exactly, which sees more: in TF32 a ReLU may fall to the other side, in the reference too, and the bound on gradients is wide.
    """
    from dpt.kernels.tools.parity import float32_products

    with (
        _without(monkeypatch, lambda kernel, entry: kernel == "conv3x3" and entry["config"]["backend"] == "cudnn"),
        float32_products("tf32" if ON_GPU else "ieee"),
    ):
        yield


@pytest.fixture
def exact_products(exact) -> Iterator[None]:
    """float32 products exact on a GPU too, in a file of `own_convolution`."""
    from dpt.kernels.tools.parity import float32_products

    with float32_products("ieee"):
        yield


# What `path` stands for: in the interpreter the family whose table is read, with the precision of float32 that reaches its entries with
# descriptors, or None for that in force; a GPU reads its own family's, in both precisions.
PATHS = {"ieee": (None, "ieee"), "tf32": (None, "tf32")} if ON_GPU else {"pointers": ("sm_80", None), "descriptors": ("sm_90", "tf32")}


@pytest.fixture(params=PATHS)
def path(request, exact, monkeypatch) -> Iterator[str]:
    """Both ways of loading: sm_80's table (pointers) and sm_90's (descriptors, float32 in TF32), in the interpreter; on a GPU, whose way is
    its own, both precisions of float32."""
    from dpt.kernels.tools.parity import float32_products, precision_in_force

    family, precision = PATHS[request.param]
    if ON_GPU and precision == "tf32" and _without_float32(request):
        pytest.skip("half precision is the same in both")
    if family:
        monkeypatch.setenv("DPT_KERNELS_FAMILY", family)
    with float32_products(precision or precision_in_force()):
        yield request.param


@pytest.fixture
def exact_path(path, monkeypatch) -> Iterator[str]:
    """`path`; but in the interpreter both ways multiply exactly, by the table's entries for TF32. See `own_convolution` for why."""
    from dpt.kernels.tools.parity import float32_products, precision_in_force

    with (
        _without(monkeypatch, lambda kernel, entry: entry["when"].get("precision") == "ieee"),
        float32_products(precision_in_force() if ON_GPU else "ieee"),
    ):
        yield path


def _without_float32(request) -> bool:
    names = request.fixturenames
    return "far" in names or "dtype" in names and request.getfixturevalue("dtype") != torch.float32


@pytest.fixture(autouse=True)
def seed(monkeypatch) -> None:
    """The same random numbers in every run, on a GPU too: those of the CPU, with which the tests pass in the interpreter. Whether a ReLU
    or a maximum is decided by rounding is up to the numbers."""
    torch.manual_seed(0)
    if ON_GPU:
        for name in ("randn", "rand", "randn_like", "rand_like"):
            monkeypatch.setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``make``, a function of random numbers, on the CPU and then copied to where they are wanted."""

    def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        like = args[0].device if args and isinstance(args[0], torch.Tensor) else None
        return make(*args, device="cpu", **options).to(device or like or torch.get_default_device())

    return made


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
    """Tensors beyond 2^31 elements: see checks.Far. After ``poison``, which would fill them. On a GPU nothing of the test before is left,
    nor of this one afterwards."""
    from checks import Far

    _free()
    yield Far(device, monkeypatch)
    _free()


def _free() -> None:
    """Give the GPU's memory back: also what a failed test's traceback holds."""
    if ON_GPU:
        sys.last_exc = sys.last_value = sys.last_traceback = None
        gc.collect()
        torch.cuda.empty_cache()
