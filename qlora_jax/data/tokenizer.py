"""One face for the two kinds of tokenizer that models come with.

`tokenizer.json` (the `tokenizers` library, "fast" tokenizers) and `tokenizer.model` or
`spiece.model` (SentencePiece) answer the same questions here: `encode`, `decode`, the ids of the
special tokens and whether the family begins its texts with bos. Which tokens are special is read
from where Hugging Face puts it, the first that answers winning: the arguments,
`tokenizer_config.json`, `special_tokens_map.json`, `config.json`, the SentencePiece model itself.
Tokens that were added may stand beside the vocabulary alone, in `added_tokens.json`.

Two choices that differ from the Hugging Face default:

- **A text is only text.** `<s>` in a web page is three characters; only `special=True` reads the
  tokenizer's own markers in a text, and that is for text a prompt template wrote.
- **A continuation has no extra space.** SentencePiece models of the Llama kind put a space before
  every text. Right for the first piece of an example, it is wrong for the following ones:
  `continues=True` leaves it out, and pieces encoded one by one decode to the text they came from.
  Decoding drops that space; `continues=True` keeps it where it is the text's own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import index
from pathlib import Path
from typing import Any, SupportsIndex

from qlora_jax.data._backends import JsonBackend, SentencePieceBackend
from qlora_jax.data.json_file import read_json_if_any
from qlora_jax.data.tokenizer_files import read_token_files

_JSON = "tokenizer.json"
_MODELS = ("tokenizer.model", "spiece.model")
_COMPANIONS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back, for one model family.

    `name` is the folder's (or what `load_tokenizer` was given). `bos_token_id` is None where the
    family has none; `add_bos` says whether its texts begin with it. `pad_token_id` fills rows up:
    the configured one, else eos, else 0 (padding is masked and without loss, so any id will do).
    `vocab_size` is the largest id + 1; a model's embedding may be larger, never smaller.
    """

    name: str
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int
    add_bos: bool
    vocab_size: int
    _backend: JsonBackend | SentencePieceBackend = field(repr=False, compare=False)
    _companions: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)

    def token_id(self, token: str) -> int | None:
        """The id of one token, None where the vocabulary lacks it."""
        return self._backend.token_id(token)

    def markers_in(self, text: str) -> list[int]:
        """Where in a text, read with `special=True`, the tokenizer's special tokens begin."""
        pattern = self._backend.markers
        return [] if pattern is None else [found.start() for found in pattern.finditer(text)]

    def with_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """The tokenizer with more special tokens; those it has already keep their ids.

        New ids follow the largest one, in the order given. (The model's rows: `models.add_tokens`.)

        Raises:
            ValueError: a token is empty, or the tokenizer is a T5's SentencePiece model, behind
                which transformers puts tokens of its own.
        """
        new = [t for t in dict.fromkeys(tokens) if self.token_id(t) is None]
        if not all(tokens):
            raise ValueError(f"tokens is {list(tokens)!r}, but a token needs at least a character.")
        if not new:
            return self
        backend = self._backend.with_tokens(new)
        return replace(self, vocab_size=backend.vocab_size, _backend=backend)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer for `load_tokenizer` and transformers: its vocabulary, and as they
        were the configuration files that lay beside it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {**self._companions, **self._backend.files()}.items():
            (folder / name).write_bytes(content)

    def encode(
        self,
        text: str,
        *,
        bos: bool | None = None,
        eos: bool = False,
        continues: bool = False,
        special: bool = False,
    ) -> list[int]:
        """The ids of a text.

        Args:
            text: any string.
            bos: begin with the bos token; None: as the family does, but not in a continuation.
            eos: end with the eos token.
            continues: the text follows other text (see the module's prologue).
            special: read the tokenizer's special tokens in the text as such.

        Raises:
            ValueError: bos or eos asked for where the tokenizer has none.
        """
        ids = self.encode_batch([text], continues=continues, special=special)[0]
        if bos is None:
            bos = self.add_bos and not continues
        before = [self._required("bos", self.bos_token_id)] if bos else []
        after = [self._required("eos", self.eos_token_id)] if eos else []
        return [*before, *ids, *after]

    def _required(self, kind: str, token: int | None) -> int:
        if token is None:
            raise ValueError(
                f"the tokenizer {self.name!r} has no {kind} token: give load_tokenizer "
                f"{kind}_token=..., or leave {kind} out."
            )
        return token

    def encode_batch(
        self, texts: Sequence[str], *, continues: bool = False, special: bool = False
    ) -> list[list[int]]:
        """The ids of many texts, without bos and eos, on all cores.

        Raises:
            ValueError: a text that UTF-8 cannot write.
        """
        try:
            return self._backend.encode_batch(texts, continues=continues, special=special)
        except TypeError as error:
            broken = next((text for text in texts if re.search("[\ud800-\udfff]", text)), None)
            if broken is None:
                raise
            raise ValueError(
                f"the text {broken[:60]!r} holds half a surrogate pair, which is no character: "
                "mend it, `text.encode('utf-8', 'replace').decode()`."
            ) from error

    def decode(
        self,
        ids: Iterable[SupportsIndex],
        *,
        skip_special: bool = True,
        continues: bool = False,
    ) -> str:
        """The text of ids.

        Args:
            ids: of this tokenizer; those that nothing stands for are left out.
            skip_special: leave special tokens out.
            continues: the text follows other text: a space that its first piece begins with stays,
                which SentencePiece models of the Llama kind drop at the beginning of a text.
        """
        tokens = [index(token) for token in ids]
        before = self.encode_batch(["a"], continues=True)[0] if continues else []
        text = self._backend.decode([*before, *tokens], skip_special=skip_special)
        return text[len(self._backend.decode(before, skip_special=skip_special)) :]


