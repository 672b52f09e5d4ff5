"""The ids of an example's segments: what stands at a boundary, and what a template's markers do.

**Boundaries.** A token never straddles the line between what is asked and what is answered, and the
ids of a prompt in training are the ids the same prompt has when the model is asked. (Tokenizing
both together and masking by position would merge, say, ":" and a quotation mark into a piece that
no prompt ends in.) Each segment is tokenized on its own, those after the first as a *continuation*:
without the space that SentencePiece models put before a text, which would otherwise appear in the
middle of every example. Decoding an example's ids therefore gives its text back, to the character,
where the tokenizer is lossless at all.

**Markers.** A conversation in a model's own template is read as the model will be asked, the whole
text at once: a space in front of a row's words is one token with the first of them, and behind a
special token a text may begin anew. So segments that differ in `special` alone are one text, unless
the row's holds a marker, which has to stay characters; and a segment behind other text gives what
its ids add to those of the text since the last marker.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qlora_jax.data.segments import Segment, joined
from qlora_jax.data.tokenizer import Tokenizer


class _Piece(NamedTuple):
    """A text to encode, and what stands before it: `continues`, anything; `tail`, all of it since
    the last marker or the beginning, where that is read with markers, too."""

    text: str
    special: bool
    continues: bool
    tail: str


# A text from its beginning, with markers.
_WHOLE = (False, True)


def encode_segments(
    segmented: Sequence[Sequence[Segment]], tokenizer: Tokenizer
) -> Iterator[list[tuple[Segment, list[int]]]]:
    """The segments of each example, some of them joined, with their ids."""
    segmented = [_read_as_one(segments, tokenizer) for segments in segmented]
    planned = [list(_pieces(segments, tokenizer)) for segments in segmented]
    # The markers of a conversation come again and again: encode each distinct text once.
    ways: dict[tuple[bool, bool], dict[str, list[int]]] = {}
    for pieces in planned:
        for text, special, continues, tail in pieces:
            if tail:
                ways.setdefault(_WHOLE, {}).update({tail: [], tail + text: []})
            else:
                ways.setdefault((continues, special), {})[text] = []
    for (continues, special), texts in ways.items():
        encoded = tokenizer.encode_batch(list(texts), continues=continues, special=special)
        ways[continues, special] = dict(zip(texts, encoded, strict=True))

    def ids(piece: _Piece) -> list[int]:
        if not piece.tail:
            return ways[piece.continues, piece.special][piece.text]
        before = ways[_WHOLE][piece.tail]
        both = ways[_WHOLE][piece.tail + piece.text]
        if both[: len(before)] == before:
            return both[len(before) :]
        # A token would straddle the boundary.
        return tokenizer.encode(piece.text, continues=True, special=True)

    for segments, pieces in zip(segmented, planned, strict=True):
        yield [(segment, ids(piece)) for segment, piece in zip(segments, pieces, strict=True)]


def _read_as_one(segments: Sequence[Segment], tokenizer: Tokenizer) -> Sequence[Segment]:
    """Segments with the row's own text read with the template's, where there is no marker in it."""
    if not any(segment.special for segment in segments):
        return segments
    return joined(
        segment if tokenizer.markers_in(segment.text) else segment._replace(special=True)
        for segment in segments
    )


def _pieces(segments: Sequence[Segment], tokenizer: Tokenizer) -> Iterator[_Piece]:
    """The segments as what is to be encoded."""
    begun = False
    # The text since the last marker or the beginning; None where a row's own marker stands in it.
    tail: str | None = ""
    for segment in segments:
        # Behind an empty prompt an answer does not continue anything.
        yield _Piece(segment.text, segment.special, begun, (segment.special and tail) or "")
        begun = begun or segment.text != ""
        if not segment.special:
            tail = None
            continue
        text = (tail or "") + segment.text
        markers = tokenizer.markers_in(text)
        if markers:
            tail = text[markers[-1] :]
        elif tail is not None:
            tail = text
