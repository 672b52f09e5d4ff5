"""The vocabulary matrix: rows on the way in, scores on the way out."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qlora_jax.nn import FrozenParam, TrainedParam


class Embedding(nnx.Module):
    """The vocabulary matrix `[vocab, embed]`: rows on the way in, scores on the way out.

    Attributes:
        weight: `FrozenParam` [vocab, embed], or a trained one.
        token_ids: `FrozenParam` [n], int32: rows that `token_rows` stands for; or None.
        token_rows: `TrainedParam` [n, embed]: those rows, trained while the matrix stays frozen
            (`tokens.py`); or None.
    """

    def __init__(self, vocab: int, embed: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        init = jax.random.normal(rngs.params(), (vocab, embed), jnp.float32) * 0.02
        self.weight = FrozenParam(init.astype(dtype))
        self.token_ids: FrozenParam | None = nnx.data(None)
        self.token_rows: TrainedParam | None = nnx.data(None)

    def train_rows(self, ids: Int[Array, " n"], rows: Float[Array, "n embed"]) -> None:
        """Lets `rows` stand for the rows of `ids` (each once) from now on, trained; in place."""
        self.token_ids, self.token_rows = FrozenParam(ids), TrainedParam(rows)

    def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
        """The rows of `ids`, in the weight's dtype. Ids outside the vocabulary give NaN."""
        found = jnp.take(self.weight[...], ids, axis=0, mode="fill")
        if self.token_ids is None or self.token_rows is None:
            return found
        hit = ids[..., None] == self.token_ids[...]
        trained = jnp.take(self.token_rows[...].astype(found.dtype), hit.argmax(-1), axis=0)
        return jnp.where(hit.any(-1, keepdims=True), trained, found)

    def attend(self, x: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Scores of every word, float32: `x · Wᵀ` with x's dtype going in."""
        scores = _scores(x, self.weight[...].astype(x.dtype))
        if self.token_ids is None or self.token_rows is None:
            return scores
        trained = _scores(x, self.token_rows[...].astype(x.dtype))
        return scores.at[..., self.token_ids[...]].set(trained)


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
