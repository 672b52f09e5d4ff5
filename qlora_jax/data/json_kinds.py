"""Of what kind a field of a JSON file has to be, and the sentence that refuses another."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Kind = tuple[str, Callable[[Any], bool]]
"""What is needed, in words, and the test of it."""


def is_whole(value: Any) -> bool:
    """A whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_id(value: Any) -> bool:
    """A whole number that an int32 holds, as token ids are."""
    return is_whole(value) and abs(value) < 2**31


def is_real(value: Any) -> bool:
    """A finite number (JSON's 1e999 is infinite to Python)."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def is_text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def is_object(value: Any) -> bool:
    """An object, of anything."""
    return isinstance(value, dict)


def listed(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The test of a list whose entries all pass `test`."""
    return lambda value: isinstance(value, list) and all(test(entry) for entry in value)


IDS: Kind = (
    "a token id or a list of them",
    lambda value: is_id(value) or listed(is_id)(value),
)
"""What ends a text."""


def check_kinds(fields: Mapping[str, Any], kinds: Mapping[str, Kind], file: str | Path) -> None:
    """Checks the fields of a file's object that `kinds` names; null is as absent.

    Raises:
        ValueError: one is of another kind.
    """
    for name in kinds.keys() & fields.keys():
        wanted, test = kinds[name]
        if fields[name] is not None and not test(fields[name]):
            raise ValueError(
                f"{file} has {name} {fields[name]!r}, but {wanted} is needed: take the "
                f"{Path(file).name} of the checkpoint."
            )
