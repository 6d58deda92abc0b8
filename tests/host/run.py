"""What a GPU of each family would be asked to do, of the stub: `python tests/host/run.py --what models [--family sm_90] [--one-in 4]`.

    models   each different call that the named models make of the ops, or a draw of them, and whole models: inference, training, autocast
    sizes    two models, and every op by itself, over thirty sizes of pictures: what they compile
    parity   the tests of `tests/kernels`, with their shapes and dtypes; what they say about numbers, of which there are none, is ignored
    replays  each op by its plan, which is to launch what the op does
    ops      each op once (the default)

Prints what was launched, and ends with 1 if a launch was refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import pytest  # noqa: E402
import replays  # noqa: E402
import single_ops  # noqa: E402
import torch  # noqa: E402

from bench.cases import launches  # noqa: E402
from bench.harness import stub  # noqa: E402
from bench.harness.hollow import Hollow  # noqa: E402
from bench.harness.shrunk import shortened  # noqa: E402
from dpt.kernels import launch  # noqa: E402
from dpt.kernels.launch import written  # noqa: E402
from dpt.zoo import CONFIGS  # noqa: E402

# Sides in patches, of small pictures and large ones: even and odd, and tokens that 16 and 64 divide with and without the class token.
THIRTY = tuple(itertools.islice(itertools.product((2, 3, 5, 7, 15, 16), (3, 9, 12, 21, 32)), 30))
OTHER_RUNS = (
    launches.Run(torch.bfloat16),
    launches.Run(torch.float16),
    launches.Run(precision="tf32"),
    launches.Run(backward=True, autocast=torch.bfloat16),
    launches.Run(backward=True, statistics=True, autocast=torch.bfloat16),
    launches.Run(backward=True),
)


def again(seen: stub.Seen, calls: dict[launches.Call, str]) -> None:
    """Make calls again; one that is refused does not stop the others."""
    for call, name in calls.items():
        seen.where = f"{call.op} of {name}"
        try:
            call.again()
        except Exception as error:
            if not any(message.startswith(seen.where) for message in seen.errors):
                seen.errors.append(f"{seen.where}: {type(error).__name__}: {error}")


def models(gpu: stub.Stub, families: Sequence[str], one_in: int = 1) -> None:
    """The calls of the named models, at the gate's sizes, for each family one in so many at random; and each model whole, at a size of its
    own, on the first family, and the calls that it made there on the others."""
    seen, own = gpu.use(families[0]), dict[launches.Call, str]()
    for config, how in itertools.product(launches.launching(CONFIGS.values()), OTHER_RUNS):
        short, patch = shortened(config), config.encoder.patch_size
        model, seen.where = launches.model_of(short, how), f"{config.name} {how}"
        with Hollow(lambda op, arguments: own.setdefault(launches.Call.of(op, arguments), seen.where)):
            launches.run(model, how, config.encoder.fixed_size or (5 * patch, 13 * patch), 3)
    named = launches.named_calls()
    for family in families:
        drawn = {call: named[call] for call in random.sample(list(named), len(named) // one_in)}
        again(gpu.use(family), drawn if family == families[0] else {**own, **drawn})


def sizes(gpu: stub.Stub, families: Sequence[str]) -> None:
    """Models at sizes that are not the gate's, in the same specialisations; and each op, told apart by ``where``."""
    calls: dict[launches.Call, str] = {}
    for name in ("dpt-base-ade20k", "dpt-tiny-depth"):
        config = shortened(CONFIGS[name])
        on = [(1, (high * config.encoder.patch_size, wide * config.encoder.patch_size)) for high, wide in THIRTY[::3]]
        calls |= launches.calls(config, OTHER_RUNS[:1] + OTHER_RUNS[3:4], on)
    for family in families:
        seen = gpu.use(family)
        again(seen, calls)
        for (op, call), dtype in itertools.product(single_ops.CALLS.items(), launch.DTYPES):
            seen.forget()
            for number, (high, wide) in enumerate(THIRTY):
                seen.where = f"{op} {str(dtype).removeprefix('torch.')}, {'others' if number else 'first'}"
                with Hollow():
                    out = call(dtype, high, wide)
                    if out.requires_grad:
                        out.sum().backward()


