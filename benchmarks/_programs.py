"""Programs that time one op honestly: cold weights, no launch gaps, nothing hoisted or dropped.

A single call of a kernel that takes 3 µs cannot be timed: the host takes longer to launch it. So
one jitted program holds many calls, each on *its own copy* of the weight, and the copies together
are several times the card's L2 cache (`Program.times_cache`; of XLA's own programs, which take long
to compile, less of the smallest weights): every call reads its weight from device memory, as a
model's next layer does. Each call waits for the one before it. Calls come in rounds; a round's
activations depend, through a number too small to change them, on every result of the round before,
so the compiler can neither drop a call nor merge equal ones nor move one out. The cost of that
dependency is one tiny kernel per round.

What a program returns to be checked is the first and the last result of its last round: the last
call follows directly on another one of the same kernel, which the first does not.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks._points import BASELINES, Point
from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED

TOLERANCE = 1e-2
"""Largest relative error of a bf16 result: its own rounding is 2e-3."""

Ends = tuple[jax.Array, jax.Array]
"""The first and the last result of a round."""

MAX_CALLS = 96
"""Calls in one program: enough to hide a launch, few enough to compile in a moment."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A point made runnable."""

    point: Point
    copies: int
    rounds: int
    launches: int
    """Programs queued per timed repeat."""

    @property
    def calls(self) -> int:
        """Calls of the op per timed repeat."""
        return self.copies * self.rounds * self.launches

    def times_cache(self, l2: int) -> float:
        """How often the weights of all copies would fill a second-level cache of so many bytes."""
        return self.copies * self.point.weight_bytes / l2


