"""A tokenizer between its files and a GGUF's metadata, both ways.

llama.cpp knows two kinds here. "gpt2": byte-level BPE, with merges, and with the *name* of the rule
that cuts a text before it is merged (`tokenizer.ggml.pre`). "llama": SentencePiece's BPE, which
merges by the pieces' scores. Hugging Face keeps the first as `tokenizer.json`, the second as
`tokenizer.model` or as a `tokenizer.json` with byte fallback.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sentencepiece

from qlora_jax.checkpoints.tokenizer import tokenizer_from_files
from qlora_jax.data.protobuf import delimited, float32, integer
from qlora_jax.data.tokenizer import added_tokens
from qlora_jax.data.tokenizer_files import parse_token_files

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_GPT2_WORDS = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def _split(regex: str) -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return _sequence(cut, _GPT2_WORDS | {"use_regex": False})


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _words(digits: str) -> str:
    """The expression of GPT-4's kind, which differ in how many digits go together."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_PRE_TOKENIZERS = {
    "gpt-2": _GPT2_WORDS | {"use_regex": True},
    "smollm": _sequence(
        {"type": "Digits", "individual_digits": True}, _GPT2_WORDS | {"use_regex": True}
    ),
    "llama-bpe": _split(_words(r"\p{N}{1,3}")),
    "qwen2": _split(_words(r"\p{N}")),
}
"""llama.cpp's name of a rule → what `tokenizers` calls it."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as GGUF keeps it.

    Attributes:
        model: "gpt2" or "llama".
        pre: the name of the rule that cuts texts.
        tokens: by id.
        types: of each token, in ggml's numbers (which are SentencePiece's).
        scores: "llama": of each token.
        merges: "gpt2": pairs, joined by a space.
        special: role ("bos", "eos", "unknown", "padding") → id.
        add_bos, add_eos: whether a text begins or ends with it.
        add_space_prefix: whether a space is put in front of a text.
        chat_template: Jinja, or None.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: Mapping[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = True
    chat_template: str | None = None


def from_files(files: Mapping[str, bytes], vocab_size: int) -> Vocabulary:
    """The tokenizer of a model's companions.

    Args:
        files: by name.
        vocab_size: of the model's embedding; ids without a token are filled in as unused.

    Raises:
        ValueError: no tokenizer, or one that llama.cpp does not have.
    """
    spec = json.loads(files["tokenizer.json"]) if "tokenizer.json" in files else None
    config, token_map, listed = parse_token_files(files)
    piece_model = files.get("tokenizer.model")
    if piece_model is not None:
        added = added_tokens(listed, config, token_map)
        for entry in (spec or {}).get("added_tokens") or []:
            added[entry["id"]] = (entry["content"], entry["special"])
        parts = _from_sentencepiece(piece_model, added)
    elif spec is not None:
        parts = _from_json(spec)
    else:
        raise ValueError(
            "The checkpoint has no tokenizer.json and no tokenizer.model, but a GGUF file holds "
            "its tokenizer too: put one of them into the folder."
        )
    tokens, types = parts["tokens"], parts["types"]
    if len(tokens) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokens)} tokens, but the model's embedding {vocab_size} rows: "
            "check that both are of one checkpoint."
        )
    missing = range(len(tokens), vocab_size)
    tokens += [f"[PAD{token}]" for token in missing]
    types += [_UNUSED for _ in missing]
    if parts.get("scores"):
        parts["scores"] += [-1000.0 for _ in missing]
    tokenizer = tokenizer_from_files(files)
    special = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
    }
    unknown = config.get("unk_token")
    text = unknown.get("content") if isinstance(unknown, dict) else unknown
    if text in tokens:
        special["unknown"] = tokens.index(text)
    template = config.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode()
    return Vocabulary(
        **parts,
        special={role: token for role, token in special.items() if token is not None},
        add_bos=tokenizer.add_bos,
        add_eos=bool(config.get("add_eos_token", False)),
        chat_template=template if isinstance(template, str) else None,
    )


def _from_json(spec: Mapping[str, Any]) -> dict[str, Any]:
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ValueError(
            f"The tokenizer is a {model.get('type')}, but GGUF files are written with BPE "
            "tokenizers: export to safetensors."
        )
    tokens = {token: text for text, token in model["vocab"].items()}
    types = dict.fromkeys(tokens, _NORMAL)
    for added in spec.get("added_tokens") or []:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    size = max(tokens) + 1
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    parts: dict[str, Any] = {
        "tokens": [tokens.get(token, f"[PAD{token}]") for token in range(size)],
        "types": [types.get(token, _UNUSED) for token in range(size)],
    }
    if not model.get("byte_fallback"):
        pre = _pre_name(spec.get("pre_tokenizer"))
        return parts | {"model": "gpt2", "pre": pre, "merges": merges, "add_space_prefix": False}
    # SentencePiece merges what has the highest score, `tokenizers` what comes first in the list.
    rank = {merge.replace(" ", ""): -float(i) for i, merge in reversed(list(enumerate(merges)))}
    for token, text in tokens.items():
        if types[token] == _NORMAL and len(text) == 6 and text.startswith("<0x"):
            parts["types"][token] = _BYTE
        if text == model.get("unk_token"):
            parts["types"][token] = _UNKNOWN
    scores = [rank.get(text, -float(len(merges))) for text in parts["tokens"]]
    prefixed = "Prepend" in json.dumps(spec.get("normalizer")) or bool(
        (spec.get("pre_tokenizer") or {}).get("prepend_scheme", "never") != "never"
    )
    return parts | {
        "model": "llama",
        "pre": "default",
        "scores": scores,
        "add_space_prefix": prefixed,
    }


def _pre_name(given: Mapping[str, Any] | None) -> str:
    """llama.cpp's name of a pre-tokenizer."""
    for name, known in _PRE_TOKENIZERS.items():
        if _essence(given) == _essence(known):
            return name
    raise ValueError(
        f"The tokenizer cuts texts by a rule that is none of {', '.join(_PRE_TOKENIZERS)}, and "
        "llama.cpp needs its name: export to safetensors, or convert with llama.cpp's own script."
    )


