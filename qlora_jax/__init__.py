"""QLoRA in JAX: finetune large language models through a frozen 4-bit base.

    import qlora_jax as ql
    model, tokenizer = ql.load_pretrained("folder-or-hub-name", lora=ql.LoraConfig(r=64, alpha=16))
    tx = optax.chain(optax.clip_by_global_norm(0.3), ql.paged(optax.adamw(2e-4, b2=0.999)))

Dettmers, Pagnoni, Holtzman, Zettlemoyer: "QLoRA: Efficient Finetuning of Quantized LLMs",
NeurIPS 2023, arXiv 2305.14314.
"""

from qlora_jax.nn import FrozenParam, LoraConfig, QuantDense, add_lora, quantize_module
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
    "load_pretrained",
    "paged",
    "quantize",
    "quantize_module",
    "quantized_matmul",
]
