"""Batches: which examples a step sees, in which shape, as a pure function of (seed, step).

Two demands shape this file.

**Nothing recompiles.** XLA compiles once per shape, so lengths are rounded up to a few *buckets*
and every step is `[batch_size, bucket]`; `Batches.shapes` is the whole set that can ever occur.
A last, smaller step is filled up with rows without loss rather than given a shape of its own.

**A run resumes anywhere.** There is no iterator to save: `at(step)` computes the step's batch from
(seed, step) alone. The order of an epoch is a permutation drawn from (seed, epoch) with PCG64's raw
output, the one stream NumPy promises never to change (NEP 19).

`group_by_length` is the paper's (and Hugging Face's) sampler: within large random groups examples
are sorted by length, so that a step's examples are about equally long and little is padding; the
order of the steps is then random again. Micro-batches of one step (`accumulation`) share one
bucket, so that they stack to `[accumulation, batch_size, seq]` and are scanned over.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from qlora_jax.data.examples import IGNORE, Example, Examples

# Steps in one sorted group, as in Hugging Face's length-grouped sampler: enough to find company of
# the same length, few enough that the order stays random.
_STEPS_PER_GROUP = 50


class Batch(NamedTuple):
    """What a training step reads; all three `[batch seq]`, or `[accumulation batch seq]`.

    `input_ids` int32, padded on the right; `labels` int32, aligned with `input_ids` (unshifted, as
    Hugging Face), -100 where no loss is taken, always so at position 0, which nothing predicts;
    `attention_mask` bool, True at real tokens.
    """

    input_ids: Int32[np.ndarray, "*batch seq"]
    labels: Int32[np.ndarray, "*batch seq"]
    attention_mask: Bool[np.ndarray, "*batch seq"]

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry loss: what a token-weighted mean divides by."""
        return int((np.asarray(self.labels) != IGNORE).sum())