def _essence(part: Mapping[str, Any] | None) -> list[Any]:
    """What a pre-tokenizer does to a text, without how it is written down."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [rule for inner in part["pretokenizers"] for rule in _essence(inner)]
    if part["type"] == "Split":
        return [("Split", part["pattern"].get("Regex"), part["behavior"])]
    if part["type"] == "ByteLevel":
        return [("ByteLevel", part["add_prefix_space"], part.get("use_regex", True))]
    return [(part["type"], part.get("individual_digits"))]


def _from_sentencepiece(proto: bytes, added: Mapping[int, tuple[str, bool]]) -> dict[str, Any]:
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    size = pieces.vocab_size()
    tokens = [pieces.id_to_piece(token) for token in range(size)]
    kinds = [
        (pieces.is_unknown, _UNKNOWN),
        (pieces.is_control, _CONTROL),
        (pieces.is_unused, _UNUSED),
        (pieces.is_byte, _BYTE),
    ]
    types = [next((kind for test, kind in kinds if test(token)), _NORMAL) for token in range(size)]
    scores = [pieces.get_score(token) for token in range(size)]
    for token in sorted(id_ for id_ in added if id_ >= size):
        text, special = added[token]
        tokens.append(text)
        types.append(_CONTROL if special else _USER_DEFINED)
        scores.append(-1000.0)
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "types": types,
        "scores": scores,
        "add_space_prefix": pieces.encode("a", out_type=str)[0] != "a",
    }


_ROLES = ("bos", "eos", "unknown", "padding")


def to_metadata(vocabulary: Vocabulary) -> dict[str, Any]:
    """The keys that a GGUF file has of it, after `tokenizer.`."""
    metadata: dict[str, Any] = {
        "ggml.model": vocabulary.model,
        "ggml.pre": vocabulary.pre,
        "ggml.tokens": vocabulary.tokens,
        "ggml.token_type": vocabulary.types,
        "ggml.add_bos_token": vocabulary.add_bos,
        "ggml.add_eos_token": vocabulary.add_eos,
        "ggml.add_space_prefix": vocabulary.add_space_prefix,
    }
    if vocabulary.scores:
        metadata["ggml.scores"] = vocabulary.scores
    if vocabulary.merges:
        metadata["ggml.merges"] = vocabulary.merges
    for role, token in vocabulary.special.items():
        metadata[f"ggml.{role}_token_id"] = token
    if vocabulary.chat_template:
        metadata["chat_template"] = vocabulary.chat_template
    return {f"tokenizer.{key}": value for key, value in metadata.items()}


def from_metadata(metadata: Mapping[str, Any]) -> Vocabulary:
    """The tokenizer of a GGUF file.

    Raises:
        ValueError: it has none, or one that is not read.
    """

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}", default)

    if value("model") not in ("gpt2", "llama") or not value("tokens"):
        raise ValueError(
            f"The file's tokenizer is {value('model')!r}, but of GGUF tokenizers gpt2 and llama "
            "are read: put the checkpoint's tokenizer files beside the file and give their folder."
        )
    tokens, pre = value("tokens"), value("pre", "default")
    # Llama 3's files are older than the key, and llama.cpp puts bos in front by their rule's name.
    begins = value("model") == "llama" or pre == "llama-bpe"
    return Vocabulary(
        model=value("model"),
        pre=pre,
        tokens=tokens,
        types=value("token_type", [_NORMAL] * len(tokens)),
        scores=value("scores", []),
        merges=value("merges", []),
        special={
            role: value(f"{role}_token_id")
            for role in _ROLES
            if value(f"{role}_token_id") is not None
        },
        add_bos=value("add_bos_token", begins),
        add_eos=value("add_eos_token", False),
        add_space_prefix=value("add_space_prefix", value("model") == "llama"),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def tokenizer_files(vocabulary: Vocabulary) -> dict[str, bytes]:
    """The tokenizer as Hugging Face keeps it: what `load_tokenizer` and transformers read.

    Raises:
        ValueError: it cuts texts by a rule that is not known here.
    """
    tokens = vocabulary.tokens
    texts = {
        f"{name}_token": tokens[vocabulary.special[role]]
        for role, name in zip(_ROLES, ("bos", "eos", "unk", "pad"), strict=True)
        if role in vocabulary.special
    }
    config = {
        "tokenizer_class": (
            "PreTrainedTokenizerFast" if vocabulary.model == "gpt2" else "LlamaTokenizer"
        ),
        **texts,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        "clean_up_tokenization_spaces": False,
        "chat_template": vocabulary.chat_template,
    }
    files = {"tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode()}
    if vocabulary.model == "llama":
        return files | {"tokenizer.model": _sentencepiece_proto(vocabulary)}
    if vocabulary.pre not in _PRE_TOKENIZERS:
        raise ValueError(
            f"The file's tokenizer cuts texts by the rule {vocabulary.pre!r}, which is none of "
            f"{', '.join(_PRE_TOKENIZERS)}: put the checkpoint's tokenizer.json beside the file "
            "and give their folder."
        )
    kinds = {_CONTROL: True, _USER_DEFINED: False}
    added = [
        {
            "id": token,
            "content": tokens[token],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kinds[kind],
        }
        for token, kind in enumerate(vocabulary.types)
        if kind in kinds
    ]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _PRE_TOKENIZERS[vocabulary.pre],
        "post_processor": _front(vocabulary),
        "decoder": _GPT2_WORDS | {"add_prefix_space": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {text: token for token, text in enumerate(tokens)},
            "merges": vocabulary.merges,
            "byte_fallback": False,
            "ignore_merges": vocabulary.pre == "llama-bpe",
        },
    }
    return files | {"tokenizer.json": json.dumps(spec, ensure_ascii=False).encode()}


def _front(vocabulary: Vocabulary) -> dict[str, Any] | None:
    """The post-processor that puts bos in front of a text."""
    if not vocabulary.add_bos or "bos" not in vocabulary.special:
        return None
    token = vocabulary.special["bos"]
    text = vocabulary.tokens[token]
    bos = {"SpecialToken": {"id": text, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, bos, second],
        "special_tokens": {text: {"id": text, "ids": [token], "tokens": [text]}},
    }


def _sentencepiece_proto(vocabulary: Vocabulary) -> bytes:
    """A `tokenizer.model`: the protobuf messages of sentencepiece_model.proto."""
    # Joined at the end: `+=` would copy them all for each one, for Gemma's 262,144 over a minute.
    pieces = []
    for text, score, kind in zip(
        vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True
    ):
        piece = delimited(1, text.encode()) + float32(2, score) + integer(3, kind)
        pieces.append(delimited(1, piece))
    special = {"unknown": 40, "bos": 41, "eos": 42, "padding": 43}
    trainer = integer(3, 2)  # model_type: BPE
    trainer += integer(35, int(_BYTE in vocabulary.types))  # byte_fallback
    for role, field_number in special.items():
        trainer += integer(field_number, vocabulary.special.get(role, -1))
    normalizer = delimited(1, b"identity") + integer(3, int(vocabulary.add_space_prefix))
    normalizer += integer(4, 0)  # remove_extra_whitespaces
    return b"".join(pieces) + delimited(2, trainer) + delimited(3, normalizer)
