"""Loss and perplexity are weighted by tokens."""

import math

import jax
import numpy as np
import pytest

from qlora_jax.data import Batches, Examples
from qlora_jax.evaluate import evaluate, perplexity
from qlora_jax.evaluate.perplexity import perplexity_of
from tests.train.toy import Toy, ToyBatches, toy_loss


def test_every_token_counts_the_same():
    model = Toy()
    batches = [ToyBatches(4, lengths=(8, 16)).at(step) for step in range(5)]
    scores = [
        np.asarray(jax.nn.log_softmax(model(batch.input_ids)), np.float64) for batch in batches
    ]
    losses = np.concatenate(
        [
            -np.take_along_axis(score, np.maximum(batch.labels, 0)[..., None], -1)[..., 0][
                batch.labels != -100
            ]
            for score, batch in zip(scores, batches, strict=True)
        ]
    )
    found = perplexity(model, batches, loss_fn=toy_loss)
    assert found.tokens == losses.size
    assert found.loss == pytest.approx(losses.mean(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-6)


def test_batches_are_read_for_one_epoch():
    examples = Examples.of([([1, 2, 3], [-100, 2, 3]), ([4, 5], [-100, 5]), ([6, 7], [-100, 7])])
    batches = Batches(examples, batch_size=2)
    found = perplexity(Toy(), batches, loss_fn=toy_loss)
    assert found == perplexity(Toy(), list(batches.one_epoch()), loss_fn=toy_loss)
    assert found.tokens == 4


def test_sums_of_batches_are_added_in_64_bits():
    """In 32, a sum of 2^24 nats does not notice one more."""
    sums = np.float32([2**24, 1, 1])
    found = evaluate(lambda lora, frozen, batch: (batch, np.int32(1)), {}, {}, sums)
    assert (found.loss, found.tokens) == ((2**24 + 2) / 3, 3)


def test_evaluation_drops_nothing_out():
    batches = [ToyBatches(4).at(0)]
    assert perplexity(Toy(dropout=0.5), batches, loss_fn=toy_loss) == perplexity(
        Toy(), batches, loss_fn=toy_loss
    )


def test_batches_without_labels_are_refused():
    batch = ToyBatches(4).at(0)
    batch = batch._replace(labels=np.full_like(batch.labels, -100))
    with pytest.raises(ValueError, match="no token with a label"):
        perplexity(Toy(), [batch], loss_fn=toy_loss)


def test_micro_batches_of_a_training_step_are_refused():
    batches = Batches(Examples.of([([1, 2, 3], [-100, 2, 3])]), batch_size=1, accumulation=2)
    with pytest.raises(ValueError, match=r"shape \(2, 1, \d+\), but .* with accumulation=1"):
        perplexity(Toy(), batches, loss_fn=toy_loss)


def test_a_hopeless_model_has_infinite_perplexity():
    def loss(model, batch, key, /):
        total, count = toy_loss(model, batch, key)
        return total * 0 + 1e4 * count, count

    found = perplexity(Toy(), [ToyBatches(4).at(0)], loss_fn=loss)
    assert found.perplexity == math.inf
    assert perplexity_of(699.0) == math.exp(699)
    # One that has come to nothing is not called infinitely bad.
    assert math.isnan(perplexity_of(math.nan))
