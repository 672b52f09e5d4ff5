"""Find the tile sizes that suit a card, and write them as rules that the dispatch reads.

For one op and number of rows every candidate of `dispatch.configs_to_try` is compiled for a few
shapes (many threads), checked against the XLA path, and timed. A rule holds for all shapes of that
op up to that many rows, so the winner is the candidate with the least *regret*: the geometric mean
over shapes of its time over the shape's best.

A Hopper kernel chooses its config by the shape, so there the winner of each shape is kept by
itself, where it beats what the kernel takes unasked.

In the output folder `tuned.json` and `cuts.json` are this card's rules and cuts in the form of the
files of that name in `pallas_kernels`; `autotune.json` keeps every time that was measured. With
those rules in place, an ordinary run compares the implementations and writes which to take where:
`rules.json`, in the same form.
"""

import concurrent.futures
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

from benchmarks._points import Point
from benchmarks._programs import compile_check, compile_program, make_input, make_weights, timing
from pallas_kernels import dispatch
from pallas_kernels._arguments import Layout
from pallas_kernels.nf4_gemv.api import MAX_ROWS

if TYPE_CHECKING:
    from benchmarks.gpu_kernels import Run

TOLERANCE = 1e-2
MARGIN = 1.02
"""How much faster than the kernel's own choice a cut has to be."""

ALL_ROWS = 2**31 - 1
TUNED = ("matmul", "transposed", "dequantize")
"""The ops that are kernels of their own: an adapter (`lora`) is a way to run `matmul`'s."""


def dispatch_op(op: str, rows: int) -> str:
    """The name under which the dispatch's table knows a benchmark's op."""
    if op == "matmul":
        return "nf4_gemv" if rows <= MAX_ROWS else "nf4_matmul"
    return {"transposed": "nf4_matmul_transposed", "dequantize": "nf4_dequantize"}[op]


def tune(run: "Run", jobs: Sequence[str]) -> None:
    """Tune each "op:rows" or "op:rows:implementation" until the budget is spent.

    The files are written after each.
    """
    rules: list[dict[str, Any]] = []
    cuts: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    with concurrent.futures.ThreadPoolExecutor(run.options.threads) as pool:
        for job in jobs:
            op, rows, implementation = (*job.split(":"), "triton")[:3]
            if op not in TUNED:
                raise ValueError(f"{job} asks for {op!r}; the ops with candidates are {TUNED}")
            if run.left() < 10:
                print(f"budget spent before {job}", flush=True)
                break
            measured = measure_candidates(run, op, int(rows), implementation, pool)
            found: list[dict[str, Any]]
            if implementation == "triton":
                found = [rule for rule in [best_rule(run, op, int(rows), measured)] if rule]
                rules += found
            else:
                found = best_cuts(run, op, int(rows), measured, times)
                cuts += found
            times += measured
            for entry in found:
                print("found", json.dumps(entry), flush=True)
            write_json(run, "autotune.json", times)
            write_json(run, "tuned.json", cover_all_rows(rules))
            write_json(run, "cuts.json", cuts)


def write_json(run: "Run", name: str, entries: list[dict[str, Any]]) -> None:
    """A list in the output folder, an entry per line, as the dispatch's tables are."""
    lines = ",\n ".join(json.dumps(entry) for entry in entries)
    (run.options.out / name).write_text(f"[\n {lines}\n]\n" if entries else "[]\n")


