"""Attention whose memory is linear in the sequence, in plain XLA: any card, any option.

FlashAttention's algorithm (arXiv 2205.14135, 2307.08691) as one loop over pairs of blocks. A
block of queries meets one block of keys at a time and keeps a running maximum, a running sum and a
running output (the online softmax); scores exist for one pair of blocks only. For the backward pass
the output and each row's log-sum-exp are kept, and the scores are computed once more.

    pairs (query block, key block), causal:      (0,0) | (1,0) (1,1) | (2,0) (2,1) (2,2) | …

The list of pairs is made when the function is traced: pairs that causality or a window hide wholly
are not in it, so they cost nothing, and the loop has a fixed length, which a GPU runs without
asking the host. cuDNN's kernel is faster where it applies; this one takes what cuDNN does not
(float32, soft caps, segments of packed rows, any bias, any head width) in as little memory.

Cost beside attention that holds all scores: the product of queries and keys once more in the
backward pass, under remat too. Padding and segments are computed and masked, not skipped.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

BLOCK = 512
"""Queries, and keys, in a block: 512 · 512 float32 scores, 1 MiB, for each head and row."""

ATTENTION = "attention"
"""The name (`checkpoint_name`) of what waits for the backward pass: output and log-sum-exp."""

# A score that is hidden. Finite, so that the maximum of a row without keys is a number.
_HIDDEN = -1e30


class _Options(NamedTuple):
    """What is fixed when the function is traced."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    query_block: int
    key_block: int
    keys: int
    """Keys that are there; the rest of the last block is padding."""


class _Extras(NamedTuple):
    """Arrays that say which keys a query may read, each None where it is not given."""

    mask: Array | None
    query_segments: Array | None
    key_segments: Array | None


