"""Several processes of one command, as torchrun starts them."""

import os
import subprocess
import sys


def command(processes: int, *words: str) -> list[str]:
    """What starts `python WORDS` so many times on this machine, on a port of its own."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *words]


def started(processes: int, *words: str, **options) -> subprocess.Popen:
    """In a session of its own, so that a signal can reach all of its processes."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.Popen(
        command(processes, *words),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def finished(processes: int, *words: str, **options) -> str:
    """What they print; their errors are the assertion's."""
    process = started(processes, *words, **options)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output
