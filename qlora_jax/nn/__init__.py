"""Floor 2: what is a QLoRA layer? `QuantDense`, its adapters, and turning any module into one."""

from qlora_jax.nn.adapt import add_lora
from qlora_jax.nn.convert import quantize_module
from qlora_jax.nn.dense import QuantDense
from qlora_jax.nn.dense_general import QuantDenseGeneral
from qlora_jax.nn.linen import linen_quant_dense
from qlora_jax.nn.loftq import start_from_weight
from qlora_jax.nn.lora import LoraConfig
from qlora_jax.nn.merge import merge_lora
from qlora_jax.nn.settle import settle_adapters
from qlora_jax.nn.variables import FrozenParam, TrainedParam

__all__ = [
    "FrozenParam",
    "LoraConfig",
    "QuantDense",
    "QuantDenseGeneral",
    "TrainedParam",
    "add_lora",
    "linen_quant_dense",
    "merge_lora",
    "quantize_module",
    "settle_adapters",
    "start_from_weight",
]
