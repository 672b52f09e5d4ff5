"""Texts, or pairs of texts, with a label each: what a batch of a classifier holds.

A text becomes `<s> a </s>`, a pair `<s> a </s></s> b </s>`, as RoBERTa reads them; of a pair that
is too long the longer text is cut first, as Hugging Face does.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from qlora_jax.data.batches import Batch, Batches
from qlora_jax.data.examples import IGNORE
from qlora_jax.data.tokenizer import Tokenizer


class Labelled(NamedTuple):
    """One example: its ids, and a class (int) or a value (float)."""

    input_ids: Int32[np.ndarray, " tokens"]
    label: int | float


class ClassificationBatch(NamedTuple):
    """What a step reads; the leading axes are `[batch]`, or `[accumulation, batch]`.

    `labels` are int32 classes, -100 in a row that only fills the batch up; or float32 values, NaN
    in such a row.
    """

    input_ids: Int32[np.ndarray, "*batch seq"]
    attention_mask: Bool[np.ndarray, "*batch seq"]
    labels: Int32[np.ndarray, "*batch"] | Float32[np.ndarray, "*batch"]


def tokenize_texts(
    texts: Sequence[tuple[str, ...]], tokenizer: Tokenizer, *, max_len: int
) -> list[Int32[np.ndarray, " tokens"]]:
    """The ids of texts, or of pairs of texts.

    Args:
        texts: tuples of one text or two.
        tokenizer: the model's; its bos and eos frame the texts.
        max_len: cut to so many tokens, the frame's included.

    Raises:
        ValueError: the tokenizer has no bos or no eos, or the frame alone is longer than max_len.
    """
    frame = 2 * max(map(len, texts), default=0)
    if max_len < frame:
        raise ValueError(
            f"max_len is {max_len}, but the tokens that frame a text are {frame} already: give "
            "more."
        )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is None or eos is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name!r} has no bos or no eos token, which frame a text: "
            "give load_tokenizer bos_token=... and eos_token=..."
        )
    flat = [part for parts in texts for part in parts]
    encoded = iter(tokenizer.encode_batch(flat))
    result = []
    for parts in texts:
        ids = [next(encoded) for _ in parts]
        lengths = _cut([len(part) for part in ids], max_len - 2 * len(ids))
        framed = [bos, *ids[0][: lengths[0]], eos]
        for part, length in zip(ids[1:], lengths[1:], strict=True):
            framed += [eos, *part[:length], eos]
        result.append(np.array(framed, np.int32))
    return result


def _cut(lengths: list[int], room: int) -> list[int]:
    """How much of one text, or of two, fits into so many tokens: the `tokenizers` library's
    "longest first"."""
    if sum(lengths) <= room:
        return lengths
    if len(lengths) == 1:
        return [room]
    shorter = min(lengths)
    longer = max(shorter, room - shorter)
    if shorter + longer > room:
        shorter, longer = room // 2, room - room // 2
    return [longer, shorter] if lengths[0] > lengths[1] else [shorter, longer]


class ClassificationBatches:
    """Every example exactly once per epoch, in batches of a few fixed shapes, reachable by step.

    Args:
        examples: tokenized and labelled; all labels int, or all float.
        batch_size: rows of one (micro-)batch.
        pad_token_id: what fills rows on the right: RoBERTa counts positions by it.
        buckets, seed, group_by_length, drop_last, accumulation, shuffle: as in `Batches`.
    """

    def __init__(
        self,
        examples: Sequence[Labelled],
        *,
        batch_size: int,
        pad_token_id: int,
        buckets: Sequence[int] | None = None,
        seed: int = 0,
        group_by_length: bool = False,
        drop_last: bool = False,
        accumulation: int = 1,
        shuffle: bool = True,
    ) -> None:
        self._order = Batches(
            [(example.input_ids, example.input_ids) for example in examples],
            batch_size=batch_size,
            pad_token_id=pad_token_id,
            buckets=buckets,
            seed=seed,
            group_by_length=group_by_length,
            drop_last=drop_last,
            accumulation=accumulation,
            shuffle=shuffle,
        )
        labels = np.array([example.label for example in examples])
        regression = labels.dtype.kind == "f"
        self.labels = labels.astype(np.float32 if regression else np.int32)
        self._nothing = np.nan if regression else IGNORE

    def __repr__(self) -> str:
        """Counts and sizes, for a notebook."""
        return (
            f"ClassificationBatches(examples={len(self.labels)}, "
            f"batch_size={self._order.batch_size}, accumulation={self._order.accumulation}, "
            f"buckets={self._order.buckets}, steps_per_epoch={self.steps_per_epoch})"
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch, the same in every epoch."""
        return self._order.steps_per_epoch

    def at(self, step: int) -> ClassificationBatch:
        """The batch of that step of the run, counted from 0 across epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._labelled(self._order.at(step), self._order.epoch(epoch)[position])

    def one_epoch(self, epoch: int = 0) -> Iterator[ClassificationBatch]:
        """The batches of one epoch in order."""
        return map(self._labelled, self._order.one_epoch(epoch), self._order.epoch(epoch))

    def _labelled(self, batch: Batch, indices: np.ndarray) -> ClassificationBatch:
        labels = np.full(batch.input_ids[..., 0].size, self._nothing, self.labels.dtype)
        labels[: len(indices)] = self.labels[indices]
        return ClassificationBatch(
            batch.input_ids, batch.attention_mask, labels.reshape(batch.input_ids.shape[:-1])
        )
