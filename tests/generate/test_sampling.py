"""Temperature, top-k and top-p against their definitions in NumPy, and draws against both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.generate import (
    GenerationConfig,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_tokens,
    penalize_repetition,
    shaped_logits,
    with_temperature,
)

LOGITS = np.random.default_rng(0).normal(0, 2, (5, 12)).astype(np.float32)


def softmax(logits):
    e = np.exp(np.float64(logits) - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def nucleus(row, p):
    """The definition: the smallest set of most likely tokens whose probability reaches p."""
    kept, reached = set(), 0.0
    for token in sorted(range(len(row)), key=lambda t: (-row[t], t)):
        kept.add(token)
        reached += softmax(row)[token]
        if reached >= p:
            break
    return kept


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    kept = np.asarray(keep_top_p(jnp.asarray(LOGITS), p))
    for row, found in zip(LOGITS, kept, strict=True):
        assert set(np.flatnonzero(np.isfinite(found))) == nucleus(row, p)
        np.testing.assert_array_equal(found[np.isfinite(found)], row[np.isfinite(found)])


@pytest.mark.parametrize("k", [1, 3, 12, 99])
def test_top_k_keeps_the_k_largest(k):
    kept = np.asarray(keep_top_k(jnp.asarray(LOGITS), k))
    for row, found in zip(LOGITS, kept, strict=True):
        assert set(np.flatnonzero(np.isfinite(found))) == set(np.argsort(-row)[:k])


@pytest.mark.parametrize("p", [1e-9, 0.05, 0.3, 1.0])
def test_min_p_keeps_a_share_of_the_most_likely(p):
    kept = np.asarray(keep_min_p(jnp.asarray(LOGITS), p))
    for row, found in zip(LOGITS, kept, strict=True):
        chances = softmax(row)
        expected = np.where(chances >= p * chances.max(), row, -np.inf)
        np.testing.assert_array_equal(found, expected)


def test_what_was_seen_is_less_likely_whatever_its_sign():
    logits = jnp.array([[2.0, -2.0, 3.0, -jnp.inf]])
    seen = jnp.array([[True, True, False, True]])
    found = penalize_repetition(logits, seen, 2.0)
    np.testing.assert_array_equal(found, [[1.0, -4.0, 3.0, -np.inf]])


def test_ties_with_the_last_one_stay():
    kept = keep_top_k(jnp.array([[1.0, 2.0, 2.0, 0.0]]), 1)
    np.testing.assert_array_equal(np.isfinite(kept), [[False, True, True, False]])


def test_one_token_stays_of_a_nucleus_too_small_for_float32():
    kept = np.asarray(keep_top_p(jnp.asarray(LOGITS), 1e-50))
    assert np.isfinite(kept).sum(axis=-1).tolist() == [1] * len(LOGITS)


def test_equally_likely_tokens_enter_the_nucleus_in_their_order():
    kept = keep_top_p(jnp.zeros((1, 4)), 0.5)
    np.testing.assert_array_equal(np.isfinite(kept), [[True, True, False, False]])


@settings(max_examples=30)
@given(st.lists(st.integers(-3, 3), min_size=16, max_size=16), st.floats(0.01, 1.0))
def test_what_the_nucleus_keeps_finds_back_to_its_place(row, p):
    """Among many ties, as by sorting the order itself, which is slower."""
    logits = np.array([row, row[::-1]], np.float32)
    order = np.argsort(-logits, axis=-1, kind="stable")
    chances = jax.nn.softmax(jnp.asarray(np.take_along_axis(logits, order, -1)), axis=-1)
    kept = np.asarray(jnp.cumsum(chances, axis=-1) - chances < p) | (np.arange(16) == 0)
    expected = np.take_along_axis(kept, np.argsort(order, axis=-1), -1)
    found = keep_top_p(jnp.asarray(logits), p)
    np.testing.assert_array_equal(found, np.where(expected, logits, -np.inf))


def test_rows_of_several_devices_stay_where_they_are():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    logits = jax.device_put(jnp.asarray(LOGITS[:4]), rows)
    nucleus_of = jax.jit(lambda logits: keep_top_p(logits, 0.9))
    assert "all-gather" not in nucleus_of.lower(logits).compile().as_text()


@settings(max_examples=30)
@given(
    # XLA compares subnormals as zeros, NumPy does not.
    st.lists(st.floats(-30, 30, width=32, allow_subnormal=False), min_size=6, max_size=6),
    st.floats(0.01, 1.0),
    st.integers(1, 6),
)
def test_filters_keep_something_and_change_nothing_else(row, p, k):
    logits = jnp.array([row], jnp.float32)
    for kept in (keep_top_p(logits, p), keep_top_k(logits, k)):
        alive = np.isfinite(kept)
        assert alive.any()
        np.testing.assert_array_equal(np.asarray(kept)[alive], np.asarray(logits)[alive])
        assert np.asarray(logits)[alive].max() == max(np.float32(row))


def test_the_coldest_temperature_takes_the_most_likely():
    coldest = GenerationConfig(temperature=1e-30, top_p=0.9)
    keys = jax.random.split(jax.random.key(0), len(LOGITS))
    found = next_tokens(jnp.asarray(1e4 * LOGITS), keys, coldest)
    np.testing.assert_array_equal(found, LOGITS.argmax(-1))


def test_temperature_divides():
    np.testing.assert_allclose(with_temperature(jnp.asarray(LOGITS), 0.7), LOGITS / 0.7, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(temperature=1.0),
        GenerationConfig(temperature=0.7, top_p=0.9),
        GenerationConfig(temperature=1.5, top_k=4),
        GenerationConfig(temperature=1.3, top_k=6, top_p=0.8),
        GenerationConfig(temperature=1.3, min_p=0.2),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(config):
    draws = 20_000
    row = jnp.asarray(LOGITS[0])
    tokens = next_tokens(
        jnp.broadcast_to(row, (draws, len(row))), jax.random.split(jax.random.key(3), draws), config
    )
    expected = softmax(np.asarray(shaped_logits(row[None], config))[0])
    scaled = LOGITS[0] / np.float32(config.temperature)
    if config.top_k is not None:
        scaled[np.argsort(-scaled)[config.top_k :]] = -np.inf
    # The nucleus is one of the k largest: of all tokens it would hold two more.
    left = set(np.flatnonzero(np.isfinite(scaled)))
    members = nucleus(scaled, config.top_p) if config.top_p < 1 else left
    if config.min_p:
        members = {t for t in left if softmax(scaled)[t] >= config.min_p * softmax(scaled).max()}
    assert set(np.flatnonzero(expected)) == members
    found = np.bincount(tokens, minlength=len(row)) / draws
    # Five standard deviations of a share.
    np.testing.assert_allclose(found, expected, atol=5 * np.sqrt(0.25 / draws))
    assert not found[expected == 0].any()


def test_greedy_takes_the_most_likely():
    tokens = next_tokens(
        jnp.asarray(LOGITS), jax.random.split(jax.random.key(0), len(LOGITS)), GenerationConfig()
    )
    np.testing.assert_array_equal(tokens, LOGITS.argmax(-1))


def test_the_bounds_of_options_are_possible():
    GenerationConfig(max_new_tokens=4, min_new_tokens=4, top_k=1, top_p=1.0, min_p=1.0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"max_new_tokens": 0}, "1 or more"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "0 to max_new_tokens=4"),
        ({"temperature": 1e-50}, "temperature=1e-50 is too near to 0"),
        ({"temperature": -0.1}, "0 \\(greedy\\) or more"),
        ({"temperature": float("inf")}, "a finite number"),
        ({"temperature": float("nan")}, "a finite number"),
        ({"top_k": 0}, "None for no limit"),
        ({"top_p": 0.0}, "at most 1"),
        ({"top_p": 1.1}, "at most 1"),
        ({"min_p": -0.1}, "min_p=-0.1 must be 0 to 1"),
        ({"min_p": 1.1}, "min_p=1.1 must be 0 to 1"),
        ({"repetition_penalty": 0.0}, "above 0, such as 1.1; 1 is none"),
        ({"repetition_penalty": float("inf")}, "must be a finite number"),
        ({"stop": ("",)}, "empty text"),
    ],
)
def test_impossible_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**option)
