"""h · Bᵀ, the second half of an adapter's product, and its gradients.

They stand beside the quantized product because a kernel may compute both at once: then its backward
pass needs these gradients, too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import vary_alike


def low_rank_product(
    hidden: Float[Array, "*batch r"], b: Float[Array, "out r"]
) -> Float[Array, "*batch out"]:
    """h · Bᵀ, with `hidden` = s · x · Aᵀ; both of one dtype, which is the result's."""
    return _product(*vary_alike(hidden, b))


@jax.custom_vjp
def _product(hidden: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("...r,or->...o", hidden, b)


def low_rank_gradients(
    operands: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `hidden` and `b`, given both and that of the product."""
    hidden, b = operands
    # dB as (hᵀ·dy)ᵀ: autodiff's dyᵀ·h makes XLA:CPU transpose the whole output gradient.
    tokens, outputs = hidden.reshape(-1, hidden.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return jnp.einsum("...o,or->...r", dy, b), jnp.einsum("tr,to->ro", tokens, outputs).T


_product.defvjp(
    lambda hidden, b: (_product(hidden, b), (hidden, b)),
    low_rank_gradients,
)
