"""A PEFT adapter's folder, read into memory whole: its configuration and its tensors by name.

PEFT writes `base_model.model.<module>.<what>`, where `<module>` is a module's name in the Hugging
Face model. `<what>` is

    lora_A.weight, lora_B.weight                 [r, in], [out, r]
    lora_magnitude_vector                        [out], DoRA
    weight, bias                                 of a module that is saved whole
    bias, base_layer.bias                        a trained bias; the second of an adapted layer
    token_adapter.trainable_tokens_delta         [n, embed]: the rows of trained tokens

Adapters are small, so nothing is streamed here.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np

from qlora_jax.checkpoints.adapter_config import (
    CONFIG,
    WEIGHTS,
    config_from_json,
    read_config_json,
    without_weights,
)
from qlora_jax.checkpoints.checkpoint import DTYPES
from qlora_jax.checkpoints.folder import open_safetensors
from qlora_jax.checkpoints.text_part import PREFIX, text_name
from qlora_jax.nn import LoraConfig
from qlora_jax.nn.targets import ALSO_CALLED

TOKENS = "token_adapter.trainable_tokens_delta"
# With bias="all", PEFT saves the biases of a module to save three times: as the others, under the
# wrapper's name for the trained copy, and untrained, of the base. Inside of such a module the
# adapter's own name, such as "default", follows the wrapper's.
_COPY, UNUSED = re.compile(r"\.modules_to_save\.(?:[^.]+\.(?=[^.]+\.))?"), ".original_module."


def without_copy(name: str) -> str:
    """The name of a trained copy's tensor without the wrapper's."""
    return _COPY.sub(".", name)


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as PEFT stores it.

    Attributes:
        folder: where it lies.
        config: what it adapts, and how.
        tensors: by name, without PEFT's prefix; experts packed where the file packs them.
        token_ids: by module, the tokens whose rows it has trained.
        ties: whether a head that is tied to a trained embedding was trained with it.
        version: of the PEFT that wrote it; None where it does not tell.
    """

    folder: Path
    config: LoraConfig
    tensors: Mapping[str, np.ndarray]
    token_ids: Mapping[str, tuple[int, ...]]
    ties: bool
    version: str | None


def read_adapter(folder: str | Path) -> PeftAdapter:
    """Reads an adapter's folder.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        FileNotFoundError: one of the files is missing; a pickle in its place is not read.
        ValueError: the adapter is damaged, or asks for what is not supported here.
    """
    folder = Path(folder)
    raw = read_config_json(folder)
    config = config_from_json(raw, folder / CONFIG)
    with open_weights(folder) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    named = {
        without_copy(text_name(name.removeprefix(PREFIX))): tensor
        for name, tensor in tensors.items()
        if UNUSED not in name
    }
    return PeftAdapter(
        folder,
        config,
        named,
        token_indices(raw, named),
        bool(raw.get("ensure_weight_tying", False)),
        raw.get("peft_version"),
    )


