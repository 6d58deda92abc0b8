"""How a case is measured: clocks and rounds, one case's contenders, a run under pytest, its files, and the machine."""
