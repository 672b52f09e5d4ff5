"""JSON files: the small ones of a model's folder, an object each, and those with one on a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give a Hugging Face model folder, whole, with its {path.name}."
        )
    return parse_json(path.read_bytes(), path)


def parse_json(content: bytes, file: str | Path) -> dict[str, Any]:
    """The JSON object in a file's content; raises ValueError as `read_json` does."""
    try:
        value = json.loads(content.decode())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): fetch it again.") from error
    if not isinstance(value, dict):
        held = "null" if value is None else f"a JSON {type(value).__name__}"
        raise ValueError(f"{file} holds {held}, but an object is needed: fetch it again.")
    return value


def read_json_if_any(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a folder may lack, and {} where it does; raises ValueError as
    `read_json` does."""
    return read_json(path) if path.is_file() else {}


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file that has one on each line, and the lines' numbers from 1; empty
    lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line holds none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}).") from error
    yield from parse_json_lines(text, path)


def parse_json_lines(text: str, file: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The JSON objects of a file's content; raises ValueError as `read_json_lines` does."""
    # Not by splitlines: JSON may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(
                f"{file}, line {number} holds a JSON {type(row).__name__}, but an object is needed."
            )
        yield number, row