def size_program(
    point: Point, l2: int, bandwidth: float, flops: float, max_calls: int = MAX_CALLS
) -> Program:
    """Choose copies, rounds and launches from the card's ceilings (bytes, bytes/s, FLOP/s)."""
    seconds = max(point.bytes / bandwidth, point.flops / flops) + 2e-6
    # XLA compiles its own fusions once per call, a custom kernel once in all.
    most = 24 if point.implementation == "xla" else 48
    copies = min(max(2, math.ceil(4 * l2 / point.weight_bytes)), most)
    # A program that runs for milliseconds needs no rounds.
    rounds = min(max(1, math.ceil(4e-4 / (copies * seconds))), max(1, max_calls // copies))
    if point.op == "dequantize" or point.implementation == "xla":
        rounds = 1
    launches = min(max(1, math.ceil(3e-3 / (copies * rounds * seconds))), 16)
    return Program(point, copies, rounds, launches)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def packed_weight(key: jax.Array, n: int, k: int, blocksize: int) -> tuple[jax.Array, ...]:
    """Random (codes, absmax, nested_absmax, offset) of a double-quantized weight, on the device."""
    blocks = n * k // blocksize
    code_key, absmax_key, nested_key = jax.random.split(key, 3)
    codes = jax.random.bits(code_key, (n, k // 2), jnp.uint8)
    absmax = jax.random.bits(absmax_key, (blocks,), jnp.uint8)
    nested = jax.random.uniform(nested_key, (-(-blocks // 256),), minval=0.002, maxval=0.01)
    return codes, absmax, nested, jnp.float32(0.02)


@functools.partial(jax.jit, static_argnums=(1, 2))
def dense_weight(key: jax.Array, n: int, k: int) -> tuple[jax.Array]:
    """A random bf16 weight of the magnitude of `packed_weight`'s."""
    return (jax.random.uniform(key, (n, k), jnp.bfloat16, minval=-0.04, maxval=0.04),)


def make_weights(program: Program, seed: int) -> list[tuple[jax.Array, ...]]:
    """The program's copies, each random by itself; an adapter's b is the last part of each."""
    point = program.point
    keys = jax.random.split(jax.random.key(seed), program.copies)
    if point.implementation in BASELINES:
        weights: list[tuple[jax.Array, ...]] = [dense_weight(key, point.n, point.k) for key in keys]
    else:
        weights = [packed_weight(key, point.n, point.k, point.blocksize) for key in keys]
    if not point.rank:
        return weights
    # As large as the product that it is added to, or an error in one of them would not show.
    return [
        (*weight, 0.1 * _normal(jax.random.fold_in(key, 0), point.n, point.rank))
        for weight, key in zip(weights, keys, strict=True)
    ]


def make_input(point: Point, seed: int) -> jax.Array:
    """Random activations [rows, k], or [rows, n] for the transposed op.

    An adapter's `xa` is taken to be x's first columns: any values do, and they cost no more memory.
    """
    width = point.n if point.op == "transposed" else point.k
    return _normal(jax.random.key(seed), max(point.rows, 1), width)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, rows: int, width: int) -> jax.Array:
    return jax.random.normal(key, (rows, width), jnp.bfloat16)


def prepare(point: Point) -> None:
    """Compile what makes the point's weights and input, so that it is there when they are made."""
    make_weights(Program(point, copies=1, rounds=1, launches=1), 0)
    make_input(point, 0)


def op_function(point: Point, interpret: bool | None = None) -> Callable[..., jax.Array]:
    """`fn(x, *weight) -> result` for the point's op and implementation.

    Without a card kernels are interpreted; `interpret=False` compiles them for another machine.
    """
    if interpret is None:
        interpret = jax.default_backend() == "cpu" and point.implementation != "xla"
    if point.implementation in BASELINES:
        axis = 0 if point.op == "transposed" else 1

        def product(x: jax.Array, weight: jax.Array) -> jax.Array:
            dims = (((1,), (axis,)), ((), ()))
            return jax.lax.dot_general(x, weight, dims, preferred_element_type=jnp.bfloat16)

        if point.op == "lora":
            return lambda x, weight, b: product(x, weight) + product(x[:, : point.rank], b)
        return product
    options: dict[str, Any] = {
        "implementation": point.implementation,
        "blocksize": point.blocksize,
        "config": point.config,
        "interpret": interpret,
    }
    if point.op == "dequantize":
        return lambda x, *weight: pallas_kernels.nf4_dequantize(*weight, **options)
    if point.op == "lora":
        return lambda x, *weight: pallas_kernels.nf4_matmul(
            x,
            *weight[:-1],
            lora=(x[:, : point.rank], weight[-1]),
            fuse_lora=point.fuse_lora,
            **options,
        )
    op = {
        "matmul": pallas_kernels.nf4_matmul,
        "transposed": pallas_kernels.nf4_matmul_transposed,
    }[point.op]
    return lambda x, *weight: op(x, *weight, **options)


def build(
    program: Program, op: Callable[..., jax.Array] | None = None
) -> Callable[[jax.Array, list[tuple[jax.Array, ...]]], tuple[jax.Array, Ends, jax.Array]]:
    """The function to jit: (x, weights) -> (the last round's x, its first and last result, a
    checksum)."""
    # The inner jit is traced and lowered once, however many calls follow.
    call = jax.jit(op or op_function(program.point))

    def run(
        x: jax.Array, weights: list[tuple[jax.Array, ...]]
    ) -> tuple[jax.Array, Ends, jax.Array]:
        nudge = jnp.float32(0)
        for index in range(program.rounds):
            if index:
                x = x + (nudge * 1e-30).astype(x.dtype)
            results = []
            for weight in weights:
                # Barriers cost nothing. This one orders the calls (XLA would fuse products that
                # share x into one kernel, and reuse a weight that it dequantized before); the
                # second keeps each result whole, so that no slice of it is computed alone.
                x, weight = jax.lax.optimization_barrier((x, weight))
                x, result = jax.lax.optimization_barrier((x, call(x, *weight)))
                results.append(result)
            nudge = sum((r[0, 0].astype(jnp.float32) for r in results), nudge)
        return x, (results[0], results[-1]), nudge

    return run


def compiler_options(point: Point) -> dict[str, Any]:
    """XLA's options for a point: "bf16" is cuBLAS, "bf16-xla" whatever XLA's autotuner prefers."""
    if point.implementation != "bf16" or jax.default_backend() != "gpu":
        return {}
    return {"xla_gpu_enable_triton_gemm": False}


@contextlib.contextmanager
def compile_threads(count: int) -> Iterator[concurrent.futures.Executor]:
    """Threads to compile in. At the end nothing is waited for: results are to be written first."""
    pool = concurrent.futures.ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def compile_program(program: Program) -> tuple[jax.stages.Compiled, float]:
    """The compiled program and the seconds it took."""
    began = time.monotonic()
    weights = jax.eval_shape(lambda: make_weights(program, 0))
    x = jax.eval_shape(lambda: make_input(program.point, 0))
    lowered = jax.jit(build(program)).lower(x, weights)
    compiled = lowered.compile(compiler_options(program.point))
    return compiled, time.monotonic() - began


def compile_check(program: Program) -> Callable[..., jax.Array]:
    """The compiled `whole_error` of the program's point."""
    point = _oracle(program.point)
    (weight, *_) = jax.eval_shape(lambda: make_weights(Program(point, 1, 1, 1), 0))
    x = jax.eval_shape(lambda: make_input(point, 0))
    out = jax.eval_shape(op_function(point), x, *weight)
    # Its speed does not matter: no autotuning.
    options = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
    lowered = jax.jit(whole_error(point)).lower(x, weight, out)
    return lowered.compile(options if jax.default_backend() == "gpu" else None)


def timing(
    compiled: jax.stages.Compiled, program: Program, x: Any, weights: Any, repeats: int
) -> dict[str, float]:
    """Median seconds per call over the repeats, and (max − min) / median of the middle half."""

    def once() -> float:
        began = time.perf_counter()
        for _ in range(program.launches):
            done = compiled(x, weights)
        jax.block_until_ready(done)
        return (time.perf_counter() - began) / program.calls

    once()
    times = sorted(once() for _ in range(repeats))
    median = statistics.median(times)
    quarter = len(times) // 4
    spread = (times[-1 - quarter] - times[quarter]) / median
    return {"seconds": median, "fastest": times[0], "spread": spread, "calls": program.calls}


def poison(program: Program) -> None:
    """Fill the memory that the results will take with NaN, so that what is not written shows."""
    point = program.point
    width = point.k if point.op == "transposed" else point.n
    rows = point.n if point.op == "dequantize" else point.rows
    width = point.k if point.op == "dequantize" else width
    jax.block_until_ready(jnp.full((program.copies + 2, rows, width), jnp.nan, jnp.bfloat16))


def worst_error(
    check: Callable[..., jax.Array], x: jax.Array, weights: list[tuple[jax.Array, ...]], ends: Ends
) -> float:
    """The larger `whole_error` of a program's first and last result; NaN where one is."""
    pairs = zip((weights[0], weights[-1]), ends, strict=True)
    return float(np.max([check(x, weight, out) for weight, out in pairs]))


def host_error(
    point: Point, x: jax.Array, weight: tuple[jax.Array, ...], out: jax.Array, seed: int
) -> float:
    """‖out − ref‖ / ‖ref‖ on sampled rows and columns, ref in float64 by NumPy on the host.

    A reference of its own: it shares nothing with the implementations but the code tables.
    """
    rng = np.random.default_rng(seed)

    def sample(count: int, size: int) -> np.ndarray:
        return np.unique(np.r_[0, size - 1, rng.integers(0, size, count)])

    result = np.asarray(out)
    if point.op == "dequantize":
        picked = sample(62, point.n)
        want, got = host_weight(point, weight, picked, np.arange(point.k)), result[picked]
    else:
        rows, picked = sample(6, x.shape[0]), sample(30, result.shape[1])
        activations = np.asarray(x)[rows].astype(np.float64)
        if point.op == "transposed":
            want = activations @ host_weight(point, weight, np.arange(point.n), picked)
        else:
            want = activations @ host_weight(point, weight, picked, np.arange(point.k)).T
        if point.op == "lora":
            b = np.asarray(weight[-1])[picked].astype(np.float64)
            want += activations[:, : point.rank] @ b.T
        got = result[rows][:, picked]
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))


def host_weight(
    point: Point, weight: tuple[jax.Array, ...], rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Those rows and columns of the weight in float64, decoded on the host by the definition."""
    codes, absmax, nested, offset = (np.asarray(part) for part in weight[:4])
    byte = codes[rows[:, None], columns // 2]
    index = np.where(columns % 2 == 0, byte >> 4, byte & 15)
    block = rows[:, None] * (point.k // point.blocksize) + columns // point.blocksize
    scale = DYNAMIC_SIGNED.astype(np.float64)[absmax[block]] * nested[block // 256].astype(
        np.float64
    ) + float(offset)
    return CODEBOOKS["nf4"].astype(np.float64)[index] * scale


def whole_error(point: Point) -> Callable[..., jax.Array]:
    """`fn(x, weight, out) -> relative error` over *every* element, against the XLA path."""
    reference = op_function(_oracle(point))

    def error(x: jax.Array, weight: tuple[jax.Array, ...], out: jax.Array) -> jax.Array:
        want = reference(x, *weight).astype(jnp.float32)
        return jnp.linalg.norm(out.astype(jnp.float32) - want) / jnp.linalg.norm(want)

    return error


def _oracle(point: Point) -> Point:
    """The same work by XLA, summed in float32 and rounded once."""
    return dataclasses.replace(
        point, implementation="xla", config=None, fuse_lora=point.op == "lora"
    )
