"""Which module does a name mean? PEFT's rules, so that one configuration adapts the same layers.

A path is a module's dotted name in its model ("model.layers.0.self_attn.q_proj"). A list holds
names, each of which means the paths that are it or end in ".name"; a text is a regular expression
that has to match a whole path. Patterns for ranks and alphas match the end of a path.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

Names = tuple[str, ...] | str
Number = TypeVar("Number", int, float)

ALL_LINEAR = "all-linear"
ALSO_CALLED = {
    "embed_out": ("lm_head",),
    "shared": ("encoder.embed_tokens", "decoder.embed_tokens"),
}
"""Modules that transformers has under other names than files do: GPT-NeoX's head (in version 5) and
T5's embedding, which computes nothing under its own."""
# What scores: not part of "all-linear" (PEFT asks the model for its output embeddings).
_HEADS = frozenset({"lm_head", "embed_out", "classifier", "score", "qa_outputs"})


def check_expression(name: str, text: str, *, part: bool = False) -> None:
    """ValueError where a field's text is no regular expression, or cannot be `part` of one (as
    flags cannot)."""
    try:
        re.compile(text)
        if part:
            re.compile(f"({text})")
    except re.error as error:
        raise ValueError(
            f"{name} has {text!r}, which is no regular expression ({error})"
        ) from error


def named(names: Names, path: str) -> bool:
    """Whether a list of names, or a regular expression, means the module at a path."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def inside(names: Names, path: str) -> bool:
    """Whether the module at a path is one that a list names, or lies inside of one."""
    return any(f".{name}." in f".{path}." for name in names)


def saved(names: Names, path: str) -> bool:
    """Whether `modules_to_save` means the module at a path, or one that it lies inside of.

    PEFT asks only that a path end in the name: "norm" means "input_layernorm", too.
    """
    paths = (path, *ALSO_CALLED.get(path, ()))
    return any(f"{name}." in f"{path}." for name in names for path in paths)


def targeted(
    names: Names, path: str, layers: tuple[int, ...] | int | None, pattern: Names | None
) -> bool:
    """Whether `target_modules` means the layer at a path.

    Args:
        names: `target_modules`.
        path: of a linear layer.
        layers: `layers_to_transform`: the numbers of the layers that are meant; None for all. A
            layer that `names` has by its whole path is meant whatever its number.
        pattern: `layers_pattern`: the lists those numbers count in; None for the first number that
            follows two names.
    """
    every = names == ALL_LINEAR
    found = not _HEADS.intersection(path.split(".")) if every else named(names, path)
    whole = not isinstance(names, str) and path in names
    if layers is None or whole or not found:
        return found
    lists = [rf"(?:^|.*?\.){name}" for name in pattern] if pattern else [r".*?\.[^.]*"]
    matches = (re.match(rf"{part}\.(\d+)\.", path) for part in lists)
    number = next((match for match in matches if match), None)
    chosen = (layers,) if isinstance(layers, int) else layers
    return number is not None and int(number.group(1)) in chosen


def by_pattern(pattern: Mapping[str, Number], path: str, default: Number) -> Number:
    """The value of the first pattern that matches the end of a path, or the default."""
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)
