"""Fields of a dataclass of options, refused by name where they hold another kind of value."""

import dataclasses
import types
import typing
from numbers import Integral, Real
from typing import Any

import numpy as np


def check_numbers(config: Any) -> None:
    """Refuse in a field declared as a number or a truth value (or None) what is none.

    NumPy's are taken, too. A truth value is a number to Python, and a slip here.

    Raises:
        ValueError: naming field and value.
    """
    for field in dataclasses.fields(config):
        value, kinds = getattr(config, field.name), {*(typing.get_args(field.type) or [field.type])}
        if not kinds <= {int, float, bool, types.NoneType} or type(value) in kinds:
            continue
        flag = isinstance(value, bool | np.bool_)
        if bool in kinds:
            right, wanted = flag, "a truth value, True or False"
        elif float in kinds:
            # YAML reads 2e-4, without a point, as a text.
            right, wanted = isinstance(value, Real) and not flag, "a number, such as 2.0e-4"
        else:
            right, wanted = isinstance(value, Integral) and not flag, "a whole number"
        if not right:
            raise ValueError(f"{field.name}={value!r} must be {wanted}.")


def as_tuple(config: Any, name: str, kind: type, wanted: str) -> tuple:
    """What a field holds, one or several of a kind, as a tuple.

    Raises:
        ValueError: naming field and value, where it holds anything else.
    """
    value = getattr(config, name)
    try:
        parts = (value,) if isinstance(value, kind) else tuple(value)
    except TypeError:
        parts = (None,)
    if not all(isinstance(part, kind) and not isinstance(part, bool) for part in parts):
        raise ValueError(f"{name}={value!r} must be {wanted}, one or several.")
    return parts
