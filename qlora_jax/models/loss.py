"""Next-token cross-entropy as a sum and a count, which add up over micro-batches and devices.

`labels` stand where `input_ids` stand (Hugging Face's convention): the model's scores at position t
are judged by `labels[t + 1]`, and -100 means "do not judge". The mean over all judged tokens of a
batch is `total / tokens`; a mean of micro-batch means is another number, and a known mistake
(transformers #34191).

The largest array of a long sequence's step is batch × sequence × vocabulary logits in float32:
15.7 GiB for 32,768 tokens of Llama 3. `chunked_cross_entropy` never holds more of it than one chunk
of tokens. The trick is Liger's (arXiv 2410.10989): a cross-entropy's gradient needs nothing from
what comes after it but one factor, so the forward pass takes it along, chunk by chunk, and what
waits for the backward pass is one array of the hidden states' size. Nothing is recomputed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.data import IGNORE
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.pieces import cut
from qlora_jax.models.spread import cut_by_rows, devices_of_rows, whole_beside

LOSS_CHUNK = 512
"""Tokens whose logits are held at once: 63 MiB of float32 at a vocabulary of 32,000, 251 MiB at
128,256, and still enough rows for the head's product to be bound by arithmetic on any card."""


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
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    hit = ids == targets[..., None]
    to_logits = (jnp.where(hit, probability - 1.0, probability) * gradient).astype(logits.dtype)
    return to_logits, np.zeros(targets.shape, jax.dtypes.float0)


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def chunked_cross_entropy(
    head: Callable[[Array], Array],
    hidden: Float[Array, "batch seq embed"],
    targets: Int[Array, "batch seq"],
    *,
    chunk: int = LOSS_CHUNK,
) -> Float[Array, ""]:
    """The sum of `cross_entropy(head(hidden), targets)`, a chunk of tokens at a time.

    Cost: none in products (two per chunk where the head is frozen, as without chunks); a head that
    is packed is unpacked once per chunk and product, and a trained head's gradient is summed in
    float32 over the chunks.

    Args:
        head: hidden states [batch, some, embed] to logits [batch, some, vocab]. It may close over
            arrays, frozen or trained: gradients reach those that are differentiated.
        hidden: what the head reads.
        targets: int32, as `next_tokens` gives them; -100 where nothing is judged.
        chunk: how many tokens' logits a device holds at once (`pieces.cut`).

    Returns:
        Nats, float32.

    Raises:
        ValueError: chunk is not positive.
    """
    if chunk < 1:
        raise ValueError(
            f"chunk is {chunk}, but at least 1 token is needed: {LOSS_CHUNK} is usual."
        )
    hidden, at_once = cut_by_rows(hidden), chunk * devices_of_rows(hidden)
    parts, wanted = cut(hidden, at_once), cut(targets, at_once, IGNORE)
    closed, closure = jax.closure_convert(head, parts[0])
    # Or each chunk would fetch the head from the devices that it is cut over.
    closure = whole_beside(hidden, closure)
    return _summed(closed, parts, wanted, *closure)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(head: Callable[..., Array], hidden: Array, targets: Array, *closure: Array) -> Array:
    def add(total: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
        return total + cross_entropy(head(piece[0], *closure), piece[1]).sum(), None

    return jax.lax.scan(add, jnp.float32(0), (hidden, targets))[0]


def _summed_forward(
    head: Callable[..., Array], hidden: Any, targets: Any, *closure: Any
) -> tuple[Array, tuple[Array, list[Array | None]]]:
    """With `symbolic_zeros` every argument comes with a flag: is it differentiated at all?"""
    trained = [i for i, each in enumerate(closure) if each.perturbed]
    values = [each.value for each in closure]

    def add(carry: tuple[Array, list[Array]], piece: tuple[Array, Array]) -> tuple[Any, Array]:
        total, sums = carry

        def loss(part: Array, weights: list[Array]) -> Array:
            everything = list(values)
            for index, weight in zip(trained, weights, strict=True):
                everything[index] = weight
            return cross_entropy(head(part, *everything), piece[1]).sum()

        value, pull = jax.vjp(loss, piece[0], [values[i] for i in trained])
        to_part, to_weights = pull(jnp.float32(1))
        wide = [a + b.astype(a.dtype) for a, b in zip(sums, to_weights, strict=True)]
        return (total + value, wide), to_part

    zeros = [jnp.zeros(values[i].shape, jnp.float32) for i in trained]
    start = (jnp.float32(0), zeros)
    (total, sums), to_hidden = jax.lax.scan(add, start, (hidden.value, targets.value))
    gradients: list[Array | None] = [None] * len(values)
    for index, gradient in zip(trained, sums, strict=True):
        gradients[index] = gradient.astype(values[index].dtype)
    return total, (to_hidden, gradients)


def _summed_backward(
    head: Callable[..., Array], residuals: tuple[Array, list[Array | None]], gradient: Array
) -> tuple[Array | None, ...]:
    to_hidden, to_closure = residuals

    def scaled(x: Array | None) -> Array | None:
        return None if x is None else (x * gradient).astype(x.dtype)

    return scaled(to_hidden), None, *map(scaled, to_closure)


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def next_token_loss(
    model: Decoder,
    input_ids: Int[Array, "batch seq"],
    labels: Int[Array, "batch labels"],
    attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
    positions: Int[Array, "batch seq"] | None = None,
    *,
    segments: Int[Array, "batch seq"] | None = None,
    loss_chunk: int | None = LOSS_CHUNK,
    dropout_key: Key[Array, ""] | None = None,
) -> TokenLoss:
    """The model's loss on a batch.

    Args:
        model: the decoder.
        input_ids: int32 token ids.
        labels: aligned with `input_ids`, not shifted; -100 where nothing is judged. There may be
            one more than there are ids: what the last token should predict.
        attention_mask, positions, segments, dropout_key: as in `Decoder.hidden`. Of packed
            sequences the labels of each one's first token should be -100.
        loss_chunk: tokens whose logits are held at once (`chunked_cross_entropy`); None holds all.
    """
    hidden = model.hidden(
        input_ids, attention_mask, positions, segments=segments, dropout_key=dropout_key
    )
    one_more = labels.shape[1] == input_ids.shape[1] + 1
    targets = labels[:, 1:] if one_more else next_tokens(labels)
    if loss_chunk is None:
        total = cross_entropy(model.head(hidden), targets).sum()
    else:
        total = chunked_cross_entropy(model.head, hidden, targets, chunk=loss_chunk)
    return TokenLoss(total, (targets != IGNORE).sum(dtype=jnp.int32))
