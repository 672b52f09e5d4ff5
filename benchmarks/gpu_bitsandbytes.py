"""The peer: bitsandbytes' NF4 kernels and torch's bf16 products on this card, timed the same way.

    python -m benchmarks.gpu_bitsandbytes --out benchmarks/results/h200 --budget 90

Same points, cold weights, many calls per launch (a CUDA graph), median of repeats. It runs in a
process of its own, because torch and JAX would share the card's memory; `benchmarks.gpu_kernels`
takes `bitsandbytes.json` into its tables when it finds it in the same folder.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks._files import put
from benchmarks._points import SHAPES, Point, plan

PEERS = ("bitsandbytes", "torch-bf16")


def main(argv: Sequence[str] | None = None) -> int:
    """Time the peers until the budget is spent; 1 where torch with CUDA is missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=90)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4096, 16, 64])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    options = parser.parse_args(argv)
    try:
        import bitsandbytes
        import torch
    except ModuleNotFoundError as error:
        print(f"{error.name} is not installed: no peer is measured")
        return 1
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: no peer is measured")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "bitsandbytes": bitsandbytes.__version__}
    results: dict[str, Any] = {"meta": versions, "points": []}
    began = time.monotonic()
    shapes = {name: SHAPES[name] for name in options.shapes}
    for group in plan(PEERS, shapes, options.rows):
        for point in group:
            if time.monotonic() - began > options.budget:
                return 0
            if point.op == "dequantize" and point.implementation == "torch-bf16":
                continue
            entry = measure(point)
            results["points"].append(entry)
            told = entry.get("error") or f"{entry['seconds'] * 1e6:9.2f} us"
            print(f"{point.label:48s} {told}", flush=True)
            put(options.out / "bitsandbytes.json", json.dumps(results, indent=1))
    return 0


def measure(point: Point) -> dict[str, Any]:
    """A point's entry in the results: its time, or why it has none."""
    entry = dataclasses.asdict(point) | {"label": point.label}
    try:
        entry |= time_point(point)
    except Exception as error:  # one point out of memory must not cost the others
        return entry | {"status": "cannot run", "error": f"{type(error).__name__}: {error}"[:600]}
    entry |= {"status": "ok", "bytes": _bytes(point), "flop": point.flops}
    entry["bytes_per_s"] = entry["bytes"] / entry["seconds"]
    entry["flop_per_s"] = entry["flop"] / entry["seconds"]
    return entry


def _bytes(point: Point) -> int:
    dense = dataclasses.replace(point, implementation="bf16")
    return (dense if point.implementation == "torch-bf16" else point).bytes


def calls_of(point: Point, copies: int) -> list[Callable[[], Any]]:
    """One closure per copy of the weight, each doing what the peer's own layer does."""
    import bitsandbytes as bnb
    import torch

    width = point.n if point.op == "transposed" else point.k
    x = torch.randn(max(point.rows, 1), width, dtype=torch.bfloat16, device="cuda")
    calls: list[Callable[[], Any]] = []
    for _ in range(copies):
        dense = torch.randn(point.n, point.k, dtype=torch.bfloat16, device="cuda") * 0.02
        if point.implementation == "torch-bf16":
            op = torch.matmul if point.op == "transposed" else torch.nn.functional.linear
            calls.append(_with_adapter(point, x, functools.partial(op, x, dense)))
            continue
        codes, state = bnb.functional.quantize_4bit(
            dense, blocksize=point.blocksize, compress_statistics=True, quant_type="nf4"
        )
        dequantize = functools.partial(bnb.functional.dequantize_4bit, codes, state)
        if point.op in ("matmul", "lora"):
            product = functools.partial(bnb.matmul_4bit, x, codes.t(), quant_state=state)
            calls.append(_with_adapter(point, x, product))
        elif point.op == "transposed":
            calls.append(functools.partial(_dequantize_then_multiply, x, dequantize))
        else:
            calls.append(dequantize)
    return calls


def _with_adapter(point: Point, x: Any, product: Callable[[], Any]) -> Callable[[], Any]:
    """For the op "lora", the product and its adapter's, as PEFT adds them: x · A is given."""
    import torch

    if not point.rank:
        return product
    xa = x[:, : point.rank].contiguous()
    b = torch.randn(point.n, point.rank, dtype=torch.bfloat16, device="cuda")
    return lambda: product() + torch.nn.functional.linear(xa, b)


def _dequantize_then_multiply(x: Any, dequantize: Callable[[], Any]) -> Any:
    """What bitsandbytes' backward does."""
    return x @ dequantize()


def time_point(point: Point, repeats: int = 9) -> dict[str, Any]:
    """Median seconds per call: a CUDA graph of calls on cold weights, timed by events."""
    import torch

    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    dense = point.implementation == "torch-bf16"
    copies = min(max(2, math.ceil(4 * l2 / ((2.0 if dense else 0.52) * point.size))), 48)
    with torch.inference_mode():
        calls = calls_of(point, copies)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for _ in range(repeats + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(8):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e-3 / (8 * copies))
    times = sorted(times[1:])
    median = statistics.median(times)
    spread = (times[-3] - times[2]) / median
    return {"seconds": median, "fastest": times[0], "spread": spread, "calls": 8 * copies}


if __name__ == "__main__":
    sys.exit(main())
