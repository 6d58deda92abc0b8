"""What a measurement was taken on and with: device, versions, commit, clocks. Nothing here names a person, a path or a host."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .. import ROOT
from .tools import tool

PACKAGES = ("torch", "triton", "transformers", "xformers", "mmsegmentation", "numpy", "pytest", "pytest-benchmark")
# What nvidia-smi is asked for: its field -> ours.
STATE = {
    "clocks.sm": "sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
    "clocks.max.sm": "largest_sm_clock_mhz",
    "power.limit": "power_limit_w",
    "power.draw": "power_draw_w",
    "temperature.gpu": "temperature_c",
    "pstate": "performance_state",
    "driver_version": "driver",
}


TOOLS = ("nvidia-smi", "nvcc", "ptxas", "gcc", "ncu", "compute-sanitizer", "cuobjdump", "git")


def _output(*command: str) -> str | None:
    """What a command printed; None if there is no such command or it failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> dict[str, Any]:
    """{"commit", "dirty"}: the commit of the checkout, and whether any file of its code differs from it. Results do not count."""
    head = _output("git", "rev-parse", "HEAD")
    if head is None:
        return {"commit": None, "dirty": None}
    changed = _output("git", "status", "--porcelain", "--untracked-files=all", "--", ".", ":!bench/results", ":!README.md")
    return {"commit": head, "dirty": bool(changed) if changed is not None else None}


def versions() -> dict[str, str | None]:
    """Versions of Python and of what takes part; None: not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = torch.__version__
    found["cuda"] = torch.version.cuda
    found["cudnn"] = str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None
    found["system"] = f"{platform.system()} {platform.machine()}"
    return found


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def device_facts(device: torch.device) -> dict[str, Any]:
    """What does not change during a run: kind, name, and what tells it from a device of the same name."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "kind": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return {
        "kind": "cpu",
        "name": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def slug(facts: dict[str, Any]) -> str:
    """The device in a file's name: "nvidia-h100-80gb-hbm3", "cpu-amd-epyc-2-threads"."""
    name = facts["name"] if facts["kind"] == "cuda" else f"cpu {facts['name']} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def same_device(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two files' ratios may be compared."""
    keys = ("kind", "name", "capability", "threads", "multiprocessors")
    return all(one.get(key) == other.get(key) for key in keys)


def state(device: torch.device) -> dict[str, Any]:
    """What changes during a run: clocks, power, temperature, load. What cannot be read is told in "missing"."""
    if device.type == "cuda":
        return _gpu_state(device)
    found: dict[str, Any] = {"load_average": round(os.getloadavg()[0], 2)}
    try:
        clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)]
    except OSError:
        clocks = []
    if clocks:
        found["cpu_clock_mhz"] = round(sum(clocks) / len(clocks))
    else:
        found["missing"] = "/proc/cpuinfo tells no clock"
    return found


def _gpu_state(device: torch.device) -> dict[str, Any]:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = ("-i", f"GPU-{uuid}") if uuid is not None else ()
    text = _output("nvidia-smi", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader,nounits", *chosen)
    return parse_nvidia_smi(text) if text else {"missing": "nvidia-smi is not here or failed: no clocks, power limit or temperature"}


def parse_nvidia_smi(text: str) -> dict[str, Any]:
    """The first line of nvidia-smi's answer to ``STATE``; numbers where they are numbers, None for "[N/A]"."""
    values = [value.strip() for value in text.splitlines()[0].split(",")]
    if len(values) != len(STATE):
        return {"missing": f"nvidia-smi answered {len(values)} values to {len(STATE)} questions"}
    return {name: _number(value) for name, value in zip(STATE.values(), values, strict=True)}


def _number(value: str) -> float | str | None:
    if value.startswith("[") or value == "N/A":
        return None
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else value


def main() -> int:
    """Print what this machine has: `python -m bench.harness.environment`. 0 with a CUDA device, 2 without."""
    found = torch.cuda.is_available()
    device = torch.device("cuda" if found else "cpu")
    facts = {**device_facts(device), **versions(), **commit(), **state(device), "cores": len(os.sched_getaffinity(0))}
    for name, value in facts.items():
        print(f"{name}: {value}")
    print("tools:", ", ".join(f"{name} {'yes' if tool(name) else 'no'}" for name in TOOLS))
    packages = {f"{item.metadata['Name']} {item.version}" for item in importlib.metadata.distributions()}
    print("packages:", ", ".join(sorted(packages, key=str.lower)))
    print(_output(tool("nvidia-smi") or "nvidia-smi") or "nvidia-smi is not here or failed")
    facts = device_facts(device)
    print(f"{facts['name']}, {facts['capability']}; torch {torch.__version__}, CUDA {torch.version.cuda}, triton {versions()['triton']}")
    return 0 if found else 2


if __name__ == "__main__":
    sys.exit(main())