def chunked_attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch keys kv_heads dim"],
    value: Float[Array, "batch keys kv_heads value_dim"],
    *,
    mask: Bool[Array, "#batch #heads #queries keys"] | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "#batch #heads #queries keys"] | None = None,
    segments: tuple[Int[Array, "batch queries"], Int[Array, "batch keys"]] | None = None,
    block: int = BLOCK,
) -> Float[Array, "batch queries heads value_dim"]:
    """softmax(query · keyᵀ) · value, differentiable in all three and in `bias`.

    Args:
        query: every `heads / kv_heads` neighbouring query heads read one key head (grouped-query
            attention); keys and values are never repeated.
        key, value: in the query's dtype.
        mask: true where a query may read a key. `[batch, 1, 1, keys]`, which keys are real, is
            linear in memory; one with an axis of queries is as large as it is given.
        causal: query i reads keys 0 … i.
        window: query i reads keys i - window + 1 … i + window - 1 at most.
        scale: of the scores; None for 1/√dim.
        softcap: scores become softcap · tanh(score / softcap), before bias and masks.
        bias: added to the scores.
        segments: ids of queries and keys; a query reads keys of its own id only.
        block: queries, and keys, in a block.

    Returns:
        The query's dtype; scores, sums and gradients are accumulated in float32. A query that may
        read no key at all gives 0, and takes and gives no gradient.

    Raises:
        ValueError: heads that key heads do not divide, a block or window that is not positive.
    """
    batch, queries, heads, dim = query.shape
    keys, kv_heads = key.shape[1:3]
    if heads % kv_heads:
        raise ValueError(
            f"query has {heads} heads and key {kv_heads}, which does not divide them: every key "
            "head serves equally many query heads."
        )
    if block < 1 or (window is not None and window < 1):
        raise ValueError(f"block is {block} and window {window}, but both must be at least 1.")
    query_block, key_block = _block(queries, block), _block(keys, block)
    options = _Options(
        causal=causal,
        window=window,
        scale=dim**-0.5 if scale is None else scale,
        softcap=softcap,
        query_block=query_block,
        key_block=key_block,
        keys=keys,
    )

    def padded(x: Any, axis: int, size: int) -> Any:
        if x is None or x.shape[axis] == 1 != size or x.shape[axis] % size == 0:
            return x
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, -x.shape[axis] % size)
        return jnp.pad(x, widths)

    def square(x: Array | None) -> Array | None:
        return padded(padded(x, 2, query_block), 3, key_block)

    query_segments, key_segments = segments or (None, None)
    extras = _Extras(
        square(mask),
        padded(query_segments, 1, query_block),
        padded(key_segments, 1, key_block),
    )
    grouped = padded(query, 1, query_block).reshape(batch, -1, kv_heads, heads // kv_heads, dim)
    out = _attention(
        options,
        grouped,
        padded(key, 1, key_block),
        padded(value, 1, key_block),
        square(bias),
        extras,
    )
    return out.reshape(batch, -1, heads, value.shape[-1])[:, :queries]


def _block(length: int, block: int) -> int:
    """Blocks of one size, as little padding as can be, in multiples that tensor cores like."""
    if length <= block:
        return length
    pieces = -(-length // block)
    multiple = min(64, block)
    return -(-length // (pieces * multiple)) * multiple


def _pairs(options: _Options, query: Array, key: Array) -> tuple[Array, Array, Array]:
    """Numbers of query and key blocks that can see each other, and whether a query block is new."""
    query_blocks = query.shape[1] // options.query_block
    key_blocks = key.shape[1] // options.key_block
    first_query = np.arange(query_blocks)[:, None] * options.query_block
    first_key = np.arange(key_blocks)[None, :] * options.key_block
    last_query = first_query + options.query_block - 1
    last_key = first_key + options.key_block - 1
    seen = np.ones((query_blocks, key_blocks), bool)
    if options.causal:
        seen &= first_key <= last_query
    if options.window is not None:
        seen &= (first_query - last_key < options.window) & (
            first_key - last_query < options.window
        )
    i, j = np.nonzero(seen)
    new = np.diff(i, prepend=-1) != 0
    return jnp.asarray(i, jnp.int32), jnp.asarray(j, jnp.int32), jnp.asarray(new)


def _over(
    pairs: tuple[Array, Array, Array], step: Callable[..., tuple[Any, ...]], start: tuple[Any, ...]
) -> tuple[Any, ...]:
    """What `step(carry, pair)` leaves of `start` after all pairs.

    Not a scan: `jax.checkpoint` looks into a scan's body, and keeps for all pairs at once whatever
    needs no argument (the masks, 32 GiB of them at 32k tokens of Llama 3 8B) or what its policy
    names (every product, under "dots"). A while loop it computes again as a whole.
    """

    def body(state: tuple[Array, tuple[Any, ...]]) -> tuple[Array, tuple[Any, ...]]:
        index, carry = state
        return index + 1, step(carry, *(each[index] for each in pairs))

    count = pairs[0].size
    return jax.lax.while_loop(lambda state: state[0] < count, body, (jnp.int32(0), start))[1]


def _cut(x: Array, index: Array, size: int, axis: int = 1) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _put(whole: Array, part: Array, index: Array, size: int, axis: int = 1) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), index * size, axis)


def _product(subscripts: str, one: Array, other: Array) -> Array:
    # float32 activations ask for float32 products: without this an Ampere card takes TF32.
    precision = jax.lax.Precision.HIGHEST if one.dtype == jnp.float32 else None
    return jnp.einsum(
        subscripts, one, other, precision=precision, preferred_element_type=jnp.float32
    )


def _square(options: _Options, x: Array, i: Array, j: Array) -> Array:
    """The part of a mask or bias [b|1, h|1, q|1, k] that a pair reads."""
    x = _cut(x, j, options.key_block, axis=3)
    return x if x.shape[2] == 1 else _cut(x, i, options.query_block, axis=2)


def _by_group(x: Array, groups: tuple[int, int]) -> Array:
    """[b|1, h|1, q, k] as [b|1, n|1, g|1, q, k]."""
    return x.reshape(x.shape[0], *(groups if x.shape[1] > 1 else (1, 1)), *x.shape[2:])


def _scores(
    options: _Options,
    query: Float[Array, "b q n g d"],
    key: Float[Array, "b k n d"],
    bias: Array | None,
    extras: _Extras,
    i: Array,
    j: Array,
) -> tuple[Float[Array, "b n g q k"], Array | None, Array | None]:
    """A pair's scores; where they are allowed; the soft cap's slope. None: everywhere, 1."""
    groups = (query.shape[2], query.shape[3])
    scores = _product("bqngd,bknd->bngqk", query, key) * options.scale
    slope = None
    if options.softcap is not None:
        bent = jnp.tanh(scores / options.softcap)
        scores, slope = bent * options.softcap, 1 - jnp.square(bent)
    if bias is not None:
        part = _square(options, bias, i, j).astype(jnp.float32)
        scores = scores + _by_group(part, groups)
    at_query = (i * options.query_block + jnp.arange(options.query_block))[:, None]
    at_key = (j * options.key_block + jnp.arange(options.key_block))[None, :]
    allowed = []
    if options.keys % options.key_block:
        allowed.append(at_key < options.keys)
    if options.causal:
        allowed.append(at_key <= at_query)
    if options.window is not None:
        allowed.append(jnp.abs(at_query - at_key) < options.window)
    if extras.mask is not None:
        allowed.append(_by_group(_square(options, extras.mask, i, j), groups))
    if extras.query_segments is not None and extras.key_segments is not None:
        of_query = _cut(extras.query_segments, i, options.query_block)
        of_key = _cut(extras.key_segments, j, options.key_block)
        allowed.append((of_query[:, :, None] == of_key[:, None, :])[:, None, None])
    if not allowed:
        return scores, None, slope
    together = allowed[0]
    for each in allowed[1:]:
        together = together & each
    return jnp.where(together, scores, _HIDDEN), together, slope


def _only(allowed: Array | None, x: Array) -> Array:
    return x if allowed is None else jnp.where(allowed, x, 0.0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, query: Array, key: Array, value: Array, bias: Any, extras: Any):
    return _forward(options, query, key, value, bias, extras)[0]


def _forward(
    options: _Options, query: Array, key: Array, value: Array, bias: Any, extras: _Extras
) -> tuple[Array, tuple]:
    batch, queries, *groups, _ = query.shape
    rows = (batch, *groups, options.query_block)
    pairs = _pairs(options, query, key)

    def step(carry: tuple[Array, ...], i: Array, j: Array, new: Array) -> tuple[Array, ...]:
        largest, total, mixed, out, normaliser = carry
        largest = jnp.where(new, _HIDDEN, largest)
        total, mixed = jnp.where(new, 0.0, total), jnp.where(new, 0.0, mixed)
        scores, allowed, _ = _scores(
            options,
            _cut(query, i, options.query_block),
            _cut(key, j, options.key_block),
            bias,
            extras,
            i,
            j,
        )
        larger = jnp.maximum(largest, scores.max(-1))
        weights = _only(allowed, jnp.exp(scores - larger[..., None]))
        decay = jnp.exp(largest - larger)
        total = total * decay + weights.sum(-1)
        values = _cut(value, j, options.key_block)
        mixed = mixed * decay[..., None] + _product(
            "bngqk,bknd->bngqd", weights.astype(value.dtype), values
        )
        # Written after every pair, right after a block's last: a write is cheaper than a branch.
        some = jnp.where(total > 0, total, 1.0)
        block = jnp.moveaxis(mixed / some[..., None], 3, 1)
        out = _put(out, block, i, options.query_block)
        logs = jnp.where(total > 0, larger + jnp.log(some), 0.0)
        normaliser = _put(normaliser, logs, i, options.query_block, axis=3)
        return larger, total, mixed, out, normaliser

    start = (
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, value.shape[-1]), jnp.float32),
        jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype),
        jnp.zeros((batch, *groups, queries), jnp.float32),
    )
    *_, out, normaliser = _over(pairs, step, start)
    out, normaliser = checkpoint_name((out, normaliser), ATTENTION)
    return out, (query, key, value, bias, extras, out, normaliser)


