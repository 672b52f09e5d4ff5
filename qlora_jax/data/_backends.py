"""The two tokenizer libraries, wrapped to what `tokenizer.Tokenizer` needs.

Both come in up to four variants: as the start or the continuation of a text, with special tokens
read as such or as plain characters. Each variant is a library object of its own, made when first
needed, because neither library takes these choices per call.
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from qlora_jax.data.json_file import read_json
from qlora_jax.data.protobuf import delimited, float32, integer

# normalizer_spec (field 3 of the model) {add_dummy_prefix (field 3): false}, to be appended.
_NO_DUMMY_PREFIX = delimited(3, integer(3, 0))
# Types of pieces.
_CONTROL, _USER_DEFINED = 3, 4


class JsonBackend:
    """A `tokenizer.json` of the `tokenizers` library."""

    def __init__(self, file: Path, spec: dict[str, Any] | None = None):
        """Reads a file, or takes what it would hold from `spec`."""
        self._file = file
        self._spec = _load_spec(file) if spec is None else spec
        self._variants: dict[tuple[bool, bool], tokenizers.Tokenizer] = {}
        try:
            self._plain = self._variant(continues=False, special=True)
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise ValueError(f"{file} is not a tokenizer of `tokenizers`: {error}") from error

    @property
    def vocab_size(self) -> int:
        """Largest id + 1, added tokens included."""
        return max(self._plain.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def begins_with_bos(self) -> bool:
        """Whether the file's own post-processor puts a token in front of every text."""
        return self._frame[0] is not None

    def token_id(self, token: str) -> int | None:
        """The id of a piece, None where there is none."""
        return self._plain.token_to_id(token)

    def with_tokens(self, tokens: Sequence[str]) -> "JsonBackend":
        """The same with more special tokens behind the last id."""
        return self._extended((token, True) for token in tokens)

    def with_added(self, added: Mapping[int, tuple[str, bool]]) -> "JsonBackend":
        """The same with what its folder says was added besides: id -> (token, whether it is
        special); one that is not is read in every text.

        Raises:
            ValueError: the ids of tokens that the file lacks do not follow its last one by one.
        """
        lacking = sorted(id_ for id_, (token, _) in added.items() if self.token_id(token) is None)
        if lacking != list(range(self.vocab_size, self.vocab_size + len(lacking))):
            raise ValueError(
                f"{self._file} ends with the id {self.vocab_size - 1} and lacks tokens that the "
                f"files beside it list with the ids {', '.join(map(str, lacking))}, not the next "
                "ones in turn: take all files from one folder, as the tokenizer was saved."
            )
        return self._extended(added[id_] for id_ in lacking) if lacking else self

    def _extended(self, tokens: Iterable[tuple[str, bool]]) -> "JsonBackend":
        """More tokens, special or not, behind the last id."""
        traits = ("single_word", "lstrip", "rstrip", "normalized")
        added = [
            {"id": id_, "content": token, **dict.fromkeys(traits, False), "special": special}
            for id_, (token, special) in enumerate(tokens, self.vocab_size)
        ]
        spec = {**self._spec, "added_tokens": [*(self._spec.get("added_tokens") or []), *added]}
        return JsonBackend(self._file, spec)

    def files(self) -> dict[str, bytes]:
        """What to write so that it can be read again."""
        return {"tokenizer.json": json.dumps(self._spec, ensure_ascii=False).encode()}

    def own_special_id(self, kind: str) -> int | None:
        """The bos that the post-processor puts in front; the file names no others by role."""
        front, something_behind = self._frame
        # "[CLS] a [SEP]" has a front that is no bos.
        return front if kind == "bos" and not something_behind else None

    @cached_property
    def _frame(self) -> tuple[int | None, bool]:
        """The token in front of every text, if any, and whether there is one behind it."""
        bare, framed = (
            self._plain.encode("a", add_special_tokens=added).ids for added in (False, True)
        )
        in_front = framed[: len(bare)] != bare
        return framed[0] if in_front else None, len(framed) - len(bare) > in_front

    @cached_property
    def markers(self) -> re.Pattern[str] | None:
        """What finds special tokens in a text; None where there is none."""
        added = self._spec.get("added_tokens") or ()
        return _any_of(token["content"] for token in added if token.get("special"))

    def encode_batch(
        self, texts: Sequence[str], *, continues: bool, special: bool
    ) -> list[list[int]]:
        """Ids without bos or eos."""
        variant = self._variant(continues=continues, special=special)
        encodings = variant.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of ids; a byte that belongs to no character is U+FFFD, as in SentencePiece."""
        return self._plain.decode(self._whole_characters(ids), skip_special_tokens=skip_special)

    def _whole_characters(self, ids: Sequence[int]) -> list[int]:
        """Ids in which U+FFFD's bytes stand for a byte that belongs to no character.

        `tokenizers` would write U+FFFD for every byte of such a run, those of whole characters
        included, and a stream has written these already.
        """
        whole: list[int] = []
        for is_byte, run in itertools.groupby(ids, self._bytes.__contains__):
            if is_byte:
                text = bytes(map(self._bytes.__getitem__, run)).decode(errors="surrogateescape")
                mended = re.sub("[\udc80-\udcff]", "\ufffd", text).encode()
                whole += map(self._byte_ids.__getitem__, mended)
            else:
                whole += run
        return whole

    @cached_property
    def _byte_ids(self) -> list[int]:
        """The ids of the 256 bytes, where the file writes characters without a piece as such."""
        ids = [self._plain.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        falls_back = '"ByteFallback"' in json.dumps(self._spec.get("decoder"))
        return [id_ for id_ in ids if id_ is not None] if falls_back and None not in ids else []

    @cached_property
    def _bytes(self) -> dict[int, int]:
        return {id_: byte for byte, id_ in enumerate(self._byte_ids)}

    def _variant(self, *, continues: bool, special: bool) -> tokenizers.Tokenizer:
        if (continues, special) not in self._variants:
            spec = {**self._spec, "truncation": None, "padding": None}
            if continues:
                spec["normalizer"] = _without_prefix(spec.get("normalizer"))
                spec["pre_tokenizer"] = _without_prefix(spec.get("pre_tokenizer"))
            variant = tokenizers.Tokenizer.from_str(json.dumps(spec))
            variant.encode_special_tokens = not special
            self._variants[continues, special] = variant
        return self._variants[continues, special]


def _load_spec(file: Path) -> dict[str, Any]:
    spec = read_json(file)
    if "model" not in spec:
        raise ValueError(f"{file} is not a tokenizer of `tokenizers`: it has no 'model' in it.")
    return spec


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that puts no space before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        name = "normalizers" if "normalizers" in part else "pretokenizers"
        parts = [kept for inner in part[name] if (kept := _without_prefix(inner)) is not None]
        return {**part, name: parts}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "never", "add_prefix_space": False}
    if part["type"] == "ByteLevel":
        return {**part, "add_prefix_space": False}
    return part


class SentencePieceBackend:
    """A `tokenizer.model` or `spiece.model` of SentencePiece."""

    begins_with_bos: bool

    def __init__(self, file: Path, proto: bytes | None = None, *, sentinels: int = 0):
        """Reads a file, or takes what it would hold from `proto`.

        `sentinels` says how many ids behind the last piece are taken, though the file does not hold
        them: T5's `<extra_id_0>` and so on, which transformers adds itself.
        """
        self._file = file
        self._sentinels = sentinels
        self._proto = file.read_bytes() if proto is None else proto
        self._start = _processor(self._proto, file)
        self._continuation: sentencepiece.SentencePieceProcessor | None = None
        # Llama, Mistral and Gemma have a bos and begin with it; T5 has none.
        self.begins_with_bos = self._start.bos_id() >= 0

    @property
    def vocab_size(self) -> int:
        """The number of pieces."""
        return self._start.vocab_size()

    def token_id(self, token: str) -> int | None:
        """The id of a piece, None where there is none."""
        found = self._start.piece_to_id(token)
        return found if self._start.id_to_piece(found) == token else None

    def with_tokens(self, tokens: Sequence[str]) -> "SentencePieceBackend":
        """The same with more control pieces behind the last id.

        Raises:
            ValueError: the ids behind the last piece are T5's sentinels.
        """
        if self._sentinels:
            raise ValueError(
                f"{self._file} is a T5's, whose {self._sentinels} sentinels (<extra_id_0>, ...) "
                "follow its last piece without standing in the file, so a token added there would "
                "take the id of one of them: make a tokenizer.json beside it, once where "
                "transformers is installed, with `AutoTokenizer.from_pretrained(folder)"
                ".save_pretrained(folder)`."
            )
        return self._extended(_piece(token, _CONTROL) for token in tokens)

    def with_added(self, added: Mapping[int, tuple[str, bool]]) -> "SentencePieceBackend":
        """The same with what its folder says was added later: id -> (token, whether it is special);
        one that is not is read in every text. A T5's sentinels stay as they are.

        Raises:
            ValueError: the ids do not follow the last piece one by one.
        """
        behind = sorted(id_ for id_ in added if id_ >= self.vocab_size)
        if self._sentinels or not behind:
            return self
        if behind != list(range(self.vocab_size, self.vocab_size + len(behind))):
            raise ValueError(
                f"{self._file} has {self.vocab_size} pieces, but the tokens added to it have the "
                f"ids {', '.join(map(str, behind))}, not the next ones in turn: make a "
                "tokenizer.json beside it, once where transformers is installed, with "
                "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)`."
            )
        kinds = {True: _CONTROL, False: _USER_DEFINED}
        return self._extended(_piece(added[id_][0], kinds[added[id_][1]]) for id_ in behind)

    def _extended(self, pieces: Iterable[bytes]) -> "SentencePieceBackend":
        return SentencePieceBackend(self._file, self._proto + b"".join(pieces))

    def files(self) -> dict[str, bytes]:
        """What to write so that it can be read again."""
        return {self._file.name: self._proto}

    def own_special_id(self, kind: str) -> int | None:
        """The id the model itself gives to bos, eos or pad; None where it has none."""
        found = {"bos": self._start.bos_id, "eos": self._start.eos_id, "pad": self._start.pad_id}[
            kind
        ]()
        return found if found >= 0 else None

    def encode_batch(
        self, texts: Sequence[str], *, continues: bool, special: bool
    ) -> list[list[int]]:
        """Ids without bos or eos."""
        if not special:
            return self._processor_for(continues).encode(list(texts), out_type=int)
        return [self._encode_special(text, continues) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of ids; one that nothing stands for (a model may have rows to spare) is left
        out, as `tokenizers` does."""
        # The library drops control pieces and knows no ids behind its last piece: write out what
        # is special, and decode what lies between.
        text = ""
        run: list[int] = []
        for token in ids:
            marker = self._marker(token)
            if marker is None:
                run.append(token)
            elif not skip_special:
                text += self._start.decode(run) + marker
                run = []
        return text + self._start.decode(run)

    def _marker(self, token: int) -> str | None:
        """How a special token is written, "" for an id that means nothing; None for a piece."""
        beyond = token - self._start.vocab_size()
        if beyond < 0:
            return self._start.id_to_piece(token) if self._is_special(token) else None
        # The first sentinel has the largest id.
        number = self._sentinels - 1 - beyond
        return f"<extra_id_{number}>" if number >= 0 else ""

    def _is_special(self, token: int) -> bool:
        # Of the unknown one the library makes " ⁇ "; to transformers it is special like the others.
        return self._start.is_control(token) or self._start.is_unknown(token)

    @cached_property
    def _special_pieces(self) -> dict[str, int]:
        sp = self._start
        return {sp.id_to_piece(i): i for i in filter(self._is_special, range(sp.vocab_size()))}

    @cached_property
    def markers(self) -> re.Pattern[str] | None:
        """What finds special tokens in a text; None where there is none."""
        return _any_of(self._special_pieces)

    def _encode_special(self, text: str, continues: bool) -> list[int]:
        ids: list[int] = []
        for index, part in enumerate(self.markers.split(text) if self.markers else [text]):
            if index % 2:
                ids.append(self._special_pieces[part])
            elif part:
                # Between markers a text begins anew, as in `tokenizers`.
                ids += self._processor_for(continues).encode(part)
        return ids

    def _processor_for(self, continues: bool) -> sentencepiece.SentencePieceProcessor:
        if not continues:
            return self._start
        if self._continuation is None:
            self._continuation = _processor(self._proto + _NO_DUMMY_PREFIX, Path())
        return self._continuation


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern with one group that is any of some texts, the longest that there is."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    listed = "|".join(map(re.escape, longest_first))
    return re.compile(f"({listed})") if listed else None


def _piece(text: str, kind: int) -> bytes:
    """One more entry of the model's list of pieces (field 1): piece (1), score (2), type (3)."""
    return delimited(1, delimited(1, text.encode()) + float32(2, 0.0) + integer(3, kind))


def _processor(proto: bytes, file: Path) -> sentencepiece.SentencePieceProcessor:
    if not proto:  # which the library takes for none given, and is of no use then
        raise ValueError(f"{file} is empty: fetch it again.")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(
            f"{file} is not a SentencePiece model ({error}): fetch it again."
        ) from error
