"""Pages and charts from recorded files, and the check that they agree."""

import re

import pytest
from made_up import GPU, record, row

from bench import ROOT, report
from bench.harness import records
from bench.reporting import charts, pages, tables

PAGE = f"# Title\n\nBefore.\n\n{pages.BEGIN}\n{pages.END}\n\nAfter.\n"


@pytest.fixture
def folder(tmp_path):
    """Both pages with the markers, and one recorded GPU run."""
    records.write(record(device=GPU), tmp_path / "results" / "made-up-models.json")
    for page in (tmp_path, tmp_path / "results"):
        (page / "README.md").write_text(PAGE)
    return tmp_path


def run(folder, *arguments):
    return report.main([*arguments, "--results", str(folder / "results"), "--readme", str(folder / "README.md")])


def tables_of(folder):
    return (folder / "results" / "README.md").read_text()


def test_from_a_file_to_its_page(folder):
    """Blind spot: a table that lacks a row or a column, or text outside the markers that is touched."""
    assert run(folder, "--check") == 1
    assert run(folder) == 0
    text = tables_of(folder)
    assert text.startswith("# Title\n\nBefore.\n") and text.endswith("\nAfter.\n")
    header, rule, plain, fast = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in (header, rule, plain, fast)}) == 1
    for shown in ("fast", "2.00 [1.90, 2.10]", "200", "1.5", "25 %", "2.0e-07", "4.5", "5.5"):
        assert f"| {shown} " in fast, shown
    for condition in ("torch 2.13.0", "commit 0123456789", "0.1 load average", "wall clock", "1 were skipped"):
        assert condition in text
    assert (folder / "results" / "made-up-models.svg").is_file()
    assert run(folder, "--check") == 0


def test_a_part_is_called_one(folder):
    """Blind spot: a filtered run presented as the whole suite; an older file, always of the whole, called a part."""
    run(folder)
    assert "part" not in tables_of(folder) + (folder / "README.md").read_text()
    options = {"dtypes": ["bfloat16"], "filter": "not batch-4", "without": ["torch.compile"], "cells": [36, 84]}
    records.write(record(device=GPU, options=options), folder / "results" / "made-up-models.json")
    run(folder)
    text = tables_of(folder)
    assert "only a part: 36 of 84 rows, only `not batch-4`" in (folder / "README.md").read_text()
    assert "## Whole models, Made-up GPU (a part of the suite)" in text
    assert "**Only a part of the suite was asked for**: 36 of 84 rows, only `not batch-4`, without torch.compile." in text
    records.write(record(device=GPU, options={**options, "cells": [84, 84]}), folder / "results" / "made-up-models.json")
    run(folder)
    assert "part" not in tables_of(folder) + (folder / "README.md").read_text()


def test_a_second_run_changes_nothing(folder):
    """Blind spot: an update that never settles, or draws anew what is current."""
    run(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(folder) == 0
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("disagree", "message"),
    [
        (lambda f: _edit(f / "results" / "README.md", "| 200 |", "| 900 |"), "results/README.md does not show"),
        (lambda f: _edit(f / "README.md", "| 2.00 ", "| 9.00 "), "README.md does not show"),
        (lambda f: records.write(record(row("plain", 1.0), row("fast", 3.0)), f / "results" / "made-up-models.json"), "shows other data"),
        (lambda f: (f / "results" / "made-up-models.svg").unlink(), "is missing"),
        (lambda f: (f / "results" / "made-up-models.json").unlink(), "belongs to no recorded file"),
        (lambda f: _edit(f / "README.md", pages.END, ""), "README.md: it needs the line"),
        (lambda f: (f / "results" / "README.md").unlink(), "results/README.md"),
        (lambda f: (f / "results" / "made-up-steps.json").write_text("{}"), "not a benchmark record"),
    ],
)
def test_disagreement_fails(folder, capsys, disagree, message):
    """Blind spot: a figure in the README, or a chart, that no file shows."""
    run(folder)
    disagree(folder)
    assert run(folder, "--check") == 1
    output = capsys.readouterr()
    assert message in output.out + output.err


def test_a_chart_is_judged_by_its_data(folder):
    """Blind spot: another matplotlib or font fails the check. Other pixels with the same data pass it."""
    run(folder)
    _edit(folder / "results" / "made-up-models.svg", "</svg>", "<!-- drawn elsewhere --></svg>")
    assert run(folder, "--check") == 0


def test_without_a_gpu_run_the_readme_says_so(folder):
    """Blind spot: a CPU's numbers that pass for the kernels', and a shared CPU's times where only ratios mean something."""
    algebra = record(row("plain", 1.0), row(note="PyTorch algebra, no kernels on this device"))
    records.write(algebra, folder / "results" / "made-up-models.json")
    run(folder)
    text, chart = tables_of(folder), (folder / "results" / "made-up-models.svg").read_text()
    assert pages.NO_GPU in text and pages.NO_GPU in (folder / "README.md").read_text() and "2 threads" in text
    assert "| fast (PyTorch algebra) | 2.00 [1.90, 2.10] | 1.5 | 25 % | 2.0e-07 |" in text and " ms" not in text
    assert "fast (PyTorch algebra)" in chart and "times as fast as the first" in chart and "per second" not in chart
    records.write(record(device=GPU), folder / "results" / "gpu-models.json")
    run(folder)
    text = tables_of(folder)
    assert pages.NO_GPU not in text + (folder / "README.md").read_text() and text.index("Made-up GPU") < text.index("Made-up CPU")


def test_without_any_run(folder):
    """Blind spot: an empty table."""
    (folder / "results" / "made-up-models.json").unlink()
    assert run(folder) == 0
    assert pages.NOTHING in tables_of(folder) and pages.NOTHING in (folder / "README.md").read_text()


