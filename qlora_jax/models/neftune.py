"""NEFTune (arXiv 2310.05914): noise on the embeddings while training, for better conversation.

Every number of an embedded token gets uniform noise of at most α / √(L · d), where L counts the
tokens of its text and d the width: a text's noise has a norm of about α / √3, however long it is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def with_noise(
    x: Float[Array, "batch seq embed"],
    positions: Int[Array, "batch seq"],
    alpha: float,
    key: Key[Array, ""],
) -> Float[Array, "batch seq embed"]:
    """The embeddings with noise, in their own dtype.

    Args:
        x: embedded tokens.
        positions: counted from 0 in each text, so that of packed texts each has its own L; padding
            does not count.
        alpha: α, 5 to 15 in the paper.
        key: of the noise.
    """
    bound = alpha * jax.lax.rsqrt(_lengths(positions).astype(jnp.float32) * x.shape[-1])
    noise = jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)
    return x + noise * bound[..., None].astype(x.dtype)


def _lengths(positions: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """How many tokens each token's text has: its last one's position, and one more."""
    index = jnp.arange(positions.shape[1], dtype=jnp.int32)
    goes_on = jnp.pad(positions[:, 1:] == positions[:, :-1] + 1, ((0, 0), (0, 1)))
    last = jax.lax.cummin(jnp.where(goes_on, index.size, index), axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1
