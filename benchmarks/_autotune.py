"""Find the tile sizes that suit a card, and write them as rules that the dispatch reads.

For one op and number of rows every candidate of `configs_to_try` is compiled for a few
shapes (many threads), checked against the XLA path, and timed. A rule holds for all shapes of that
op and the rows that were measured (`rows_covered`), so the winner is the candidate with the least
*regret*: the geometric mean over shapes of its time over the shape's best.

A Hopper kernel chooses its config by the shape, so there the winner of each shape is kept by
itself, where it beats what the kernel takes unasked, and does so again: the fastest of many equal
candidates is the luckiest, so the two are timed in turns once more, and each time has to win.

In the output folder `tuned.json` and `cuts.json` are this card's rules and cuts in the form of the
files of that name in `pallas_kernels`; `autotune.json` keeps every time that was measured. With
those rules in place, an ordinary run compares the implementations and writes which to take where:
`rules.json`, in the same form.
"""

import concurrent.futures
import dataclasses
import json
import math
import re
import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from benchmarks._files import put
from benchmarks._points import ROWS, Point
from benchmarks._programs import (
    TOLERANCE,
    Program,
    compile_check,
    compile_program,
    compile_threads,
    make_input,
    make_weights,
    poison,
    timing,
    worst_error,
)
from pallas_kernels import configs_to_try, dispatch
from pallas_kernels._arguments import Layout
from pallas_kernels.dispatch import MAX_ROWS

if TYPE_CHECKING:
    from benchmarks.gpu_kernels import Run

MARGIN = 1.02
"""How much faster than the kernel's own choice a cut has to be."""

TURNS = 5
"""Times that a cut and the kernel's own choice are timed again. Of two that are equal, one wins
all turns against all of the other's in 1 of 252 cases."""

ALL_ROWS = 2**31 - 1
TUNED = ("matmul", "transposed", "dequantize")
"""The ops that are kernels of their own: an adapter (`lora`) is a way to run `matmul`'s."""


def dispatch_op(op: str, rows: int) -> str:
    """The name under which the dispatch's table knows a benchmark's op."""
    if op == "matmul":
        return "nf4_gemv" if rows <= MAX_ROWS else "nf4_matmul"
    return {"transposed": "nf4_matmul_transposed", "dequantize": "nf4_dequantize"}[op]


@dataclasses.dataclass(frozen=True)
class Job:
    """What to tune: an op's kernel of one implementation, for so many rows."""

    op: str
    rows: int
    implementation: str

    @classmethod
    def read(cls, text: str) -> "Job":
        """The job of "op:rows" or "op:rows:implementation"; a ValueError for any other."""
        parts = re.fullmatch(rf"({'|'.join(TUNED)}):(\d+)(?::(triton|mosaic_gpu))?", text)
        if parts is None:
            raise ValueError(
                f"{text!r} is no job; expected OP:ROWS or OP:ROWS:mosaic_gpu, with OP one of "
                f"{', '.join(TUNED)}"
            )
        return cls(parts[1], int(parts[2]), parts[3] or "triton")

    @property
    def name(self) -> str:
        """The op as the dispatch's table knows it."""
        return dispatch_op(self.op, self.rows)


def tune(run: "Run", texts: Sequence[str]) -> None:
    """Tune each "op:rows" or "op:rows:implementation" until the budget is spent.

    The rules and cuts are written after each, the times after each shape.
    """
    rules: list[dict[str, Any]] = []
    cuts: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    with compile_threads(run.options.threads) as pool:
        for job in map(Job.read, texts):
            if run.left() < 10:
                print(f"budget spent before {job}", flush=True)
                break
            measured = measure_candidates(run, job, pool, times)
            found: list[dict[str, Any]]
            if job.implementation == "triton":
                found = [rule for rule in [best_rule(run, job.op, job.rows, measured)] if rule]
                rules += found
            else:
                found = best_cuts(run, job.op, job.rows, measured, times)
                cuts += found
            for entry in found:
                print("found", json.dumps(entry), flush=True)
            write_json(run, "tuned.json", sorted_rules(rules))
            write_json(run, "cuts.json", cuts)


def write_json(run: "Run", name: str, entries: list[dict[str, Any]]) -> None:
    """A list in the output folder, an entry per line, as the dispatch's tables are."""
    lines = ",\n ".join(json.dumps(entry) for entry in entries)
    put(run.options.out / name, f"[\n {lines}\n]\n" if entries else "[]\n")


