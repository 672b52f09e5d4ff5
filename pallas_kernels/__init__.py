"""4-bit weights on arrays: dequantization and matmuls against packed codes, one folder per op.

Arrays in, arrays out; the names, bytes and block sizes are bitsandbytes'. `qlora_jax.quant` wraps
them into tensors with gradients.
"""

from pallas_kernels.codebooks import (
    BLOCKSIZES,
    CODEBOOKS,
    DYNAMIC_SIGNED,
    DYNAMIC_UNSIGNED,
    NESTED_BLOCKSIZE,
)
from pallas_kernels.nf4_dequantize.api import nf4_dequantize
from pallas_kernels.nf4_gemv.api import nf4_gemv
from pallas_kernels.nf4_matmul.api import nf4_matmul
from pallas_kernels.nf4_matmul_transposed.api import nf4_matmul_transposed

__all__ = [
    "BLOCKSIZES",
    "CODEBOOKS",
    "DYNAMIC_SIGNED",
    "DYNAMIC_UNSIGNED",
    "NESTED_BLOCKSIZE",
    "nf4_dequantize",
    "nf4_gemv",
    "nf4_matmul",
    "nf4_matmul_transposed",
]
