"""Double dequantization in plain XLA: the definition every kernel is measured against.

    absmax[b] = map[q[b]] · nested_absmax[b // 256] + offset      (float32, two roundings)
    w[i]      = dtype(table[code[i]] · absmax[i // blocksize])    (float32 product, one rounding)

Written for the vectorisers of XLA: a table of 16 is a tree of 15 selects on the code's four bits
(three times faster than a gather on a CPU with AVX-512), and the two values of a byte are decoded
apart and interleaved last, so that nothing is indexed by an element's number.
"""

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


def select_tree(code: UInt8[Array, "..."], table: np.ndarray) -> Float32[Array, "..."]:
    """table[code] for 16 float32 entries and codes below 16, by selects on the code's bits."""
    # Tied to the codes: JAX hoists what depends on constants alone out of a scan over layers, and
    # here that would be full arrays of the table's entries, held through the backward pass.
    zero = (code & np.uint8(0)).astype(jnp.float32)
    values = [zero + np.float32(v) for v in table]
    for bit in (1, 2, 4, 8):
        is_set = (code & np.uint8(bit)) != 0
        values = [
            jnp.where(is_set, odd, even)
            for even, odd in zip(values[::2], values[1::2], strict=True)
        ]
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
    values = jnp.take(jnp.asarray(DYNAMIC_SIGNED), padded.astype(jnp.int32), axis=0, mode="clip")
    return add_unfused(values * nested_absmax[:, None], offset).reshape(-1)[:blocks]


def decode(
    codes: UInt8[Array, "..."],
    absmax: Float32[Array, " blocks"],
    layout: Layout,
    dtype: DTypeLike,
) -> Float[Array, "..."]:
    """The weight of shape `layout.shape` in `dtype`, from its codes and float32 absmax."""
    block_bytes = layout.blocksize // layout.codes_per_byte
    flat = codes.reshape(-1)
    # Only a short last block needs the padding, and none of it is left after the slice below.
    flat = jnp.pad(flat, (0, layout.blocks * block_bytes - flat.shape[0]))
    blocks = flat.reshape(layout.blocks, block_bytes)
    scale = absmax[:, None]
    table = CODEBOOKS[layout.quant_type]
    if layout.quant_type == "int8":
        values = jnp.take(jnp.asarray(table), blocks.astype(jnp.int32), axis=0, mode="clip")
        weight = (values * scale).astype(dtype)
    else:
        high = (select_tree(blocks >> np.uint8(4), table) * scale).astype(dtype)
        low = (select_tree(blocks & np.uint8(15), table) * scale).astype(dtype)
        weight = jnp.stack([high, low], axis=-1)
    return jax.lax.slice_in_dim(weight.reshape(-1), 0, layout.size).reshape(layout.shape)
