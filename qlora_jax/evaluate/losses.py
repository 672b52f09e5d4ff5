"""The losses of sequence-to-sequence models and classifiers, and which loss a model takes."""

import functools
from typing import Any

from jaxtyping import Array, Float, Int, Key

from qlora_jax.evaluate.perplexity import LossFn, causal_lm_loss
from qlora_jax.models.classification_loss import classification_loss
from qlora_jax.models.encoder import EncoderClassifier
from qlora_jax.models.encoder_decoder import EncoderDecoder
from qlora_jax.models.loss import LOSS_CHUNK
from qlora_jax.models.seq2seq_loss import seq2seq_loss


def seq2seq_lm_loss(
    model: Any,
    batch: Any,
    dropout_key: Key[Array, ""] | None,
    /,
    *,
    loss_chunk: int | None = LOSS_CHUNK,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The loss of an encoder–decoder on a `data.Seq2SeqBatch`, as sum and count of tokens;
    `loss_chunk` as in `seq2seq_loss`."""
    loss = seq2seq_loss(
        model,
        batch.input_ids,
        batch.labels,
        batch.attention_mask,
        loss_chunk=loss_chunk,
        dropout_key=dropout_key,
    )
    return loss.total, loss.tokens


def classifier_loss(
    model: Any, batch: Any, dropout_key: Key[Array, ""] | None, /
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The loss of a classifier on a `data.ClassificationBatch`, as sum and count of examples."""
    loss = classification_loss(
        model, batch.input_ids, batch.labels, batch.attention_mask, dropout_key=dropout_key
    )
    return loss.total, loss.examples


def loss_for(model: Any, *, loss_chunk: int | None = LOSS_CHUNK) -> LossFn:
    """What to train a model with: `fit(..., loss_fn=loss_for(model))`.

    Args:
        model: decides which loss.
        loss_chunk: where there is a head over the vocabulary: tokens whose logits are held at once;
            None holds all.
    """
    if isinstance(model, EncoderDecoder):
        return functools.partial(seq2seq_lm_loss, loss_chunk=loss_chunk)
    if isinstance(model, EncoderClassifier):
        return classifier_loss
    return functools.partial(causal_lm_loss, loss_chunk=loss_chunk)
