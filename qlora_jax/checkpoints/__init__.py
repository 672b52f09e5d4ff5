"""Floor 4: how do weights come and go? Hugging Face folders and PEFT adapters, in and out."""

from qlora_jax.checkpoints.adapter import load_adapter, save_adapter
from qlora_jax.checkpoints.adapter_config import read_adapter_config
from qlora_jax.checkpoints.adapter_file import PeftAdapter, read_adapter
from qlora_jax.checkpoints.folder import WeightFolder
from qlora_jax.checkpoints.load import load_model
from qlora_jax.checkpoints.save import save_model

__all__ = [
    "PeftAdapter",
    "WeightFolder",
    "load_adapter",
    "load_model",
    "read_adapter",
    "read_adapter_config",
    "save_adapter",
    "save_model",
]
