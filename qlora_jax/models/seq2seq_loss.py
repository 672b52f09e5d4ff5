"""Cross-entropy of a target given its source, as a sum and a count (see `loss.py`).

`labels` are the target's own ids, -100 where nothing is judged. What the decoder reads is made from
them: the same ids moved one to the right, behind the start token, so that the score at position t
is judged by `labels[t]` and no label moves.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from qlora_jax.data import IGNORE
from qlora_jax.models.encoder_decoder import EncoderDecoder
from qlora_jax.models.loss import LOSS_CHUNK, TokenLoss, chunked_cross_entropy, cross_entropy


def shift_right(
    labels: Int[Array, "batch seq"], *, start: int, pad: int
) -> Int[Array, "batch seq"]:
    """What the decoder reads where it should predict `labels`: the start token, then all labels but
    the last, with `pad` for -100."""
    ids = jnp.pad(labels[:, :-1], ((0, 0), (1, 0)), constant_values=start)
    return jnp.where(ids == IGNORE, pad, ids)


def seq2seq_loss(
    model: EncoderDecoder,
    input_ids: Int[Array, "batch source"],
    labels: Int[Array, "batch seq"],
    attention_mask: Bool[Array, "batch source"] | Int[Array, "batch source"] | None = None,
    *,
    loss_chunk: int | None = LOSS_CHUNK,
    dropout_key: Key[Array, ""] | None = None,
) -> TokenLoss:
    """The model's loss on a batch.

    Args:
        model: the encoder–decoder.
        input_ids: of the sources.
        labels: ids of the targets, eos included, padded on the right with -100.
        attention_mask: nonzero where a source is real.
        loss_chunk: tokens whose logits are held at once (`chunked_cross_entropy`); None holds all.
        dropout_key: as in `EncoderDecoder.hidden`.
    """
    config = model.config
    read = shift_right(labels, start=config.decoder_start_token_id, pad=config.pad_token_id)
    hidden = model.hidden(input_ids, read, attention_mask, dropout_key=dropout_key)
    if loss_chunk is None:
        total = cross_entropy(model.head(hidden), labels).sum()
    else:
        total = chunked_cross_entropy(model.head, hidden, labels, chunk=loss_chunk)
    return TokenLoss(total, (labels != IGNORE).sum(dtype=jnp.int32))
