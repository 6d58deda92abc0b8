"""What the processes of one test run have in common."""

import os
from pathlib import Path

from bench.cases.launches import CALLS_VARIABLE


def shared_folder(tmp_path_factory) -> Path:
    """A folder of this run, the same in each of xdist's processes."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def sharing_calls(tmp_path_factory) -> dict[str, str]:
    """An environment in which a process that wants the named models' calls takes what another of this run has found."""
    return {**os.environ, CALLS_VARIABLE: str(shared_folder(tmp_path_factory) / "named-calls.pickle")}