def test_what_failed_its_gate_has_no_numbers(folder):
    """Blind spot: a time beside a wrong result."""
    failed = row("quick", status="failed", problem="off by 1.00e+00 of the largest value, allowed 1.00e-06", p50_ms=None)
    records.write(record(row("plain", 1.0), failed), folder / "results" / "made-up-models.json")
    run(folder)
    line = next(line for line in tables_of(folder).splitlines() if "quick" in line)
    assert "FAILED: off by 1.00e+00" in line and not re.search(r"\| \d", line)
    assert "quick" not in [row.contender for row in charts.charted_rows(records.read(folder / "results" / "made-up-models.json"))]


def test_kernels_stand_beside_the_best_of_their_peers(folder):
    """Blind spot: a fused op that shines beside the slowest; a peer that failed its gate taken for the best."""
    ours = row("fused", 4.0, p50_ms=2.5, durations_ms=[2.0, 2.5, 2.5], bytes=5_000_000, note="PyTorch algebra, no kernel on this device")
    peers = [row("eager", 1.0), row("SDPA flash", 5.0, p50_ms=2.0, durations_ms=[2.0, 2.0, 2.0])]
    wrong = row("quick", status="failed", problem="off by 1.0", p50_ms=None)
    records.write(record(peers[0], ours, peers[1], wrong, what="kernels", device=GPU), folder / "results" / "made-up-kernels.json")
    run(folder)
    [line] = [line for line in tables_of(folder).splitlines() if "SDPA" in line]
    assert "| fused (PyTorch algebra) | 2.5 | SDPA flash | 2 | 0.80 [0.78, 1.02] | 0.0004 | 2 | 25 % | 2.0e-07 |" in line


def test_a_second_run_is_evidence_and_no_row(folder):
    """Blind spot: every figure twice; a second run that disagrees and is told to agree."""
    records.write(record(row("plain", 1.0), row("fast", 2.1)), folder / "results" / "made-up-models-again.json")
    run(folder)
    assert "| 2.10 [" not in tables_of(folder) + (folder / "README.md").read_text()
    assert [path.name for path in (folder / "results").glob("*.svg")] == ["made-up-models.svg"]
    assert "agree on 1 of the 1 ratios" in tables_of(folder)
    records.write(record(row("plain", 1.0), row("fast", 3.0)), folder / "results" / "made-up-models-again.json")
    run(folder)
    assert "agree on 0 of the 1 ratios" in tables_of(folder)


def test_the_gain_is_one_table(folder):
    """Blind spot: a memory ratio upside down, peers among ours, a contender without the training step's, a wrong result's numbers; a CPU's
    rows beside a GPU's."""
    fast = row("fast", 2.0, peak_memory_bytes=750_000_000)
    broken = row("fast, CUDA graph", status="failed", problem="off by 1.0", peak_memory_bytes=None)
    training = record(row("plain", 1.0), row("fast", 1.5), what="training", device=GPU)
    records.write(record(row("plain", 1.0), fast, row("transformers"), broken, device=GPU), folder / "results" / "made-up-models.json")
    records.write(training, folder / "results" / "made-up-training.json")
    records.write(record(row("plain", 1.0), row("fast", 7.0)), folder / "results" / "cpu-models.json")
    run(folder)
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("|")][2:]
    assert lines == [
        "| model 64x64, batch 1, float32 | fast | 2.00 [1.90, 2.10] | 0.50 |",
        "|  | fast, CUDA graph | FAILED: off by 1.0 |  |",
        "| model 64x64, batch 1, float32, training step | fast | 1.50 [1.40, 1.60] | 1.00 |",
    ]
    assert "Made-up GPU. All that was recorded" in (folder / "README.md").read_text()


def _luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("background", ["#ffffff", "#0d1117"])
@pytest.mark.parametrize("colour", [charts.INK, charts.PLAIN, charts.FAST, charts.PEER])
def test_legible_on_light_and_dark(colour, background):
    """Blind spot: a chart made for one background. WCAG's contrast for graphics is 3."""
    one, other = sorted((_luminance(colour), _luminance(background)))
    assert (other + 0.05) / (one + 0.05) >= 3


def test_the_chart_is_transparent_and_uses_these_colours(folder):
    """Blind spot: matplotlib's black text or white ground in a chart whose colours were checked."""
    run(folder)
    svg = (folder / "results" / "made-up-models.svg").read_text()
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
    assert charts.FAST in used and charts.INK in used
    assert used <= {charts.INK, charts.PLAIN, charts.FAST, charts.PEER}


@pytest.mark.parametrize(("value", "text"), [(None, ""), (12345.6, "12346"), (12.345, "12.3"), (0.0123, "0.0123"), (0.00123, "0.0012")])
def test_milliseconds(value, text):
    """Blind spot: an exponent, or a time rounded to nothing."""
    assert tables.milliseconds(value) == text


def test_skips_say_why():
    """Blind spot: a skip without its reason, or a reason without what it skipped."""
    skips = [records.Skip("a", "", "no GPU"), records.Skip("b", "peer", "not installed"), records.Skip("c", "graph", "no GPU")]
    assert tables.skip_lines(skips) == ["no GPU:", "    a", "    c: graph", "not installed:", "    b: peer"]


def test_the_committed_pages_agree_with_the_results():
    """The check that CI runs: pages and charts show what bench/results holds, and the page beside it links to what is there."""
    if not records.read_all():
        pytest.skip("no run has been recorded")
    assert report.problems(records.RESULTS, ROOT / "README.md") == []
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (records.RESULTS / "README.md").read_text())
    assert links and all((records.RESULTS / link).exists() for link in links)
