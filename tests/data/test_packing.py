"""Packed rows: every example once, apart from its neighbours, the same loss and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.data import Batches, PackedBatches
from qlora_jax.data.packing import pack
from qlora_jax.evaluate import causal_lm_loss
from qlora_jax.models import DecoderConfig
from qlora_jax.nn import LoraConfig
from tests.random_decoder import random_decoder


@given(st.lists(st.integers(1, 16), max_size=60))
def test_rows_hold_every_example_once_and_are_nearly_full(lengths):
    rows = pack(lengths, 16)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    filled = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < tokens <= 16 for tokens in filled)
    # No two rows could have been one: fewer than twice the rows that the tokens need.
    assert len(rows) < 2 or min(filled) + sorted(filled)[1] > 16


def test_the_longest_come_first():
    # Shortest first, the two short ones would share a row and the others have one each.
    assert pack([2, 2, 8, 8], 10) == [[2, 1], [3, 0]]


def examples(count: int = 9, seed: int = 0):
    rng = np.random.default_rng(seed)
    made = []
    for length in rng.integers(2, 9, count):
        ids = rng.integers(1, 32, length).astype(np.int32)
        made.append((ids, np.where(rng.random(length) < 0.3, -100, ids).astype(np.int32)))
    return made


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(0, 20), st.sampled_from([1, 2]))
def test_a_step_is_a_function_of_seed_and_step(seed, step, accumulation):
    made = examples()
    options = {"batch_size": 2, "length": 16, "seed": seed, "accumulation": accumulation}
    walked = PackedBatches(made, **options)
    for earlier in range(step):
        walked.at(earlier)
    fresh = PackedBatches(made, **options).at(step)
    jax.tree.map(np.testing.assert_array_equal, walked.at(step), fresh)
    assert (fresh.input_ids.shape,) == walked.shapes


def test_an_epoch_holds_every_example_in_a_segment_of_its_own():
    made = examples()
    batches = PackedBatches(made, batch_size=2, length=16, seed=3)
    found = []
    second = [batches.at(batches.steps_per_epoch + i) for i in range(batches.steps_per_epoch)]
    jax.tree.map(np.testing.assert_array_equal, list(batches.one_epoch(1)), second)
    for batch in second:
        for ids, labels, segments, positions in zip(*batch, strict=True):
            for number in range(1, segments.max() + 1):
                own = segments == number
                np.testing.assert_array_equal(positions[own], np.arange(own.sum()))
                found.append((ids[own].tolist(), labels[own].tolist()))
            # A scaling that goes by the largest position sees that of an example.
            assert not positions[segments == 0].any()
    # Nothing before an example's first token belongs to it.
    wanted = [(ids.tolist(), [-100, *labels[1:].tolist()]) for ids, labels in made]
    assert sorted(found) == sorted(wanted)
    assert batches.filled == sum(len(ids) for ids, _ in made) / (16 * len(batches.rows))


def test_which_rows_a_step_sees_is_decided_as_in_batches():
    made = examples(11)
    options = {"batch_size": 2, "seed": 3, "pad_token_id": 31, "drop_last": True}
    packed = PackedBatches(made, length=16, **options)
    rows = [np.concatenate([made[index][0] for index in row]) for row in packed.rows]
    plain = Batches([(row, row) for row in rows], buckets=(16,), **options)
    assert 2 * packed.steps_per_epoch == 2 * plain.steps_per_epoch == len(rows) - 1
    for step in range(2 * plain.steps_per_epoch):
        np.testing.assert_array_equal(packed.at(step).input_ids, plain.at(step).input_ids)
    in_order = PackedBatches(made, length=16, batch_size=1, shuffle=False).one_epoch(3)
    for batch, row in zip(in_order, rows, strict=True):
        np.testing.assert_array_equal(batch.input_ids[batch.attention_mask], row)
    # The examples themselves are left as they were.
    jax.tree.map(np.testing.assert_array_equal, made, examples(11))


@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_loss_and_gradients_are_those_of_the_unpacked_examples(attention):
    config = DecoderConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    model = random_decoder(config, quant=None, lora=LoraConfig(r=2), attention=attention)
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def step(lora, batch):
        def loss(lora):
            total, tokens = causal_lm_loss(nnx.merge(graphdef, lora, rest), batch, None)
            return total, tokens

        return jax.value_and_grad(loss, has_aux=True)(lora)

    made = examples()
    plain = next(Batches(made, batch_size=9, buckets=(16,), shuffle=False).one_epoch())
    packed = PackedBatches(made, batch_size=8, length=16, shuffle=False)
    assert packed.steps_per_epoch == 1
    (expected, tokens), gradient = step(lora, jax.tree.map(jnp.asarray, plain))
    (found, counted), ours = step(lora, jax.tree.map(jnp.asarray, packed.at(0)))
    assert int(counted) == int(tokens) == packed.at(0).trained_tokens
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_an_example_longer_than_a_row_is_refused():
    longest = max(len(ids) for ids, _ in examples())
    assert PackedBatches(examples(), batch_size=1, length=longest).length == longest
    with pytest.raises(ValueError, match=f"a packed row holds {longest - 1}"):
        PackedBatches(examples(), batch_size=1, length=longest - 1)
