import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.models.loss import TokenLoss, cross_entropy, next_tokens


def reference(logits: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Losses and the gradient of their sum, in float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    probability = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    judged = targets != -100
    onehot = np.eye(logits.shape[-1])[np.where(judged, targets, 0)]
    losses = -np.log((probability * onehot).sum(-1)) * judged
    return losses, (probability - onehot) * judged[..., None]


@jax.jit
def loss_and_gradient(logits, targets):
    losses = cross_entropy(logits, targets)
    return losses, jax.grad(lambda x: cross_entropy(x, targets).sum())(logits)


@settings(max_examples=30)
@given(
    st.sampled_from([(1, 1, 2), (2, 5, 33)]),
    st.sampled_from([1.0, 30.0]),
    st.integers(0, 2**32 - 1),
)
def test_loss_and_gradient_against_float64(shape, scale, seed):
    rng = np.random.default_rng(seed)
    batch, length, vocab = shape
    logits = (scale * rng.normal(size=(batch, length, vocab))).astype(np.float32)
    targets = rng.integers(0, vocab, (batch, length))
    targets = np.where(rng.random((batch, length)) < 0.3, -100, targets).astype(np.int32)
    expected, gradient = reference(logits, targets)
    losses, ours = loss_and_gradient(jnp.asarray(logits), jnp.asarray(targets))
    # A loss is a difference of two logits up to 100: known to their last float32 place, 8e-6.
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(ours, gradient, atol=2e-5)


def test_infinite_logits_of_words_that_cannot_be_leave_the_loss_finite():
    logits = jnp.asarray([[1.0, -jnp.inf, 2.0]])
    loss = cross_entropy(logits, jnp.asarray([2]))
    assert float(loss[0]) == pytest.approx(np.log1p(np.exp(-1.0)), rel=1e-6)


def test_labels_move_one_to_the_left():
    labels = jnp.asarray([[5, -100, 7]])
    np.testing.assert_array_equal(next_tokens(labels), [[-100, 7, -100]])


def test_mean_of_nothing_is_zero():
    nothing = TokenLoss(jnp.float32(0.0), jnp.int32(0))
    assert float(nothing.mean) == 0.0
