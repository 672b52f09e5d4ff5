"""Sources and targets apart: what a batch of an encoder–decoder holds, and how rows become one.

    tokenize_pairs      rows, in a prompt format → Pairs of ids
    Seq2SeqBatches      Pairs → Seq2SeqBatch of a fixed shape, for any step of the run

Both texts end with eos, as T5 was trained. Sources and targets are padded to buckets of their own,
so a batch is `[batch, source bucket]` beside `[batch, target bucket]`; which examples a step sees
is decided as in `Batches`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from qlora_jax.data.batches import Batch, Batches, length_buckets
from qlora_jax.data.examples import IGNORE, TokenizeReport, digest
from qlora_jax.data.templates import Format, check_columns
from qlora_jax.data.tokenize import check_limits, check_rows
from qlora_jax.data.tokenizer import Tokenizer


class Pair(NamedTuple):
    """One example: ids of the source and of the target, each with its eos."""

    source: Int32[np.ndarray, " source"]
    target: Int32[np.ndarray, " target"]


class Pairs(list[Pair]):
    """Tokenized examples, in the order of their rows; `report` is what tokenization did to them
    (None for pairs made otherwise)."""

    report: TokenizeReport | None = None

    @property
    def tokens(self) -> int:
        """All tokens of all sources and targets."""
        return sum(len(pair.source) + len(pair.target) for pair in self)

    def __repr__(self) -> str:
        """Counts, for a notebook."""
        return f"Pairs(pairs={len(self)}, tokens={self.tokens})"

    def digest(self) -> str:
        """What tells these pairs from others."""
        return digest(ids for pair in self for ids in pair)


class Seq2SeqBatch(NamedTuple):
    """What a training step reads; the leading axes are `[batch]`, or `[accumulation, batch]`.

    `input_ids` int32, sources padded on the right; `attention_mask` bool, True at their real
    tokens; `labels` int32, the targets' ids, -100 behind their ends.
    """

    input_ids: Int32[np.ndarray, "*batch source"]
    attention_mask: Bool[np.ndarray, "*batch source"]
    labels: Int32[np.ndarray, "*batch target"]

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry loss."""
        return int((np.asarray(self.labels) != IGNORE).sum())

    @property
    def real_tokens(self) -> int:
        """Tokens of sources and targets without their padding."""
        return int(np.asarray(self.attention_mask).sum()) + self.trained_tokens


def tokenize_pairs(
    rows: Iterable[Mapping[str, Any]],
    form: Format,
    tokenizer: Tokenizer,
    *,
    source_max_len: int | None = None,
    target_max_len: int | None = None,
    source: str = "the dataset",
) -> Pairs:
    """Rows of a dataset, in a prompt format, as sources and targets.

    Args:
        rows: mappings from column to value.
        form: the prompt format; what it calls source goes to the encoder, the rest is the target.
        tokenizer: the model's.
        source_max_len: cut a source to so many tokens, its eos included, which it keeps.
        target_max_len: cut a target to so many; one that is cut loses its eos, so that nothing
            learns to stop in mid-sentence.
        source: what to call the rows in an error.

    Raises:
        ValueError: no rows, columns that the format cannot read, a row without a source (a
            conversation), a limit of no tokens, or a tokenizer without eos.
        TypeError: form is no format, but the name of one, say.
    """
    check_rows(rows, source)
    check_limits(source_max_len=source_max_len, target_max_len=target_max_len)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name!r} names no end-of-sequence token: give load_tokenizer "
            "eos_token=..."
        )
    sources, targets = [], []
    for count, row in enumerate(rows):
        if count == 0:
            check_columns(row, form, source=source)
        parts = {"source": "", "target": ""}
        for segment in form.segments(row, "response"):
            parts[segment.part] += segment.text
        if not parts["source"]:
            raise ValueError(
                f"row {count} of {source} has no source in format {form.name!r}, but an "
                "encoder–decoder reads a source and writes a target: take a format that tells "
                "instruction and response apart."
            )
        sources.append(parts["source"])
        targets.append(parts["target"].strip())
    if not sources:
        raise ValueError(f"{source} is empty: there is not one row to tokenize.")
    pairs = Pairs()
    cut_sources = cut_targets = 0
    for read, written in zip(
        tokenizer.encode_batch(sources), tokenizer.encode_batch(targets), strict=True
    ):
        cut_sources += source_max_len is not None and len(read) >= source_max_len
        cut_targets += target_max_len is not None and len(written) >= target_max_len
        kept = read if source_max_len is None else read[: source_max_len - 1]
        target = [*written, eos][:target_max_len]
        pairs.append(Pair(np.array([*kept, eos], np.int32), np.array(target, np.int32)))
    pairs.report = TokenizeReport(len(pairs), cut_sources, cut_targets, 0)
    return pairs


