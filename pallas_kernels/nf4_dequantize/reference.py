"""`nf4_dequantize` in plain XLA: the oracle, and what CPU and TPU run."""

import functools

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels._arguments import Layout
from pallas_kernels._decode import decode, decode_absmax


@functools.partial(jax.jit, static_argnames=("layout", "dtype"))
def nf4_dequantize_xla(
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    *,
    layout: Layout,
    dtype: DTypeLike,
) -> Float[Array, "..."]:
    """The weight itself: two table look-ups, two multiplications and an addition."""
    return decode(codes, decode_absmax(absmax, nested_absmax, offset), layout, dtype)
