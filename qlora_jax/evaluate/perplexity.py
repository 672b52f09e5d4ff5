"""How surprised is the model? Loss per token and perplexity, weighted by tokens.

Both are statements about tokens, so the sums of token losses and the token counts of all batches
are added up first and divided once: a mean of batch means would count a token in a short batch
for more. Perplexity is exp(loss), the loss in nats per trained token.

Batches keep a few fixed shapes (`data.Batches` pads to buckets), so that evaluation compiles once
per shape. Nothing is dropped out, and the sums of all batches are fetched at the end, so that the
device never waits for the host.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from qlora_jax.models.loss import LOSS_CHUNK, next_token_loss
from qlora_jax.models.positions import positions_of
from qlora_jax.models.spread import spread_rows
from qlora_jax.models.streaming import options_for

LossFn = Callable[[Any, Any, Any], tuple[Float[Array, ""], Int[Array, ""]]]
"""(model, batch, dropout key or None) -> (sum of token losses in nats, number of trained tokens).

Sums, not means: micro-batches and batches are added up before they are divided."""


class Evaluation(NamedTuple):
    """Loss in nats per token, its exponential, and the number of tokens it is the mean of."""

    loss: float
    perplexity: float
    tokens: int


def causal_lm_loss(
    model: Any,
    batch: Any,
    dropout_key: Key[Array, ""] | None,
    /,
    *,
    loss_chunk: int | None = LOSS_CHUNK,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """The loss of a causal language model on a `data.Batch` [batch seq], as sum and count.

    The batch is padded on the right, as `data.Batches` pads: then no token that is judged can see
    the padding, and attention without a mask is faster and, under cuDNN, linear in memory. The mask
    tells how long the texts are, by which "dynamic" and "longrope" positions and NEFTune go.
    `functools.partial(causal_lm_loss, loss_chunk=...)` sets how many tokens' logits are held.
    """
    positions, segments = (getattr(batch, name, None) for name in ("positions", "segments"))
    if positions is None:
        mask = getattr(batch, "attention_mask", None)
        positions = positions_of(batch.input_ids, mask, segments)
    loss = next_token_loss(
        model,
        batch.input_ids,
        batch.labels,
        positions=positions,
        segments=segments,
        loss_chunk=loss_chunk,
        dropout_key=dropout_key,
    )
    return loss.total, loss.tokens


def split_adapters(model: nnx.Module) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """(graphdef, adapters, all the rest): the adapters are trained, the rest is an argument.

    `nnx.merge(graphdef, adapters, rest)` is the model again. Codes, norms, embeddings and whatever
    else is not an `nnx.LoRAParam` count as the rest.
    """
    graphdef, *states = nnx.split(model, nnx.LoRAParam, ...)
    lora, frozen = states
    return graphdef, lora, frozen


def make_eval_step(
    graphdef: nnx.GraphDef,
    loss_fn: LossFn = causal_lm_loss,
    *,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[..., tuple[Float[Array, ""], Int[Array, ""]]]:
    """A jitted (lora, frozen, batch) -> (sum of token losses, token count), without dropout."""

    def step(lora: PyTree, frozen: PyTree, batch: Any) -> tuple[Array, Array]:
        model = nnx.merge(graphdef, lora, frozen)
        # A module's own dropout needs no key to be brought.
        model.eval()
        return loss_fn(model, batch, None)

    return jax.jit(step, compiler_options=dict(compiler_options) if compiler_options else None)


def evaluate(
    step: Callable[..., tuple[Float[Array, ""], Int[Array, ""]]],
    lora: PyTree,
    frozen: PyTree,
    batches: Iterable[Any],
) -> Evaluation:
    """Run `make_eval_step`'s step over all batches.

    Raises:
      ValueError: no token has a label, or batches are cut into micro-batches.
    """
    # float64 on the host: a float32 sum over millions of tokens would lose the last digits.
    sums = jax.device_get(
        [step(lora, frozen, spread_rows(_one_batch(batch), lora)) for batch in batches]
    )
    total = math.fsum(float(np.float64(loss)) for loss, _ in sums)
    tokens = sum(int(count) for _, count in sums)
    if tokens == 0:
        raise ValueError(
            f"The {len(sums)} evaluation batches hold no token with a label (all are -100); "
            "give at least one example with a response."
        )
    loss = total / tokens
    return Evaluation(loss, perplexity_of(loss), tokens)


def _one_batch(batch: Any) -> Any:
    """A batch as it is, unless it is a training step's, [accumulation batch seq]."""
    shape = getattr(getattr(batch, "input_ids", None), "shape", ())
    if len(shape) == 3:
        raise ValueError(
            f"An evaluation batch has input_ids of shape {shape}, but [batch, seq] is needed: "
            "make its Batches with accumulation=1."
        )
    return batch


def perplexity_of(loss: float) -> float:
    """exp(loss), the loss in nats per token."""
    # Beyond 700 nats a float64 exponential overflows; such a model has no finite perplexity.
    return math.inf if loss >= 700 else math.exp(loss)


def perplexity(model: nnx.Module, batches: Any, *, loss_fn: LossFn = causal_lm_loss) -> Evaluation:
    """Loss and perplexity of a model over batches.

    Args:
      model: any NNX module that `loss_fn` understands; by default a causal language model.
      batches: `data.Batches`, of which one epoch is read, or `data.Batch`es [batch seq].
      loss_fn: how a batch becomes a sum of token losses and a count of tokens.
    """
    graphdef, lora, frozen = split_adapters(model)
    step = make_eval_step(graphdef, loss_fn, compiler_options=options_for(model))
    epoch = batches.one_epoch() if hasattr(batches, "one_epoch") else batches
    return evaluate(step, lora, frozen, epoch)
