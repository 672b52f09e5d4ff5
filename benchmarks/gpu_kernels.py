"""How fast are the 4-bit kernels on this card, and are they right?

    python -m benchmarks.gpu_kernels --budget 480 --out benchmarks/results/h200

For every op × implementation × rows × Llama linear shape: correctness first (fresh random inputs;
every element against the XLA path, samples against float64 on the host; memory poisoned with NaN),
then the time per call, and beside it ceilings measured in the same run: the bandwidth of a large
copy and of a large sum, and the rate of a large bf16 product. The 16-bit baseline runs in the same
programs.

Results are written after every point, so a session that ends early keeps what it has:
`kernels.json`, and at the end `kernels.md`, `roofline.png` and `rules.json` (what the dispatch
should take, see `_autotune`), in the output folder, where it also looks for the peer's numbers
(`benchmarks.gpu_bitsandbytes`). Without a GPU it runs at toy sizes (`--toy`), with the kernels in
interpret mode: the numbers mean nothing, the path is the same.

The method: a program of many calls on cold weights (`_programs`), compiled ahead in parallel
threads, the median over repeats, and the spread beside it.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _autotune, _report
from benchmarks._files import put
from benchmarks._points import BASELINES, OPS, ROWS, SHAPES, TOY_SHAPES, Point, plan
from benchmarks._programs import (
    MAX_CALLS,
    TOLERANCE,
    Program,
    compile_check,
    compile_program,
    compile_threads,
    host_error,
    make_input,
    make_weights,
    poison,
    prepare,
    size_program,
    timing,
    worst_error,
)
from pallas_kernels.cards import CARDS, find_card

IMPLEMENTATIONS = ("bf16", "triton", "mosaic_gpu", "xla", "bf16-xla")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a line per point, write the files; 1 if any kernel was wrong."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.merge:
        results = _report.merge(options.merge)
        _report.add_peer(results, options.out)
        _report.write_all(results, options.out)
        return 0
    _check(parser, options)
    run = Run(options)
    if options.autotune:
        run.measure_ceilings()
        _autotune.tune(run, options.autotune)
        return 0
    try:
        run.measure()
    finally:
        run.write_rules()
        _report.add_peer(run.results, options.out)
        _report.write_all(run.results, options.out)
    wrong = [p["label"] for p in run.results["points"] if p["status"] == "wrong"]
    if wrong:
        print("WRONG:", ", ".join(wrong))
    return bool(wrong)


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End the program before it has cost the card any time, where it cannot do what is asked."""
    if not options.toy:
        _report.require_gpu(parser)
    known = TOY_SHAPES if options.toy else SHAPES
    unknown = set(options.shapes or ()) - set(known)
    if unknown:
        parser.error(f"--shapes names {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for job in options.autotune or ():
        try:
            _autotune.Job.read(job)
        except ValueError as error:
            parser.error(f"--autotune: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--merge", nargs="+", type=Path, help="measure nothing: join these kernels.json in --out"
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds, compiles included")
    parser.add_argument("--quick", action="store_true", help="rows 1 and 4096, Llama 7B and 70B")
    parser.add_argument("--toy", action="store_true", help="toy shapes: what a CPU can interpret")
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--rows", nargs="+", type=int, default=None)
    parser.add_argument("--shapes", nargs="+", default=None, help="names, see _points.py")
    parser.add_argument("--implementations", nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seed", type=int, default=None, help="default: fresh from the clock")
    parser.add_argument("--threads", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument(
        "--autotune",
        nargs="+",
        metavar="OP:ROWS[:mosaic_gpu]",
        help="measure Triton's candidates instead, e.g. matmul:1 transposed:4096 dequantize:0, and "
        "write the best as rules for pallas_kernels/tuned.json; or those of the Hopper kernels, "
        "e.g. matmul:1:mosaic_gpu, as cuts for pallas_kernels/cuts.json",
    )
    parser.add_argument(
        "--kernel-times", action="store_true", help="also read each kernel's time from a trace"
    )
    return parser


class Run:
    """One measuring session: the ceilings, the results so far, the clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.started = time.monotonic()
        self.seed = options.seed if options.seed is not None else time.time_ns() % 2**31
        self.device = jax.devices()[0]
        self.l2 = cache_bytes(self.device.device_kind, toy=options.toy)
        meta = _report.machine() | {"seed": self.seed, "repeats": options.repeats}
        self.results: dict[str, Any] = {"meta": meta, "ceilings": {}, "points": []}
        options.out.mkdir(parents=True, exist_ok=True)

    def measure(self) -> None:
        """Ceilings, then group after group until the budget is spent."""
        self.measure_ceilings()
        with compile_threads(self.options.threads) as pool:
            implementations = self.options.implementations
            for group in plan(implementations, self.shapes(), self.rows(), self.options.ops):
                if self.left() < 5:
                    print("budget spent: the rest is not measured", flush=True)
                    break
                self._measure_group(group, pool)
                self.write_rules()

    def measure_ceilings(self) -> None:
        """What the card can do at best, kept with the results."""
        self.results["ceilings"] = ceilings(toy=self.options.toy)
        print("ceilings", json.dumps(self.results["ceilings"]), flush=True)

    def left(self) -> float:
        """Seconds of budget left."""
        return self.options.budget - (time.monotonic() - self.started)

    def write(self) -> None:
        """The results so far."""
        self.results["meta"]["seconds"] = round(time.monotonic() - self.started, 1)
        put(self.options.out / "kernels.json", json.dumps(self.results, indent=1))

    def write_rules(self) -> None:
        """What the dispatch should take, by the points so far."""
        rules = _autotune.implementation_rules(self)
        put(self.options.out / "rules.json", json.dumps(rules, indent=1) + "\n")

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shapes asked for, by name."""
        shapes = TOY_SHAPES if self.options.toy else SHAPES
        if self.options.quick and not self.options.toy:
            shapes = {name: s for name, s in shapes.items() if not name.startswith("13b")}
        if self.options.shapes:
            shapes = {name: shapes[name] for name in self.options.shapes}
        return shapes

    def rows(self) -> Sequence[int]:
        """The numbers of rows asked for."""
        default = (1, 4096) if self.options.quick else ROWS
        return self.options.rows or ((1, 32) if self.options.toy else default)

    def program(self, point: Point) -> Program:
        """The point as a program sized for this card."""
        ceiling = self.results["ceilings"]
        limits = (self.l2, ceiling["copy_bytes_per_s"], ceiling["bf16_flops"])
        return size_program(point, *limits, max_calls=4 if self.options.toy else MAX_CALLS)

    def _measure_group(self, group: list[Point], pool: concurrent.futures.Executor) -> None:
        programs = [self.program(point) for point in group]
        began = time.monotonic()
        jobs = {program.point: pool.submit(compile_program, program) for program in programs}
        by_work = {_work(p.point): p for p in programs}
        checks = {work: pool.submit(compile_check, p) for work, p in by_work.items()}
        made = {(p.implementation in BASELINES, p.n, p.k): p for p in group}
        ready = [pool.submit(prepare, point) for point in made.values()]
        everything: list[concurrent.futures.Future] = [*jobs.values(), *checks.values(), *ready]
        concurrent.futures.wait(everything, timeout=max(self.left(), 1))
        print(f"compiled {len(group)} programs in {time.monotonic() - began:.1f} s", flush=True)
        for program in programs:
            point = program.point
            check = checks[_work(point)]
            needed = [jobs[point]] if point.implementation in BASELINES else [jobs[point], check]
            if self.left() < 3 or not all(job.done() for job in needed):
                jobs[point].cancel()
                self._add(point, {"status": "not measured", "error": "the budget was spent"})
                continue
            try:
                compiled, seconds = jobs[point].result()
                entry = self._measure_point(program, compiled, check)
                entry["compile_s"] = round(seconds, 2)
            except Exception as error:  # one broken kernel must not cost the others
                entry = {"status": "cannot run", "error": f"{type(error).__name__}: {error}"[:600]}
            self._add(point, entry)

    def _measure_point(
        self, program: Program, compiled: jax.stages.Compiled, check: concurrent.futures.Future
    ) -> dict[str, Any]:
        point = program.point
        weights, x = make_weights(program, self.seed), make_input(point, self.seed + 1)
        poison(program)
        last_x, ends, _ = jax.block_until_ready(compiled(x, weights))
        entry: dict[str, Any] = {"status": "ok"}
        if point.implementation not in BASELINES:
            whole = worst_error(check.result(), last_x, weights, ends)
            host = host_error(point, last_x, weights[-1], ends[-1], self.seed)
            entry |= {"error_vs_xla": whole, "error_vs_float64": host}
            if not (whole < TOLERANCE and host < TOLERANCE):
                entry["status"] = "wrong"
        del last_x, ends
        entry |= timing(compiled, program, x, weights, self.options.repeats)
        entry |= {"bytes": point.bytes, "flop": point.flops}
        entry["bytes_per_s"] = point.bytes / entry["seconds"]
        entry["flop_per_s"] = point.flops / entry["seconds"]
        entry["times_cache"] = round(program.times_cache(self.l2), 2)
        if self.options.kernel_times:
            entry |= _report.kernel_times(lambda: compiled(x, weights), program)
        return entry

    def _add(self, point: Point, entry: dict[str, Any]) -> None:
        names = {"label": point.label, "variant": point.variant}
        self.results["points"].append(dataclasses.asdict(point) | names | entry)
        self.write()
        if entry["status"] in ("ok", "wrong"):
            kernel = f" kernel {entry['kernel_s'] * 1e6:.2f}" if "kernel_s" in entry else ""
            print(
                f"{point.label:42s} {entry['seconds'] * 1e6:9.2f} us{kernel} "
                f"±{entry['spread'] * 100:.1f}% {entry['bytes_per_s'] / 1e9:7.0f} GB/s "
                f"{entry['flop_per_s'] / 1e12:7.1f} TFLOP/s {entry['status']} "
                f"{entry.get('error_vs_float64', 0):.1e}",
                flush=True,
            )
        else:
            print(f"{point.label:42s} {entry['status']}: {entry['error'][:300]}", flush=True)


def _work(point: Point) -> tuple[str, int, int, int]:
    """What is computed, whoever computes it."""
    return point.op, point.rows, point.n, point.k


def cache_bytes(kind: str, *, toy: bool) -> int:
    """The second-level cache of a kind of device; of one that CARDS does not know, a large one."""
    if toy:
        return 2**12
    known = [card.description for card in CARDS.values()]
    return find_card(kind).l2 if kind in known else 2**26


def ceilings(toy: bool) -> dict[str, float]:
    """What this card can do at best: bytes/s of a large copy (read + written), and of a large sum
    (read alone), bf16 FLOP/s."""
    size, width = (2**16, 256) if toy else (2**29, 8192)
    source = jax.random.bits(jax.random.key(0), (size,), jnp.uint32)
    copy = jax.jit(lambda a: a ^ jnp.uint32(1))
    # A multiprocessor's worth of sums and more.
    total = jax.jit(lambda a: jnp.sum(a.reshape(2**10, -1), axis=1))
    a, b = (jax.random.normal(jax.random.key(i), (width, width), jnp.bfloat16) for i in (1, 2))
    product = jax.jit(lambda a, b: a @ b)

    def best(fn: Any, *args: Any) -> float:
        jax.block_until_ready([fn(*args) for _ in range(3)])
        times = []
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(10):
                done = fn(*args)
            jax.block_until_ready(done)
            times.append((time.perf_counter() - began) / 10)
        return float(np.median(times))

    return {
        "copy_bytes_per_s": 2 * source.nbytes / best(copy, source),
        "read_bytes_per_s": source.nbytes / best(total, source),
        "bf16_flops": 2 * width**3 / best(product, a, b),
    }


if __name__ == "__main__":
    sys.exit(main())
