"""The project's benchmarks: `pytest bench/ --benchmark`, from a checkout. README.md here says what is measured and how."""
