"""The JSON files beside a vocabulary: which tokens are special, and what a chat looks like."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.data.json_file import parse_json
from qlora_jax.data.json_kinds import Kind, check_kinds, is_flag, is_id, is_text, listed

_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def is_token(value: Any) -> bool:
    """A token's text, or the object that transformers writes of one."""
    return is_text(value) or (isinstance(value, dict) and is_text(value.get("content")))


def _is_decoder(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return all(key.isdecimal() and isinstance(t, dict) and is_token(t) for key, t in value.items())


def _is_template(value: Any) -> bool:
    return is_text(value) or listed(
        lambda one: (
            isinstance(one, dict) and is_text(one.get("name")) and is_text(one.get("template"))
        )
    )(value)


_TOKEN_ID: Kind = ("a token id", lambda value: is_id(value) and value >= 0)
_TOKEN: Kind = ("a token", is_token)
_KINDS: dict[str, Kind] = {
    **{f"{role}_token": _TOKEN for role in ("bos", "eos", "pad", "unk", "cls", "sep", "mask")},
    "additional_special_tokens": ("a list of tokens", listed(is_token)),
    "added_tokens_decoder": ("an object of token ids and tokens", _is_decoder),
    "add_bos_token": ("true or false", is_flag),
    "chat_template": ("a template or a list of named ones", _is_template),
}


def read_token_files(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """tokenizer_config.json, special_tokens_map.json and added_tokens.json of a folder; {} for one
    that is not there.

    Raises:
        ValueError: one is damaged, or a field is of a kind that it cannot be of.
    """
    paths = (folder / name for name in _FILES)
    return parse_token_files({p.name: p.read_bytes() for p in paths if p.is_file()}, folder)


def parse_token_files(
    files: Mapping[str, bytes], folder: Path = Path()
) -> tuple[dict[str, Any], dict[str, Any], dict[str, int]]:
    """The same of files by name, whose folder is for messages."""
    config, token_map, added = (
        parse_json(files.get(name, b"{}"), folder / name) for name in _FILES
    )
    for name, fields in ((_FILES[0], config), (_FILES[1], token_map)):
        check_kinds(fields, _KINDS, folder / name)
    added = {token: id_ for token, id_ in added.items() if id_ is not None}
    check_kinds(added, dict.fromkeys(added, _TOKEN_ID), folder / _FILES[2])
    return config, token_map, added
