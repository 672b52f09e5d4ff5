"""Trees of options: how YAML and `--set key=value` become frozen dataclasses, and back.

A tree is what YAML gives: mappings, lists, plain values. Dataclasses say what may stand in it, by
their fields and annotations; so every option of a library's own configuration can be set in a file
under its own name, without being listed a second time.

Everything a file says is checked before anything runs: a key that does not exist is refused with
the nearest one that does, a value of the wrong kind with what was expected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import functools
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import yaml

Tree = dict[str, Any]


# --------------------------------------------------------------------------- reading


def read_yaml(path: Path) -> Tree:
    """The tree of a YAML file; ValueError where it is not one."""
    try:
        tree = from_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        nearby = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(nearby)}" if nearby else ""
        raise FileNotFoundError(f"the configuration file {path} does not exist{hint}.") from None
    except IsADirectoryError:
        files = ", ".join(sorted(str(file) for file in path.glob("*.yaml"))) or "a YAML file"
        raise ValueError(
            f"{path} is a folder, but a configuration is a file: give {files}."
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error.reason}).") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{path} should hold keys and values, but holds a {_kind(tree)}.")
    return tree


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a section: YAML would keep the last and lose the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {name} stands twice in one section", key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def from_yaml(text: str, where: str) -> Any:
    """What a YAML text says; ValueError names `where` it stands if it is none."""
    try:
        return yaml.load(text, _Loader)
    # A date without such a day is a ValueError, brackets in many brackets a RecursionError.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid YAML: {' '.join(str(error).split())}.") from error


def parse_setting(text: str, flag: str = "--set") -> tuple[str, Any]:
    """`"train.learning_rate=1e-3"` as its dotted key and its value, read as YAML.

    `flag` is what gave it, for the message of a ValueError.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"{flag} {text!r} should read key=value, as in train.learning_rate=1e-3.")
    return key.strip(), from_yaml(value, f"the value of {flag} {text!r}")


def with_setting(tree: Tree, key: str, value: Any) -> Tree:
    """A copy of the tree with a dotted key set; what was no section on the way becomes one."""
    head, _, rest = key.partition(".")
    if not rest:
        return {**tree, head: value}
    below = tree.get(head)
    return {**tree, head: with_setting(below if isinstance(below, dict) else {}, rest, value)}


