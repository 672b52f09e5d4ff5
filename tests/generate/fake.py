"""A recurrent model of a few numbers with the generation protocol: exact under left padding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array


class State(NamedTuple):
    state: Array
    filled: Array


class Recurrent(nnx.Module):
    """state ← tanh(0.5 · state + embedding); logits = state · head. Padding leaves the state."""

    def __init__(self, vocab: int = 50, width: int = 8) -> None:
        keys = jax.random.split(jax.random.key(1), 2)
        self.embedding = nnx.Param(jax.random.normal(keys[0], (vocab, width)))
        self.head = nnx.Param(3 * jax.random.normal(keys[1], (width, vocab)))

    def prefill(self, input_ids, attention_mask=None, *, cache_length):
        if attention_mask is None:
            attention_mask = jnp.ones(input_ids.shape, bool)

        def read(state, column):
            token, real = column
            return jnp.where(real[:, None], self._next(state, token), state), None

        state = jnp.zeros((len(input_ids), self.embedding.shape[1]))
        state, _ = jax.lax.scan(read, state, (input_ids.T, attention_mask.T))
        return state @ self.head[...], State(state, jnp.int32(input_ids.shape[1]))

    def decode_step(self, tokens, cache):
        state = self._next(cache.state, tokens)
        return state @ self.head[...], State(state, cache.filled + 1)

    def _next(self, state, token):
        return jnp.tanh(0.5 * state + self.embedding[...][token])

    def logits_after(self, tokens):
        """Of one row, without padding and batches."""
        state = jnp.zeros((1, self.embedding.shape[1]))
        for token in tokens:
            state = self._next(state, jnp.array([token]))
        return (state @ self.head[...])[0]
