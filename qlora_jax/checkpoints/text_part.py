"""Adapters of a model that also sees, by the names that its text part has in it.

A Gemma 3 of 4B and up is read here as a text model, `model.layers.0…`, but in transformers, where
PEFT meets it, it is a larger one: `model.language_model.layers.0…`, beside an eye whose layers have
some of the same last names (`q_proj`). So an adapter of such a base is written for the larger
model, every adapted layer named in full, and names of the larger model are read as the text's.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qlora_jax.checkpoints.folder import open_safetensors
from qlora_jax.nn import LoraConfig

PREFIX = "base_model.model."
"""What leads every name in an adapter's file."""

# In transformers since 4.52, and before.
_PART = re.compile(r"^(model\.language_model\.|language_model\.model\.)")
_LISTS = ("target_modules", "exclude_modules", "modules_to_save")
_BY_NAME = ("rank_pattern", "alpha_pattern", "trainable_token_indices")


def text_name(name: str) -> str:
    """A module's or a tensor's name in the text model, from its name in either model."""
    return _PART.sub("model.", name).removeprefix("language_model.")


def whole_name(name: str) -> str:
    """Its name in the larger model, from its name in the text model; a head is beside the part."""
    return re.sub(r"^model\.", "model.language_model.", name)


def adapted_inside(weights: Path) -> list[str]:
    """The layers that an adapter's file has factors of, if any lies in a larger model's text part.

    Raises:
        ValueError: the file is damaged.
    """
    layers = adapted_in(weights)
    return layers if any(map(_PART.match, layers)) else []


def adapted_in(weights: Path) -> list[str]:
    """What an adapter's file has factors of, by PEFT's names without its prefix; raises as
    `adapted_inside`."""
    suffix = ".lora_A.weight"
    with open_safetensors(weights) as file:
        names = [name.removeprefix(PREFIX) for name in file.keys()]  # noqa: SIM118
    return [name.removesuffix(suffix) for name in names if name.endswith(suffix)]


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """An adapter_config.json with the names in its lists as the text model has them."""
    changed = dict(config)
    for field in _LISTS:
        if isinstance(config.get(field), list):
            changed[field] = [text_name(n) if isinstance(n, str) else n for n in config[field]]
    for field in _BY_NAME:
        if isinstance(config.get(field), dict):
            changed[field] = {text_name(name): value for name, value in config[field].items()}
    return changed


def whole_lora(lora: LoraConfig, modules: Iterable[str]) -> LoraConfig:
    """A configuration that means, in the larger model, the layers that `lora` means in the text.

    Args:
        lora: of the text model.
        modules: its adapted layers, by their names there.
    """
    own = {whole_name(name): at for name in modules if (at := lora.at(name)) is not None}
    saved = lora.modules_to_save
    return replace(
        lora,
        target_modules=tuple(own),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={name: at.r for name, at in own.items() if at.r != lora.r},
        alpha_pattern={name: at.alpha for name, at in own.items() if at.alpha != lora.alpha},
        modules_to_save=None if saved is None else tuple(map(whole_name, saved)),
    )
