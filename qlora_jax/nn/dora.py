"""DoRA (Liu et al. 2024, arXiv 2402.09353): magnitude and direction of each row, apart.

    y = m / ‖W + s·B·A‖ · (x · Wᵀ + s · dropout(x) · Aᵀ · Bᵀ) + b

m [out] is trained and starts as ‖W + s·B·A‖, each row's own length, so that training starts from
the base. As the paper's section 4.3 proposes (and PEFT does), the norm counts as a constant in the
backward pass.

W is there in 4 bits only, and W + s·B·A is never formed. With the rows' squared lengths kept from
the start (one float32 per row),

    ‖Wᵢ + s·Bᵢ·A‖² = ‖Wᵢ‖² + 2s · Bᵢ · (A · Wᵢᵀ) + s² · Bᵢ · (A · Aᵀ) · Bᵢᵀ

needs W only in the product A · Wᵀ, r more rows through the 4-bit matmul.

PEFT drops elements of x before it scales W's part, too, where there is dropout; here dropout is on
the adapter's input alone. Without dropout the two are the same function.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import vary_alike
from qlora_jax.quant import QuantizedTensor


def row_squares(
    weight: QuantizedTensor | Float[Array, "*stack out in"],
) -> Float[Array, "*stack out"]:
    """‖Wᵢ‖² of every row, float32; one weight of a stack is dequantized at a time."""
    if isinstance(weight, QuantizedTensor):
        if weight.stack_shape:
            return jax.lax.map(row_squares, weight)
        weight = weight.dequantize(jnp.float32)
    return jnp.sum(jnp.square(weight.astype(jnp.float32)), axis=-1)


def adapted_squares(
    squares: Float[Array, " out"],
    cross: Float[Array, "r out"],
    a: Float[Array, "r in"],
    b: Float[Array, "out r"],
    scaling: int | float | Float[Array, ""],
) -> Float[Array, " out"]:
    """‖Wᵢ + s·Bᵢ·A‖² of every row, float32.

    Args:
        squares: ‖Wᵢ‖².
        cross: A · Wᵀ.
        a, b: the adapter.
        scaling: s.
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    mixed = jnp.einsum("or,ro->o", b, cross.astype(jnp.float32))
    low = jnp.einsum("or,rq,oq->o", b, a @ a.T, b)
    return jnp.maximum(squares + 2 * scaling * mixed + scaling**2 * low, 0)


def magnification(
    magnitude: Float[Array, " out"],
    squares: Float[Array, " out"],
    scaling: int | float | Float[Array, ""],
) -> Float[Array, " out"]:
    """m / ‖W + s·B·A‖, float32.

    Where the scale is 0 (a layer of a stack that has no adapter) or a row is all zeros it is 1, and
    m gets no gradient.
    """
    norm = jnp.sqrt(squares)
    on = (norm > 0) & (jnp.asarray(scaling) != 0)
    return jnp.where(on, magnitude.astype(jnp.float32) / jnp.where(on, norm, 1), 1)


def magnify(
    y: Float[Array, "*batch out"], factor: Float[Array, " out"]
) -> Float[Array, "*batch out"]:
    """factor · y in y's dtype, multiplied in float32."""
    return _scaled(*vary_alike(y, factor))


@jax.custom_vjp
def _scaled(y: jax.Array, factor: jax.Array) -> jax.Array:
    return (y.astype(jnp.float32) * factor).astype(y.dtype)


def _scaled_forward(y: jax.Array, factor: jax.Array) -> tuple[jax.Array, tuple]:
    # Autodiff would keep y in float32.
    return _scaled(y, factor), (y, factor)


def _scaled_backward(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, factor = residuals
    wide = dy.astype(jnp.float32)
    return (wide * factor).astype(y.dtype), jnp.sum(wide * y, axis=range(y.ndim - 1))


_scaled.defvjp(_scaled_forward, _scaled_backward)
