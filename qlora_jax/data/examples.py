"""Tokenized examples: token ids and labels, many of them in two flat arrays.

What tokenization hands to batching. A quarter of a million examples as Python objects cost more
memory for their headers than for their tokens, so `Examples` keeps all ids in one array, all labels
in another and the offsets between examples in a third; indexing gives views.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
from jaxtyping import Int32, Int64

IGNORE = -100
"""The label of a token without loss, as in PyTorch and Hugging Face."""


def digest(arrays: Iterable[np.ndarray]) -> str:
    """What tells these arrays, in this order, from others: the beginning of their SHA-256."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).data)
    return f"sha256:{found.hexdigest()[:16]}"


class Example(NamedTuple):
    """One tokenized example; labels are the ids where loss is taken, -100 elsewhere, unshifted."""

    input_ids: Int32[np.ndarray, " tokens"]
    labels: Int32[np.ndarray, " tokens"]


@dataclass(frozen=True)
class TokenizeReport:
    """What tokenization did to the rows: counts to show a user before a run.

    `rows` read; `cut_sources` and `cut_targets` cut to their maximal length; `left_out` because no
    token with loss was left of them.
    """

    rows: int
    cut_sources: int
    cut_targets: int
    left_out: int


class Examples(Sequence[Example]):
    """An immutable sequence of `Example`, stored flat.

    `lengths` int64 [examples]; `tokens` and `trained_tokens` are totals; `report` is what
    tokenization did (None for examples made otherwise).
    """

    def __init__(
        self,
        input_ids: Int32[np.ndarray, " tokens"],
        labels: Int32[np.ndarray, " tokens"],
        lengths: Int64[np.ndarray, " examples"],
        report: TokenizeReport | None = None,
    ):
        if len(input_ids) != len(labels) or len(input_ids) != lengths.sum():
            raise ValueError(
                f"{len(input_ids)} ids, {len(labels)} labels and lengths that sum to "
                f"{lengths.sum()} do not belong together: all three must be equal."
            )
        self._input_ids, self._labels = input_ids, labels
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.lengths = lengths
        self.report = report

    @classmethod
    def of(
        cls, examples: Iterable[tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray]]
    ) -> "Examples":
        """From pairs (ids, labels) of equal length."""
        pairs = [
            (np.asarray(ids, np.int32), np.asarray(marks, np.int32)) for ids, marks in examples
        ]
        empty = np.zeros(0, np.int32)
        return cls(
            np.concatenate([empty, *(ids for ids, _ in pairs)]),
            np.concatenate([empty, *(labels for _, labels in pairs)]),
            np.array([len(ids) for ids, _ in pairs], np.int64),
        )

    @classmethod
    def join(cls, parts: Sequence["Examples"], report: TokenizeReport | None = None) -> "Examples":
        """The examples of all parts, in order."""
        empty = cls.of([])
        return cls(
            np.concatenate([part._input_ids for part in (empty, *parts)]),
            np.concatenate([part._labels for part in (empty, *parts)]),
            np.concatenate([part.lengths for part in (empty, *parts)]),
            report,
        )

    @property
    def tokens(self) -> int:
        """All tokens of all examples."""
        return len(self._input_ids)

    @property
    def trained_tokens(self) -> int:
        """The tokens of all examples that carry loss."""
        return int((self._labels != IGNORE).sum())

    def __repr__(self) -> str:
        """Counts, for a notebook."""
        counts = f"tokens={self.tokens}, trained_tokens={self.trained_tokens}"
        return f"Examples(examples={len(self)}, {counts})"

    def digest(self) -> str:
        """What tells these examples from others."""
        return digest((self.lengths, self._input_ids, self._labels))

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> "Examples": ...

    def __getitem__(self, index: int | slice) -> "Example | Examples":
        if isinstance(index, slice):
            return Examples.of(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        part = slice(self._offsets[index], self._offsets[index + 1])
        return Example(self._input_ids[part], self._labels[part])
