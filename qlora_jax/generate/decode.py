"""The two compiled programs of generation: read the prompts, then write token after token.

A model is anything with the protocol `Generative`: `prefill` reads padded prompts into a cache,
`decode_step` takes one token per row further. Both have static shapes, so generation compiles once
for a batch size, a prompt length and a cache length, whatever the prompts say:

    start(...)    prefill, and the first token of every row
    advance(...)  up to `steps` more tokens in one `jax.lax.while_loop`, which ends early when every
                  row has ended

Before the first token each computes what is the same for all of them: adapters are cast and scaled
once, not once a token.

The host sees tokens only between calls of `advance`; its `steps` are what a stream waits for.
"""

from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from qlora_jax.generate.config import GenerationConfig
from qlora_jax.generate.sampling import next_tokens, penalize_repetition
from qlora_jax.nn import settle_adapters


@runtime_checkable
class Generative(Protocol):
    """What a model must do to generate; `Decoder` and `EncoderDecoder` do."""

    def prefill(
        self,
        input_ids: Int[Array, "batch seq"],
        attention_mask: Bool[Array, "batch seq"] | None = None,
        *,
        cache_length: int,
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """Logits after the last real position of every row, and the cache."""
        ...

    def decode_step(
        self, tokens: Int[Array, " batch"], cache: Any
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """Logits after these tokens, and the cache with them in it."""
        ...


def reads_source(model: Generative) -> bool:
    """Whether the prompt is read by an encoder, so that the cache holds the answer alone."""
    return hasattr(model, "encoder")


class Written(NamedTuple):
    """A batch in the middle of being written.

    `tokens` [batch max_new_tokens] are valid up to `length` [batch]; `ended` rows write no more.
    `step` counts the tokens written by the rows that have not ended. `keys` are the rows' own.
    `seen` says which tokens a text has already, where repeating them is penalized.
    """

    tokens: Int[Array, "batch new"]
    length: Int[Array, " batch"]
    ended: Bool[Array, " batch"]
    step: Int[Array, ""]
    keys: Key[Array, " batch"]
    cache: PyTree
    seen: Bool[Array, "batch vocab"] | None = None


@partial(jax.jit, static_argnames=("graphdef", "config", "cache_length"))
def start(
    graphdef: nnx.GraphDef,
    state: PyTree,
    input_ids: Int[Array, "batch seq"],
    attention_mask: Bool[Array, "batch seq"],
    keys: Key[Array, " batch"],
    ended: Bool[Array, " batch"],
    *,
    config: GenerationConfig,
    cache_length: int,
) -> Written:
    """The prompts read, and the first token written; rows that have `ended` write none."""
    model = settle_adapters(nnx.merge(graphdef, state))
    logits, cache = model.prefill(input_ids, attention_mask, cache_length=cache_length)
    batch = len(input_ids)
    written = Written(
        tokens=jnp.zeros((batch, config.max_new_tokens), jnp.int32),
        length=jnp.zeros(batch, jnp.int32),
        ended=ended,
        step=jnp.zeros((), jnp.int32),
        keys=keys,
        cache=cache,
    )
    if config.repetition_penalty != 1:
        read = attention_mask & (not reads_source(model))
        written = written._replace(seen=_with(jnp.zeros(logits.shape, bool), input_ids, read))
    return _write(written, logits, config)


@partial(jax.jit, static_argnames=("graphdef", "config"), donate_argnames="written")
def advance(
    graphdef: nnx.GraphDef,
    state: PyTree,
    written: Written,
    steps: Int[Array, ""],
    *,
    config: GenerationConfig,
) -> Written:
    """Up to `steps` more tokens per row, fewer where all rows end or reach their length."""
    model = settle_adapters(nnx.merge(graphdef, state))
    last = jnp.minimum(written.step + steps, config.max_new_tokens)

    def unfinished(written: Written) -> Bool[Array, ""]:
        return (written.step < last) & ~jnp.all(written.ended)

    def step(written: Written) -> Written:
        previous = jax.lax.dynamic_index_in_dim(
            written.tokens, written.step - 1, axis=1, keepdims=False
        )
        logits, cache = model.decode_step(previous, written.cache)
        return _write(written._replace(cache=cache), logits, config)

    return jax.lax.while_loop(unfinished, step, written)


def _write(
    written: Written, logits: Float[Array, "batch vocab"], config: GenerationConfig
) -> Written:
    """One token into every row that goes on; a row that writes an end token ends with it."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(written.keys, written.step)
    eos = jnp.array(config.eos_token_ids, jnp.int32)
    if written.seen is not None:
        logits = penalize_repetition(logits, written.seen, config.repetition_penalty)
    if config.min_new_tokens:
        too_early = written.step < config.min_new_tokens
        logits = logits.at[:, eos].add(jnp.where(too_early, -jnp.inf, 0.0))
    token = next_tokens(logits, keys, config)
    goes_on = ~written.ended
    ends = jnp.any(token[:, None] == eos, axis=1)
    if written.seen is not None:
        seen = _with(written.seen, token[:, None], goes_on[:, None])
        written = written._replace(seen=seen)
    return written._replace(
        tokens=jax.lax.dynamic_update_slice_in_dim(
            written.tokens, token[:, None], written.step, axis=1
        ),
        length=written.length + goes_on,
        ended=written.ended | ends,
        step=written.step + 1,
    )


# Row by row, so that rows that are spread over devices stay where they are.
@partial(jnp.vectorize, signature="(v),(s),(s)->(v)")
def _with(seen: Array, tokens: Array, real: Array) -> Array:
    """What was seen, and those of these tokens that are `real`."""
    return seen.at[tokens].max(real)
