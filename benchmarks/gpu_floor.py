"""What a product of one row cannot beat on this card: starting a kernel and reading the weight.

    python -m benchmarks.gpu_floor --out benchmarks/results/h200/floor.json

A plain kernel that only reads as many bytes as a packed weight has, one that reads next to nothing,
and the 16-bit product, all timed as `benchmarks.gpu_kernels` times its points. The last over the
first is about the most by which a 4-bit product of that shape can be faster: 3.88 for large
matrices, the ratio of the bytes; less for small ones, because a launch costs both the same. On
Hopper also by a kernel that is launched as the gemv is, and by one that starts early
(`GemvConfig.early`): the most that this could bring.

Without a GPU it runs at toy sizes (`--toy`), interpreted: the numbers mean nothing.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from benchmarks import _report
from benchmarks._files import put
from benchmarks._hopper_read import read_on_hopper
from benchmarks._points import BASELINES, SHAPES, TOY_SHAPES, Point
from benchmarks._programs import (
    MAX_CALLS,
    Program,
    build,
    compile_program,
    make_input,
    make_weights,
    size_program,
    timing,
)
from benchmarks.gpu_kernels import cache_bytes, ceilings
from pallas_kernels.nf4_gemv.mosaic_plan import STARTS_EARLY
from qlora_jax.models import capability_here

Reader = Callable[[jax.Array], jax.Array]

TILE = 4096
"""Words of 32 bits that a block of 256 threads reads: four loads of 16 bytes for each."""


def read(words: jax.Array, *, interpret: bool = False) -> jax.Array:
    """The sum of every `TILE` of the words, [1, tiles] int32: all of them have to be read."""
    tiles = pl.cdiv(words.size, TILE)

    def kernel(words_ref: Any, out_ref: Any) -> None:
        at = pl.program_id(0) * TILE + jnp.arange(TILE)
        held = plgpu.load(words_ref.at[at], mask=at < words.size, other=0)
        out_ref[0, pl.program_id(0)] = jnp.sum(held)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((1, tiles), jnp.int32),
        grid=(tiles,),
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        name="read",
    )(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Time each shape, print a line and write the file after it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--toy", action="store_true", help="toy shapes: what a CPU can interpret")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(argv)
    if not options.toy:
        _report.require_gpu(parser)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    limits = ceilings(toy=options.toy)
    results: dict[str, Any] = {"meta": _report.machine(), "ceilings": limits, "shapes": []}
    for name, (n, k) in (TOY_SHAPES if options.toy else SHAPES).items():
        found = measure(name, n, k, limits, options)
        results["shapes"].append(found)
        print(_line(found), flush=True)
        put(options.out, json.dumps(results, indent=1) + "\n")
    return 0


def measure(
    name: str, n: int, k: int, limits: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    """Seconds per call: of reading a packed weight, of reading one tile, of the 16-bit product."""

    def program(implementation: str) -> Program:
        l2 = cache_bytes(jax.devices()[0].device_kind, toy=options.toy)
        calls = 4 if options.toy else MAX_CALLS
        point = Point("matmul", implementation, 1, name, n, k)
        return size_program(
            point, l2, limits["copy_bytes_per_s"], limits["bf16_flops"], max_calls=calls
        )

    packed = program("triton")
    found: dict[str, Any] = {"shape": name, "n": n, "k": k}
    readers: dict[str, Reader] = {"": functools.partial(read, interpret=options.toy)}
    if not options.toy and capability_here() == (9, 0):
        readers["hopper_"] = functools.partial(read_on_hopper, early=False)
        if STARTS_EARLY:
            readers["early_"] = functools.partial(read_on_hopper, early=True)
    # Whole 16 bytes.
    every = -(-packed.point.weight_bytes // 16) * 4
    for who, reader in readers.items():
        for what, words in (("launch", TILE), ("read", every)):
            found[who + what] = time_reading(packed, reader, words, options)
    times = []
    for dense in map(program, BASELINES):
        compiled, _ = compile_program(dense)
        x, weights = make_input(dense.point, 1), make_weights(dense, 0)
        times.append(timing(compiled, dense, x, weights, options.repeats)["seconds"])
    return found | {"bf16": min(times)}


def _line(found: dict[str, Any]) -> str:
    """What a shape's timing comes to."""
    microseconds = ", ".join(
        f"{what.replace('_', ' ')} {seconds * 1e6:.2f}"
        for what, seconds in found.items()
        if isinstance(seconds, float)
    )
    least = min(seconds for what, seconds in found.items() if what.endswith("read"))
    return (
        f"{found['shape']:12s} {found['n']:6d} x {found['k']:6d}: us: {microseconds}: "
        f"at most {found['bf16'] / least:.2f} x"
    )


def time_reading(
    program: Program, reader: Reader, words: int, options: argparse.Namespace
) -> float:
    """Seconds that the reader takes for so many words, in a program of cold calls."""
    keys = jax.random.split(jax.random.key(0), program.copies)
    weights = [(jax.random.bits(key, (words,), jnp.uint32).astype(jnp.int32),) for key in keys]
    x = make_input(program.point, 1)
    run = build(program, lambda x, words: reader(words))
    compiled = jax.jit(run).lower(x, weights).compile()
    return timing(compiled, program, x, weights, options.repeats)["seconds"]


if __name__ == "__main__":
    sys.exit(main())