def check_adapter(folder: str | Path) -> LoraConfig:
    """The configuration of an adapter whose tensors `read_adapter` would take; reads none of them.

    What to build a model with, where a damaged adapter is to be told before minutes of loading.

    Raises:
        FileNotFoundError, ValueError: as `read_adapter`.
    """
    folder = Path(folder)
    raw = read_config_json(folder)
    config = config_from_json(raw, folder / CONFIG)
    with open_weights(folder) as file:
        token_indices(raw, file.keys())  # raises where the ids are no numbers
    return config


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[Any]:
    """An adapter's tensors, checked but not read, as `safe_open` gives them.

    Raises:
        FileNotFoundError: there is no file, or a pickle in its place.
        ValueError: it is damaged, or holds what is not supported here.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}{without_weights(folder)}.")
    with open_safetensors(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        _check_tensors(
            path,
            {name: tuple(view.get_shape()) for name, view in views.items()},
            {name: view.get_dtype() for name, view in views.items()},
        )
        yield file


def _check_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> None:
    """Refuses what no adapter of linear layers can hold, before a number is read.

    Args:
        path: of the file.
        shapes: of its tensors by name.
        dtypes: safetensors' names for them.

    Raises:
        ValueError: there is no tensor, a factor is no matrix, or a tensor holds no 16- or 32-bit
            floats.
    """
    if not shapes:
        raise ValueError(f"{path} holds no tensor: fetch the adapter again.")
    for name, shape in shapes.items():
        if ".lora_embedding_" in name:
            raise ValueError(
                f"{path} holds {name!r}, but adapters of linear layers alone are read: merge it in "
                "PEFT, or train rows of the embedding (trainable_token_indices)."
            )
        if len(shape) != 2 and name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(
                f"{path}: {name!r} has shape {list(shape)}, but a matrix is needed: adapters of "
                "linear layers are read."
            )
        if dtypes[name] not in DTYPES:
            raise ValueError(
                f"{path}: {name!r} is stored as {dtypes[name]}, but {', '.join(DTYPES)} are read: "
                "save the adapter in one of them."
            )


def token_indices(raw: Mapping[str, Any], named: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The ids of the trained rows by module.

    Args:
        raw: adapter_config.json, which names a module by the end of its name, or gives one list for
            the input embedding, whatever its name.
        named: the tensors beside it, with or without PEFT's prefix.

    Returns:
        By the modules' whole names; what no tensor is there for, by the name that the file gives.
    """
    tokens = raw.get("trainable_token_indices") or {}
    plain = (text_name(name.removeprefix(PREFIX)) for name in named)
    modules = [name.removesuffix(f".{TOKENS}") for name in plain if name.endswith(f".{TOKENS}")]
    if not isinstance(tokens, dict):
        return dict.fromkeys(modules, tuple(map(int, tokens)))
    found: dict[str, tuple[int, ...]] = {}
    for end, ids in tokens.items():
        meant = [module for module in modules if f".{module}".endswith(f".{end}")]
        found |= dict.fromkeys(meant or [end], tuple(map(int, ids)))
    return found


def check_head_rows(folder: str | Path, named: Iterable[str], modules: Iterable[str]) -> None:
    """Refuses trained rows of GPT-NeoX's head under the name that only transformers 5 has for it,
    and such of T5's embedding that may be of its own head, too.

    Args:
        folder: the adapter's.
        named: its tensors, with or without PEFT's prefix.
        modules: of the base, as its files call them.

    Raises:
        ValueError: there are such rows.
    """
    plain, modules = {name.removeprefix(PREFIX) for name in named}, set(modules)
    head = f"lm_head.{TOKENS}" in plain
    if f"shared.{TOKENS}" in plain and not head and "lm_head" in modules:
        raise ValueError(
            f"{folder} has trained rows of 'shared', which PEFT takes for rows of 'lm_head' as "
            "well with transformers 5, though this base has a head of its own, and not with "
            "transformers 4: merge it in PEFT, with the version that trained it."
        )
    if head and "embed_out" in modules:
        raise ValueError(
            f"{folder} has trained rows of 'lm_head', as transformers 5 calls the head that this "
            "base's files call 'embed_out': train them in PEFT with transformers 4, or the whole "
            "head (modules_to_save)."
        )


def check_copies(folder: str | Path, named: Iterable[str]) -> None:
    """Refuses an adapter that trains whole one of the copies that transformers reads T5's embedding
    by, and not the other: PEFT's wrapper of one leaves the other as it was.

    Args:
        folder: the adapter's.
        named: its tensors, with or without PEFT's prefix.

    Raises:
        ValueError: it does.
    """
    plain = {without_copy(text_name(name.removeprefix(PREFIX))) for name in named}
    for module, others in ALSO_CALLED.items():
        trained = [other for other in others if f"{other}.weight" in plain]
        if trained and len(trained) < len(others):
            raise ValueError(
                f"{folder} trains {trained[0]!r} alone, one of the copies ({', '.join(others)}) of "
                f"what is one matrix here, {module!r}: use the adapter in PEFT."
            )
