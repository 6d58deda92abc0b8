"""`pytest bench/ --benchmark` measures; `pytest bench/` only checks that every case runs, once, at a toy size."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # a checkout that is not installed

from bench.harness import comparison, environment, measure, records, session  # noqa: E402
from bench.reporting import tables  # noqa: E402

BENCH = pytest.StashKey[session.Bench]()
AGAINST = pytest.StashKey[list[records.Record]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dpt benchmarks")
    add = group.addoption
    add("--benchmark", action="store_true", help="measure; without it each case only runs once, at a toy size")
    add("--device", help='"cpu", "cuda" or "cuda:1"; default: the GPU if there is one')
    add("--dtypes", help="float32,float16,bfloat16; default: float32 on a CPU, bfloat16 on a GPU")
    add("--only", metavar="EXPRESSION", help="a name filter: the same as -k")
    add("--without", metavar="NAME", action="append", default=[], help="leave out contenders with NAME in theirs; the baseline stays")
    add("--budget", type=float, metavar="SECONDS", help="what does not fit is skipped; default: 450 on a CPU, 420 on a GPU")
    add("--keep-freed-memory", action="store_true", help="on a CPU, keep what is freed: without what pages cost")
    add("--record", action="store_true", help="write bench/results/<device>-<what>.json")
    add("--record-to", metavar="FOLDER", type=Path, help="write them there, after every case: a run that is cut off loses nothing")
    add("--record-suffix", metavar="NAME", default="", help="write <device>-<what>-NAME.json, beside an earlier run")
    add("--against", metavar="FILE", action="append", default=[], help="compare ratios with a recorded run of this device")
    add("--margin", type=float, default=comparison.MARGIN, help="the loss of a ratio that --against allows; default 0.05")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "benchmark: settings of pytest-benchmark")
    if config.option.only:
        if config.option.keyword:
            raise pytest.UsageError("--only is -k under another name: give one of them")
        config.option.keyword = config.option.only
    benchmark = config.option.benchmark
    _check_options(config, benchmark)
    device = _device(config.option.device)
    try:
        dtypes = session.parse_dtypes(config.option.dtypes) if config.option.dtypes else session.DEFAULT_DTYPES[device.type]
        compared = [records.read(file) for file in config.option.against]
        facts = environment.device_facts(device)
        for file, record in zip(config.option.against, compared, strict=True):
            comparison.check_device(record.device, facts, file)
    except (ValueError, OSError) as error:
        raise pytest.UsageError(str(error)) from error
    budget = measure.Budget(session.DEFAULT_BUDGET[device.type] if config.option.budget is None else config.option.budget)
    config.stash[AGAINST] = compared
    keep = (config.option.record_to, config.option.record_suffix) if config.option.record_to else None
    asked = {"filter": config.option.keyword or "", "without": tuple(config.option.without)}
    kept = config.option.keep_freed_memory
    config.stash[BENCH] = session.Bench(device, dtypes, budget, toy=not benchmark, keep=keep, keep_freed_memory=kept, **asked)


def _check_options(config: pytest.Config, benchmark: bool) -> None:
    recording = config.option.record or config.option.record_to or config.option.record_suffix
    if (recording or config.option.against) and not benchmark:
        raise pytest.UsageError("--record and --against need --benchmark: without it nothing is measured")
    if benchmark and (hasattr(config, "workerinput") or config.getoption("dist", "no") != "no"):
        raise pytest.UsageError("--benchmark measures in one process: add -n 0")
    if benchmark and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise pytest.UsageError("TRITON_INTERPRET is set: nobody wants to know how fast the interpreter is")


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise pytest.UsageError(f"--device {name}: {error}") from error
    if device.type not in session.DEFAULT_BUDGET:
        raise pytest.UsageError(f"--device {name}: it must be cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: there is no CUDA device here")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        bench = metafunc.config.stash[BENCH]
        metafunc.parametrize("cell", bench.cells(metafunc.module.cases(bench.device.type, bench.dtypes)), ids=str)


def _cell(item: pytest.Item) -> session.Cell | None:
    return item.callspec.params.get("cell") if hasattr(item, "callspec") else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In order of importance, the contenders of a case together: what comes late is what the budget leaves out."""
    ours = [item for item in items if _cell(item) is not None]
    replay = config.stash[BENCH].replay
    for item in ours:
        item.add_marker(pytest.mark.benchmark(timer=replay.clock, group=_cell(item).case.name))
    ours.sort(key=lambda item: (_cell(item).case.importance, _cell(item).case.suite, _cell(item).case.name))
    items[:] = [item for item in items if _cell(item) is None] + ours


