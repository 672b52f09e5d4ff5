"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT names a tensor `base_model.model.<module>.lora_A.weight`, where `<module>` is the adapted
linear layer's name in the Hugging Face model, so an adapter trained here loads there and the
reverse. Only what a decoder here can apply is read; anything else in a config is refused rather
than left out.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints.folder import read_json, replace_file
from qlora_jax.checkpoints.load import node_at
from qlora_jax.models import FAMILIES
from qlora_jax.nn import LoraConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Switches of PEFT's that change what an adapter computes, and that a decoder here does not know.
_UNSUPPORTED = (
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)


class _Adapted(NamedTuple):
    """One adapted linear layer of the tree."""

    path: str
    modules: list[str]  # its Hugging Face names, one for each layer of the stack
    lora: LoraConfig
    lora_A: nnx.LoRAParam
    lora_B: nnx.LoRAParam


def _adapted(model: Any) -> Iterator[_Adapted]:
    names: dict[tuple[str, ...], list[str]] = {}
    family = FAMILIES[model.config.model_type]
    for name, slot in family.weight_names(model.config).items():
        if slot.path[-1] == "kernel":
            names.setdefault(slot.path[:-1], []).append(name.removesuffix(".weight"))
    for path, modules in names.items():
        layer = node_at(model, path)
        if layer.lora is not None:
            yield _Adapted(".".join(path), modules, layer.lora, layer.lora_A, layer.lora_B)


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """The `LoraConfig` of a saved adapter: what to build a model with before `load_adapter`.

    Raises:
        FileNotFoundError: there is no adapter_config.json.
        ValueError: it asks for what is not supported here, or is no LoRA.
    """
    path = Path(folder) / CONFIG
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{path} has peft_type {config.get('peft_type')!r}, but only 'LORA' adapters are read."
        )
    unsupported = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        name = unsupported[0]
        raise ValueError(
            f"{path} sets {name} to {config[name]!r}, which is not supported here: use an adapter "
            "trained without it."
        )
    targets = config.get("target_modules") or "all-linear"
    return LoraConfig(
        r=int(config["r"]),
        alpha=config["lora_alpha"],
        lora_dropout=float(config.get("lora_dropout", 0.0)),
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(config.get("use_rslora", False)),
    )


def save_adapter(folder: str | Path, model: Any, lora_config: LoraConfig, base_name: str) -> None:
    """Writes a model's adapters for PEFT, in the dtype they have here.

    Args:
        folder: made if missing; both files are put in place whole or not at all.
        model: with adapters.
        lora_config: what they were built with.
        base_name: the base model's name or folder, as PEFT should find it.

    Raises:
        ValueError: the model has no adapters.
    """
    tensors: dict[str, np.ndarray] = {}
    targets = set()
    for layer in _adapted(model):
        a, b = np.asarray(layer.lora_A.get_value()), np.asarray(layer.lora_B.get_value())
        for index, module in enumerate(layer.modules):
            targets.add(module.rpartition(".")[2])
            tensors[f"{_PREFIX}{module}.lora_A.weight"] = np.ascontiguousarray(a[index])
            tensors[f"{_PREFIX}{module}.lora_B.weight"] = np.ascontiguousarray(b[index])
    if not tensors:
        raise ValueError("The model has no adapters to save: build or load it with a LoraConfig.")
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": lora_config.alpha,
        "lora_dropout": lora_config.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora_config.r,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora_config.use_rslora,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS, lambda path: save_file(tensors, path, {"format": "pt"}))
    replace_file(folder / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))


def load_adapter(folder: str | Path, model: Any) -> None:
    """Puts a PEFT adapter's numbers into a model's adapters, in place.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        model: built with a LoraConfig of the same rank, scaling and targets
            (`read_adapter_config(folder)` gives it).

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: the adapter is damaged, or does not fit the model: another rank, scaling, other
            modules or another base.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    if not (folder / WEIGHTS).is_file():
        pickle = folder / "adapter_model.bin"
        hint = (
            f"; {pickle.name} is a pickle and never read here: load it once in PEFT and save it "
            "with `safe_serialization=True`"
            if pickle.is_file()
            else ": give the folder that PEFT's save_pretrained wrote"
        )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}{hint}.")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS} is truncated or no safetensors file ({error}): fetch it again."
        ) from error
    replacements: list[tuple[nnx.LoRAParam, np.ndarray]] = []
    for layer in _adapted(model):
        if layer.lora.scaling != config.scaling:
            raise ValueError(
                f"{folder} scales its adapters by {config.scaling:g} and the model by "
                f"{layer.lora.scaling:g}: build the model with read_adapter_config(folder)."
            )
        for name in ("lora_A", "lora_B"):
            keys = [f"{_PREFIX}{module}.{name}.weight" for module in layer.modules]
            absent = [key for key in keys if key not in tensors]
            if absent:
                raise ValueError(
                    f"{folder} lacks {absent[0]!r}, but the model adapts {layer.path}: build the "
                    "model with read_adapter_config(folder)."
                )
            stack = np.stack([tensors.pop(key) for key in keys])
            variable = getattr(layer, name)
            if stack.shape != variable.get_value().shape:
                raise ValueError(
                    f"{folder}: {keys[0]!r} has shape {list(stack.shape[1:])}, but the model's is "
                    f"{list(variable.get_value().shape[1:])}: the adapter was trained with another "
                    "rank or on another base model."
                )
            replacements.append((variable, stack))
    if tensors:
        raise ValueError(
            f"{folder} holds {sorted(tensors)[0]!r} (and {len(tensors) - 1} more) that the model "
            "does not adapt: build it with read_adapter_config(folder), on the adapter's own base."
        )
    for variable, stack in replacements:
        variable.set_value(jnp.asarray(stack, variable.get_value().dtype))
