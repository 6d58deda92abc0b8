"""Recorded runs that nobody measured, of devices that do not exist."""

from bench.harness import records

CPU = {"kind": "cpu", "name": "Made-up CPU", "capability": "AVX2", "threads": 2}
GPU = {"kind": "cuda", "name": "Made-up GPU", "capability": "9.0", "multiprocessors": 132, "memory_bytes": 1}


def row(contender="fast", speedup=2.0, spread=0.1, **changes) -> records.Row:
    """A row that passed its gate, `speedup` times as fast as its baseline."""
    fields = {
        "case": "model 64x64, batch 1, float32",
        "contender": contender,
        "baseline": "plain",
        "dtype": "float32",
        "shape": [1, 3, 64, 64],
        "status": "ok",
        "timing": "wall clock",
        "facts": {"model": "model", "batch": 1},
        "durations_ms": [10.0 / speedup] * 5,
        "p20_ms": 9.0 / speedup,
        "p50_ms": 10.0 / speedup,
        "p80_ms": 11.0 / speedup,
        "speedup": speedup,
        "speedup_low": speedup - spread,
        "speedup_high": speedup + spread,
        "per_second": 100.0 * speedup,
        "peak_memory_bytes": 1_500_000_000,
        "flops": 1_000_000,
        "roofline_share": 0.25,
        "loss": 1e-7,
        "allowed": 3e-7,
        "difference": 2e-7,
    }
    return records.Row(**{**fields, **changes})


def record(*rows, what="models", device=CPU, **changes) -> records.Record:
    """A recorded run with these rows; by default plain and fast."""
    fields = {
        "what": what,
        "device": dict(device),
        "versions": {"torch": "2.13.0", "triton": "3.7.1", "transformers": None},
        "commit": "0123456789abcdef",
        "dirty": False,
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 12.0,
        "options": {"dtypes": ["float32"]},
        "state": {"before": {"load_average": 0.1}, "after": {"load_average": 2.0}},
        "ceilings": {"gemm_float32_flop_per_second": 1e11},
        "memory": "peak",
        "rows": list(rows) or [row("plain", 1.0, 0.0), row()],
        "skipped": [records.Skip("model 64x64, batch 16, float32", "", "does not fit")],
    }
    return records.Record(**{**fields, **changes})
