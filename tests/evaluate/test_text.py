"""Windows over a text: who scores what, and the perplexity that comes of it."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data import IGNORE
from qlora_jax.evaluate import perplexity, text_batches
from qlora_jax.models import DecoderConfig, RopeConfig
from tests.random_decoder import ONE_LAYER, random_decoder


@settings(max_examples=200)
@given(st.data())
def test_every_token_but_the_first_is_scored_once(data):
    length = data.draw(st.integers(2, 60))
    window = data.draw(st.integers(1, 20))
    stride = data.draw(st.integers(1, window))
    rows = data.draw(st.integers(1, 5))
    ids = np.arange(1000, 1000 + length)
    batches = text_batches(ids, window=window, stride=stride, batch_size=rows)
    assert {batch.input_ids.shape for batch in batches} == {(rows, window)}
    scored = []
    for batch in batches:
        for read, labels, mask in zip(*batch, strict=True):
            (at,) = np.nonzero(labels != IGNORE)
            # A label is the token that stands there, the last one not read; something is before it.
            np.testing.assert_array_equal(labels[at[:-1]], read[at[:-1]])
            assert (at > 0).all()
            if scored and at.size:
                # All but the first window's tokens have something to go by.
                assert at[0] >= min(window - stride + 1, window)
            scored += [int(label) for label in labels[at]]
            assert mask[at - 1].all()
    assert scored == list(range(1001, 1000 + length))


def test_perplexity_of_a_text_in_float64():
    config = DecoderConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = random_decoder(config)
    # Larger weights, for losses that differ from a uniform guess.
    model.lm_head.weight[...] *= 40
    ids = np.random.default_rng(0).integers(0, 32, 43)
    window, stride = 8, 3
    forward = jax.jit(lambda state, row: nnx.merge(graphdef, state)(row[None])[0])
    graphdef, state = nnx.split(model)
    total, count = 0.0, 0
    for target in range(1, len(ids)):
        # The first window that reaches this token.
        start = max(0, -(-(target - window) // stride)) * stride
        # Filled up on the right, which a causal model does not see: one shape for all.
        read = np.pad(ids[start:target], (0, window - (target - start)))
        logits = np.asarray(forward(state, read)[target - start - 1], np.float64)
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[target]]
        count += 1
    batches = text_batches(ids, window=window, stride=stride, batch_size=2)
    found = perplexity(model, batches)
    assert found.tokens == count == 42
    assert abs(total / count - np.log(32)) > 0.1
    np.testing.assert_allclose(found.loss, total / count, rtol=1e-6)
    np.testing.assert_allclose(found.perplexity, np.exp(total / count), rtol=1e-6)


def test_a_window_may_be_as_long_as_the_context():
    """Learned positions end there, and "dynamic" rotary ones change."""
    ids = np.random.default_rng(0).integers(0, 512, 17)
    batches = text_batches(ids, window=16)
    learned = dataclasses.replace(ONE_LAYER, rope=None, max_position_embeddings=16)
    assert perplexity(random_decoder(learned), batches).tokens == 16
    rope = RopeConfig(original_max_position_embeddings=16)
    losses = [
        perplexity(random_decoder(dataclasses.replace(ONE_LAYER, rope=turned)), batches).loss
        for turned in (rope, dataclasses.replace(rope, rope_type="dynamic", factor=4.0))
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        ([1], {"window": 4}, "the text has 1 token"),
        ([1, 2], {"window": 0}, "window=0"),
        ([1, 2], {"window": 4, "stride": 5}, "stride=5 must be between 1 and the window, 4"),
        ([1, 2], {"window": 4, "batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_input(ids, options, words):
    with pytest.raises(ValueError, match=words):
        text_batches(ids, **options)
