"""QLoRA in JAX: finetune large language models through a frozen 4-bit base.

    import qlora_jax as ql
    model, tokenizer = ql.load_pretrained("folder-or-hub-name", lora=ql.LoraConfig(r=64, alpha=16))
    tx = optax.chain(optax.clip_by_global_norm(0.3), ql.paged(optax.adamw(2e-4, b2=0.999)))
    ql.plan.plan("llama-65b", "l40").device.total  # bytes on a card that need not be here

Dettmers, Pagnoni, Holtzman, Zettlemoyer: "QLoRA: Efficient Finetuning of Quantized LLMs",
NeurIPS 2023, arXiv 2305.14314.
"""

import importlib
from typing import Any

from qlora_jax.checkpoints import load_adapter, read_adapter_config, save_adapter
from qlora_jax.models import add_tokens, resize_token_embeddings, train_tokens
from qlora_jax.nn import (
    FrozenParam,
    LoraConfig,
    QuantDense,
    add_lora,
    merge_lora,
    quantize_module,
)
from qlora_jax.optim import paged
from qlora_jax.pretrained import load_pretrained
from qlora_jax.quant import QuantConfig, QuantizedTensor, quantize, quantized_matmul

__all__ = [
    "FrozenParam",
    "LoraConfig",
    "QuantConfig",
    "QuantDense",
    "QuantizedTensor",
    "add_lora",
    "add_tokens",
    "load_adapter",
    "load_pretrained",
    "merge_lora",
    "paged",
    "quantize",
    "quantize_module",
    "quantized_matmul",
    "read_adapter_config",
    "resize_token_embeddings",
    "save_adapter",
    "train_tokens",
]


def __getattr__(name: str) -> Any:
    """`ql.plan`, imported when it is asked for: it brings the trainer along, a second's work."""
    if name == "plan":
        return importlib.import_module("qlora_jax.plan")
    raise AttributeError(f"module 'qlora_jax' has no attribute {name!r}")
