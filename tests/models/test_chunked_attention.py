"""Attention in blocks against softmax(query · keyᵀ) · value in float64, gradients included."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.models import REMAT, chunked_attention


def allowed_pairs(queries, keys, options):
    at_query, at_key = np.arange(queries)[:, None], np.arange(keys)
    allowed = np.ones((1, 1, queries, keys), bool)
    if options["causal"]:
        allowed = allowed & (at_key <= at_query)
    if options["window"] is not None:
        allowed = allowed & (np.abs(at_query - at_key) < options["window"])
    if options["mask"] is not None:
        allowed = allowed & options["mask"]
    if options["segments"] is not None:
        one, other = options["segments"]
        allowed = allowed & (one[:, None, :, None] == other[:, None, None, :])
    return allowed


def reference(arrays, pulled, options):
    """The textbook's output and its gradients, in float64; a row without keys gives 0."""
    query, key, value, bias = (None if x is None else x.astype(np.float64) for x in arrays)
    groups = query.shape[2] // key.shape[2]
    keys, values = np.repeat(key, groups, axis=2), np.repeat(value, groups, axis=2)
    scores = np.einsum("bqhd,bkhd->bhqk", query, keys) * options["scale"]
    bent = 1.0
    if options["softcap"] is not None:
        bent = 1 - np.tanh(scores / options["softcap"]) ** 2
        scores = options["softcap"] * np.tanh(scores / options["softcap"])
    if bias is not None:
        scores = scores + bias
    allowed = allowed_pairs(query.shape[1], key.shape[1], options)
    weights = np.where(allowed, np.exp(scores), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    out = np.einsum("bhqk,bkhd->bqhd", weights, values)

    def folded(x):
        return x.reshape(*x.shape[:2], -1, groups, x.shape[-1]).sum(3)

    to_weights = np.einsum("bqhd,bkhd->bhqk", pulled, values)
    to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True))
    gradients = [
        folded(np.einsum("bhqk,bqhd->bkhd", weights, pulled)),
    ]
    if bias is not None:
        over = tuple(a for a in range(3) if bias.shape[a] == 1)
        gradients.append(to_scores.sum(over, keepdims=True))
    to_scores = to_scores * bent * options["scale"]
    to_key = folded(np.einsum("bhqk,bqhd->bkhd", to_scores, query))
    return out, [np.einsum("bhqk,bkhd->bqhd", to_scores, keys), to_key, *gradients]


@st.composite
def cases(draw):
    """Arrays and options; blocks of 4, so that up to 11 positions make up to 3 blocks."""
    batch = draw(st.sampled_from([1, 2]))
    queries = draw(st.sampled_from([1, 3, 8, 11]))
    keys = draw(st.sampled_from([queries, 6]))
    heads, kv_heads = draw(st.sampled_from([(1, 1), (4, 2)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    # A mask and a bias have every axis but the last whole or broadcast.
    squares = [None, (1, 1, 1), (batch, 1, 1), (1, heads, queries), (batch, heads, queries)]
    masked, biased = draw(st.sampled_from(squares)), draw(st.sampled_from(squares))
    segments = rng.integers(0, 3, (batch, queries)), rng.integers(0, 3, (batch, keys))
    arrays = (
        normal(batch, queries, heads, 6),
        normal(batch, keys, kv_heads, 6),
        normal(batch, keys, kv_heads, 5),
        None if biased is None else normal(*biased, keys),
    )
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, 3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
        "mask": None if masked is None else rng.random((*masked, keys)) < 0.6,
        "segments": segments if draw(st.booleans()) else None,
        "scale": 0.7,
    }
    return arrays, normal(batch, queries, heads, 5), options


def test_keys_that_fill_a_block_up_are_not_read():
    """Six keys in blocks of four, which neither causality nor a mask hides."""
    query, key = jnp.ones((1, 3, 1, 4)), jnp.ones((1, 6, 1, 4))
    np.testing.assert_allclose(chunked_attention(query, key, key, block=4), query, rtol=1e-6)


def test_a_window_that_ends_with_a_block_is_seen_to_its_end():
    """Blocks that one pair of tokens alone connects are no pair that is left out."""
    query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 12, 1, 4))
    in_blocks, at_once = (
        chunked_attention(query, key, value, window=6, block=block) for block in (4, 12)
    )
    np.testing.assert_allclose(in_blocks, at_once, rtol=1e-5, atol=1e-6)


