"""Tokenization: from text segments to token ids and labels.

What happens at the boundaries between segments: `encode`.

**Lengths.** As in the paper's code, the source part (with the bos token) is cut to `source_max_len`
tokens and the target part (with the eos token) to `target_max_len`, both on the right. A target
that is cut loses its eos, so that nothing learns to stop in mid-sentence.

**Labels** are the ids themselves where a segment is trained on, -100 elsewhere, aligned with the
ids (the loss shifts). The first label is always -100: nothing predicts the first token.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_jax.data.chat_format import ChatTemplateFormat
from qlora_jax.data.encode import encode_segments
from qlora_jax.data.examples import IGNORE, Examples, TokenizeReport
from qlora_jax.data.segments import Format, Segment, TrainOn
from qlora_jax.data.templates import check_columns
from qlora_jax.data.tokenizer import Tokenizer

# Rows encoded in one call: enough to keep every thread of the tokenizer busy.
_CHUNK = 1024
# With fewer rows than this a progress bar would be gone before it is read.
_PROGRESS_FROM = 5_000
# Characters of a row that cannot be read: enough to find it, as its number is of no use where rows
# were drawn from a file.
_TOLD = 120


def tokenize_rows(
    rows: Iterable[Mapping[str, Any]],
    form: Format,
    tokenizer: Tokenizer,
    *,
    train_on: TrainOn = "response",
    source_max_len: int | None = None,
    target_max_len: int | None = None,
    max_len: int | None = None,
    append_eos: bool = True,
    progress: bool | None = None,
    source: str = "the dataset",
) -> Examples:
    """Rows of a dataset, in a prompt format, as token ids and labels.

    Args:
        rows: mappings from column to value (`load_rows`, or a plain list of dicts).
        form: the prompt format (`FORMATS[...]`).
        tokenizer: the model's.
        train_on: loss on the "response" only, of a conversation perhaps only on the "last", or on
            "all" of the text.
        source_max_len: cut the source part, bos included, to so many tokens; None: never cut.
        target_max_len: cut the target part, eos included, to so many tokens; None: never cut.
        max_len: the longest example allowed after cutting: the model's context, say.
        append_eos: end every uncut target with the eos token, unless it ends with one already; it
            is trained on where what it ends is.
        progress: show a progress bar; None: from some thousands of rows on.
        source: what to call the rows in an error.

    Returns:
        `Examples`, in the order of the rows; rows left without any trained token (their answers
        were cut away) are left out and counted in `.report`.

    Raises:
        ValueError: no rows, columns the format cannot read, an example longer than `max_len`,
            no example with a trained token, no eos token to append.
        TypeError: form is no format, but the name of one, say.
    """
    check_rows(rows, source)
    check_limits(source_max_len=source_max_len, target_max_len=target_max_len, max_len=max_len)
    if append_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name!r} names no end-of-sequence token to append: give "
            "load_tokenizer eos_token=..., or set append_eos=False."
        )
    eos = tokenizer.eos_token_id if append_eos else None
    # Encoding nothing gives what every text of the family begins with: bos, or nothing. A chat
    # template writes its own.
    start = [] if isinstance(form, ChatTemplateFormat) else tokenizer.encode("")
    # Flat arrays as they come: a token costs 8 bytes in them, some 80 in lists of Python's ints.
    parts: list[Examples] = []
    count = cut_sources = cut_targets = 0
    with _advancing(rows, progress) as advance:
        for chunk in _chunks(rows, _CHUNK):
            if count == 0:
                check_columns(chunk[0], form, source=source)
            pairs: list[_Part] = []
            segmented = [
                _segments(row, form, train_on, f"row {count + i} of {source}")
                for i, row in enumerate(chunk)
            ]
            for encoded in encode_segments(segmented, tokenizer):
                asked, answered = _assemble(encoded, start, eos)
                cut_sources += source_max_len is not None and len(asked[0]) > source_max_len
                cut_targets += target_max_len is not None and len(answered[0]) > target_max_len
                ids, labels = (
                    a[:source_max_len] + b[:target_max_len]
                    for a, b in zip(asked, answered, strict=True)
                )
                labels[:1] = [IGNORE] * len(labels[:1])
                if max_len is not None and len(ids) > max_len:
                    raise ValueError(
                        f"row {count} of {source} has {len(ids)} tokens, but at most {max_len} are "
                        "allowed: set source_max_len and target_max_len so that together they do "
                        f"not exceed {max_len}, or leave the row out."
                    )
                if any(label != IGNORE for label in labels):
                    pairs.append((ids, labels))
                count += 1
            parts.append(Examples.of(pairs))
            advance(len(chunk))
    if count == 0:
        raise ValueError(f"{source} is empty: there is not one row to tokenize.")
    kept = sum(map(len, parts))
    if kept == 0:
        raise ValueError(
            f"none of the {count} rows of {source} has a token to train on with format "
            f"{form.name!r}, train_on={train_on!r}, target_max_len={target_max_len}: allow longer "
            "targets, or train on 'all'."
        )
    report = TokenizeReport(count, cut_sources, cut_targets, count - kept)
    return Examples.join(parts, report)


def check_rows(rows: Any, source: str) -> None:
    """Refuses a slice of a `datasets.Dataset`, which is a dict of columns and no rows."""
    if isinstance(rows, Mapping):
        raise ValueError(
            f"{source} is given as a dict of columns ({', '.join(map(str, rows))}), as a slice of "
            "a datasets.Dataset is, but rows are needed: take rows.select(range(n)), or read them "
            "by load_rows(..., split='train[:n]')."
        )


def check_limits(**limits: int | None) -> None:
    """Refuses a limit of no tokens, by its name; None is no limit."""
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1 token (None: no limit), but is {limit}.")


def _segments(
    row: Mapping[str, Any], form: Format, train_on: TrainOn, which: str
) -> tuple[Segment, ...]:
    try:
        return form.segments(row, train_on)
    except ValueError as error:
        text = str(dict(row))
        told = text if len(text) <= _TOLD else f"{text[:_TOLD]} …"
        raise ValueError(f"{which}: {error} The row: {told}") from error


# The ids and the labels of one part of an example.
_Part = tuple[list[int], list[int]]


def _assemble(
    encoded: Sequence[tuple[Segment, list[int]]], start: list[int], eos: int | None
) -> tuple[_Part, _Part]:
    """Source and target of one example before cutting, with `start` in front and `eos` behind."""
    parts: dict[str, _Part] = {
        "source": (list(start), [IGNORE] * len(start)),
        "target": ([], []),
    }
    last_trained = True
    for segment, tokens in encoded:
        ids, labels = parts[segment.part]
        ids += tokens
        labels += tokens if segment.trained else [IGNORE] * len(tokens)
        last_trained = segment.trained
    ids, labels = parts["target"]
    # A chat template ends its last turn with eos itself.
    if eos is not None and ids[-1:] != [eos]:
        ids.append(eos)
        # A conversation that ends with a question does not teach to answer it with nothing.
        labels.append(eos if last_trained else IGNORE)
    return parts["source"], parts["target"]


def _chunks(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk


@contextmanager
def _advancing(rows: Iterable[Any], progress: bool | None) -> Iterator[Callable[[float], None]]:
    """Moves a progress bar on by so many rows, or does nothing where none is to be shown."""
    total = len(rows) if isinstance(rows, Sized) else None
    if progress is None:
        progress = total is not None and total >= _PROGRESS_FROM
    if not progress:
        yield lambda rows_done: None
        return
    columns = (TextColumn("tokenizing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("tokenizing", total=total)
        yield lambda rows_done: bar.advance(task, rows_done)
