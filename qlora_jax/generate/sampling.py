"""From logits to the next token: temperature, top-k and nucleus (top-p) sampling.

Each is a pure function of logits [..., vocab]; a token that may not come has the logit -inf. They
are applied in the order of the Hugging Face library: temperature, then top-k, then top-p, each to
what the one before left over.

- Temperature T divides the logits; T → 0 is the most likely token alone, which is what 0 means.
- Top-k (Fan et al., arXiv 1805.04833) keeps the k largest logits, and those that tie with the last.
- Top-p (Holtzman et al., arXiv 1904.09751) keeps the smallest set of most likely tokens whose
  probabilities reach p. QLoRA's paper generates with p = 0.9, T = 0.7.

Every row has its own key, so that what one prompt says does not depend on its neighbours.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from qlora_jax.generate.config import GenerationConfig

Logits = Float[Array, "*batch vocab"]


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
    return keep_top_p(logits, config.top_p) if config.top_p < 1 else logits


def next_tokens(
    logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], config: GenerationConfig
) -> Int[Array, " batch"]:
    """One token per row, drawn with the row's own key; the most likely one where it is greedy."""
    if config.greedy:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    drawn = jax.vmap(jax.random.categorical)(keys, shaped_logits(logits, config))
    return drawn.astype(jnp.int32)
