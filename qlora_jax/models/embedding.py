"""The vocabulary matrix: rows on the way in, scores on the way out."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.nn import FrozenParam


class Embedding(nnx.Module):
    """The vocabulary matrix `[vocab, embed]`: rows on the way in, scores on the way out."""

    def __init__(self, vocab: int, embed: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        init = jax.random.normal(rngs.params(), (vocab, embed), jnp.float32) * 0.02
        self.weight = FrozenParam(init.astype(dtype))

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
        """The rows of `ids`, in the weight's dtype. Ids outside the vocabulary give NaN."""
        return jnp.take(self.weight[...], ids, axis=0, mode="fill")

    def attend(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Scores of every word, float32: `x · Wᵀ` with x's dtype going in."""
        return _scores(x, self.weight[...].astype(x.dtype))


@jax.custom_vjp
def _scores(x: Array, weight: Array) -> Array:
    return jnp.einsum("...e,ve->...v", x, weight, preferred_element_type=jnp.float32)


def _scores_forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _scores(x, weight), (x, weight)


def _scores_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    # Left alone, autodiff would multiply the float32 gradient: with a 16-bit head that is a float32
    # copy of the largest matrix there is, off the tensor cores.
    x, weight = residuals
    narrow = gradient.astype(x.dtype)
    to_x = jnp.einsum("...v,ve->...e", narrow, weight).astype(x.dtype)
    return to_x, jnp.einsum("...v,...e->ve", narrow, x).astype(weight.dtype)


_scores.defvjp(_scores_forward, _scores_backward)
