"""From logits to the next token: penalties, temperature, top-k, nucleus (top-p) and min-p sampling.

Each is a pure function of logits [..., vocab]; a token that may not come has the logit -inf. They
are applied in the order of the Hugging Face library: the penalty of repetition, temperature, then
top-k, top-p and min-p, each to what the one before left over.

- A penalty of repetition (Keskar et al., arXiv 1909.05858) divides the logits of tokens that the
  text has already; those below 0 it multiplies, as in the Hugging Face library.
- Temperature T divides the logits; T → 0 is the most likely token alone, which is what 0 means.
- Top-k (Fan et al., arXiv 1805.04833) keeps the k largest logits, and those that tie with the last.
- Top-p (Holtzman et al., arXiv 1904.09751) keeps the smallest set of most likely tokens whose
  probabilities reach p. QLoRA's paper generates with p = 0.9, T = 0.7.
- Min-p (Nguyen et al., arXiv 2407.01082) keeps what has at least p times the probability of the
  most likely token.

Every row has its own key, so that what one prompt says does not depend on its neighbours.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.generate.config import GenerationConfig

Logits = Float[Array, "*batch vocab"]


def penalize_repetition(
    logits: Logits, seen: Bool[Array, "*batch vocab"], penalty: float
) -> Logits:
    """Tokens that were `seen` less likely for a penalty above 1, more likely below."""
    penalized = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(seen, penalized, logits)


def with_temperature(logits: Logits, temperature: float) -> Logits:
    """Flatter above 1, sharper below; `temperature` is above 0."""
    return logits / temperature


def keep_top_k(logits: Logits, k: int) -> Logits:
    """The k largest and what ties with the last of them; all where k is the vocabulary or more."""
    k = min(k, logits.shape[-1])
    least = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """The most likely tokens until their probabilities reach p; always at least one.

    A token stays if those more likely than it sum to less than p; of equally likely ones, the first
    in the vocabulary counts as the more likely.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, -1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The first one always: a p too small for float32 is 0 there.
    kept = (before < p) | (jnp.arange(logits.shape[-1]) == 0)
    return jnp.where(_put_back(kept, order), logits, -jnp.inf)


def keep_min_p(logits: Logits, p: float) -> Logits:
    """What has at least p times the probability of the most likely token."""
    least = logits.max(-1, keepdims=True) + math.log(p)
    return jnp.where(logits < least, -jnp.inf, logits)


# Row by row: jnp.put_along_axis would gather rows that are spread over devices.
@partial(jnp.vectorize, signature="(v),(v)->(v)")
def _put_back(ordered: Array, order: Array) -> Array:
    """What was taken in this order, each in its place again; a second sort would take longer."""
    return jnp.zeros_like(ordered).at[order].set(ordered, unique_indices=True)


def shaped_logits(logits: Logits, config: GenerationConfig) -> Logits:
    """The logits of the distribution that `config` samples from; its temperature is above 0."""
    logits = with_temperature(logits, config.temperature)
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    return keep_min_p(logits, config.min_p) if config.min_p else logits


def next_tokens(
    logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], config: GenerationConfig
) -> Int[Array, " batch"]:
    """One token per row, drawn with the row's own key; the most likely one where it is greedy."""
    if config.greedy:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    drawn = jax.vmap(jax.random.categorical)(keys, shaped_logits(logits, config))
    return drawn.astype(jnp.int32)