class Seq2SeqBatches:
    """Every pair exactly once per epoch, in batches of a few fixed shapes, reachable by step.

    Args:
        pairs: tokenized examples.
        batch_size: rows of one (micro-)batch.
        source_buckets, target_buckets: allowed lengths; None: powers of two up to the longest.
        pad_token_id: what fills sources on the right; masked.
        seed, group_by_length, drop_last, accumulation, shuffle: as in `Batches`; the lengths that
            are grouped are the sources'.

    Raises:
        ValueError: as `Batches` does.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        batch_size: int,
        source_buckets: Sequence[int] | None = None,
        target_buckets: Sequence[int] | None = None,
        pad_token_id: int = 0,
        seed: int = 0,
        group_by_length: bool = False,
        drop_last: bool = False,
        accumulation: int = 1,
        shuffle: bool = True,
    ) -> None:
        self._pairs = pairs
        self._order = Batches(
            [(pair.source, pair.source) for pair in pairs],
            batch_size=batch_size,
            buckets=source_buckets,
            pad_token_id=pad_token_id,
            seed=seed,
            group_by_length=group_by_length,
            drop_last=drop_last,
            accumulation=accumulation,
            shuffle=shuffle,
        )
        longest = max(len(pair.target) for pair in pairs)
        self.target_buckets = tuple(sorted(target_buckets or length_buckets(longest, smallest=32)))
        if longest > self.target_buckets[-1]:
            raise ValueError(
                f"a target has {longest} tokens, but the largest bucket holds "
                f"{self.target_buckets[-1]}: set target_max_len, or add a larger bucket."
            )

    def __repr__(self) -> str:
        """Counts and sizes, for a notebook."""
        return (
            f"Seq2SeqBatches(pairs={len(self._pairs)}, batch_size={self._order.batch_size}, "
            f"accumulation={self._order.accumulation}, source_buckets={self._order.buckets}, "
            f"target_buckets={self.target_buckets}, steps_per_epoch={self.steps_per_epoch})"
        )

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch, the same in every epoch."""
        return self._order.steps_per_epoch

    def at(self, step: int) -> Seq2SeqBatch:
        """The batch of that step of the run, counted from 0 across epochs."""
        sources = self._order.at(step)
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._beside(sources, self._order.epoch(epoch)[position])

    def one_epoch(self, epoch: int = 0) -> Iterator[Seq2SeqBatch]:
        """The batches of one epoch in order."""
        return map(self._beside, self._order.one_epoch(epoch), self._order.epoch(epoch))

    def _beside(self, sources: Batch, indices: np.ndarray) -> Seq2SeqBatch:
        """The targets of some examples beside their sources, collated already."""
        targets = [self._pairs[int(index)].target for index in indices]
        longest = max(map(len, targets))
        bucket = next(length for length in self.target_buckets if length >= longest)
        rows = int(np.prod(sources.input_ids.shape[:-1]))
        labels = np.full((rows, bucket), IGNORE, np.int32)
        for row, target in enumerate(targets):
            labels[row, : len(target)] = target
        labels = labels.reshape(*sources.input_ids.shape[:-1], bucket)
        return Seq2SeqBatch(sources.input_ids, sources.attention_mask, labels)
