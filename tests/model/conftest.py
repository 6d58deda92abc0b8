"""Makes the helpers beside the tests importable; one thread a test, for the machines with two cores."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
