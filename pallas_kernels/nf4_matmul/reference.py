"""`nf4_matmul` in plain XLA: dequantize to x's dtype, multiply, round once."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels._arguments import Layout
from pallas_kernels.nf4_dequantize.reference import nf4_dequantize_xla


def matmul_dense(
    x: Float[Array, "*batch k"], weight: Float[Array, "n k"], bias: Float[Array, " n"] | None
) -> Float[Array, "*batch n"]:
    """x · Wᵀ + bias for a dense W of x's dtype: float32 sums, rounded once."""
    out = jax.lax.dot_general(
        x,
        weight,
        (((x.ndim - 1,), (1,)), ((), ())),
        # float32 activations ask for float32 products: without this an Ampere card takes TF32.
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("layout",))
def nf4_matmul_xla(
    x: Float[Array, "*batch k"],
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    bias: Float[Array, " n"] | None,
    *,
    layout: Layout,
) -> Float[Array, "*batch n"]:
    """x · Wᵀ + bias with W rounded to x's dtype and sums in float32."""
    weight = nf4_dequantize_xla(codes, absmax, nested_absmax, offset, layout=layout, dtype=x.dtype)
    return matmul_dense(x, weight, bias)
