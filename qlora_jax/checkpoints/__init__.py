"""Floor 4: how do weights come and go? Hugging Face folders and PEFT adapters, in and out."""

from qlora_jax.checkpoints.adapter import load_adapter, read_adapter_config, save_adapter
from qlora_jax.checkpoints.checkpoint import Checkpoint, TensorInfo, cast, dequantized, quantized
from qlora_jax.checkpoints.folder import WeightFolder
from qlora_jax.checkpoints.load import linear_weights, load_model
from qlora_jax.checkpoints.merge import MODES, merge, merged
from qlora_jax.checkpoints.open import open_checkpoint
from qlora_jax.checkpoints.save import model_checkpoint, save_checkpoint, save_model

__all__ = [
    "MODES",
    "Checkpoint",
    "TensorInfo",
    "WeightFolder",
    "cast",
    "dequantized",
    "linear_weights",
    "load_adapter",
    "load_model",
    "merge",
    "merged",
    "model_checkpoint",
    "open_checkpoint",
    "quantized",
    "read_adapter_config",
    "save_adapter",
    "save_checkpoint",
    "save_model",
]