def length_buckets(longest: int, *, smallest: int = 64) -> tuple[int, ...]:
    """Powers of two from `smallest` while they are below `longest`, then `longest` rounded up to 8.

    A row longer than `smallest` is at most half padding, and the programs to compile grow with the
    logarithm of the length.
    """
    if longest < 1:
        raise ValueError(f"buckets need a longest length of at least 1, not {longest}.")
    top = -(-longest // 8) * 8
    lengths, bucket = [], smallest
    while bucket < top:
        lengths.append(bucket)
        bucket *= 2
    return (*lengths, top)


def lengths_of(
    examples: Sequence[Example] | Sequence[tuple[np.ndarray, np.ndarray]],
) -> Int64[np.ndarray, " examples"]:
    """The tokens of each example.

    Raises:
        ValueError: there is none, or one is without a token.
    """
    if len(examples) == 0:
        raise ValueError("there are no examples to batch: the dataset is empty.")
    lengths = (
        examples.lengths
        if isinstance(examples, Examples)
        else np.array([len(ids) for ids, _ in examples], np.int64)
    )
    if lengths.min() < 1:
        raise ValueError(f"example {int(lengths.argmin())} has no tokens: leave it out.")
    return lengths


class Batches:
    """Every example exactly once per epoch, in batches of a few fixed shapes, reachable by step.

    Args:
        examples: tokenized examples (`tokenize_rows`), or any sequence of (ids, labels) arrays.
        batch_size: rows of one (micro-)batch.
        buckets: allowed lengths, in any order; default `length_buckets` of the longest example.
        seed: with the epoch, decides the order.
        pad_token_id: what fills the rows on the right; masked, so any valid id will do.
        group_by_length: put examples of like length together.
        drop_last: leave out the examples of an epoch that do not fill a step, instead of filling
            the step up with rows that have no loss.
        accumulation: micro-batches per step; above 1, batches have that leading axis.
        shuffle: False keeps the order of `examples` (for evaluation); excludes `group_by_length`.

    Raises:
        ValueError: no examples, one without tokens or longer than the largest bucket, nonsensical
            sizes.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[tuple[np.ndarray, np.ndarray]],
        *,
        batch_size: int,
        buckets: Sequence[int] | None = None,
        seed: int = 0,
        pad_token_id: int = 0,
        group_by_length: bool = False,
        drop_last: bool = False,
        accumulation: int = 1,
        shuffle: bool = True,
    ):
        if batch_size < 1 or accumulation < 1:
            raise ValueError(
                f"batch_size ({batch_size}) and accumulation ({accumulation}) must be at least 1."
            )
        if seed < 0:
            raise ValueError(f"seed must not be negative, but is {seed}.")
        if group_by_length and not shuffle:
            raise ValueError("group_by_length reorders the examples: it needs shuffle=True.")
        self._examples = examples
        self._lengths = lengths_of(examples)
        longest = int(self._lengths.max())
        self.buckets = tuple(sorted(set(length_buckets(longest) if buckets is None else buckets)))
        if not self.buckets or self.buckets[0] < 1:
            raise ValueError(f"buckets must be positive lengths, not {self.buckets}.")
        if longest > self.buckets[-1]:
            raise ValueError(
                f"example {int(self._lengths.argmax())} has {longest} tokens, but the largest "
                f"bucket holds {self.buckets[-1]}: truncate when tokenizing (source_max_len, "
                "target_max_len) or add a larger bucket."
            )
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.seed = seed
        self.pad_token_id = pad_token_id
        self._group_by_length = group_by_length
        self._drop_last = drop_last
        self._shuffle = shuffle
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{len(examples)} examples do not fill one step of {self._step_size} "
                "(batch_size · accumulation): lower it or set drop_last=False."
            )
        # The order of the epoch asked for last: `at` walks through an epoch step by step.
        self._latest: tuple[int, list[np.ndarray]] | None = None

    def __repr__(self) -> str:
        """Counts and sizes, for a notebook."""
        return (
            f"Batches(examples={len(self._lengths)}, tokens={self._lengths.sum()}, batch_size="
            f"{self.batch_size}, accumulation={self.accumulation}, buckets={self.buckets}, "
            f"steps_per_epoch={self.steps_per_epoch})"
        )

    @property
    def _step_size(self) -> int:
        return self.batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch, the same in every epoch."""
        full, rest = divmod(len(self._examples), self._step_size)
        return full + (rest > 0 and not self._drop_last)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Every shape `at` can return, ascending: what there is to compile."""
        leading = (self.accumulation,) if self.accumulation > 1 else ()
        if self._shuffle:
            rest = len(self._examples) % self._step_size
            fewest = rest if rest and not self._drop_last else self._step_size
            # A step lands in a bucket if its longest example does and shorter ones can fill it up.
            counts = np.bincount(self._bucket_of(self._lengths), minlength=len(self.buckets))
            possible = np.flatnonzero((counts > 0) & (counts.cumsum() >= fewest))
        else:
            longest = [self._lengths[indices].max() for indices in self.epoch(0)]
            possible = np.unique(self._bucket_of(np.array(longest)))
        return tuple((*leading, self.batch_size, self.buckets[i]) for i in possible)

    def epoch(self, epoch: int) -> list[Int64[np.ndarray, " rows"]]:
        """Each step of that epoch (from 0) as indices of examples; only the last may be short."""
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, but is {epoch}.")
        if self._latest is None or self._latest[0] != epoch:
            self._latest = (epoch, self._order(epoch))
        return self._latest[1]

    def at(self, step: int) -> Batch:
        """The batch of that step of the run, counted from 0 across epochs."""
        if step < 0:
            raise ValueError(f"step must not be negative, but is {step}.")
        epoch, position = divmod(step, self.steps_per_epoch)
        return self._collate(self.epoch(epoch)[position])

    def one_epoch(self, epoch: int = 0) -> Iterator[Batch]:
        """The batches of one epoch in order."""
        return (self._collate(indices) for indices in self.epoch(epoch))

    def _bucket_of(self, lengths: np.ndarray | np.int64) -> np.ndarray | np.int64:
        return np.searchsorted(self.buckets, lengths)

    def _order(self, epoch: int) -> list[np.ndarray]:
        count, size = len(self._examples), self._step_size
        if not self._shuffle:
            order = np.arange(count)
            return [order[i * size : (i + 1) * size] for i in range(self.steps_per_epoch)]
        stream = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        order = _permutation(stream, count)
        if not self._group_by_length:
            return [order[i * size : (i + 1) * size] for i in range(self.steps_per_epoch)]
        # Which examples a shorter last step holds is decided before sorting, so that they are not
        # always the longest or the shortest of their group; drop_last then drops at random too.
        full = count - count % size
        steps: list[np.ndarray] = []
        for start in range(0, full, size * _STEPS_PER_GROUP):
            group = order[start : min(start + size * _STEPS_PER_GROUP, full)]
            group = group[np.argsort(-self._lengths[group], kind="stable")]
            steps += [group[i : i + size] for i in range(0, len(group), size)]
        steps = [steps[i] for i in _permutation(stream, len(steps))]
        if len(steps) < self.steps_per_epoch:
            steps.append(order[full:])
        return steps

    def _collate(self, indices: np.ndarray) -> Batch:
        rows = self._step_size
        bucket = self.buckets[int(self._bucket_of(self._lengths[indices].max()))]
        input_ids = np.full((rows, bucket), self.pad_token_id, np.int32)
        labels = np.full((rows, bucket), IGNORE, np.int32)
        attention_mask = np.zeros((rows, bucket), np.bool_)
        for row, index in enumerate(indices):
            (ids, marks), length = self._examples[int(index)], self._lengths[index]
            input_ids[row, :length] = ids
            labels[row, :length] = marks
            attention_mask[row, :length] = True
        labels[:, 0] = IGNORE
        # A softmax over no keys at all is 0/0: a filling row attends to its first position.
        attention_mask[len(indices) :, 0] = True
        leading = (self.accumulation,) if self.accumulation > 1 else ()
        shape = (*leading, self.batch_size, bucket)
        return Batch(input_ids.reshape(shape), labels.reshape(shape), attention_mask.reshape(shape))


def _permutation(stream: np.random.PCG64, count: int) -> np.ndarray:
    """A random order of `count` things, from raw output alone; ties (one in 2^64) go by index."""
    return np.argsort(stream.random_raw(count), kind="stable")
