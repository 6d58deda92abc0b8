"""What the op modules declare to be tuned: which entries of the tables it reaches, its candidates, and that its checks can fail."""

import dataclasses
import json

import checks
import pytest
import torch

from dpt.kernels import launch
from dpt.kernels.tools import compiler, spaces, tune, workload

FAMILIES = sorted(set(launch.TABLES.values()))
LINEAR = ("layernorm_linear", "linear_residual", "activation_input_gradient", "weight_gradient")
NO_MODEL_HAS = {kernel: ({"describable": False},) for kernel in LINEAR}


@pytest.fixture(scope="module")
def declared():
    return tune.workloads()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_entry_is_reached(family, declared):
    """No entry of a family's table is left without a workload that launches with it. Exempt is what no model has: sizes and addresses that
    no 16-byte copy fits, for which an entry of its own keeps the larger tiles' spills away."""
    exempt = {(kernel, json.dumps(when)) for kernel in NO_MODEL_HAS for when in NO_MODEL_HAS[kernel]}
    reached = {(b.kernel, json.dumps(b.parent)) for b in workload.buckets(declared, family) if b.when == b.parent}
    table = {(kernel, json.dumps(entry["when"])) for kernel, entries in launch.load_table(family).items() for entry in entries}
    assert table - reached == exempt & table


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates(family, declared):
    """Few, each once, the shipped one first; all of the entry's keys; descriptors only where there are some."""
    for found in workload.buckets(declared, family):
        keys = [json.dumps(candidate, sort_keys=True) for candidate in found.candidates]
        assert found.candidates[0] == found.shipped and len(set(keys)) == len(keys)
        assert 4 <= len(keys) <= 40, f"{found.kernel} {found.when}: {len(keys)} candidates"
        for candidate in found.candidates:
            assert family in workload.DESCRIPTOR_FAMILIES or not candidate.get("descriptor")
            if "backend" not in candidate:
                assert set(candidate) == set(found.shipped), f"{found.kernel}: {candidate}"


@pytest.mark.parametrize("family", FAMILIES)
def test_proposed_entries_fit_the_table(family, declared, monkeypatch):
    """With the proposed entries in the table, in the place where they are written, every workload is served by the entry it was tuned for,
    and the compile cases still reach every entry."""
    found = workload.buckets(declared, family)
    table = json.loads(json.dumps(launch.load_table(family)))
    for new in found:
        if new.when != new.parent:
            whens = [entry["when"] for entry in table[new.kernel]]
            table[new.kernel].insert(whens.index(new.parent), {"when": new.when, "config": new.shipped, "provenance": ""})
    launch.forget_choices()
    for kernel, entries in table.items():
        monkeypatch.setitem(launch.load_table(family), kernel, entries)
    try:
        for served in found:
            for work in served.workloads:
                used = {entry for case in work.record(family) for entry in case.used}
                assert (served.kernel, json.dumps(served.when)) in used, f"{work.name}: {served.when}"
        for op in spaces.ops():
            compiler.cases(op, family)
    finally:
        launch.forget_choices()


def test_what_costs_most_comes_first(declared):
    """Convolutions in half precision at once, no float32 before the last half, no gradient before the last inference."""
    found = workload.buckets(declared, "sm_90")
    stages = [(b.workloads[0].dtype == torch.float32, min(work.stage for work in b.workloads)) for b in found]
    assert found[0].kernel == "conv3x3" and stages == sorted(stages)


def test_what_is_chosen(declared):
    """The options leave what they say, in the same order: half-precision forward kernels are those that every inference runs."""
    found = workload.buckets(declared, "sm_90")
    assert tune.chosen(found, None, None) == found
    forward = tune.chosen(found, "forward", "half")
    assert forward == found[: len(forward)] and {"conv3x3", "attention_forward", "layernorm_linear"} <= {b.kernel for b in forward}
    assert not any("backward" in b.kernel for b in forward) and all(b.when.get("dtype") != "float32" for b in forward)
    single = tune.chosen(found, None, "float32")
    assert {id(b) for b in tune.chosen(found, None, "half")} | {id(b) for b in single} == {id(b) for b in found}
    assert 0 < len(tune.chosen(found, "backward", "float32")) < len(single) < len(found)


def test_a_candidate_of_a_kernel_that_is_not_launched(declared):
    """A declaration that tunes nothing is an error, not a silence."""
    odd = dataclasses.replace(declared[0], candidates={"nothing": [{}]})
    with pytest.raises(ValueError, match="has candidates of nothing, which sm_90 does not look up"):
        workload.buckets([odd], "sm_90")


def test_names_are_unique(declared):
    """A provenance names its workloads: two of one name would be one measurement."""
    names = [work.name for work in declared]
    assert len(set(names)) == len(names)


def toy_workloads():
    """Every declaration once; those that agree in all but their full sizes are one toy."""
    toys = {}
    for work in tune.workloads():
        dtype = torch.float16 if launch.INTERPRETED and work.dtype != torch.float32 else work.dtype
        sizes = {**work.sizes, **work.small}
        toys.setdefault((work.launcher.__name__, work.arguments.__name__, dtype, str(sizes)), (work, dtype))
    return list(toys.values())


@pytest.mark.parametrize(("work", "dtype"), [pytest.param(*toy, id=f"{toy[0].what} {toy[1]} {toy[0].small}") for toy in toy_workloads()])
def test_a_declaration_passes_right_launches_and_no_others(work, dtype, device, monkeypatch):
    """Run and check of every declaration: right outputs pass; one wrong, unwritten or missing element of any compared output fails."""
    monkeypatch.setenv(launch.INTERPRETED_FAMILY_VARIABLE, "sm_90")
    launched = []
    kept = dataclasses.replace(work, launcher=lambda **arguments: launched.append(work.launcher(**arguments)) or launched[0])
    trial = workload.Trial(kept, device, dtype, small=True)
    with workload.float32_products(work.precision):
        trial.check()
    outputs = workload._flat(launched[0])
    for index, (exact, _) in enumerate(trial.expected):
        for wrong in () if exact is None else damaged(outputs[index], exact):
            results = [*outputs[:index], wrong, *outputs[index + 1 :]]
            trial.workload = dataclasses.replace(work, launcher=lambda results=results, **_: results)
            with checks.refused(f"result {index}"):
                trial.check()


def damaged(out, exact):
    """The output with its last element off by a tenth of the largest, or unwritten; and one row short."""
    last = (-1,) * out.ndim
    values = (
        [exact.double().abs().max().item() / 10 + out[last].item(), float("nan")] if out.is_floating_point() else [out[last].item() + 1]
    )
    for value in values:
        copy = out.clone()
        copy[last] = value
        yield copy
    yield out[:-1]


def test_memory_is_poisoned_for_the_check_only(declared):
    """A launcher that writes nothing fails though the memory it got held the right result a moment ago; timing pays nothing for that."""
    work = dataclasses.replace(
        declared[0], arguments=lambda inputs: {}, sizes={}, small={}, launcher=lambda: torch.empty(3), reference=lambda: torch.ones(3)
    )
    trial = workload.Trial(work, "cpu", torch.float32)
    trial.expected = [(torch.ones(3, dtype=torch.float64), torch.ones(3))]
    with checks.refused("not finite"):
        trial.check()
    assert not torch.are_deterministic_algorithms_enabled()
