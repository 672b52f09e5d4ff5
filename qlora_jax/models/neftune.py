"""NEFTune (arXiv 2310.05914): noise on the embeddings while training, for better conversation.

Every number of an embedded token gets uniform noise of at most α / √(L · d), where L counts the
tokens of its text and d the width: a text's noise has a norm of about α / √3, however long it is.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from qlora_jax.models.positions import text_lengths


def with_noise(
    x: Float[Array, "batch seq embed"],
    positions: Int[Array, "batch seq"],
    alpha: float | None,
    key: Key[Array, ""] | None,
) -> Float[Array, "batch seq embed"]:
    """The embeddings with noise, in their own dtype.

    Args:
        x: embedded tokens.
        positions: counted from 0 in each text, so that of packed texts each has its own L; padding
            does not count.
        alpha: α, 5 to 15 in the paper; None for no noise.
        key: of the noise; None for no noise.
    """
    if alpha is None or key is None:
        return x
    bound = alpha * jax.lax.rsqrt(text_lengths(positions).astype(jnp.float32) * x.shape[-1])
    noise = jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0)
    return x + noise * bound[..., None].astype(x.dtype)


def set_noise(model: nnx.Module, alpha: float | None) -> None:
    """This α, or none, for a model that has such noise.

    Raises:
        ValueError: it has not, and α is one.
    """
    if hasattr(model, "neftune_noise_alpha"):
        model.neftune_noise_alpha = alpha
    elif alpha is not None:
        raise ValueError(
            f"neftune_noise_alpha is {alpha}, but {type(model).__name__} has no such noise, which "
            "is a Decoder's: leave it out."
        )
