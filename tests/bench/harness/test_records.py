"""Files, what they were measured on, and the comparison of two of them."""

import json

import pytest
import torch
from made_up import CPU, GPU, record, row

from bench.harness import environment, records


def test_round_trip(tmp_path):
    """Blind spot: a field that is lost or changes its type on the way through JSON."""
    path = tmp_path / "made-up-models.json"
    before = record()
    records.write(before, path)
    assert records.read(path) == before
    assert list(tmp_path.iterdir()) == [path]  # no partial file is left
    text = path.read_text()
    assert sum(line.startswith('  {"case"') for line in text.splitlines()) == 3  # a row or skip a line: changes can be read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("commit"), "no field 'commit'"),
        (lambda c: c.update(extra=1), "unknown field 'extra'"),
        (lambda c: c["rows"][0].pop("p50_ms"), r"rows\[0\]: no field 'p50_ms'"),
        (lambda c: c["rows"][1].update(p50_ms="fast"), r"rows\[1\]: p50_ms is 'fast', it must be float"),
        (lambda c: c["rows"][0].update(status="fine"), "status is 'fine', it must be one of ok, failed, error"),
        (lambda c: c.update(what="dreams"), "what is 'dreams'"),
        (lambda c: c.update(schema=0), "not a benchmark record of schema 1"),
        (lambda c: c["skipped"][0].update(reason=3), "reason is 3, it must be str"),
    ],
)
def test_strict_schema(tmp_path, change, message):
    """Blind spot: a file edited by hand, or of another version, read as if it were whole."""
    path = tmp_path / "made-up-models.json"
    records.write(record(), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        records.read(path)


def test_what_is_written_keeps_the_schema(tmp_path):
    """Blind spot: a file that nobody can read again."""
    with pytest.raises(ValueError, match="status"):
        records.write(record(row(status="fine")), tmp_path / "x-models.json")
    assert not list(tmp_path.iterdir())


def test_other_files_are_left_alone(tmp_path):
    """Blind spot: the tuning command's outcomes, which lie in the same folder."""
    records.write(record(), tmp_path / "a-models.json")
    records.write(record(), tmp_path / "a-models-again.json")
    (tmp_path / "a-tuning.json").write_text("{}")
    assert list(records.read_all(tmp_path)) == ["a-models-again.json", "a-models.json"]


def test_names():
    """Blind spot: two devices with one name, or a name that is no file name."""
    assert environment.slug(GPU) == "made-up-gpu"
    assert environment.slug({"kind": "cuda", "name": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
    assert environment.slug(CPU) == "cpu-made-up-cpu-2-threads"
    assert records.file_name("gpu", "models", "again") == "gpu-models-again.json"


def test_nothing_personal():
    """Blind spot: the host, the user or a path in a file that is published."""
    import getpass
    import os
    import socket

    found = json.dumps([environment.device_facts(torch.device("cpu")), environment.versions(), environment.state(torch.device("cpu"))])
    assert socket.gethostname() not in found and os.sep + "home" not in found and f'"{getpass.getuser()}"' not in found


def test_nvidia_smi():
    """Blind spot: numbers as text, "[N/A]" as a number, an answer of another length."""
    state = environment.parse_nvidia_smi("1980, 2619, 1980, 700.00, 121.35, 41, P0, 570.86.15\n")
    assert state["sm_clock_mhz"] == 1980.0 and state["power_limit_w"] == 700.0 and state["temperature_c"] == 41.0
    assert state["performance_state"] == "P0" and state["driver"] == "570.86.15"
    assert environment.parse_nvidia_smi("[N/A], 1, 2, 3, 4, 5, P8, 1")["sm_clock_mhz"] is None
    assert "answered 2 values" in environment.parse_nvidia_smi("1, 2")["missing"]


def test_commit_of_this_checkout():
    """Blind spot: no commit in a file though git is there; results do not make a checkout dirty."""
    found = environment.commit()
    assert set(found) == {"commit", "dirty"} and (found["commit"] is None or len(found["commit"]) == 40)
