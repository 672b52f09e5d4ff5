"""Floor 4: how do weights come and go? Hugging Face folders, 16-bit or in bitsandbytes' 4-bit
format, PEFT adapters and GGUF files, in and out."""

from qlora_jax.checkpoints.adapter import load_adapter, save_adapter
from qlora_jax.checkpoints.adapter_config import read_adapter_config
from qlora_jax.checkpoints.adapter_file import PeftAdapter, check_adapter, read_adapter
from qlora_jax.checkpoints.card import model_card
from qlora_jax.checkpoints.checkpoint import Checkpoint, TensorInfo, cast, dequantized, quantized
from qlora_jax.checkpoints.dense_modules import packable_weights
from qlora_jax.checkpoints.folder import WeightFolder
from qlora_jax.checkpoints.gguf import open_gguf, save_gguf
from qlora_jax.checkpoints.hub import push
from qlora_jax.checkpoints.load import load_model
from qlora_jax.checkpoints.matching import check_shapes, linear_weights
from qlora_jax.checkpoints.merge import MODES, merge, merged
from qlora_jax.checkpoints.open import open_checkpoint, refuse_adapter
from qlora_jax.checkpoints.save import model_checkpoint, save_checkpoint, save_model
from qlora_jax.checkpoints.tokenizer import checkpoint_tokenizer

__all__ = [
    "MODES",
    "Checkpoint",
    "PeftAdapter",
    "TensorInfo",
    "WeightFolder",
    "cast",
    "check_adapter",
    "check_shapes",
    "checkpoint_tokenizer",
    "dequantized",
    "linear_weights",
    "load_adapter",
    "load_model",
    "merge",
    "merged",
    "model_card",
    "model_checkpoint",
    "open_checkpoint",
    "open_gguf",
    "packable_weights",
    "push",
    "quantized",
    "read_adapter",
    "read_adapter_config",
    "refuse_adapter",
    "save_adapter",
    "save_checkpoint",
    "save_gguf",
    "save_model",
]
