"""Quantizing and dequantizing on the CPU, beside bitsandbytes, on the same array and threads.

The two programs alternate, round by round, and the result is the ratio of their medians: times
alone differ by a third from round to round on a shared machine.

    python -m benchmarks.cpu_quantize                      # this project alone
    pip install torch==2.13.0 bitsandbytes && python -m benchmarks.cpu_quantize

Prints one JSON line per measurement: elements per second, and the ratio to bitsandbytes (above 1:
faster) where it is installed.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import qlora_jax as ql


def ours(weight: np.ndarray) -> dict[str, Callable[[], object]]:
    """The work to time, by name; each call blocks until its result is there."""
    array = jnp.asarray(weight)
    plain = ql.quantize(array, ql.QuantConfig(double_quant=False))
    nested = ql.quantize(array)
    dequantize = jax.jit(ql.QuantizedTensor.dequantize, static_argnums=1)
    return {
        "quantize nf4": lambda: jax.block_until_ready(
            ql.quantize(array, ql.QuantConfig(double_quant=False))
        ),
        "quantize nf4 double": lambda: jax.block_until_ready(ql.quantize(array)),
        "dequantize nf4 to float32": lambda: dequantize(plain, jnp.float32).block_until_ready(),
        "dequantize nf4 to bfloat16": lambda: dequantize(plain, jnp.bfloat16).block_until_ready(),
        "dequantize nf4 double to bfloat16": lambda: dequantize(
            nested, jnp.bfloat16
        ).block_until_ready(),
    }


def bitsandbytes(weight: np.ndarray) -> dict[str, Callable[[], object]]:
    """The same work by bitsandbytes; empty where it is not installed."""
    try:
        import torch
        from bitsandbytes import functional as bnb
    except ImportError:
        return {}
    torch.set_num_threads(_threads())
    tensor = torch.from_numpy(weight)
    work: dict[str, Callable[[], object]] = {}
    for suffix, double in (("", False), (" double", True)):

        def quantize(double: bool = double) -> object:
            return bnb.quantize_4bit(tensor, quant_type="nf4", compress_statistics=double)

        work[f"quantize nf4{suffix}"] = quantize
        packed, _ = quantize()
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            _, other = bnb.quantize_4bit(
                tensor.to(dtype), quant_type="nf4", compress_statistics=double
            )

            def dequantize(packed: object = packed, state: object = other) -> object:
                return bnb.dequantize_4bit(packed, state)

            work[f"dequantize nf4{suffix} to {name}"] = dequantize
    return work


def _threads() -> int:
    return len(os.sched_getaffinity(0))


def seconds(work: Callable[[], object]) -> float:
    """The time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    shape = (options.rows, options.columns)
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    mine, theirs = ours(weight), bitsandbytes(weight)
    for name, work in mine.items():
        times: dict[str, list[float]] = {"ours": [], "bitsandbytes": []}
        for round_ in range(options.rounds + 1):
            for who, call in (("ours", work), ("bitsandbytes", theirs.get(name))):
                if call is not None:
                    elapsed = seconds(call)
                    if round_:  # the first compiles, or warms caches
                        times[who].append(elapsed)
        rates = {who: weight.size / statistics.median(t) / 1e9 for who, t in times.items() if t}
        line = {
            "benchmark": "cpu_quantize",
            "what": name,
            "shape": shape,
            "threads": _threads(),
            "G elements/s": {who: round(rate, 3) for who, rate in rates.items()},
        }
        if "bitsandbytes" in rates:
            line["ratio"] = round(rates["ours"] / rates["bitsandbytes"], 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
