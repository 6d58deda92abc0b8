"""Compile every shipped configuration for every architecture, without a GPU, and read what came out.

    python -m dpt.kernels.tools.compiler [--kernel attention] [--cases bench.cases.launches] [--arch sm_90] [--draw 8] [--afresh] [--write]

Each op's space, ``spaces/<op>.py``, gives its launches by ``compile_cases(family)`` (``launch.record``), and so does any other module named
by ``--cases``; Triton compiles them for the family's architecture, and cuobjdump and nvdisasm, which come with Triton, read registers,
stack and instructions off the binary. A case fails on spills, on serialised warpgroup MMAs, on more shared or tensor memory than the
architecture has, and on missing tensor-core instructions or asynchronous copies. sm_86 is compiled only when asked for: it runs the
configurations of sm_89, whose shared memory it has, with the instructions of sm_80.

What is recorded (``ledger``) for a case's key is not compiled again, but for ``--draw`` of them a module, drawn at random over the
families, whose facts have to come out as they are recorded; ``--afresh`` compiles everything. ``--write`` writes the record and the tables
of ``kernels/compiled-code/``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import launch
from . import ledger, spaces

TABLES = ledger.FOLDER
# The tables in the repository were made by this version; another's code differs, and so do its registers.
TABLE_TRITON = "3.7.1"
KB = 1024


@dataclass(frozen=True)
class Architecture:
    """What limits a launch, from the CUDA programming guide's table of compute capabilities. Bytes, warps and CTAs per SM or CTA."""

    shared_per_cta: int
    shared_per_sm: int
    warps_per_sm: int
    ctas_per_sm: int
    tensor_core: str

    registers_per_sm = 65536
    tensor_memory_columns = 512
    reserved_shared_per_cta = 1 * KB


ARCHITECTURES = {
    "sm_80": Architecture(163 * KB, 164 * KB, 64, 32, "HMMA"),
    "sm_86": Architecture(99 * KB, 100 * KB, 48, 16, "HMMA"),
    "sm_89": Architecture(99 * KB, 100 * KB, 48, 24, "HMMA"),
    "sm_90": Architecture(227 * KB, 228 * KB, 64, 32, "HGMMA"),
    "sm_100": Architecture(227 * KB, 228 * KB, 64, 32, "UTCHMMA"),
    "sm_120": Architecture(99 * KB, 100 * KB, 48, 24, "HMMA"),
}
DEFAULT_FAMILIES = tuple(family for family in ARCHITECTURES if family != "sm_86")
INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "UTMALDG", "LDGSTS", "MUFU", "FFMA", "STL", "LDL")