def measure_candidates(
    run: "Run", op: str, rows: int, implementation: str, pool: concurrent.futures.Executor
) -> list[dict[str, Any]]:
    """Time every candidate on every shape: one entry per pair, wrong and failed ones included."""
    name = dispatch_op(op, rows)
    points = [
        Point(op, implementation, rows, shape_name, n, k, config=config)
        for shape_name, (n, k) in run.shapes().items()
        for config in dispatch.configs_to_try(name, max(rows, 1), n, k, implementation)
    ]
    began = time.monotonic()
    programs = [run.program(point) for point in points]
    of_shape = {program.point.shape_name: program for program in programs}
    checks = {shape: pool.submit(compile_check, p) for shape, p in of_shape.items()}
    compiled = [pool.submit(compile_program, program) for program in programs]
    concurrent.futures.wait(compiled, timeout=max(run.left() * 0.7, 1))
    print(
        f"{op}:{rows}:{implementation}: {len(points)} candidates, {time.monotonic() - began:.0f} s",
        flush=True,
    )
    entries = []
    shape_name, weights, x, error = "", [], None, None
    for program, job in zip(programs, compiled, strict=True):
        point = program.point
        entry: dict[str, Any] = {"op": op, "rows": rows, "shape": point.shape_name}
        entry["implementation"] = implementation
        entry["config"] = dataclasses.asdict(point.config) if point.config else None
        if not job.done() or run.left() < 3:
            job.cancel()
            continue
        if point.shape_name != shape_name:
            shape_name = point.shape_name
            weights, x = make_weights(program, run.seed), make_input(point, run.seed + 1)
            error = checks[shape_name].result()
        try:
            executable, _ = job.result()
            last_x, out, _ = jax.block_until_ready(executable(x, weights))
            entry["error"] = float(error(last_x, weights[0], out)) if error else math.nan
            if entry["error"] < TOLERANCE:
                entry |= timing(executable, program, x, weights, 5)
        except Exception as failure:  # a candidate that breaks is a finding
            entry["failure"] = str(failure)[:300]
        entries.append(entry)
    for shape in dict.fromkeys(entry["shape"] for entry in entries):
        timed = [e for e in entries if e["shape"] == shape and "seconds" in e]
        for entry in sorted(timed, key=lambda e: e["seconds"])[:4]:
            config = json.dumps(entry["config"])
            print(f"  {shape} {entry['seconds'] * 1e6:8.2f} us {config}", flush=True)
        bad = [e for e in entries if e["shape"] == shape and "seconds" not in e]
        if bad:
            print(f"  {shape}: {len(bad)} wrong or failed, e.g. {bad[0]}"[:500], flush=True)
    return entries


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
    key = least_regret(times, {entry["shape"] for entry in entries})
    if key is None:
        return None
    return {
        "op": dispatch_op(op, rows),
        "card": dispatch.card_name(run.device.device_kind) or run.device.device_kind,
        "max_rows": rows,
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
    """Per shape the fastest candidate, if it beats the first one, which the kernel takes unasked.

    A cut holds from the rows after those that were measured `before`, or for these alone.
    """
    found = []
    same = [e["rows"] for e in before if (e["op"], e["implementation"]) == (op, "mosaic_gpu")]
    above = max((measured for measured in same if measured < rows), default=rows - 1)
    for shape, (n, k) in run.shapes().items():
        here = [e for e in entries if e["shape"] == shape]
        timed = [e for e in here if "seconds" in e]
        if not timed or "seconds" not in here[0]:
            continue
        best = min(timed, key=lambda e: e["seconds"])
        if best["seconds"] * MARGIN > here[0]["seconds"]:
            continue
        found.append(
            {
                "op": dispatch_op(op, rows),
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
        name = least_regret(times, {p["shape_name"] for p in here})
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
                "max_rows": rows,
                "implementation": name,
                "config": config,
                "fuse_lora": op == "matmul" and fusing_pays(points, name, rows),
            }
        )
    return cover_all_rows(rules)


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
    both = all(set(found) == shapes for found in times.values())
    return both and least_regret(times, shapes) == "inside"


def cover_all_rows(rules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rules by op and rows, the last of each op open-ended (a gemv ends at its own limit)."""
    ordered = sorted(rules, key=lambda rule: (rule["op"], rule["max_rows"]))
    last = {rule["op"]: index for index, rule in enumerate(ordered)}
    return [
        rule | {"max_rows": MAX_ROWS if rule["op"] == "nf4_gemv" else ALL_ROWS}
        if last[rule["op"]] == index
        else rule
        for index, rule in enumerate(ordered)
    ]
