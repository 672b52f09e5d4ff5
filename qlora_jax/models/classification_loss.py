"""The loss of a classifier, or of a regression, as a sum over examples and their number."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.data import IGNORE
from qlora_jax.models.encoder import EncoderClassifier
from qlora_jax.models.loss import cross_entropy


class ExampleLoss(NamedTuple):
    """Losses that add up.

    Attributes:
        total: sum over the judged examples, float32: nats, or squared differences.
        examples: how many were judged, int32.
    """

    total: Float[Array, ""]
    examples: Int[Array, ""]


def classification_loss(
    model: EncoderClassifier,
    input_ids: Int[Array, "batch seq"],
    labels: Int[Array, " batch"] | Float[Array, " batch"],
    attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
    *,
    dropout_key: Key[Array, ""] | None = None,
) -> ExampleLoss:
    """The model's loss on a batch.

    Args:
        model: with one output for a regression, else with one for each class.
        input_ids: int32 token ids.
        labels: int32 classes, -100 where nothing is judged; or float32 values, NaN there.
        attention_mask, dropout_key: as in `EncoderClassifier.hidden`.

    Raises:
        ValueError: classes for a model with one output, or values for one with several.
    """
    regression = model.config.num_labels == 1
    if regression != jnp.issubdtype(labels.dtype, jnp.floating):
        raise ValueError(
            f"labels are {labels.dtype.name}, but a model with {model.config.num_labels} label(s) "
            f"takes {'float32 values' if regression else 'int32 classes'}."
        )
    scores = model(input_ids, attention_mask, dropout_key=dropout_key)
    if regression:
        judged = ~jnp.isnan(labels)
        # A NaN must not enter the arithmetic: its gradient would be NaN even where it is not taken.
        gap = jnp.where(judged, scores[:, 0] - jnp.where(judged, labels, 0.0), 0.0)
        return ExampleLoss(jnp.square(gap).sum(), judged.sum(dtype=jnp.int32))
    losses = cross_entropy(scores, labels)
    return ExampleLoss(losses.sum(), (labels != IGNORE).sum(dtype=jnp.int32))
