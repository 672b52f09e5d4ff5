"""What of a batch each loss is given: all that it may depend on, and the key of what is dropped."""

import dataclasses
import importlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.data import Batches, PackedBatches
from qlora_jax.evaluate import (
    causal_lm_loss,
    classifier_loss,
    loss_for,
    perplexity,
    seq2seq_lm_loss,
)
from qlora_jax.models import RopeConfig
from tests.random_decoder import ONE_LAYER, random_decoder

BATCH = types.SimpleNamespace(
    input_ids="ids", labels="labels", attention_mask="mask", positions="places", segments="parts"
)
PLACES = {"positions": "places", "segments": "parts"}


@pytest.mark.parametrize(
    ("loss_fn", "where", "chunk", "given", "named"),
    [
        (causal_lm_loss, "perplexity.next_token_loss", 7, ("ids", "labels"), PLACES),
        (seq2seq_lm_loss, "losses.seq2seq_loss", 7, ("ids", "labels", "mask"), {}),
        (classifier_loss, "losses.classification_loss", None, ("ids", "labels", "mask"), {}),
    ],
)
def test_a_loss_is_given_the_whole_batch(loss_fn, where, chunk, given, named, monkeypatch):
    told = []

    def noting(model, *arguments, **options):
        told.append((model, arguments, options))
        count = jnp.int32(3)
        return types.SimpleNamespace(total=jnp.float32(2.0), tokens=count, examples=count)

    module, name = where.split(".")
    monkeypatch.setattr(importlib.import_module(f"qlora_jax.evaluate.{module}"), name, noting)
    chunks = {} if chunk is None else {"loss_chunk": chunk}
    key = jax.random.key(0)
    assert loss_fn("model", BATCH, key, **chunks) == (2.0, 3)
    assert told == [("model", given, {**named, **chunks, "dropout_key": key})]


def test_how_far_a_text_is_padded_does_not_matter():
    """Nor to rotary positions that stretch with the length that is read."""
    rope = RopeConfig(rope_type="dynamic", factor=4.0, original_max_position_embeddings=12)
    model = random_decoder(dataclasses.replace(ONE_LAYER, rope=rope))
    ids = np.random.default_rng(0).integers(0, 512, (2, 12), np.int32)
    texts = [(row, row) for row in ids]
    packed = PackedBatches(texts, batch_size=1, length=24, shuffle=False)
    padded = Batches(texts, batch_size=2, buckets=(32,), shuffle=False)
    tight = Batches(texts, batch_size=2, buckets=(12,), shuffle=False)
    expected, *found = (perplexity(model, [each.at(0)]).loss for each in (tight, padded, packed))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_decoders_loss_holds_as_many_logits_as_asked():
    assert loss_for(object(), loss_chunk=7).keywords == {"loss_chunk": 7}
    assert loss_for(object()).func is causal_lm_loss
