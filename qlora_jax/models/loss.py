"""Next-token cross-entropy as a sum and a count, which add up over micro-batches and devices.

`labels` stand where `input_ids` stand (Hugging Face's convention): the model's scores at position t
are judged by `labels[t + 1]`, and -100 means "do not judge". The mean over all judged tokens of a
batch is `total / tokens`; a mean of micro-batch means is another number, and a known mistake
(transformers #34191).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.data import IGNORE
from qlora_jax.models.decoder import Decoder


class TokenLoss(NamedTuple):
    """Losses that add up.

    Attributes:
        total: sum of the judged tokens' cross-entropies, nats, float32.
        tokens: how many were judged, int32.
    """

    total: Float[Array, ""]
    tokens: Int[Array, ""]

    @property
    def mean(self) -> Float[Array, ""]:
        """Nats per judged token; 0 where none is."""
        return self.total / jnp.maximum(self.tokens, 1).astype(jnp.float32)


def next_tokens(labels: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """What each position should predict: labels moved one to the left, -100 at the end.

    Moving the labels, not the logits, spares a copy of the largest array of the step.
    """
    return jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)


def cross_entropy(
    logits: Float[Array, "*batch vocab"], targets: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """-log softmax(logits)[target] in nats, float32; 0 where the target is -100.

    The gradient is one fused pass over the logits, softmax minus one-hot: nothing of the size of
    the logits is kept for it but they themselves.
    """
    return _cross_entropy(logits, targets)


@jax.custom_vjp
def _cross_entropy(logits: Array, targets: Array) -> Array:
    return _cross_entropy_forward(logits, targets)[0]


def _cross_entropy_forward(logits: Array, targets: Array) -> tuple[Array, tuple[Array, ...]]:
    wide = logits.astype(jnp.float32)
    normaliser = jax.nn.logsumexp(wide, axis=-1)
    judged = targets != IGNORE
    index = jnp.where(judged, targets, 0)[..., None]
    chosen = jnp.take_along_axis(wide, index, axis=-1)[..., 0]
    return jnp.where(judged, normaliser - chosen, 0.0), (logits, normaliser, targets)


def _cross_entropy_backward(
    residuals: tuple[Array, ...], gradient: Array
) -> tuple[Array, np.ndarray]:
    logits, normaliser, targets = residuals
    gradient = jnp.where(targets != IGNORE, gradient, 0.0)[..., None]
    probability = jnp.exp(logits.astype(jnp.float32) - normaliser[..., None])
    # An ignored target, -100, equals no index.
    words = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    hit = words == targets[..., None]
    to_logits = (jnp.where(hit, probability - 1.0, probability) * gradient).astype(logits.dtype)
    return to_logits, np.zeros(targets.shape, jax.dtypes.float0)


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def next_token_loss(
    model: Decoder,
    input_ids: Int[Array, "batch seq"],
    labels: Int[Array, "batch seq"],
    attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
    positions: Int[Array, "batch seq"] | None = None,
    *,
    dropout_key: Key[Array, ""] | None = None,
) -> TokenLoss:
    """The model's loss on a batch.

    Args:
        model: the decoder.
        input_ids: int32 token ids.
        labels: aligned with `input_ids`, not shifted; -100 where nothing is judged.
        attention_mask, positions, dropout_key: as in `Decoder.hidden`.
    """
    hidden = model.hidden(input_ids, attention_mask, positions, dropout_key=dropout_key)
    targets = next_tokens(labels)
    losses = cross_entropy(model.head(hidden), targets)
    return TokenLoss(losses.sum(), (targets != IGNORE).sum(dtype=jnp.int32))