def pytest_collection_finish(session: pytest.Session) -> None:
    """After -k and the like: what is left takes part."""
    bench = session.config.stash[BENCH]
    unknown = [word for word in bench.without if not any(word in name for name in bench.names)]
    if unknown:
        raise pytest.UsageError(
            f"--without {unknown[0]}: no contender here has that in its name; there are {', '.join(sorted(bench.names))}"
        )
    bench.want(_cell(item) for item in session.items if _cell(item) is not None)


@pytest.fixture
def measured(request):
    """A function that measures a cell with its case and hands the durations to pytest-benchmark; skips or fails the test by its result."""
    bench = request.config.stash[BENCH]

    def measure_cell(cell: session.Cell) -> None:
        result = bench.result(cell)
        if isinstance(result, records.Skip):
            pytest.skip(result.reason)
        if result.status != "ok":
            pytest.fail(f"{result.contender}: {result.problem}", pytrace=False)
        if not bench.toy and request.config.pluginmanager.hasplugin("benchmark"):
            benchmark = request.getfixturevalue("benchmark")
            benchmark.extra_info.update(loss=result.loss, allowed=result.allowed, note=result.note, timing=result.timing)
            bench.replay.feed(benchmark, [value / 1000 for value in result.durations_ms])

    return measure_cell


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Compare with earlier runs, before the exit status is settled."""
    bench = session.config.stash.get(BENCH, None)
    if bench is None or bench.toy:
        return
    bench.comparisons = []
    for file, record in zip(session.config.option.against, session.config.stash[AGAINST], strict=True):
        lines, passed = comparison.lines(record, bench.rows.get(record.what, []), session.config.option.margin)
        bench.comparisons += [f"against {file}:", *lines]
        if not passed and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    bench = config.stash.get(BENCH, None)
    if bench is None or bench.toy or not (bench.rows or bench.skips):
        return
    write, section = terminalreporter.write_line, terminalreporter.section
    section("benchmarks")
    write(_conditions(bench))
    if not config.pluginmanager.hasplugin("benchmark"):
        write("pytest-benchmark is not installed (the extra `bench`): its JSON and its comparisons are left out")
    for suite in records.SUITES:
        if bench.rows.get(suite):
            write("")
            write(f"{suite}{': ' + tables.PUBLISHED if suite in ('models', 'training') else ''}")
            for line in tables.text_lines(suite, bench.rows[suite]):
                write(line)
    section("skipped, and why")
    for line in tables.skip_lines(skip for skips in bench.skips.values() for skip in skips):
        write(line)
    for line in getattr(bench, "comparisons", []):
        write(line)
    if config.option.record or config.option.record_to or config.option.record_suffix:
        for path in bench.write(config.option.record_to or records.RESULTS, config.option.record_suffix):
            write(f"wrote {path}")


def _conditions(bench: session.Bench) -> str:
    """Device, versions, clocks and rates in one line."""
    facts, found = environment.device_facts(bench.device), environment.versions()
    state = ", ".join(f"{name} {value}" for name, value in environment.state(bench.device).items())
    rates = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in bench.context.ceilings.items())
    return f"{environment.slug(facts)}, torch {found['torch']}, triton {found['triton']}; {state}; {rates}"
