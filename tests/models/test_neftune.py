"""NEFTune: uniform noise on the embeddings, by the length of each text, in training alone."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qlora_jax.data import Batches, PackedBatches
from qlora_jax.evaluate import causal_lm_loss
from qlora_jax.models import decoder as decoder_module
from qlora_jax.models.loss import TokenLoss
from qlora_jax.models.neftune import with_noise
from qlora_jax.models.positions import text_lengths
from tests.models.variants import VARIANTS
from tests.random_decoder import ONE_LAYER, random_decoder

IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 6)), jnp.int32)


def test_noise_is_uniform_within_the_bound_of_each_text():
    """Padded left, padded right, two packed texts, and one text of all tokens."""
    positions = [[0, 0, 0, 1, 2, 3], [0, 1, 2, 2, 2, 2], [0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    lengths = np.array([[1, 1, 4, 4, 4, 4], [3, 3, 3, 1, 1, 1], [2, 2, 4, 4, 4, 4], [6] * 6])
    real = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1] * 6, [1] * 6], bool)
    width, alpha = 4096, 5.0
    x = jnp.ones((4, 6, width), jnp.float32)
    noise = with_noise(x, jnp.asarray(positions, jnp.int32), alpha, jax.random.key(0)) - 1
    scaled = np.asarray(noise) / (alpha / np.sqrt(lengths * width))[..., None]
    scaled = scaled[real]
    assert np.abs(scaled).max() <= 1 + 1e-4
    # Of 4096 uniform numbers in [-1, 1]: mean 0 ± 0.009, variance 1/3 ± 0.0047; five times that.
    np.testing.assert_allclose(scaled.mean(axis=-1), 0, atol=0.045)
    np.testing.assert_allclose(scaled.var(axis=-1), 1 / 3, atol=0.024)
    assert abs(np.corrcoef(scaled)[~np.eye(len(scaled), dtype=bool)]).max() < 0.1


def test_a_decoder_is_noisy_with_a_key_alone():
    @jax.jit
    def logits(model, key):
        return model(IDS, dropout_key=key)

    model = random_decoder(ONE_LAYER)
    plain = logits(model, None)
    keys = [jax.random.key(seed) for seed in (0, 1)]
    np.testing.assert_array_equal(logits(model, keys[0]), plain)
    model.neftune_noise_alpha = 5.0
    np.testing.assert_array_equal(logits(model, None), plain)
    one, again, other = (logits(model, key) for key in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(one, again)
    assert min(np.abs(one - plain).max(), np.abs(one - other).max()) > 1e-3


def test_a_padded_text_is_as_long_as_a_packed_one(monkeypatch):
    lengths = []

    def noting(*batch, positions, **options):
        lengths.append(text_lengths(positions))
        return TokenLoss(jnp.float32(0), jnp.int32(0))

    monkeypatch.setattr(sys.modules[causal_lm_loss.__module__], "next_token_loss", noting)
    texts = [(np.arange(length), np.arange(length)) for length in (9, 33)]
    padded = Batches(texts, batch_size=2, buckets=(40,), shuffle=False).at(0)
    packed = PackedBatches(texts, batch_size=1, length=42, shuffle=False).at(0)
    for batch in (padded, packed):
        causal_lm_loss(None, jax.device_put(batch), None)
    (short, long), ((*both,),) = lengths
    assert [*long[:33], *short[:9]] == both == [33] * 33 + [9] * 9


def test_16_bits_stay_16_bits():
    x = jnp.ones((1, 3, 8), jnp.bfloat16)
    positions = jnp.arange(3, dtype=jnp.int32)[None]
    assert with_noise(x, positions, 5.0, jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("variant", ["gemma2-plain", "bloom-even", "granite-scaled", "opt-350m"])
def test_what_the_embedding_gives_is_noisy(variant, monkeypatch):
    """With its scale, before the norm, the projection and the factor that follow, as in
    transformers."""
    given = []

    def spied(x, positions, alpha, key):
        given.append(x)
        return with_noise(x, positions, alpha, key)

    monkeypatch.setattr(decoder_module, "with_noise", spied)
    model = random_decoder(VARIANTS[variant])
    model.neftune_noise_alpha = 5.0
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), IDS.shape)
    model._embed(IDS, positions, jax.random.key(0))
    expected = model.embed_tokens(IDS) * model.config.embedding_scale
    np.testing.assert_array_equal(given, [expected])


def test_devices_draw_their_rows_of_the_same_noise():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (4, 6))
    x, key = jnp.ones((4, 6, 8), jnp.bfloat16), jax.random.key(0)
    noisy = jax.jit(lambda x, positions, key: with_noise(x, positions, 5.0, key))
    one = noisy(x, positions, key)
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    given = (*jax.device_put((x, positions), rows), jax.device_put(key, everywhere))
    np.testing.assert_array_equal(noisy(*given), one)
    assert "all-gather" not in noisy.lower(*given).compile().as_text()
