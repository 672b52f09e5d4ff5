"""Floor 1: what is a 4-bit tensor? Quantization, dequantization, and the product through it; and
the 8-bit blocks in which optimizers keep their state."""

from qlora_jax.quant.config import QuantConfig
from qlora_jax.quant.dynamic import dequantize_dynamic, quantize_dynamic
from qlora_jax.quant.low_rank import low_rank_product
from qlora_jax.quant.matmul import PRODUCT, quantized_matmul
from qlora_jax.quant.quantize import quantize
from qlora_jax.quant.rows import (
    PIECE,
    append_rows,
    mean_row,
    put_rows,
    row_config,
    rows_at_once,
    take_rows,
)
from qlora_jax.quant.scores import row_scores
from qlora_jax.quant.tensor import QuantizedTensor

__all__ = [
    "PIECE",
    "PRODUCT",
    "QuantConfig",
    "QuantizedTensor",
    "append_rows",
    "dequantize_dynamic",
    "low_rank_product",
    "mean_row",
    "put_rows",
    "quantize",
    "quantize_dynamic",
    "quantized_matmul",
    "row_config",
    "row_scores",
    "rows_at_once",
    "take_rows",
]
