"""What does a kernel wait for? Nsight Compute's counters, in the terms of docs/kernel_limits.md.

    python -m benchmarks.gpu_profile --rows 4096 --implementations mosaic_gpu bf16 --out matmul.json
    python -m benchmarks.gpu_profile --shape 70b-gate-up --config '{"segments": 2}' --out gemv.json

Runs itself under `ncu` (which needs the right to read hardware counters), each point once, and
leaves the card's clocks alone. Of each kernel: time, cycles and clock; how busy tensor cores,
schedulers, caches and device memory are; lines touched by loads and turns of shared memory, per
multiprocessor, which make up the first-level cache's work; why warps stood still; and, printed, the
instructions at which they did. A profiled kernel runs alone: under steady load it is slower.
"""

import argparse
import collections
import csv
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import _report
from benchmarks._autotune import TUNED, dispatch_op
from benchmarks._points import BASELINES, SHAPES, Point
from benchmarks._programs import Program, make_input, make_weights, op_function
from pallas_kernels._table import config_type

KERNELS = "regex:nf4_|nvjet|gemm|cutlass|cublas"
"""Names of what is profiled: the project's kernels, and those of 16-bit products."""

COUNTERS = {
    "microseconds": "gpu__time_duration.sum",
    "cycles": "sm__cycles_elapsed.max",
    "active_cycles": "sm__cycles_active.avg",
    "ghz": "sm__cycles_elapsed.avg.per_second",
    "tensor_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "issue_percent": "sm__issue_active.avg.pct_of_peak_sustained_elapsed",
    "l1_percent": "l1tex__throughput.avg.pct_of_peak_sustained_active",
    "l2_percent": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
}
"""Ours -> Nsight Compute's, of its page "raw"."""

