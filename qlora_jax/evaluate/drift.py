"""How far has a model moved? Its logits and perplexity beside those of the one it should equal.

Made for merged and requantized models, where the question is not whether a model is good but
whether it is still the model that was trained. Three numbers, per token of a sample:

- the largest and the mean difference of a logit, in nats;
- KL(reference ‖ other), how many nats a code made for the other wastes on the reference;
- both perplexities.

`token_logits` is called for each model in turn, so that only one has to be in memory.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from qlora_jax.evaluate.perplexity import perplexity_of


class Drift(NamedTuple):
    """What changed from a reference model to another, over a sample.

    Attributes:
        max_abs: largest difference of a logit.
        mean_abs: mean difference of a logit.
        kl: KL(reference ‖ other) in nats per token.
        perplexity_before: of the reference.
        perplexity_after: of the other.
        tokens: how many were predicted.
    """

    max_abs: float
    mean_abs: float
    kl: float
    perplexity_before: float
    perplexity_after: float
    tokens: int


def windows(ids: Sequence[int], length: int, limit: int) -> Int[np.ndarray, "window length"]:
    """A text's tokens as rows of one length, at most `limit` tokens; what is left over is dropped.

    Raises:
        ValueError: the text, a row or the limit is shorter than two tokens.
    """
    length = min(length, limit, len(ids))
    if length < 2:
        raise ValueError(
            f"The sample has {length} tokens, but at least 2 are needed: one to read and one to "
            "predict; give a longer text."
        )
    count = min(len(ids), limit) // length
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def token_logits(
    model: nnx.Module, ids: Int[np.ndarray, "window length"]
) -> list[Float[np.ndarray, "length vocab"]]:
    """The model's float32 logits for each window, in host memory."""
    graphdef, state = nnx.split(model)
    return [np.asarray(_logits(graphdef, state, row[None])) for row in ids]


@partial(jax.jit, static_argnames="graphdef")
def _logits(
    graphdef: nnx.GraphDef, state: PyTree, row: Int[Array, "1 length"]
) -> Float[Array, "length vocab"]:
    """Compiled once for models of one kind, however many are compared."""
    return nnx.merge(graphdef, state)(row)[0]


def drift(
    before: Sequence[Float[np.ndarray, "length vocab"]],
    after: Sequence[Float[np.ndarray, "length other_vocab"]],
    ids: Int[np.ndarray, "window length"],
) -> Drift:
    """Compares two models' `token_logits` over the same windows.

    Raises:
        ValueError: their vocabularies differ.
    """
    if before[0].shape != after[0].shape:
        raise ValueError(
            f"The models have vocabularies of {before[0].shape[1]} and {after[0].shape[1]} tokens, "
            "but only models of one vocabulary can be compared."
        )
    largest, total, kl, losses, count = 0.0, 0.0, 0.0, [0.0, 0.0], 0
    for row, first, second in zip(ids, before, after, strict=True):
        difference = np.abs(first - second)
        largest = max(largest, float(difference.max()))
        total += float(difference.mean(dtype=np.float64)) * len(row)
        scores = [_log_softmax(x) for x in (first, second)]
        kl += float((np.exp(scores[0]) * (scores[0] - scores[1])).sum())
        for index, score in enumerate(scores):
            losses[index] -= float(score[np.arange(len(row) - 1), row[1:]].sum())
        count += len(row)
    predicted = count - len(ids)
    return Drift(
        max_abs=largest,
        mean_abs=total / count,
        kl=kl / count,
        perplexity_before=perplexity_of(losses[0] / predicted),
        perplexity_after=perplexity_of(losses[1] / predicted),
        tokens=predicted,
    )


def _log_softmax(logits: Float[np.ndarray, "length vocab"]) -> Float[np.ndarray, "length vocab"]:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