def _backward(options: _Options, residuals: tuple, gradient: Array) -> tuple:
    query, key, value, bias, extras, out, normaliser = residuals
    pairs = _pairs(options, query, key)
    # What the softmax takes off every score's gradient: a row's gradient · output.
    offset = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    offset = jnp.moveaxis(offset, 1, -1)

    def step(carry: tuple[Any, ...], i: Array, j: Array, new: Array) -> tuple[Any, ...]:
        to_block, to_query, to_key, to_value, to_bias = carry
        queries, keys = _cut(query, i, options.query_block), _cut(key, j, options.key_block)
        values, pulled = _cut(value, j, options.key_block), _cut(gradient, i, options.query_block)
        scores, allowed, slope = _scores(options, queries, keys, bias, extras, i, j)
        logs = _cut(normaliser, i, options.query_block, axis=3)[..., None]
        weights = _only(allowed, jnp.exp(scores - logs))
        to_values = _product("bngqk,bqngd->bknd", weights.astype(value.dtype), pulled)
        to_value = _add(to_value, to_values, j, options.key_block)
        to_weights = _product("bqngd,bknd->bngqk", pulled, values)
        to_scores = weights * (to_weights - _cut(offset, i, options.query_block, axis=3)[..., None])
        if bias is not None:
            to_bias = _add_to_bias(options, to_bias, to_scores, i, j)
        if slope is not None:
            to_scores = to_scores * slope
        narrow = (to_scores * options.scale).astype(query.dtype)
        to_block = jnp.where(new, 0.0, to_block) + _product("bngqk,bknd->bqngd", narrow, keys)
        to_query = _put(to_query, to_block, i, options.query_block)
        to_keys = _product("bngqk,bqngd->bknd", narrow, queries)
        return (
            to_block,
            to_query,
            _add(to_key, to_keys, j, options.key_block),
            to_value,
            to_bias,
        )

    start: tuple[Any, ...] = (
        jnp.zeros((query.shape[0], options.query_block, *query.shape[2:]), jnp.float32),
        jnp.zeros_like(query),
        jnp.zeros(key.shape, jnp.float32),
        jnp.zeros(value.shape, jnp.float32),
        None if bias is None else jnp.zeros(bias.shape, jnp.float32),
    )
    _, to_query, to_key, to_value, to_bias = _over(pairs, step, start)
    return (
        to_query,
        to_key.astype(key.dtype),
        to_value.astype(value.dtype),
        None if bias is None else to_bias.astype(bias.dtype),
        None,
    )


def _add(whole: Array, part: Array, index: Array, size: int) -> Array:
    return _put(whole, _cut(whole, index, size) + part, index, size)


def _add_to_bias(options: _Options, whole: Array, part: Array, i: Array, j: Array) -> Array:
    """Adds a pair's [b, n, g, q, k], summed over what the bias is broadcast over."""
    part = part.reshape(part.shape[0], -1, *part.shape[3:])
    over = tuple(a for a in (0, 1, 2) if whole.shape[a] == 1 != part.shape[a])
    part = part.sum(over, keepdims=True) + _square(options, whole, i, j)
    at_query = 0 if whole.shape[2] == 1 else i * options.query_block
    return jax.lax.dynamic_update_slice(whole, part, (0, 0, at_query, j * options.key_block))


_attention.defvjp(_forward, _backward)
