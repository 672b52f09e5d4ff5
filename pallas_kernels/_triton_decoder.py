"""From a byte of codes to its two table values, inside a Triton-lowered kernel.

Two ways, equal bit for bit:

- **"table"** reads `table_ref[code]`, a load per weight. The table's 64 bytes lie in one cache
  line, so a warp is served at once whatever its codes are, but each weight costs about five
  instructions.
- **"pairs"** first writes the 256 pairs (table[high], table[low]) into shared memory and then reads
  one 8-byte pair per byte of codes: per weight half a load, half a byte permute, half an address.
  Every pair lies there 16 times, once for each lane of a half-warp in that lane's own banks, so
  random codes never conflict. 32 KiB per program, written once and read for all its tiles.

Pallas' Triton lowering knows neither shared memory nor byte permutes, so "pairs" is a few lines of
inline PTX, and the interpreter runs "table" in its place. PTX declares the shared array where it is
filled, so the filling instruction must stand exactly once in a kernel: it works on a vector of one
piece per thread. Nothing tells the compiler that reads depend on it but the token it returns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels._triton import load

_COPIES = 16
_PAIR = _COPIES * 8
_SHARED = 256 * _PAIR

Decoder = Callable[[Array], tuple[Array, Array]]


def make_decoder(method: str, table_ref: Any, num_warps: int, interpret: bool) -> Decoder:
    """A function from bytes (uint8, any shape) to the float32 values of high and low nibble."""
    if method == "table" or interpret:
        return lambda codes: _read_table(codes, table_ref)
    token = _fill_pairs(table_ref, num_warps)
    return lambda codes: _read_pairs(codes, token)


def _read_table(codes: Array, table_ref: Any) -> tuple[Array, Array]:
    codes = codes.astype(jnp.int32)
    return load(table_ref, (codes >> 4,)), load(table_ref, (codes & 15,))


def _fill_asm(entries: int) -> str:
    """PTX storing 16 copies of each of a thread's `entries` pairs.

    Operands: `entries` tokens, byte values, high values, low values. Two copies make one 16-byte
    store; lane l starts with its l-th, so that a warp's stores spread over all banks.
    """
    lines = [
        f".shared .align 128 .b8 nf4_pairs[{_SHARED}];",
        "{",
        ".reg .b32 lane, base, slot, address;",
        "mov.u32 lane, %laneid;",
        "mov.u32 base, nf4_pairs;",
    ]
    for e in range(entries):
        token, byte, high, low = (f"${part * entries + e}" for part in range(4))
        for i in range(_COPIES // 2):
            lines += [
                f"add.u32 slot, lane, {i};",
                f"and.b32 slot, slot, {_COPIES // 2 - 1};",
                "shl.b32 slot, slot, 4;",
                f"mad.lo.u32 address, {byte}, {_PAIR}, base;",
                "add.u32 address, address, slot;",
                f"st.shared.v4.f32 [address], {{{high}, {low}, {high}, {low}}};",
            ]
        lines.append(f"mov.u32 {token}, 0;")
    return "\n".join([*lines, "}"])


def _fill_pairs(table_ref: Any, num_warps: int) -> Array:
    """Fill the shared array; returns a zero that is there only after every thread has stored.

    The sum over threads is the barrier: it passes through shared memory itself.
    """
    threads = 32 * num_warps
    count = max(256, threads)
    byte = jnp.arange(count, dtype=jnp.int32) & 255
    high, low = _read_table(byte, table_ref)
    entries = count // threads
    (stored,) = plgpu.elementwise_inline_asm(
        _fill_asm(entries),
        args=[byte, high, low],
        constraints=",".join(["=r"] * entries + ["r"] * entries + ["f"] * (2 * entries)),
        pack=entries,
        result_shape_dtypes=[jax.ShapeDtypeStruct(byte.shape, jnp.int32)],
    )
    return stored.sum()


# Operands: four 8-byte pairs; a word of four bytes of codes; four tokens (the same zero).
_READ_ASM = "\n".join(
    [
        "{",
        ".reg .b32 lane, base, byte, address;",
        "mov.u32 lane, %laneid;",
        f"and.b32 lane, lane, {_COPIES - 1};",
        "mov.u32 base, nf4_pairs;",
        "mad.lo.u32 base, lane, 8, base;",
        "add.u32 base, base, $5;",
        *(
            line
            for j in range(4)
            for line in (
                f"prmt.b32 byte, $4, 0, 0x444{j};",
                f"mad.lo.u32 address, byte, {_PAIR}, base;",
                f"ld.shared.b64 ${j}, [address];",
            )
        ),
        "}",
    ]
)


def _read_pairs(codes: Array, token: Array) -> tuple[Array, Array]:
    # One 64-bit result, because the lowering takes only single results; taking it apart is free.
    (pairs,) = plgpu.elementwise_inline_asm(
        _READ_ASM,
        args=[codes, jnp.broadcast_to(token, codes.shape)],
        constraints=",".join(["=l"] * 4 + ["r"] * 5),
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, np.dtype(np.int64))],
    )
    return _half(pairs, "{$0, other}"), _half(pairs, "{other, $0}")


def _half(pairs: Array, registers: str) -> Array:
    (value,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .b32 other; mov.b64 {registers}, $1; }}",
        args=[pairs],
        constraints="=f,l",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(pairs.shape, jnp.float32)],
    )
    return value


_UNPACK = {
    # A bfloat16 is the upper half of a float32.
    "bfloat16": "shl.b32 e, $3, 16; and.b32 o, $3, 0xffff0000; mov.b32 x, e; mov.b32 y, o;",
    "float16": "mov.b32 {h, g}, $3; cvt.f32.f16 x, h; cvt.f32.f16 y, g;",
}


def pair_product(
    high: Array, low: Array, x_ref: Any, row: Array, pair: Array, mask: Array | None, dtype: Any
) -> Array:
    """high · x[2·pair] + low · x[2·pair + 1] in float32, for a row of `pack_pairs(x)`.

    `high` and `low` are [rows, pairs], `pair` is [pairs]. The sum is fused with one product. 16-bit
    pairs are taken apart only here, because Triton brings x to the threads through shared memory.
    """
    shape = high.shape
    if dtype == jnp.float32:
        even, odd = (
            jnp.broadcast_to(load(x_ref, (row, pair, jnp.full_like(pair, i)), mask, 0.0), shape)
            for i in (0, 1)
        )
        return high * even + low * odd
    pairs = jnp.broadcast_to(load(x_ref, (row, pair), mask), shape)
    (out,) = plgpu.elementwise_inline_asm(
        "{ .reg .b32 e, o; .reg .b16 h, g; .reg .f32 x, y, t;"
        f" {_UNPACK[jnp.dtype(dtype).name]} mul.rn.f32 t, $1, x; fma.rn.f32 $0, $2, y, t; }}",
        args=[high, low, pairs],
        constraints="=f,f,f,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.float32)],
    )
    return out


def pair_product_interpreted(
    high: Array, low: Array, x_ref: Any, row: Array, pair: Array, mask: Array | None, dtype: Any
) -> Array:
    """`pair_product` without inline PTX, for the interpreter."""
    if dtype == jnp.float32:
        return pair_product(high, low, x_ref, row, pair, mask, dtype)
    pairs = load(x_ref, (row, pair), mask)
    halves = (pairs & 0xFFFF, pairs >> 16)
    even, odd = (
        jax.lax.bitcast_convert_type(half.astype(jnp.uint16), dtype).astype(jnp.float32)
        for half in halves
    )
    return high * even + low * odd
