"""Floor 1: what is a 4-bit tensor? Quantization, dequantization, and the product through it."""

from qlora_jax.quant.config import QuantConfig
from qlora_jax.quant.matmul import quantized_matmul
from qlora_jax.quant.quantize import quantize
from qlora_jax.quant.tensor import QuantizedTensor

__all__ = ["QuantConfig", "QuantizedTensor", "quantize", "quantized_matmul"]
