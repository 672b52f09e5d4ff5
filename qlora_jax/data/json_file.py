"""The small JSON files of a model's folder: configurations and maps, an object each."""

import json
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
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, but an object is needed.")
    return value


def read_json_if_any(path: Path) -> dict[str, Any]:
    """The JSON object in a file that a folder may lack, and {} where it does; raises ValueError as
    `read_json` does."""
    return read_json(path) if path.is_file() else {}
