"""Two recorded runs, compared by their ratios."""

import dataclasses

import pytest
from made_up import CPU, GPU, record, row

from bench import against
from bench.harness import comparison, records
from bench.harness.measure import Ratio


def slower(factor, spread=0.05):
    return record(row("plain", 1.0, 0.0), row("fast", 2.0 * factor, spread))


@pytest.mark.parametrize(
    ("factor", "spread", "passes"),
    [
        (1.0, 0.05, True),
        (1.5, 0.05, True),  # faster is no regression
        (0.96, 0.05, True),  # 4 % slower, margin 5 %
        (0.80, 0.05, False),  # 20 % slower
        (0.80, 0.30, True),  # 20 % slower, by a run whose spread reaches up to what was recorded
    ],
)
def test_regression_past_the_margin_and_the_spread(factor, spread, passes):
    """Blind spot: noise that fails, and a loss beyond it that does not."""
    lines, passed = comparison.lines(slower(1.0), slower(factor, spread).rows, margin=0.05)
    assert passed == passes
    assert any(line.startswith("REGRESSED") for line in lines) == (not passes)


def test_absolute_times_do_not_matter():
    """Blind spot: another clock, or a busy machine, taken for a regression."""
    halved = [dataclasses.replace(r, p50_ms=2 * r.p50_ms, durations_ms=[2 * d for d in r.durations_ms]) for r in slower(1.0).rows]
    assert comparison.lines(slower(1.0), halved, margin=0.0)[1]


def test_what_is_not_measured_is_told():
    """Blind spot: a contender that has vanished passes in silence."""
    then = record(row("plain", 1.0, 0.0), row("fast"), row("peer"))
    lines, passed = comparison.lines(then, [row("plain", 1.0, 0.0), row("fast")], margin=0.05)
    assert passed and "not measured now: model 64x64, batch 1, float32: peer" in lines
    assert lines[-1] == "1 ratios compared, 0 regressed, 1 not measured now"
    assert not comparison.lines(then, [row("plain", 1.0, 0.0)], margin=0.05)[1]  # nothing compared is no pass


def test_another_device_is_refused():
    """Blind spot: a GPU's ratios held against a CPU's, or 2 threads against 16."""
    with pytest.raises(comparison.OtherDevice, match="do not compare"):
        comparison.check_device(CPU, GPU)
    with pytest.raises(comparison.OtherDevice):
        comparison.check_device(CPU, {**CPU, "threads": 16})
    comparison.check_device(GPU, dict(GPU))


def test_two_runs_compared(tmp_path, capsys):
    """Blind spot: agreement claimed of runs that are apart, or of runs that share nothing."""
    made = {"first": slower(1.0), "same": slower(1.02), "apart": slower(0.8), "empty": record(row("plain", 1.0, 0.0))}
    for name, run in made.items():
        records.write(run, tmp_path / f"{name}-models.json")
    paths = [str(tmp_path / f"{name}-models.json") for name in made]
    assert against.main(paths[:2]) == 0 and "agrees: " in capsys.readouterr().out
    assert against.main([paths[0], paths[2]]) == 1 and "DIFFERS: " in capsys.readouterr().out
    assert against.main([paths[0], paths[3]]) == 1 and "0 ratios" in capsys.readouterr().out


def test_recorded_repetitions_agree():
    """The evidence itself: a second run that is recorded beside a first must agree with it on every ratio."""
    found = records.read_all()
    pairs = [(name.replace("-again", ""), name) for name in found if name.endswith("-again.json")]
    for first, again in pairs:
        comparisons, _ = comparison.compare(found[first].rows, found[again].rows)
        apart = [str(comparison) for comparison in comparisons if not comparison.agrees]
        assert comparisons and not apart, f"{first} and {again}: {apart}"
    if not pairs:
        pytest.skip("no second run is recorded")


def test_ratio_of_a_failed_row_is_none():
    """Blind spot: comparing what did not pass its gate."""
    assert comparison.compare([row(status="failed")], [row()]) == ([], [])
    assert Ratio(1, 1, 1).agrees(Ratio(1, 1, 1))


def test_a_margin_is_stated():
    """Blind spot: a default margin that nobody set, or that allows anything."""
    assert 0 < comparison.MARGIN <= 0.1
