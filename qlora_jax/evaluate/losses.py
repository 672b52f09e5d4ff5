"""The losses of sequence-to-sequence models and classifiers, and which loss a model takes."""

from typing import Any

from jaxtyping import Array, Float, Int, Key

from qlora_jax.evaluate.perplexity import LossFn, causal_lm_loss
from qlora_jax.models.classification_loss import classification_loss
from qlora_jax.models.encoder import EncoderClassifier
from qlora_jax.models.encoder_decoder import EncoderDecoder
from qlora_jax.models.seq2seq_loss import seq2seq_loss


def seq2seq_lm_loss(
    model: Any, batch: Any, dropout_key: Key[Array, ""] | None, /
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The loss of an encoder–decoder on a `data.Seq2SeqBatch`, as sum and count of tokens."""
    loss = seq2seq_loss(
        model, batch.input_ids, batch.labels, batch.attention_mask, dropout_key=dropout_key
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


def loss_for(model: Any) -> LossFn:
    """What to train a model with: `fit(..., loss_fn=loss_for(model))`."""
    if isinstance(model, EncoderDecoder):
        return seq2seq_lm_loss
    return classifier_loss if isinstance(model, EncoderClassifier) else causal_lm_loss
