"""QLoRA in JAX: finetune large language models through a frozen 4-bit base.

    import qlora_jax as ql
    model, tokenizer = ql.load_pretrained("folder-or-hub-name", lora=ql.LoraConfig(r=64, alpha=16))
    tx = optax.chain(optax.clip_by_global_norm(0.3), ql.paged(optax.adamw(2e-4, b2=0.999)))
    ql.plan.plan("llama-65b", "l40").device.total  # bytes on a card that need not be here

Dettmers, Pagnoni, Holtzman, Zettlemoyer: "QLoRA: Efficient Finetuning of Quantized LLMs",
NeurIPS 2023, arXiv 2305.14314.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from qlora_jax.checkpoints import load_adapter, read_adapter_config, save_adapter, save_model
from qlora_jax.models import add_tokens, resize_token_embeddings, train_tokens
from qlora_jax.nn import (
    FrozenParam,
    LoraConfig,
    QuantDense,
    QuantDenseGeneral,
    add_lora,
    merge_lora,
    quantize_module,
)
from qlora_jax.optim import paged, resting_shardings
from qlora_jax.pretrained import load_pretrained
from qlora_jax.quant import QuantConfig, QuantizedTensor, quantize, quantized_matmul

if TYPE_CHECKING:
    from qlora_jax import plan
    from qlora_jax.train import TrainConfig, fit

__version__ = importlib.metadata.version("qlora-jax")

__all__ = [
    "FrozenParam",
    "LoraConfig",
    "QuantConfig",
    "QuantDense",
    "QuantDenseGeneral",
    "QuantizedTensor",
    "TrainConfig",
    "add_lora",
    "add_tokens",
    "fit",
    "load_adapter",
    "load_pretrained",
    "merge_lora",
    "paged",
    "plan",
    "quantize",
    "quantize_module",
    "quantized_matmul",
    "read_adapter_config",
    "resize_token_embeddings",
    "resting_shardings",
    "save_adapter",
    "save_model",
    "train_tokens",
]

# Imported when they are asked for: they bring the trainer along, a second's work.
_LATE = ("TrainConfig", "fit")


def __getattr__(name: str) -> Any:
    if name == "plan":
        return importlib.import_module("qlora_jax.plan")
    if name in _LATE:
        return getattr(importlib.import_module("qlora_jax.train"), name)
    raise AttributeError(f"module 'qlora_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