def ops(gpu: stub.Stub, families: Sequence[str]) -> None:
    """The calls of one small model in inference and of another in training: between them, every op."""
    for name, how in (("dpt-tiny-scenes", OTHER_RUNS[0]), ("dpt-large-midas", OTHER_RUNS[3])):
        config = shortened(CONFIGS[name])
        calls = launches.calls(config, [how], launches.inputs(config, (1,))[:1])
        for family in families:
            again(gpu.use(family), calls)


class Numberless:
    """A plugin for the tests of `tests/kernels`: each runs hollow, on the stub, and fails only where a launch was refused. ``calls``: those
    of the ops that need no configuration but a table's."""

    def __init__(self, seen: stub.Seen):
        self.seen = seen
        self.calls: dict[launches.Call, str] = {}

    def called(self, op: str, arguments: tuple[Any, ...]) -> None:
        if not launch.overridden():
            self.calls.setdefault(launches.Call.of(op, arguments), self.seen.where)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        self.seen.where, errors = item.nodeid, len(self.seen.errors)
        try:
            with Hollow(self.called):
                yield
        except (pytest.skip.Exception, pytest.exit.Exception):
            raise
        except (Exception, pytest.fail.Exception):  # about numbers, or by a tool that does not go with the mode: neither is asked here
            pass
        if len(self.seen.errors) > errors:
            pytest.fail("; ".join(self.seen.errors[errors:]), pytrace=False)


def parity(gpu: stub.Stub, families: Sequence[str]) -> None:
    """The tests on the first family, and the calls that they made on the others.

    Not those of opcheck, which hands an op's real implementation tensors that are its arguments' bare memory.
    """
    seen = gpu.use(families[0])
    plugin, os.environ["DPT_KERNELS_ON_STUB"] = Numberless(seen), "1"
    files = [str(path) for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py")) if path.stem not in WITHOUT_OPS]
    chosen = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-m", "not far", "-k", "not opcheck", *files]
    code = pytest.main(chosen, plugins=[plugin])
    if code != 0:
        seen.errors.append(f"pytest ended with {int(code)}")
    for family in families[1:]:
        again(gpu.use(family), plugin.calls)


def replayed(gpu: stub.Stub, families: Sequence[str]) -> None:
    """Each op by its plan, and without; of each argument one tensor map is kept, so that each new address finds none."""
    written.MAPS = 1
    for family in families:
        seen = gpu.use(family)
        seen.where = "a plan"
        seen.errors += [f"{seen.where}: {difference}" for difference in replays.differences(seen)]


WITHOUT_OPS = ("test_adding_an_op", "test_fast", "test_transformers")  # files and commands; whole models
FAMILIES = ["sm_90", *sorted(set(launch.TABLES.values()) - {"sm_90"})]
WHAT = {"ops": ops, "models": models, "sizes": sizes, "parity": parity, "replays": replayed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", action="append", choices=FAMILIES, help="default: all")
    parser.add_argument("--what", default="ops", choices=list(WHAT))
    parser.add_argument("--one-in", type=int, default=1, help="of the models' calls, for each family")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one_in < 1:
        parser.error(f"--one-in {options.one_in}: it must be at least 1")
    families = options.family or FAMILIES
    with tempfile.TemporaryDirectory() as folder:
        try:
            gpu = stub.Stub(Path(folder))
        except stub.NoCompiler as error:
            print(error)
            return 3
        WHAT[options.what](gpu, families, **({"one_in": options.one_in} if options.what == "models" else {}))
    found = {family: gpu.compilers[family].seen for family in families}
    if options.json:
        options.json.write_text(json.dumps({family: seen.facts() for family, seen in found.items()}))
    for family, seen in found.items():
        counts = f"{len(seen.keys)} specialisations, {len(seen.borrowed)} with borrowed encodings, {len(seen.compiled)} compiled"
        print(f"{family}: {seen.launches} launches, {counts}, {len(seen.errors)} refused")
        print("".join(f"    {error}\n" for error in seen.errors[:20]), end="")
    return 1 if any(seen.errors for seen in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
