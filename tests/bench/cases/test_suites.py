"""What the suites measure."""

import importlib.util

import torch

from bench import ROOT
from bench.cases import models, steps, training
from bench.harness import records
from bench.harness.runner import Case


def _all_cases(device, dtypes) -> list[Case]:
    found = []
    for suite in records.SUITES:
        path = ROOT / "bench" / f"test_{suite}.py"
        spec = importlib.util.spec_from_file_location(f"bench_test_{suite}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found += module.cases(device, dtypes)
    return found


def test_the_promised_cases_are_there():
    """Blind spot: a case that was promised and dropped. Names, contenders, batches, ops and both ways of timing."""
    cases = _all_cases("cuda", (torch.bfloat16,))
    assert len({case.name for case in cases if case.suite == "kernels"}) == len([case for case in cases if case.suite == "kernels"])
    models_there = {(case.facts["model"], case.facts["batch"]) for case in cases if case.suite == "models"}
    names = ["dpt-base-ade20k", "dpt-large-midas", *(f"depth-anything-v2-{size}" for size in ("small", "base", "large"))]
    assert models_there >= {(name, batch) for name in names for batch in (1, 4, 16)}
    wanted = {"plain", "fast", "fast, CUDA graph", "plain, torch.compile", "transformers", "transformers, torch.compile", "mmsegmentation"}
    assert set(models.CONTENDERS) == wanted | {"ONNX Runtime", "OpenVINO"}
    theirs = {case.facts["model"]: case.contenders for case in cases if case.suite == "transformers"}
    assert theirs.keys() >= {*names[1:], "chmv2"} and set(theirs.values()) == {("transformers", "transformers, accelerated")}
    assert ("dpt-base-ade20k", 2) in {(case.facts["model"], case.facts["batch"]) for case in cases if case.suite == "training"}
    assert set(training.CONTENDERS) == {"plain", "fast"} and list(steps.STEPS)[0] == "plain float32"
    of_pictures = [case for case in cases if case.suite == "pictures"]
    assert {(case.facts["model"], case.facts["batch"], case.shape[2]) for case in of_pictures} == {
        (model, batch, height) for model in ("dpt-tiny-depth", "dpt-tiny-scenes") for batch in (1, 8) for height in (480, 1080, 3000)
    }
    assert all({"plain, end to end", "plain, network alone", "fast, end to end"} <= set(case.contenders) for case in of_pictures)
    of_ops = [case for case in cases if case.suite == "kernels"]
    assert {bool(case.replays) for case in of_ops} == {True, False}
    assert {case.facts["direction"] for case in of_ops} == {"forward", "forward+backward"}
    peers = {name for case in of_ops for name in case.contenders}
    assert peers >= {"eager", "fused", "SDPA cuDNN", "SDPA flash", "xformers", "eager, channels_last", "torch.compile"}


def test_what_was_recorded_is_still_a_case():
    """Blind spot: a case or contender under another name, with which no recorded run can be compared any more."""
    there = {(case.name, contender) for case in _all_cases("cpu", (torch.float32, torch.bfloat16)) for contender in case.contenders}
    recorded = {row.key for record in records.read_all().values() if record.device["kind"] == "cpu" for row in record.rows}
    assert recorded <= there