def measure_candidates(
    run: "Run", job: Job, pool: concurrent.futures.Executor, times: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Time every candidate on every shape: one entry per pair, wrong and failed ones included.

    They join `times`, which is written after each shape.
    """
    began = time.monotonic()
    of_shape = {
        shape: [
            run.program(Point(job.op, job.implementation, job.rows, shape, n, k, config=config))
            for config in configs_to_try(job.name, max(job.rows, 1), n, k, job.implementation)
        ]
        for shape, (n, k) in run.shapes().items()
    }
    checks = {s: pool.submit(compile_check, found[0]) for s, found in of_shape.items() if found}
    compiled = {
        program.point: pool.submit(compile_program, program)
        for programs in of_shape.values()
        for program in programs
    }
    concurrent.futures.wait(
        [*compiled.values(), *checks.values()], timeout=max(run.left() * 0.7, 1)
    )
    # What has not begun by now would be compiled beside the timing.
    late = sum(program.cancel() for program in compiled.values())
    told = f", {late} of them not compiled in time" if late else ""
    print(f"{job}: {len(compiled)} candidates{told}, {time.monotonic() - began:.0f} s", flush=True)
    entries: list[dict[str, Any]] = []
    for shape, check in checks.items():
        here = measure_shape(run, job, of_shape[shape], compiled, check)
        entries += here
        times += here
        write_json(run, "autotune.json", times)
        tell(shape, here)
    return entries


def measure_shape(
    run: "Run",
    job: Job,
    programs: Sequence[Program],
    compiled: dict[Point, concurrent.futures.Future],
    check: concurrent.futures.Future,
) -> list[dict[str, Any]]:
    """Check and time one shape's candidates, on the same weights."""
    measured: list[tuple[dict[str, Any], Program]] = []
    inputs: tuple[Any, Any] | None = None
    for program in programs:
        point, executable = program.point, compiled[program.point]
        ready = executable.done() and not executable.cancelled() and check.done()
        if not ready or run.left() < 3:
            continue
        entry: dict[str, Any] = {"op": job.op, "rows": job.rows, "shape": point.shape_name}
        entry["implementation"] = job.implementation
        entry["config"] = dataclasses.asdict(point.config) if point.config else None
        # The first candidate of a Hopper kernel is what it takes unasked.
        entry["own"] = job.implementation == "mosaic_gpu" and program is programs[0]
        try:
            if inputs is None:
                inputs = make_input(point, run.seed + 1), make_weights(program, run.seed)
            run_once, _ = executable.result()
            # All candidates have the same results: memory that was freed may hold the last one's.
            poison(program)
            last_x, ends, _ = jax.block_until_ready(run_once(*inputs))
            entry["error"] = worst_error(check.result(), last_x, inputs[1], ends)
            del last_x, ends
            if entry["error"] < TOLERANCE:
                entry |= timing(run_once, program, *inputs, 5)
        except Exception as failure:  # a candidate that breaks is a finding
            entry["failure"] = str(failure)[:300]
        measured.append((entry, program))
    if inputs is not None and job.implementation == "mosaic_gpu":
        time_again([(e, p) for e, p in measured if "seconds" in e], compiled, inputs)
    return [entry for entry, _ in measured]


def time_again(
    timed: Sequence[tuple[dict[str, Any], Program]],
    compiled: dict[Point, concurrent.futures.Future],
    inputs: tuple[Any, Any],
) -> None:
    """Time the fastest entry and the kernel's own choice in turns, and note both in the former."""
    own = next((pair for pair in timed if pair[0]["own"]), None)
    if own is None:
        return
    best = min(timed, key=lambda pair: pair[0]["seconds"])
    if best is own:
        return
    turns: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for seconds, (_, program) in zip(turns, (best, own), strict=True):
            executable, _ = compiled[program.point].result()
            seconds.append(timing(executable, program, *inputs, 3)["seconds"])
    best[0]["again"] = {"seconds": turns[0], "own": turns[1]}


def wins_again(entry: dict[str, Any]) -> bool:
    """Whether a candidate was faster than the kernel's own choice in every turn, and by `MARGIN`
    in the median."""
    if "again" not in entry:
        return False
    seconds, own = entry["again"]["seconds"], entry["again"]["own"]
    clear = statistics.median(seconds) * MARGIN <= statistics.median(own)
    return clear and max(seconds) < min(own)


def tell(shape: str, entries: Sequence[dict[str, Any]]) -> None:
    """Print a shape's fastest candidates, and an example of what is wrong or failed."""
    timed = [entry for entry in entries if "seconds" in entry]
    for entry in sorted(timed, key=lambda e: e["seconds"])[:4]:
        config = json.dumps(entry["config"])
        print(f"  {shape} {entry['seconds'] * 1e6:8.2f} us {config}", flush=True)
    bad = [entry for entry in entries if "seconds" not in entry]
    if bad:
        print(f"  {shape}: {len(bad)} wrong or failed, e.g. {bad[0]}"[:500], flush=True)


def least_regret(times: dict[str, dict[str, float]], shapes: set[str]) -> str | None:
    """Of candidate -> shape -> seconds, the candidate nearest to the best over all shapes.

    Nearest by the geometric mean of its time over the shape's best; one that is not measured on
    every shape (wrong, failed, out of time) is no candidate. None where none is left.
    """
    complete = {name: found for name, found in times.items() if set(found) == shapes}
    if not complete:
        return None
    best = {shape: min(found[shape] for found in complete.values()) for shape in shapes}
    return min(
        complete,
        key=lambda name: sum(math.log(complete[name][shape] / best[shape]) for shape in shapes),
    )


def best_rule(
    run: "Run", op: str, rows: int, entries: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """The Triton candidate of least regret, as a rule."""
    times: dict[str, dict[str, float]] = {}
    for entry in entries:
        if "seconds" in entry:
            key = json.dumps(entry["config"], sort_keys=True)
            times.setdefault(key, {})[entry["shape"]] = entry["seconds"]
    key = least_regret(times, set(run.shapes()))
    if key is None:
        return None
    return {
        "op": dispatch_op(op, rows),
        "card": dispatch.card_name(run.device.device_kind) or run.device.device_kind,
        **rows_covered(op, rows),
        "implementation": "triton",
        "config": json.loads(key),
    }


def best_cuts(
    run: "Run",
    op: str,
    rows: int,
    entries: list[dict[str, Any]],
    before: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Per shape the fastest candidate, if it beats what the kernel takes unasked.

    A cut holds from the rows after those that were measured `before` for the same kernel, or for
    these alone.
    """
    found = []
    kernel = dispatch_op(op, rows)
    same = [
        entry["rows"]
        for entry in before
        if entry["implementation"] == "mosaic_gpu"
        and dispatch_op(entry["op"], entry["rows"]) == kernel
    ]
    above = max((measured for measured in same if measured < rows), default=rows - 1)
    for shape, (n, k) in run.shapes().items():
        timed = [e for e in entries if e["shape"] == shape and "seconds" in e]
        best = min(timed, key=lambda e: e["seconds"], default=None)
        if best is None or not wins_again(best):
            continue
        found.append(
            {
                "op": kernel,
                "card": dispatch.card_name(run.device.device_kind) or run.device.device_kind,
                "min_rows": above + 1,
                "max_rows": rows,
                "implementation": "mosaic_gpu",
                "shape": [n, k],
                "config": best["config"],
            }
        )
    return found


def implementation_rules(run: "Run") -> list[dict[str, Any]]:
    """Which implementation to take, by op and rows, from the points of a finished run.

    A Triton rule carries the tile sizes that were measured: those of the table at the time.
    """
    points = [p for p in run.results["points"] if p["implementation"] in dispatch.IMPLEMENTATIONS]
    rules = []
    for op, rows in dict.fromkeys((p["op"], p["rows"]) for p in points if p["op"] != "lora"):
        here = [p for p in points if (p["op"], p["rows"]) == (op, rows)]
        times: dict[str, dict[str, float]] = {}
        for point in here:
            if point["status"] == "ok":
                found = times.setdefault(point["implementation"], {})
                found[point["shape_name"]] = point["seconds"]
        name = least_regret(times, set(run.shapes()))
        if name is None:
            continue
        config = None
        if name == "triton":
            layout = Layout((here[0]["n"], here[0]["k"]), "nf4", 64, double_quant=True)
            choice = dispatch.which_implementation(
                dispatch_op(op, rows), max(rows, 1), layout, implementation=name, interpret=True
            )
            config = dataclasses.asdict(choice.config) if choice.config else None
        rules.append(
            {
                "op": dispatch_op(op, rows),
                "card": dispatch.card_name(run.device.device_kind) or run.device.device_kind,
                **rows_covered(op, rows),
                "implementation": name,
                "config": config,
                "fuse_lora": op == "matmul" and fusing_pays(points, name, rows),
            }
        )
    return sorted_rules(rules)


def fusing_pays(points: list[dict[str, Any]], implementation: str, rows: int) -> bool:
    """Whether an adapter was faster inside the kernel, by the geometric mean over all shapes.

    Only where both ways were measured, and right, on each of them.
    """
    here = [
        p
        for p in points
        if (p["op"], p["implementation"], p["rows"]) == ("lora", implementation, rows)
    ]
    times: dict[str, dict[str, float]] = {"inside": {}, "after": {}}
    for point in here:
        if point["status"] == "ok":
            where = "inside" if point["fuse_lora"] else "after"
            times[where][point["shape_name"]] = point["seconds"]
    shapes = {p["shape_name"] for p in here}
    both = shapes and all(set(found) == shapes for found in times.values())
    return bool(both) and least_regret(times, shapes) == "inside"


def rows_covered(op: str, rows: int) -> dict[str, int]:
    """For which numbers of rows a measurement speaks: down to the next that a full run measures,
    and beyond its own only where that is the largest. The standing table answers for the rest."""
    if op == "dequantize":
        return {"min_rows": 0, "max_rows": ALL_ROWS}
    below = max((other for other in ROWS if other < rows), default=0)
    return {"min_rows": below + 1, "max_rows": ALL_ROWS if rows >= max(ROWS) else rows}


def sorted_rules(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rules by op and rows."""
    return sorted(rules, key=lambda rule: (rule["op"], rule["max_rows"]))
