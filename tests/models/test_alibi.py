"""Positions as biases: the paper's slopes, and models that have them (BLOOM)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.models import Decoder, RopeConfig, attend
from qlora_jax.models.alibi import alibi_bias, alibi_slopes
from tests.models.variants import VARIANTS
from tests.random_decoder import random_decoder

BLOOM = VARIANTS["bloom-even"]
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 7)), jnp.int32)


@jax.jit
def logits(model, ids, mask=None, positions=None, segments=None):
    return model(ids, mask, positions, segments=segments)


def test_slopes_of_the_paper():
    """Section 3: 1/2, 1/4, … for 8 heads; for 16 a geometric sequence from 1/√2 on."""
    np.testing.assert_array_equal(alibi_slopes(8), [0.5**n for n in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(16), [0.5 ** (n / 2) for n in range(1, 17)], rtol=1e-7)
    np.testing.assert_array_equal(alibi_slopes(1), np.float32([2**-8]))
    # Of the authors' code for other numbers, as a 12-headed one has them.
    twelve = [*alibi_slopes(8), *alibi_slopes(16)[[0, 2, 4, 6]]]
    np.testing.assert_array_equal(alibi_slopes(12), twelve)


@pytest.mark.parametrize("implementation", ["xla", "chunked"])
def test_a_score_falls_by_slope_times_distance(implementation):
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, 1, 6, 4, 8)).astype(np.float32)
    distances = np.arange(6)[:, None] - np.arange(6)[None, :]
    scores = np.einsum("bqhd,bkhd->bhqk", query.astype(np.float64), key) / np.sqrt(8)
    scores = scores - alibi_slopes(4).astype(np.float64)[:, None, None] * distances
    weights = np.where(distances >= 0, np.exp(scores), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value)
    bias = alibi_bias(jnp.arange(6)[None], 4)
    assert bias.shape == (1, 4, 1, 6)
    arrays = map(jnp.asarray, (query, key, value))
    mixed = attend(*arrays, bias=bias, causal=True, implementation=implementation)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)


def test_distances_alone_count():
    model = random_decoder(BLOOM)
    plain = logits(model, IDS)
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    np.testing.assert_allclose(logits(model, IDS, None, positions + 11), plain, atol=2e-5)
    assert np.abs(logits(model, IDS, None, 2 * positions) - plain).max() > 1e-3
    # Longer than it was made for: nothing is learned that could end.
    long = jnp.tile(IDS, (1, 10))
    assert long.shape[1] > BLOOM.max_position_embeddings
    assert np.isfinite(logits(model, long)).all()


def test_padding_and_packed_rows_change_nothing():
    model = random_decoder(BLOOM)
    plain = logits(model, IDS)
    for before in (0, 3):
        pads = ((0, 0), (before, 3 - before))
        padded = logits(model, jnp.pad(IDS, pads), jnp.pad(jnp.ones_like(IDS), pads))
        np.testing.assert_allclose(padded[:, before : before + 7], plain, atol=2e-5)
    segments = jnp.asarray([[1] * 7 + [2] * 7], jnp.int32)
    packed = logits(model, IDS.reshape(1, -1), segments=segments)
    np.testing.assert_allclose(packed.reshape(plain.shape), plain, atol=2e-5)


def test_positions_are_told_in_one_way():
    with pytest.raises(ValueError, match="alibi is set beside a rope: give rope=None"):
        dataclasses.replace(BLOOM, rope=RopeConfig())
    with pytest.raises(ValueError, match="cuDNN's backward pass takes no position biases"):
        jax.eval_shape(lambda: Decoder(BLOOM, attention="cudnn", rngs=nnx.Rngs(0)))
