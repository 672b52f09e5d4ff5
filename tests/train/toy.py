"""A model small enough to train in a test: an embedding, one QLoRA layer, and data to match."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.nn import LoraConfig, QuantDense

VOCABULARY = 24


class ToyBatch(NamedTuple):
    input_ids: Any
    labels: Any
    attention_mask: Any


class Toy(nnx.Module):
    """Predicts a label for each token."""

    def __init__(self, *, dropout: float = 0.0, seed: int = 0, dtype: Any = jnp.float32):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(VOCABULARY, 64, rngs=rngs)
        self.head = QuantDense(
            64,
            VOCABULARY,
            lora=LoraConfig(r=4, alpha=8, lora_dropout=dropout, dtype=dtype),
            compute_dtype=jnp.float32,
            implementation="xla",
            rngs=rngs,
        )

    def __call__(self, input_ids, *, dropout_key=None):
        return self.head(self.embed(input_ids), dropout_key=dropout_key)


def toy_loss(model, batch, dropout_key, /):
    """Sum of cross-entropies over labels that are not -100, and their number."""
    scores = jax.nn.log_softmax(model(batch.input_ids, dropout_key=dropout_key))
    judged = batch.labels != -100
    chosen = jnp.take_along_axis(scores, jnp.maximum(batch.labels, 0)[..., None], -1)[..., 0]
    return -(chosen * judged).sum(), judged.sum(dtype=jnp.int32)


class ToyBatches:
    """Batch of step s: a pure function of s. The share of judged tokens varies from row to row."""

    def __init__(self, *leading: int, lengths: tuple[int, ...] = (8,)):
        self.leading, self.lengths = leading, lengths

    def at(self, step: int) -> ToyBatch:
        rng = np.random.default_rng(step)
        shape = (*self.leading, self.lengths[step % len(self.lengths)])
        ids = rng.integers(0, VOCABULARY, shape).astype(np.int32)
        share = rng.random((*self.leading, 1))
        labels = np.where(rng.random(shape) < share, -100, (ids * 5 + 1) % VOCABULARY)
        return ToyBatch(ids, labels.astype(np.int32), np.ones(shape, np.bool_))


def adapters(model: nnx.Module) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
