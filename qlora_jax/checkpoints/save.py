"""A dense model as a Hugging Face folder: config.json and model.safetensors."""

import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors needs)
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from qlora_jax.checkpoints.folder import SINGLE, replace_file
from qlora_jax.checkpoints.load import node_at
from qlora_jax.models import FAMILIES
from qlora_jax.nn import TrainedParam
from qlora_jax.quant import QuantizedTensor


def save_model(folder: str | Path, model: Any, *, dtype: Any = None) -> None:
    """Writes a dense model's base weights, for `load_model(folder, quant=None)` and transformers.

    Args:
        folder: made if missing; each file is put in place whole or not at all.
        model: with dense weights, frozen or trainable.
        dtype: of the weights in the file; None keeps each one's own.

    Raises:
        ValueError: the model is quantized, or has adapters, which this file format cannot hold.
    """
    adapters = nnx.All(nnx.LoRAParam, nnx.Not(TrainedParam))
    if jax.tree.leaves(nnx.state(model, adapters)):
        raise ValueError(
            "The model has adapters, which a model.safetensors cannot hold: save them with "
            "save_adapter, or build the model with lora=None."
        )
    family = FAMILIES[model.config.model_type]
    tensors: dict[str, np.ndarray] = {}
    for name, slot in family.weight_names(model.config).items():
        path = slot.path
        value = node_at(model, path).get_value()
        if isinstance(value, QuantizedTensor):
            raise ValueError(
                f"{'.'.join(path)} is quantized ({value.quant_type}), but only dense weights can "
                "be written: save the adapter alone with save_adapter, or load with quant=None."
            )
        array = value[slot.stack_index]
        tensors[name] = np.ascontiguousarray(
            np.asarray(array if dtype is None else array.astype(dtype))
        )
    stored = {str(array.dtype) for array in tensors.values()}
    config = family.write_config(model.config)
    config["torch_dtype"] = stored.pop() if len(stored) == 1 else "float32"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / SINGLE, lambda path: save_file(tensors, path, {"format": "pt"}))
    text = json.dumps(config, indent=2) + "\n"
    replace_file(folder / "config.json", lambda path: path.write_text(text))
