"""Perplexity of a text that is longer than the model reads: windows, and what each one scores.

    ids      0 1 2 3 4 5 6 7 8 9        window=4, stride=2
    reads    0 1 2 3                    scores 1 2 3 4
                 2 3 4 5                scores     5 6
                     4 5 6 7            scores         7 8
                         6 7 8          scores             9

Every token but the first is scored exactly once. The last that a window scores it does not read, so
a window may be as long as the model's context. A window moves on by `stride` and scores only what
no window before it did, so all but the first window's tokens have at least `window − stride` tokens
to go by. stride = window (the default) reads every token once: the cheapest, and the usual way of
comparing data types; perplexities are comparable at equal window and stride only.
"""

from collections.abc import Sequence

import numpy as np

from qlora_jax.data import IGNORE, Batch


def text_batches(
    ids: Sequence[int] | np.ndarray,
    *,
    window: int,
    stride: int | None = None,
    batch_size: int = 1,
    pad_token_id: int = 0,
) -> list[Batch]:
    """A text as batches for `perplexity` and `evaluate`: ids [batch_size, window] beside labels
    [batch_size, window + 1], the last of which is scored and not read.

    Args:
        ids: the text's tokens.
        window: how many tokens the model reads at once to score the next ones.
        stride: how far a window moves on; None: by `window`.
        batch_size: windows at once; the last batch is filled up with rows that score nothing.
        pad_token_id: fills short rows.

    Raises:
        ValueError: fewer than two tokens, a window or batch of none, a stride not in [1, window].
    """
    stride = window if stride is None else stride
    if window < 1 or batch_size < 1:
        raise ValueError(f"window={window} and batch_size={batch_size} must be 1 or more.")
    if not 1 <= stride <= window:
        raise ValueError(f"stride={stride} must be between 1 and the window, {window}.")
    tokens = np.asarray(ids, np.int32)
    if len(tokens) < 2:
        raise ValueError(
            f"the text has {len(tokens)} token(s), but a perplexity needs two: one to read and one "
            "to predict."
        )
    # A window that ends beyond the text's last token is the last one.
    starts = range(0, max(len(tokens) - 1 - window, 0) + stride, stride)
    rows = -(-len(starts) // batch_size) * batch_size
    input_ids = np.full((rows, window), pad_token_id, np.int32)
    labels = np.full((rows, window + 1), IGNORE, np.int32)
    mask = np.zeros((rows, window), np.bool_)
    # A softmax over no keys at all is 0/0: a filling row attends to its first position.
    mask[:, 0] = True
    scored = 0
    for row, start in enumerate(starts):
        piece = tokens[start : start + window + 1]
        input_ids[row, : len(piece) - 1] = piece[:-1]
        mask[row, : len(piece) - 1] = True
        fresh = max(scored - start, 0) + 1
        labels[row, fresh : len(piece)] = piece[fresh:]
        scored = start + len(piece) - 1
    return [
        Batch(*(part[at : at + batch_size] for part in (input_ids, labels, mask)))
        for at in range(0, rows, batch_size)
    ]