def merged(base: Tree, over: Mapping[str, Any]) -> Tree:
    """A copy of `base` in which `over` wins; sections are merged, all else is replaced."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, Mapping)
        result[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def convert(value: Any, kind: Any, key: str, where: str) -> Any:
    """A value out of YAML as the annotated type `kind`; ValueError says what was expected."""
    if dataclasses.is_dataclass(kind):
        return _convert_section(value, kind, key, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _dtype(value, key, where) if key.endswith("dtype") else value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert_union(value, arguments, key, where)
    if origin is Literal:
        if value in arguments:
            return arguments[arguments.index(value)]
        choices = ", ".join(map(str, arguments))
        raise ValueError(f"{key} in {where} is {value!r}, but should be one of {choices}.")
    if origin is Mapping:
        if isinstance(value, Mapping):
            return {str(k): convert(v, arguments[1], f"{key}.{k}", where) for k, v in value.items()}
        raise _wrong(value, "a section of names and values", key, where)
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(convert(item, arguments[0], key, where) for item in value)
        raise _wrong(value, "a list", key, where)
    return _convert_plain(value, kind, key, where)


_KINDS = ((int, "a whole number"), (float, "a number"), (bool, "true or false"), (str, "text"))


def _convert_plain(value: Any, kind: Any, key: str, where: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is str and isinstance(value, datetime.date):
        return value.isoformat()  # as it was written, before YAML read it
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in (int, float) and not isinstance(value, bool):
        # YAML 1.1 reads 1e-3 as text, and 1e4 is a number of steps as people write it.
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is not None and kind is float:
            return number
        if number is not None and number.is_integer():
            return value if isinstance(value, int) else int(number)
    expected = next((name for known, name in _KINDS if kind is known), str(kind))
    raise _wrong(value, expected, key, where)


def _convert_union(value: Any, kinds: tuple[Any, ...], key: str, where: str) -> Any:
    optional = type(None) in kinds
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    exact = [kind for kind in kinds if isinstance(kind, type) and type(value) is kind]
    errors = []
    for kind in [*exact, *kinds]:
        try:
            return convert(value, kind, key, where)
        except ValueError as error:
            errors.append(error)
    if optional and value in ("none", "None"):
        raise ValueError(f"{key} in {where} is {value!r}: in YAML that is null.")
    literals = [kind for kind in kinds[1:] if typing.get_origin(kind) is Literal]
    if literals:
        words = ", ".join(str(word) for kind in literals for word in typing.get_args(kind))
        raise ValueError(f"{str(errors[0]).removesuffix('.')} or {words}.")
    raise errors[0]


def _convert_section(value: Any, kind: Any, key: str, where: str) -> Any:
    if dataclasses.is_dataclass(value):
        return value
    if not isinstance(value, Mapping):
        raise _wrong(value, f"a section ({', '.join(option_names(kind))})", key, where)
    hints = type_hints(kind)
    for name in value:
        if name not in hints:
            raise unknown_key(str(name), option_names(kind), key, where)
    options = {
        name: convert(item, hints[name], f"{key}.{name}" if key else name, where)
        for name, item in value.items()
    }
    try:
        return kind(**options)
    except ValueError as error:
        raise ValueError(f"{key or 'the configuration'} in {where}: {error}") from error
    except TypeError as error:
        missing = [
            f.name
            for f in dataclasses.fields(kind)
            if f.name not in value
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if not missing:
            raise
        raise ValueError(
            f"{key} in {where} needs {', '.join(missing)}, which it does not give."
        ) from error


USUAL_NAMES = {
    "lora.r": ("r", "rank", "lora_r", "lora_rank"),
    "lora.alpha": ("alpha", "lora_alpha"),
    "lora.lora_dropout": ("dropout", "lora_dropout"),
    "train.steps": ("steps", "max_steps", "epochs", "num_epochs", "num_train_epochs"),
    "train.learning_rate": ("lr", "learning_rate"),
    "train.micro_batch_size": ("batch", "batch_size", "per_device_train_batch_size"),
    "train.max_grad_norm": ("clip", "grad_clip", "max_grad_norm"),
    "train.eval_every": ("eval_steps",),
    "train.patience": ("early_stopping_patience", "early_stopping"),
    "train.keep_best": ("load_best_model_at_end", "save_best"),
    "train.save_every": ("save_steps",),
    "train.log_every": ("logging_steps",),
    "train.seed": ("seed",),
    "quant.quant_type": ("bits", "quant_type"),
    "model.remat": ("gradient_checkpointing",),
}
"""Options by what people and other libraries call them, where the letters alone would not tell."""


def unknown_key(name: str, known: list[str], section: str, where: str) -> ValueError:
    """The refusal of a key that does not exist, naming the nearest that does."""
    prefix = f"{section}." if section else ""
    meant = [o for o, names in USUAL_NAMES.items() if name in names and o.startswith(prefix)]
    near = [prefix + option for option in difflib.get_close_matches(name, known, n=1, cutoff=0.5)]
    nearest = f"the nearest is {[*meant, *near][0]}, and " if meant or near else ""
    listed = ", ".join(prefix + option for option in known)
    return ValueError(f"there is no option {prefix}{name} ({where}); {nearest}there are {listed}.")


@functools.cache
def type_hints(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields that can be set, as types."""
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in dataclasses.fields(kind) if f.init}


def option_names(kind: Any) -> list[str]:
    """The names of a dataclass's options."""
    return list(type_hints(kind))


def _dtype(value: Any, key: str, where: str) -> Any:
    # NumPy takes nothing for float64, and a list for a record.
    with contextlib.suppress(TypeError):
        if isinstance(value, str):
            return jnp.dtype(value)
    raise _wrong(value, "a dtype such as float32 or bfloat16", key, where)


def _wrong(value: Any, expected: str, key: str, where: str) -> ValueError:
    shown = value if isinstance(value, str | int | float | bool | None) else _kind(value)
    return ValueError(f"{key} in {where} is {shown!r}, but should be {expected}.")


def _kind(value: Any) -> str:
    names = {"dict": "section", "str": "text", "NoneType": "empty value"}
    return names.get(type(value).__name__, type(value).__name__)


# --------------------------------------------------------------------------- writing


def to_tree(config: Any) -> Any:
    """A dataclass tree as plain YAML values; `build_run(to_tree(run))` is the run again."""
    if dataclasses.is_dataclass(config):
        fields = (f.name for f in dataclasses.fields(config) if f.init)
        return {name: to_tree(getattr(config, name)) for name in fields}
    if isinstance(config, Mapping):
        return {str(key): to_tree(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [to_tree(item) for item in config]
    if isinstance(config, bool | int | float | str) or config is None:
        return config
    if isinstance(config, Path):
        return str(config)
    return jnp.dtype(config).name


def to_yaml(config: Any) -> str:
    """A configuration as a YAML file's text."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree as dotted keys: what two configurations are compared by."""
    if isinstance(tree, dict) and tree:
        items = (flat(value, f"{prefix}{key}.") for key, value in tree.items())
        return {key: value for part in items for key, value in part.items()}
    return {prefix.removesuffix("."): tree}


def differences(one: Any, other: Any) -> list[str]:
    """What two configurations differ in, as `"lora.r: 8, was 16"`."""
    now, was = flat(to_tree(one)), flat(to_tree(other))
    return [
        f"{key}: {now.get(key, 'absent')}, was {was.get(key, 'absent')}"
        for key in dict.fromkeys([*now, *was])
        if now.get(key, "absent") != was.get(key, "absent")
    ]
