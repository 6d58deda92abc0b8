"""Several processes of one command, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

DEADLINE = 300.0  # seconds


def started(processes: int, *words: str, restarts: int = 0) -> subprocess.Popen:
    """`python WORDS` so many times on this machine; where one dies all start again, up to so often."""
    how = ["--standalone", "--monitor-interval", "0.1", "--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "torch.distributed.run", *how, *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen) -> str:
    """What they printed; their errors are the assertion's."""
    output, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    return output


def of_rank(process: subprocess.Popen, rank: int) -> int | None:
    """The number of the process of a rank; None while there is none."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        try:
            if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
        except OSError:  # it has ended
            continue
    return None
