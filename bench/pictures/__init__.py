"""The pictures of docs/: one module each, whose `draw()` makes it. `python -m bench.pictures [NAME ...]` writes docs/NAME.png."""
