"""`nf4_matmul_transposed` in plain XLA: dequantize to dy's dtype, multiply, round once."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels._arguments import Layout
from pallas_kernels._decode import decode_absmax, decode_columns
from pallas_kernels._mesh import gather_packed
from pallas_kernels.nf4_dequantize.reference import nf4_dequantize_xla


def matmul_transposed_dense(
    dy: Float[Array, "*batch n"], weight: Float[Array, "n k"], dtype: DTypeLike = jnp.float32
) -> Float[Array, "*batch k"]:
    """dy · W for a dense W of dy's dtype: float32 sums, rounded once.

    `dtype` is what the product itself is to return: see `nf4_matmul.triton`.
    """
    out = jax.lax.dot_general(
        dy,
        weight,
        (((dy.ndim - 1,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if dy.dtype == jnp.float32 else None,
        preferred_element_type=dtype,
    )
    return out.astype(dy.dtype)


@functools.partial(jax.jit, static_argnames=("layout",))
def nf4_matmul_transposed_xla(
    dy: Float[Array, "*batch n"],
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    *,
    layout: Layout,
) -> Float[Array, "*batch k"]:
    """dy · W with W rounded to dy's dtype and sums in float32."""
    codes, absmax = gather_packed(dy, codes, absmax, layout=layout)
    weight = (codes, absmax, nested_absmax, offset)
    whole = functools.partial(_by_weight, layout=layout)
    if not layout.rows_are_whole_blocks:
        return whole(dy, weight)
    columns = functools.partial(_by_columns, layout=layout)
    return jax.lax.platform_dependent(dy, weight, tpu=columns, default=whole)


def _by_weight(dy: Array, weight: tuple, layout: Layout) -> Array:
    dense = nf4_dequantize_xla(*weight, layout=layout, dtype=dy.dtype)
    return matmul_transposed_dense(dy, dense)


def _by_columns(dy: Array, weight: tuple, layout: Layout) -> Array:
    """Even and odd columns of dx from those of W: see `_decode`."""
    codes, *absmax = weight
    columns = decode_columns(codes, decode_absmax(*absmax), layout, dy.dtype)
    dx = jnp.stack([matmul_transposed_dense(dy, part) for part in columns], axis=-1)
    return dx.reshape(*dy.shape[:-1], layout.shape[1])
