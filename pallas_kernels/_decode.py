"""Double dequantization in plain XLA: the definition every kernel is measured against.

    absmax[b] = map[q[b]] · nested_absmax[b // 256] + offset      (float32, two roundings)
    w[i]      = dtype(table[code[i]] · absmax[i // blocksize])    (float32 product, one rounding)

Written for the vectorisers of XLA, of which there are two kinds.

On CPU and GPU a table of 16 is a tree of 15 selects on the code's four bits (three times faster
than a gather on a CPU with AVX-512), one of 256 is a gather, and the two values of a byte are
decoded apart and interleaved last, so that nothing is indexed by an element's number.

A TPU keeps the last axis of an array in groups of 128 and reads 4 KiB for every number that it
gathers. Blocks of 32 bytes would take four times their memory there, and pairs of values 64 times.
So every table is a tree of selects, rows stay rows, and a product takes even and odd columns apart
(`decode_columns`). Compiled for a v5e, an 11008 × 4096 product with 1024 rows needs no temporaries
in place of 5.7 GiB, and 0.37 GB of traffic in place of 18 (`tests/gpu_compile/test_tpu.py`).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels._arguments import Layout
from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED, NESTED_BLOCKSIZE


def add_unfused(product: Float32[Array, "..."], addend: Float32[Array, "..."]) -> Array:
    """product + addend with the product rounded first.

    Compilers contract a·b + c into one fused multiply-add, whose single rounding differs from
    bitsandbytes in a sixth of all absmax constants; a select between the two keeps them apart.
    """
    return jnp.where(jnp.isnan(product), jnp.nan, product) + addend


def look_up(codes: UInt8[Array, "..."], table: np.ndarray) -> Float32[Array, "..."]:
    """table[codes] for 16 or 256 float32 entries and codes below their number."""
    select = functools.partial(_select_tree, table=tuple(table.tolist()))
    if table.size == 16:
        return select(codes)
    gather = functools.partial(_gather, table=table)
    return jax.lax.platform_dependent(codes, tpu=select, default=gather)


def _gather(codes: UInt8[Array, "..."], table: np.ndarray) -> Float32[Array, "..."]:
    return jnp.take(jnp.asarray(table), codes.astype(jnp.int32), axis=0, mode="clip")


# Jitted, so that 255 selects are traced once for a shape.
@functools.partial(jax.jit, static_argnames=("table",))
def _select_tree(codes: UInt8[Array, "..."], table: tuple[float, ...]) -> Float32[Array, "..."]:
    """By selects on the code's bits, the lowest first."""
    # Tied to the codes: JAX hoists what depends on constants alone out of a scan over layers, and
    # here that would be full arrays of the table's entries, held through the backward pass.
    zero = (codes & np.uint8(0)).astype(jnp.float32)
    values = [zero + np.float32(v) for v in table]
    bit = 1
    while len(values) > 1:
        is_set = (codes & np.uint8(bit)) != 0
        values = [
            jnp.where(is_set, odd, even)
            for even, odd in zip(values[::2], values[1::2], strict=True)
        ]
        bit *= 2
    return values[0]


def decode_absmax(
    absmax: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
) -> Float32[Array, " blocks"]:
    """The float32 absmax of every block, whether it was quantized itself or not."""
    if nested_absmax is None or offset is None:
        return absmax
    blocks = absmax.shape[0]
    padded = jnp.pad(absmax, (0, -blocks % NESTED_BLOCKSIZE)).reshape(-1, NESTED_BLOCKSIZE)
    values = look_up(padded, DYNAMIC_SIGNED)
    return add_unfused(values * nested_absmax[:, None], offset).reshape(-1)[:blocks]


def decode(
    codes: UInt8[Array, "..."],
    absmax: Float32[Array, " blocks"],
    layout: Layout,
    dtype: DTypeLike,
) -> Float[Array, "..."]:
    """The weight of shape `layout.shape` in `dtype`, from its codes and float32 absmax."""
    by_blocks = functools.partial(_decode_blocks, layout=layout, dtype=dtype)
    if not layout.rows_are_whole_blocks:
        return by_blocks(codes, absmax)
    by_columns = functools.partial(_interleave_columns, layout=layout, dtype=dtype)
    return jax.lax.platform_dependent(codes, absmax, tpu=by_columns, default=by_blocks)


def _decode_blocks(
    codes: UInt8[Array, "..."], absmax: Float32[Array, " blocks"], layout: Layout, dtype: DTypeLike
) -> Float[Array, "..."]:
    block_bytes = layout.blocksize // layout.codes_per_byte
    flat = codes.reshape(-1)
    # Only a short last block needs the padding, and none of it is left after the slice below.
    flat = jnp.pad(flat, (0, layout.blocks * block_bytes - flat.shape[0]))
    values = _values(flat.reshape(layout.blocks, block_bytes), absmax[:, None], layout, dtype)
    weight = jnp.stack(values, axis=-1).reshape(-1)
    return jax.lax.slice_in_dim(weight, 0, layout.size).reshape(layout.shape)


def _interleave_columns(
    codes: UInt8[Array, "..."], absmax: Float32[Array, " blocks"], layout: Layout, dtype: DTypeLike
) -> Float[Array, "..."]:
    columns = decode_columns(codes, absmax, layout, dtype)
    return jnp.stack(columns, axis=-1).reshape(layout.shape)


def decode_columns(
    codes: UInt8[Array, "..."],
    absmax: Float32[Array, " blocks"],
    layout: Layout,
    dtype: DTypeLike,
) -> list[Float[Array, "rows columns"]]:
    """A weight's columns in as many arrays as a byte has codes: the even and the odd ones.

    Its rows must be whole blocks; of more than two axes, all but the last count as rows.
    """
    width = layout.shape[-1] // layout.codes_per_byte
    packed = codes.reshape(-1, width)
    by_block = absmax.reshape(packed.shape[0], -1, 1)
    block_bytes = layout.blocksize // layout.codes_per_byte
    scale = jnp.broadcast_to(by_block, (*by_block.shape[:2], block_bytes)).reshape(packed.shape)
    return _values(packed, scale, layout, dtype)


def _values(
    packed: UInt8[Array, "rows bytes"],
    scale: Float32[Array, "rows ..."],
    layout: Layout,
    dtype: DTypeLike,
) -> list[Float[Array, "rows bytes"]]:
    """The first value of every byte, the second where there are two: table[code] · scale."""
    codes = (
        [packed] if layout.codes_per_byte == 1 else [packed >> np.uint8(4), packed & np.uint8(15)]
    )
    table = CODEBOOKS[layout.quant_type]
    return [(look_up(code, table) * scale).astype(dtype) for code in codes]
