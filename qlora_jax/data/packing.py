"""Packing: several examples in one row of fixed length, each still alone in its attention.

Examples of an instruction dataset are short and of many lengths, so that padding to the longest of
a batch wastes much of the step. Packed, they fill rows of one length (and there is one program to
compile). A row says of every token which example it belongs to (`segments`) and where in it it
stands (`positions`); attention stays within a segment, rotary positions begin anew, and the first
token of a segment is never judged, since nothing before it belongs to it. So the loss and the
gradient of every token are those of the unpacked batch.

    row       | a0 a1 a2 a3 | b0 b1 | c0 c1 c2 | padding |
    segments  |  1  1  1  1 |  2  2 |  3  3  3 |  0  0   |
    positions |  0  1  2  3 |  0  1 |  0  1  2 |  0  0   |

Which examples share a row is decided once, by best-fit decreasing: longest first, each into the
fullest row that still has room (at most 11/9 of the fewest rows that could do, and next to none
wasted where there are short examples to fill up with). Sharing a row means nothing to an example;
what an epoch shuffles is the order of the rows, a pure function of (seed, epoch) as in `Batches`.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from qlora_jax.data.batches import Batches, lengths_of
from qlora_jax.data.examples import IGNORE, Example, Examples


class PackedBatch(NamedTuple):
    """What a training step reads; all `[batch seq]`, or `[accumulation batch seq]`, int32.

    `input_ids` and `labels` as in `Batch`; `segments` ids of a row's examples, from 1, 0 at
    padding; `positions` of each token in its example, from 0, and 0 at padding.
    """

    input_ids: Int32[np.ndarray, "*batch seq"]
    labels: Int32[np.ndarray, "*batch seq"]
    segments: Int32[np.ndarray, "*batch seq"]
    positions: Int32[np.ndarray, "*batch seq"]

    @property
    def attention_mask(self) -> Bool[np.ndarray, "*batch seq"]:
        """True at real tokens."""
        return np.asarray(self.segments) != 0

    @property
    def trained_tokens(self) -> int:
        """How many tokens carry loss."""
        return int((np.asarray(self.labels) != IGNORE).sum())


def pack(lengths: Sequence[int] | np.ndarray, row_length: int) -> list[list[int]]:
    """Which examples share a row: indices, each exactly once, by best-fit decreasing.

    Args:
        lengths: of the examples, each at least 1 and at most `row_length`.
        row_length: tokens of a row.
    """
    rows: list[list[int]] = []
    # Rows with room, by how much of it; `rooms` are the keys in order.
    open_rows: dict[int, list[int]] = {}
    rooms: list[int] = []
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for index in order.tolist():
        length = int(lengths[index])
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            room, row = row_length, len(rows)
            rows.append([])
        else:
            room = rooms[place]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del open_rows[room], rooms[place]
        rows[row].append(index)
        left = room - length
        if left:
            if left not in open_rows:
                open_rows[left] = []
                bisect.insort(rooms, left)
            open_rows[left].append(row)
    return rows


def _joined(examples: Sequence[Any], row: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The ids and labels of a row's examples, one after another."""
    ids = [np.asarray(examples[index][0]) for index in row]
    labels = [np.array(examples[index][1]) for index in row]
    for marks in labels:
        marks[0] = IGNORE
    return np.concatenate(ids), np.concatenate(labels)


class PackedBatches:
    """Every example exactly once per epoch, packed into rows of one length, reachable by step.

    Args:
        examples: tokenized examples, or any sequence of (ids, labels) arrays.
        batch_size: rows of one (micro-)batch, each of several examples.
        length: tokens of a row; multiples of 64 suit a card.
        seed, pad_token_id, drop_last, accumulation, shuffle: as in `Batches`, for rows.

    Raises:
        ValueError: no examples, one without tokens or longer than a row, nonsensical sizes.
    """

    def __init__(
        self,
        examples: Sequence[Example] | Sequence[tuple[np.ndarray, np.ndarray]],
        *,
        batch_size: int,
        length: int,
        seed: int = 0,
        pad_token_id: int = 0,
        drop_last: bool = False,
        accumulation: int = 1,
        shuffle: bool = True,
    ) -> None:
        self._lengths = lengths_of(examples)
        if self._lengths.max() > length:
            raise ValueError(
                f"example {int(self._lengths.argmax())} has {int(self._lengths.max())} tokens, but "
                f"a packed row holds {length}: truncate when tokenizing (source_max_len, "
                "target_max_len) or give longer rows."
            )
        self.length = length
        self.rows = pack(self._lengths, length)
        self._batches = Batches(
            Examples.of(_joined(examples, row) for row in self.rows),
            batch_size=batch_size,
            buckets=(length,),
            seed=seed,
            pad_token_id=pad_token_id,
            drop_last=drop_last,
            accumulation=accumulation,
            shuffle=shuffle,
        )

    def __repr__(self) -> str:
        """Counts and sizes, for a notebook."""
        return (
            f"PackedBatches(examples={len(self._lengths)}, tokens={self._lengths.sum()}, "
            f"rows={len(self.rows)}, length={self.length}, batch_size={self._batches.batch_size}, "
            f"accumulation={self._batches.accumulation}, steps_per_epoch={self.steps_per_epoch})"
        )

    @property
    def filled(self) -> float:
        """The share of the rows' tokens that is no padding."""
        return float(self._lengths.sum()) / (len(self.rows) * self.length)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one epoch, the same in every epoch."""
        return self._batches.steps_per_epoch

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The one shape `at` returns."""
        return self._batches.shapes

    def at(self, step: int) -> PackedBatch:
        """The batch of that step of the run, counted from 0 across epochs."""
        batch = self._batches.at(step)
        epoch, position = divmod(step, self.steps_per_epoch)
        shape = batch.input_ids.shape
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        # Padding stays at 0: no position is larger than an example's, by which some rotary scalings
        # ("dynamic", "longrope") tell how long texts are.
        one, other = segments.reshape(-1, self.length), positions.reshape(-1, self.length)
        for row, packed in enumerate(self._batches.epoch(epoch)[position].tolist()):
            start = 0
            for number, index in enumerate(self.rows[packed], 1):
                end = start + int(self._lengths[index])
                one[row, start:end] = number
                other[row, start:end] = np.arange(end - start)
                start = end
        return PackedBatch(batch.input_ids, batch.labels, segments, positions)

    def one_epoch(self, epoch: int = 0) -> Iterator[PackedBatch]:
        """The batches of one epoch in order."""
        steps = self.steps_per_epoch
        return (self.at(step) for step in range(epoch * steps, (epoch + 1) * steps))