@dataclass(frozen=True)
class Report:
    """What the binary of one case shows. ``shared`` in bytes, ``tensor_memory`` in columns, ``instructions`` static counts."""

    name: str
    family: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    tensor_memory: int
    serialised: bool
    instructions: dict[str, int]
    problems: tuple[str, ...] = ()
    key: str = ""

    @property
    def ctas_per_sm(self) -> int:
        """CTAs that fit on an SM by registers (allocated by the warp in units of 256), shared memory, warps and slots."""
        limits = ARCHITECTURES[self.family]
        registers = self.warps * -(-self.registers * 32 // 256) * 256
        fits = [
            limits.registers_per_sm // registers,
            limits.shared_per_sm // (self.shared + limits.reserved_shared_per_cta),
            limits.warps_per_sm // self.warps,
            limits.ctas_per_sm,
        ]
        if self.tensor_memory:
            fits.append(limits.tensor_memory_columns // self.tensor_memory)
        return min(fits)


class _CompileOnly:
    """Stands in for Triton's CUDA driver: compiles for one target, launches nothing. Devices beyond FORGETFUL compile nothing either."""

    FORGETFUL = 1000

    def __init__(self, capability: int, forgetful: bool = False):
        self.capability, self.device = capability, capability + self.FORGETFUL * forgetful

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextlib.contextmanager
def _compiling_for(family: str, forgetful: bool = False) -> Iterator[_CompileOnly]:
    """Triton compiles for ``family`` instead of the machine's own GPU."""
    launching = driver.active if torch.cuda.is_available() else None
    target = _CompileOnly(int(family.removeprefix("sm_")), forgetful)
    driver.set_active(target)
    try:
        yield target
    finally:
        if launching is not None:
            driver.set_active(launching)


def key_of(case: launch.CompileCase) -> str:
    """The case's key in the record; nothing is compiled."""
    with _compiling_for(case.family, forgetful=True) as target:
        return ledger.key_asked_for(lambda: case.function.warmup(*case.args, grid=(1,), **case.kwargs), target.capability)


def compiled(case: launch.CompileCase, afresh: bool = False) -> tuple[Any, str]:
    """Triton's compiled kernel and what ptxas said; it says nothing if the binary came from Triton's cache, unless ``afresh``."""
    said, knobs = io.StringIO(), triton.knobs
    with _compiling_for(case.family) as target:
        if afresh:
            case.function.device_caches.pop(target.device, None)
        with contextlib.redirect_stdout(said), knobs.nvidia.scope(), knobs.compilation.scope():
            knobs.nvidia.dump_ptxas_log = True
            knobs.compilation.always_compile = afresh
            kernel = case.function.warmup(*case.args, grid=(1,), **case.kwargs)
    return kernel, said.getvalue()


def tool(name: str, *arguments: str) -> str:
    """What one of the programs that come with Triton says: cuobjdump, nvdisasm."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _disassemble(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """(registers, stack bytes, instruction -> static count) of a binary that holds one kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
        code = tool("nvdisasm", "-c", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    counts = {name: len(re.findall(rf"\s{name}(?=[.\s])", code)) for name in INSTRUCTIONS}
    return int(registers), int(stack), counts


def _cache(cubin: bytes) -> Path:
    """Where the facts about this very binary are kept; the parser's own source is part of the key."""
    key = hashlib.sha256(cubin + Path(__file__).read_bytes()).hexdigest()
    return Path(triton.knobs.cache.dir) / "dpt-compiled" / f"{key}.json"


def facts(case: launch.CompileCase) -> ledger.Facts:
    """Compile ``case`` for its family's architecture and read off the binary what the gates and the launcher need to know.

    ``parameters``: of the kernel's entry point; ``descriptors``: how the launcher has to encode each tensor map.
    """
    kernel, said = compiled(case)
    cache = _cache(kernel.asm["cubin"])
    if cache.exists():
        found = json.loads(cache.read_text())
    else:
        if "ptxas info" not in said:
            kernel, said = compiled(case, afresh=True)
        registers, stack, counts = _disassemble(kernel.asm["cubin"])
        serialised = re.search(r"C75\d\d|wgmma.*serialized", said) is not None
        found = {"registers": registers, "stack": stack, "instructions": counts, "serialised": serialised}
        cache.parent.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(found))
        partial.replace(cache)
    metadata = kernel.metadata
    return {
        "kernel": case.function.__name__,
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        **found,
        "shared": metadata.shared,
        "tensor_memory": metadata.tmem_size or 0,
        "parameters": kernel.asm["ptx"].split(".visible .entry")[1].split(")")[0].count(".param ."),
        "descriptors": _encodings(kernel),
    }


def _encodings(kernel: Any) -> list[dict[str, Any]]:
    """How each tensor map is encoded, with the ``type`` of the descriptor it is of: "tensordesc<bf16[1, 8, 16, 64]>"."""
    types = [kind for kind in kernel.src.signature.values() if isinstance(kind, str) and kind.startswith("tensordesc")]
    encodings = getattr(kernel.metadata, "tensordesc_meta", None) or []
    return [{"type": kind, **encoding} for kind, encoding in zip(types, encodings, strict=bool(encodings))]


def report(case: launch.CompileCase, found: ledger.Facts, key: str = "") -> Report:
    """The facts about a case's binary, held to the gates."""
    of_binary = {name: found[name] for name in Report.__dataclass_fields__ if name in found}
    counts = {**dict.fromkeys(INSTRUCTIONS, 0), **found["instructions"]}
    made = Report(**{**of_binary, "name": case.name, "family": case.family, "instructions": counts, "key": key})
    return replace(made, problems=tuple(problems(case, made)))


def measure(case: launch.CompileCase) -> Report:
    """Compile ``case`` for its family's architecture and report on the binary."""
    return report(case, facts(case))


def problems(case: launch.CompileCase, report: Report) -> Iterable[str]:
    """What is wrong with the compiled case, a sentence each; nothing if all is well."""
    limits, counts = ARCHITECTURES[case.family], report.instructions
    if report.stack or counts["STL"] or counts["LDL"]:
        yield f"spills: {report.stack} bytes of stack, {counts['STL']} stores, {counts['LDL']} loads"
    if report.serialised:
        yield "ptxas serialised the warpgroup MMAs (C7510 to C7519)"
    if report.shared > limits.shared_per_cta:
        yield f"{report.shared} bytes of shared memory, the limit is {limits.shared_per_cta}"
    if report.tensor_memory > limits.tensor_memory_columns:
        yield f"{report.tensor_memory} columns of tensor memory, the limit is {limits.tensor_memory_columns}"
    tensor_core = limits.tensor_core if case.tensor_cores is True else case.tensor_cores
    if tensor_core and not counts[tensor_core]:
        yield f"no {tensor_core} instructions"
    descriptors = any(isinstance(arg, TensorDescriptor) for arg in case.args)
    copy = "UTMALDG" if descriptors else "LDGSTS"
    if case.async_copies and not counts[copy]:
        yield f"no asynchronous copies ({copy})"


def cases(source: str, family: str) -> list[launch.CompileCase]:
    """The compile cases of an op, or of another module by its full name; ValueError if two of an op share a name, for then the table hides
    one, or if an entry of the table is in none."""
    is_op = "." not in source
    found = list((spaces.space(source) if is_op else importlib.import_module(source)).compile_cases(family))
    if not is_op:
        return found
    used = {entry for case in found for entry in case.used}
    kernels = {kernel for kernel, _ in used}
    shipped = {(k, json.dumps(entry["when"])) for k, entries in launch.load_table(family).items() if k in kernels for entry in entries}
    if shipped - used:
        raise ValueError(f"{source} on {family}: configurations that no compile case uses: {sorted(shipped - used)}")
    names = [case.name for case in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{source} on {family}: compile cases share a name: {', '.join(twice)}")
    return found


@dataclass(frozen=True)
class _Work:
    """The cases of one source and family. ``draw``: how many of the recorded ones are compiled all the same, by ``seed``; None: all."""

    source: str
    family: str
    draw: int | None
    seed: int


def _measure_all(work: _Work) -> tuple[_Work, list[Report], dict[str, ledger.Facts]]:
    """A report for each specialisation of the cases (the first case that leads to it names it), and their facts by key."""
    different: dict[str, launch.CompileCase] = {}
    for case in cases(work.source, work.family):
        different.setdefault(key_of(case), case)
    recorded = {key: found for key, found in ledger.read(work.family).items() if key in different}
    drawn = set(recorded) if work.draw is None else set(random.Random(work.seed).sample(sorted(recorded), min(work.draw, len(recorded))))
    reports, known = [], {}
    for key, case in different.items():
        known[key] = recorded[key] if key in recorded and key not in drawn else _without_zeros(facts(case))
        made = report(case, known[key], key)
        if key in drawn and known[key] != recorded[key]:
            other = [
                f"{name} {recorded[key].get(name)}, now {value}" for name, value in known[key].items() if value != recorded[key].get(name)
            ]
            made = replace(made, problems=(*made.problems, f"recorded otherwise than it compiles: {'; '.join(other)}"))
        reports.append(made)
    return work, reports, known


def _without_zeros(found: ledger.Facts) -> ledger.Facts:
    """The facts as they are recorded, which is short."""
    return json.loads(json.dumps({**found, "instructions": {name: count for name, count in found["instructions"].items() if count}}))


def _shared_out(sources: Sequence[str], families: Sequence[str], draw: int | None, seed: int) -> list[_Work]:
    """The work on every source and family, what is to be drawn of a source shared out among its families at random."""
    drawn = {source: Counter(random.Random(f"{seed} {source}").choices(families, k=draw or 0)) for source in sources}
    return [_Work(source, family, None if draw is None else drawn[source][family], seed) for source in sources for family in families]


def measure_all(
    sources: Sequence[str], families: Sequence[str], draw: int | None = 0, seed: int = 0, processes: int = 2
) -> tuple[dict[str, list[Report]], dict[str, dict[str, ledger.Facts]]]:
    """Source -> its reports on every family, in order; family -> key -> facts; measured by ``processes`` fresh processes."""
    work = _shared_out(sources, families, draw, seed)
    done: dict[tuple[str, str], list[Report]] = {}
    known: dict[str, dict[str, ledger.Facts]] = {family: {} for family in families}
    with multiprocessing.get_context("spawn").Pool(min(processes, len(work))) as pool:
        for each, reports, found in pool.imap_unordered(_measure_all, work):
            done[each.source, each.family] = reports
            known[each.family] |= found
    return {source: [report for family in families for report in done[source, family]] for source in sources}, known


def table(op: str, reports: Sequence[Report]) -> str:
    """The Markdown table of one op."""
    columns = ("kernel", "warps", "stages", "registers", "shared KB", "CTAs/SM", *INSTRUCTIONS[:-2], "spills")
    lines = [
        f"# {op}: compiled code",
        "",
        f"Written by `make compiled-code` with Triton {TABLE_TRITON}; a test holds it to the code. Instructions are",
        "static counts. UTCHMMA is the fifth-generation tensor core, HGMMA the warpgroup MMA; UTMALDG and LDGSTS are asynchronous copies.",
    ]
    for family in ARCHITECTURES:
        rows = [_row(report) for report in reports if report.family == family]
        if rows:
            lines += ["", f"## {family}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns), *rows]
    return "\n".join(lines) + "\n"


def _row(report: Report) -> str:
    counts = [report.instructions[name] for name in INSTRUCTIONS[:-2]]
    spills = report.instructions["STL"] + report.instructions["LDL"]
    shared = f"{report.shared / KB:.1f}"
    cells = [report.name, report.warps, report.stages, report.registers, shared, report.ctas_per_sm, *counts, spills]
    return "| " + " | ".join(map(str, cells)) + " |"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    ops = spaces.ops()
    parser = argparse.ArgumentParser(prog="python -m dpt.kernels.tools.compiler", description=__doc__.split("\n")[0])
    parser.add_argument("--kernel", action="append", choices=ops, help="an op's module; default: all")
    parser.add_argument("--cases", action="append", default=[], metavar="MODULE", help="another module with compile_cases(family)")
    parser.add_argument("--arch", action="append", choices=list(ARCHITECTURES), help="default: all but sm_86")
    parser.add_argument("--draw", type=int, default=0, metavar="N", help="compile so many recorded cases a module all the same; default 0")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--afresh", action="store_true", help="compile all of them")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the record, and the tables kernels/compiled-code/<op>.md")
    parser.add_argument("--json", type=Path, help="write the reports to this file, for the tests")
    options = parser.parse_args(arguments)
    options.sources = [*(options.kernel or ops), *options.cases]
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: interpreted functions cannot be compiled, start again without it")
    if options.write and (options.arch or options.kernel or not options.cases):
        parser.error("--write needs everything: leave --arch and --kernel out, and name the models' launches, --cases bench.cases.launches")
    if options.write and triton.__version__ != TABLE_TRITON:
        parser.error(f"--write needs triton {TABLE_TRITON}, this is {triton.__version__}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, and with ``--write`` write the record and the tables; 1 if a case has a problem."""
    options = _options(arguments)
    families = options.arch or DEFAULT_FAMILIES
    draw = None if options.afresh else options.draw
    found, known = measure_all(options.sources, families, draw, options.seed, options.processes)
    for source, reports in found.items():
        if "." in source:
            print(f"{source}: {len(reports)} specialisations")
            continue
        print(table(source, reports))
        if options.write:
            (TABLES / f"{source}.md").write_text(table(source, reports))
    if options.write:
        for family, facts_by_key in known.items():
            ledger.write(family, facts_by_key)
    if options.json:
        options.json.write_text(json.dumps({source: [asdict(r) for r in reports] for source, reports in found.items()}))
    failures = [f"{r.family} {r.name}: {problem}" for reports in found.values() for r in reports for problem in r.problems]
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
