"""The project's benchmarks: `pytest bench/ --benchmark`, from a checkout. README.md here says what is measured and how."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the checkout
