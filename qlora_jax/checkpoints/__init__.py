"""Floor 4: how do weights come and go? Hugging Face folders and PEFT adapters, in and out."""

from qlora_jax.checkpoints.adapter import load_adapter, read_adapter_config, save_adapter
from qlora_jax.checkpoints.folder import WeightFolder
from qlora_jax.checkpoints.load import load_model
from qlora_jax.checkpoints.save import save_model

__all__ = [
    "WeightFolder",
    "load_adapter",
    "load_model",
    "read_adapter_config",
    "save_adapter",
    "save_model",
]