def load_tokenizer(
    path: str | Path,
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    add_bos: bool | None = None,
) -> Tokenizer:
    """The tokenizer of a model folder, or of one tokenizer file.

    In a folder, `tokenizer.json` is taken before `tokenizer.model` / `spiece.model`; given a file,
    that file is read and its folder asked for the configuration.

    Args:
        path: a folder or a file `*.json` / `*.model`.
        bos_token, eos_token, pad_token: override what the folder says.
        add_bos: override whether texts begin with bos.

    Raises:
        FileNotFoundError: no such path, or no tokenizer in the folder.
        ValueError: a file that is no tokenizer, a special token that is not in the vocabulary.
    """
    path = Path(path)
    file = _find(path)
    folder = file.parent
    config, token_map, listed = read_token_files(folder)
    model_config = read_json_if_any(folder / "config.json")
    if file.suffix == ".json":
        backend: JsonBackend | SentencePieceBackend = JsonBackend(file)
    else:
        backend = SentencePieceBackend(file, sentinels=_sentinels(config, model_config))
    backend = backend.with_added(added_tokens(listed, config, token_map))
    given = {"bos": bos_token, "eos": eos_token, "pad": pad_token}

    def special_id(kind: str) -> int | None:
        for token in (given[kind], config.get(f"{kind}_token"), token_map.get(f"{kind}_token")):
            if token is None:
                continue
            text = token["content"] if isinstance(token, dict) else token
            found = backend.token_id(text)
            if found is None:
                raise ValueError(
                    f"the {kind} token {text!r} is not in the vocabulary of {file}: correct "
                    f"{kind}_token in tokenizer_config.json or give load_tokenizer {kind}_token=..."
                )
            return found
        # Some families end a text in one of several ways; the first is the one to write.
        configured = model_config.get(f"{kind}_token_id")
        if isinstance(configured, list):
            configured = configured[0] if configured else None
        return backend.own_special_id(kind) if configured is None else configured

    bos, eos, pad = special_id("bos"), special_id("eos"), special_id("pad")
    if add_bos is None:
        add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = backend.begins_with_bos
    return Tokenizer(
        name=path.name if path.is_dir() else folder.name,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=next((i for i in (pad, eos) if i is not None), 0),
        add_bos=bool(add_bos) and bos is not None,
        vocab_size=backend.vocab_size,
        _backend=backend,
        _companions={
            name: (folder / name).read_bytes() for name in _COMPANIONS if (folder / name).is_file()
        },
    )


def added_tokens(
    listed: Mapping[str, int], config: Mapping[str, Any], token_map: Mapping[str, Any]
) -> dict[int, tuple[str, bool]]:
    """What was added to a tokenizer: id -> (token, whether it is special).

    transformers leaves a SentencePiece model's own file alone and keeps them beside it: in
    `added_tokens.json` (`listed`), and since 4.34 in tokenizer_config.json, too. A tokenizer.json
    holds them itself, unless it comes from another folder than those.
    """
    named: set[str] = set()
    for given in (config, token_map):
        roles = [value for key, value in given.items() if key.endswith("_token")]
        for token in (*roles, *(given.get("additional_special_tokens") or ())):
            named.add(token["content"] if isinstance(token, dict) else str(token))
    added = {id_: (token, token in named) for token, id_ in listed.items()}
    decoder = config.get("added_tokens_decoder") or {}
    return added | {
        int(id_): (entry["content"], bool(entry.get("special"))) for id_, entry in decoder.items()
    }


def _sentinels(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> int:
    """How many tokens transformers puts behind the pieces of a T5's SentencePiece model."""
    named = str(config.get("tokenizer_class", "")).startswith("T5Tokenizer")
    ours = named or model_config.get("model_type") == "t5"
    count = config.get("extra_ids")
    if count is None:
        return 100 if ours else 0
    if type(count) is not int or count < 0:
        raise ValueError(
            f"extra_ids is {count!r} in tokenizer_config.json, but a whole number of tokens is "
            "needed: take the checkpoint's own file."
        )
    return count


def _find(path: Path) -> Path:
    if path.is_dir():
        for name in (_JSON, *_MODELS):
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(
            f"{path} holds no tokenizer: expected {_JSON}, {' or '.join(_MODELS)} in it."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: expected a folder with {_JSON} or {' / '.join(_MODELS)}."
        )
    if path.suffix not in (".json", ".model"):
        raise ValueError(f"{path} is not a tokenizer file: expected *.json or *.model.")
    return path
