"""Cross-entropy a chunk at a time: the same loss and gradients, without all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.models import (
    Decoder,
    DecoderConfig,
    chunked_cross_entropy,
    next_token_loss,
    unfreeze,
)
from qlora_jax.nn import LoraConfig
from tests.random_decoder import random_decoder

VOCAB, EMBED = 19, 6


def reference(hidden, weight, targets):
    """Sum of losses, and its gradients of hidden states and head, in float64."""
    logits = hidden @ weight.T
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probability = shifted / shifted.sum(-1, keepdims=True)
    judged = targets != -100
    onehot = np.eye(VOCAB)[np.where(judged, targets, 0)]
    total = -(np.log((probability * onehot).sum(-1)) * judged).sum()
    to_logits = (probability - onehot) * judged[..., None]
    return total, to_logits @ weight, np.einsum("bsv,bse->ve", to_logits, hidden)


@functools.partial(jax.jit, static_argnums=3)
def chunked(hidden, weight, targets, chunk):
    def loss(hidden, weight):
        return chunked_cross_entropy(lambda x: x @ weight.T, hidden, targets, chunk=chunk)

    return jax.value_and_grad(loss, (0, 1))(hidden, weight)


@settings(max_examples=12)
@given(
    # The last piece is short, whole, or the only one; a chunk smaller than the batch is a column.
    st.sampled_from([(1, 7, 3), (3, 10, 2), (2, 8, 8), (2, 5, 1000), (1, 1, 1)]),
    st.integers(0, 2**32 - 1),
)
def test_loss_and_both_gradients_against_float64(case, seed):
    batch, length, chunk = case
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(batch, length, EMBED)).astype(np.float32)
    weight = rng.normal(size=(VOCAB, EMBED)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (batch, length)).astype(np.int32)
    targets = np.where(rng.random((batch, length)) < 0.3, -100, targets)
    total, *gradients = reference(hidden.astype(np.float64), weight.astype(np.float64), targets)
    found, ours = chunked(hidden, weight, targets, chunk)
    np.testing.assert_allclose(found, total, rtol=1e-5, atol=1e-5)
    for one, other in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_a_chunk_without_tokens_is_refused():
    nothing = jnp.zeros((1, 2, EMBED)), jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="at least 1 token"):
        chunked_cross_entropy(lambda x: x, *nothing, chunk=0)


@functools.cache
def model(tied: bool) -> Decoder:
    config = DecoderConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return random_decoder(config, quant=None, lora=LoraConfig(r=2))


@pytest.mark.parametrize(
    ("tied", "trained"),
    [
        pytest.param(False, nnx.LoRAParam, id="own head, adapters"),
        pytest.param(True, nnx.Param, id="tied head, everything"),
        pytest.param(True, nnx.LoRAParam, id="tied head, adapters", marks=pytest.mark.slow),
        pytest.param(False, nnx.Param, id="own head, everything", marks=pytest.mark.slow),
    ],
)
def test_a_models_loss_and_gradients_do_not_depend_on_the_chunk(tied, trained):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 9)), jnp.int32)
    copy = nnx.clone(model(tied))
    if trained is nnx.Param:
        # Embedding and head are trained too: their gradient is summed over the chunks.
        unfreeze(copy)
    graphdef, weights, rest = nnx.split(copy, trained, ...)

    def loss(weights, chunk):
        whole = nnx.merge(graphdef, weights, rest)
        return next_token_loss(whole, ids, ids, loss_chunk=chunk).mean

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    results = [step(weights, None), step(weights, 8)]
    (expected, gradient), (found, ours) = results
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


def test_a_frozen_head_takes_no_gradient():
    graphdef, lora, rest = nnx.split(model(False), nnx.LoRAParam, ...)
    ids = jnp.zeros((1, 8), jnp.int32)

    def loss(lora):
        return next_token_loss(nnx.merge(graphdef, lora, rest), ids, ids, loss_chunk=4).mean

    shapes = [v.aval.shape for e in jax.make_jaxpr(jax.grad(loss))(lora).eqns for v in e.outvars]
    # The loop over chunks is there, and nothing it returns has the head's shape.
    assert (2, 1, 4, 16) in shapes
    assert (32, 16) not in shapes


def test_gradients_of_a_trained_16_bit_head_are_summed_in_float32():
    """In bfloat16 a sum of equal numbers stands still at 256 of them."""
    hidden, targets = jnp.ones((1, 512, 3), jnp.bfloat16), jnp.ones((1, 512), jnp.int32)

    def loss(weight):
        return chunked_cross_entropy(lambda x: x @ weight.T, hidden, targets, chunk=1)

    gradient = jax.jit(jax.grad(loss))(jnp.zeros((4, 3), jnp.bfloat16))
    assert gradient.dtype == jnp.bfloat16
    expected = np.broadcast_to([[128], [128 - 512], [128], [128]], (4, 3))
    np.testing.assert_array_equal(gradient.astype(jnp.float32), expected)
