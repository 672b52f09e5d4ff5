"""`nf4_matmul` in plain XLA: dequantize to x's dtype, multiply, round once."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels._arguments import Layout, LowRank
from pallas_kernels._decode import decode_absmax, decode_columns
from pallas_kernels._mesh import gather_packed
from pallas_kernels._sharding_types import in_auto_axes
from pallas_kernels.nf4_dequantize.reference import nf4_dequantize_xla


def matmul_dense(
    x: Float[Array, "*batch k"],
    weight: Float[Array, "n k"],
    bias: Float[Array, " n"] | None,
    lora: LowRank | None = None,
) -> Float[Array, "*batch n"]:
    """x · Wᵀ + xa · bᵀ + bias for a dense W of x's dtype: float32 sums, rounded once."""
    return complete(product(x, weight), bias, lora, x.dtype)


def complete(
    total: Float32[Array, "*batch n"],
    bias: Float[Array, " n"] | None,
    lora: LowRank | None,
    dtype: DTypeLike,
) -> Float[Array, "*batch n"]:
    """What belongs to the sums x · Wᵀ beside them, and their rounding."""
    if lora is not None:
        total = total + product(*lora)
    if bias is not None:
        total = total + bias.astype(jnp.float32)
    return total.astype(dtype)


def add_low_rank(y: Float[Array, "*batch n"], lora: LowRank) -> Float[Array, "*batch n"]:
    """y + xa · bᵀ as a product of its own, each rounded to y's dtype."""

    def add(y: Array, lora: LowRank) -> Array:
        return y + product(*lora).astype(y.dtype)

    return in_auto_axes(add, y, lora, result=lambda y, _: y.sharding.spec)


def product(
    x: Float[Array, "*batch k"], weight: Float[Array, "n k"], dtype: DTypeLike = jnp.float32
) -> Array:
    """x · Wᵀ as `dtype`."""
    return jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        # float32 activations ask for float32 products: without this an Ampere card takes TF32.
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=dtype,
    )


@functools.partial(jax.jit, static_argnames=("layout",))
def nf4_matmul_xla(
    x: Float[Array, "*batch k"],
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    bias: Float[Array, " n"] | None,
    lora: LowRank | None = None,
    *,
    layout: Layout,
) -> Float[Array, "*batch n"]:
    """x · Wᵀ + xa · bᵀ + bias with W rounded to x's dtype and sums in float32."""
    codes, absmax = gather_packed(x, codes, absmax, layout=layout)
    weight = (codes, absmax, nested_absmax, offset)
    whole = functools.partial(_by_weight, layout=layout)
    if not layout.rows_are_whole_blocks:
        return whole(x, weight, bias, lora)
    columns = functools.partial(_by_columns, layout=layout)
    return jax.lax.platform_dependent(x, weight, bias, lora, tpu=columns, default=whole)


def _by_weight(
    x: Array, weight: tuple, bias: Array | None, lora: LowRank | None, layout: Layout
) -> Array:
    dense = nf4_dequantize_xla(*weight, layout=layout, dtype=x.dtype)
    return matmul_dense(x, dense, bias, lora)


def _by_columns(
    x: Array, weight: tuple, bias: Array | None, lora: LowRank | None, layout: Layout
) -> Array:
    """Even columns of W with those of x, odd with odd: see `_decode`."""
    codes, *absmax = weight
    columns = decode_columns(codes, decode_absmax(*absmax), layout, x.dtype)
    parts = [product(x[..., i :: len(columns)], part) for i, part in enumerate(columns)]
    total = functools.reduce(jnp.add, parts)
    return complete(total, bias, lora, x.dtype)