_SCALES = {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
_SCALES |= {"mhz": 1e-3, "khz": 1e-6, "hz": 1e-9}
"""A unit of ncu's, which it chooses by the size of a number -> microseconds or GHz."""

CORES = "device__attribute_multiprocessor_count"
SAMPLES, LINES, TURNS = "# Samples", "L1 Tag Requests Global", "L1 Wavefronts Shared"


@dataclasses.dataclass(frozen=True)
class Profile:
    """One launch of one kernel."""

    kernel: str
    counters: dict[str, float]
    """By the names of COUNTERS; a share that the report lacks is left out."""
    lines: float
    """Lines of 128 bytes that loads from device memory touched, per multiprocessor."""
    shared: float
    """Turns of shared memory, per multiprocessor, `wgmma`'s reads among them."""
    stalls: dict[str, float]
    """Reason -> percent of all samples of warps, the most frequent first."""
    hottest: list[dict[str, Any]]
    """The instructions with the most samples: index, text, percent, and the main reason."""

    @property
    def load_path(self) -> float:
        """The first-level cache's work as a share of the active cycles."""
        return (self.lines + self.shared) / self.counters["active_cycles"]


def main(argv: Sequence[str] | None = None) -> int:
    """Profile the chosen points, print and write what was found."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.child:
        run_once(points(options))
        return 0
    if shutil.which("ncu") is None:
        parser.error("there is no ncu on the PATH: install NVIDIA Nsight Compute")
    arguments = list(sys.argv[1:] if argv is None else argv)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.ncu-rep"
        collect(report, arguments)
        profiles = read(page(report, "raw"), page(report, "source"))
    for profile in profiles:
        print(describe(profile), flush=True)
    found = [dataclasses.asdict(profile) for profile in profiles]
    result = {"meta": _report.machine() | {"command": arguments}, "profiles": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file for the results")
    parser.add_argument("--op", nargs="+", default=["matmul"], choices=TUNED)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--shape", nargs="+", default=["7b-qkvo"], choices=sorted(SHAPES))
    parser.add_argument("--implementations", nargs="+", default=["mosaic_gpu"])
    parser.add_argument("--config", type=json.loads, help="a config of the kernel as JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def points(options: argparse.Namespace) -> list[Point]:
    """What is asked for; a config goes to every kernel that is not a 16-bit product."""
    found = []
    for op in options.op:
        for implementation in options.implementations:
            config = None
            if options.config and implementation not in BASELINES:
                kind = config_type(dispatch_op(op, options.rows), implementation)
                config = kind(**options.config)
            rows = 0 if op == "dequantize" else options.rows
            found += [
                Point(op, implementation, rows, shape, *SHAPES[shape], config=config)
                for shape in options.shape
            ]
    return found


def run_once(wanted: Iterable[Point]) -> None:
    """Run each point once, on fresh random arguments. No autotuning: its trials would be profiled.

    So a 16-bit product is what XLA takes untuned.
    """
    for point in wanted:
        weight = make_weights(Program(point, copies=1, rounds=1, launches=1), 0)[0]
        x = make_input(point, 1)
        lowered = jax.jit(op_function(point)).lower(x, *weight)
        options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
        compiled = lowered.compile(options if jax.default_backend() == "gpu" else None)
        jax.block_until_ready(compiled(x, *weight))


def collect(report: Path, arguments: Sequence[str]) -> None:
    """Run this module again under ncu, for its report; a RuntimeError with what ncu said."""
    command = ["ncu", "--clock-control", "none", "--kernel-name", KERNELS, "--set", "full"]
    command += ["--import-source", "no", "-f", "-o", str(report), sys.executable, "-m"]
    command += ["benchmarks.gpu_profile", "--child", *arguments]
    # This process must not have touched the card: JAX would hold most of its memory.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not report.exists():
        raise RuntimeError(f"ncu left no report: {(done.stdout + done.stderr)[-2000:]}")


def page(report: Path, name: str) -> list[list[str]]:
    """A page of the report as rows of a table."""
    command = ["ncu", "--import", str(report), "--page", name, "--csv"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return list(csv.reader(text.splitlines()))


def read(raw: Sequence[Sequence[str]], source: Sequence[Sequence[str]]) -> list[Profile]:
    """The kernels of a report, from its pages "raw" and "source".

    The first has a row of names, one of units and a row per kernel; the second a table per kernel,
    headed by its name, with a row per instruction.
    """
    names, units, *rows = raw
    scales = [_SCALES.get(unit.lower(), 1.0) for unit in units]
    return [
        _profile(dict(zip(names, _scaled(row, scales), strict=True)), code)
        for row, code in zip(rows, _tables(source), strict=True)
    ]


def _scaled(row: Sequence[str], scales: Sequence[float]) -> list[str]:
    """The row in our units, where ncu took others for its size."""
    return [
        text if scale == 1.0 else str(_number(text) * scale)
        for text, scale in zip(row, scales, strict=True)
    ]


def _tables(source: Sequence[Sequence[str]]) -> list[list[dict[str, str]]]:
    tables: list[list[dict[str, str]]] = []
    header: Sequence[str] | None = None
    for row in source:
        if row and row[0] == "Kernel Name":
            tables.append([])
            header = None
        elif header is None:
            header = row
        elif len(row) == len(header):
            tables[-1].append(dict(zip(header, row, strict=True)))
    return tables


def _number(text: str | None) -> float:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return 0.0


def _profile(raw: dict[str, str], code: Sequence[dict[str, str]]) -> Profile:
    needed = [theirs for ours, theirs in COUNTERS.items() if not ours.endswith("_percent")]
    missing = {*needed, CORES} - set(raw)
    if missing:
        raise ValueError(
            f"the report has no {', '.join(sorted(missing))}: this version of ncu may call it "
            "otherwise; see COUNTERS"
        )
    cores = _number(raw[CORES])

    def total(name: str) -> float:
        return sum(_number(line.get(name)) for line in code)

    samples = max(total(SAMPLES), 1.0)
    stalls = collections.Counter({r: total(f"stall_{r}") / samples * 100 for r in _reasons(code)})
    hottest = sorted(range(len(code)), key=lambda i: -_number(code[i][SAMPLES]))[:12]
    return Profile(
        kernel=raw["Kernel Name"],
        counters={o: _number(raw[theirs]) for o, theirs in COUNTERS.items() if theirs in raw},
        lines=total(LINES) / cores,
        shared=total(TURNS) / cores,
        stalls={reason: round(percent, 1) for reason, percent in stalls.most_common(8)},
        hottest=[
            {
                "index": i,
                "text": " ".join(code[i]["Source"].split()),
                "percent": round(_number(code[i][SAMPLES]) / samples * 100, 1),
                "reason": max(_reasons(code), key=lambda r: _number(code[i][f"stall_{r}"])),
            }
            for i in hottest
        ],
    )


def _reasons(code: Sequence[dict[str, str]]) -> list[str]:
    """Why a warp stood still, as Nsight Compute calls it ("long_sb": a load from memory)."""
    names = code[0] if code else {}
    return [n.removeprefix("stall_") for n in names if n.startswith("stall_") and "(" not in n]


def describe(profile: Profile) -> str:
    """A kernel's profile, some lines."""
    c = profile.counters
    busy = ", ".join(
        f"{name.removesuffix('_percent')} {value:.0f} %"
        for name, value in c.items()
        if name.endswith("_percent")
    )
    stalls = ", ".join(f"{reason} {percent:.0f} %" for reason, percent in profile.stalls.items())
    hot = [
        f"    {line['percent']:4.1f} % {line['index']:5d} {line['text'][:70]} ({line['reason']})"
        for line in profile.hottest
    ]
    return "\n".join(
        [
            f"{profile.kernel}: {c['microseconds']:.2f} us, {c['cycles']:.0f} cycles "
            f"at {c['ghz']:.2f} GHz, {c['registers']:.0f} registers",
            f"  busy: {busy}",
            f"  load path: {profile.lines:.0f} lines + {profile.shared:.0f} turns of shared memory "
            f"= {profile.load_path * 100:.0f} % of {c['active_cycles']:.0f} active cycles",
            f"  warps: {stalls}",
            *hot,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