@settings(max_examples=12)
@given(cases())
def test_output_and_gradients_against_float64(case):
    arrays, pulled, options = case
    given_arrays = [jnp.asarray(x) for x in arrays if x is not None]

    @jax.jit
    def both(*arrays):
        def attend(query, key, value, bias=None):
            more = jax.tree.map(jnp.asarray, options)
            more |= {name: options[name] for name in ("causal", "window", "softcap", "scale")}
            return chunked_attention(query, key, value, bias=bias, **more, block=4)

        out, pull = jax.vjp(attend, *arrays)
        return out, pull(jnp.asarray(pulled))

    out, gradients = both(*given_arrays)
    expected, expected_gradients = reference(arrays, pulled, options)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=5e-6)
    for one, other in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-5)


def drawn(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def test_the_default_block_equals_jax():
    # 600 positions: two blocks of 320, the second one short.
    query, key = drawn((1, 600, 4, 16)), drawn((1, 600, 2, 16), seed=1)

    def summed(attend):
        def total(query, key):
            return jnp.sum(jnp.sin(attend(query, key, key)))

        return jax.jit(jax.value_and_grad(total, (0, 1)))(query, key)

    ours = summed(lambda *arrays: chunked_attention(*arrays, causal=True))
    theirs = summed(lambda *arrays: jax.nn.dot_product_attention(*arrays, is_causal=True))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for one, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_rounded_no_worse_than_jaxs():
    arrays = [drawn((1, 64, 2, 16), jnp.bfloat16, seed) for seed in range(3)]
    wide = [x.astype(jnp.float32) for x in arrays]
    exact = jax.nn.dot_product_attention(*wide, is_causal=True)
    ours = chunked_attention(*arrays, causal=True, block=16)
    theirs = jax.nn.dot_product_attention(*arrays, is_causal=True)
    assert ours.dtype == jnp.bfloat16
    assert jnp.abs(ours - exact).max() <= 1.5 * jnp.abs(theirs - exact).max()


def test_pairs_that_causality_hides_are_not_computed():
    def length(causal, window=None):
        query = jnp.zeros((1, 64, 1, 8))

        def attend(x):
            return chunked_attention(x, x, x, causal=causal, window=window, block=8)

        # The loop's condition: its counter is less than the number of pairs (and never below 0).
        bounds = re.findall(r"lt \w+ (\d+)", str(jax.make_jaxpr(attend)(query)))
        return max(map(int, bounds))

    assert length(causal=False) == 64
    assert length(causal=True) == 36
    assert length(causal=True, window=8) == 15


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 4, 3, 8), (1, 4, 2, 8)), {}, "does not divide"),
        (((1, 4, 2, 8), (1, 4, 2, 8)), {"window": 0}, "at least 1"),
        (((1, 4, 2, 8), (1, 4, 2, 8)), {"block": 0}, "at least 1"),
    ],
)
def test_nonsense_is_refused(shapes, options, message):
    query, key = (jnp.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        chunked_attention(query, key, key, **options)


@pytest.mark.parametrize(("remat", "loops"), [("full", 3), ("attention", 2)])
def test_remat_may_keep_what_the_backward_pass_reads(remat, loops):
    def attend(x):
        return jnp.sum(chunked_attention(x, x, x, causal=True, block=8) ** 2)

    step = jax.checkpoint(attend, policy=REMAT[remat])
    text = str(jax.make_jaxpr(jax.grad(step))(jnp.zeros((1, 16, 1, 8))))
    # Forward, backward, and forward again where its results were not kept.
    assert text.count("while[") == loops
