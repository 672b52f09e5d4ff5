"""4-bit weights on arrays: dequantization and matmuls against packed codes, one folder per op.

Arrays in, arrays out; the names, bytes and block sizes are bitsandbytes'. `qlora_jax.quant` wraps
them into tensors with gradients.
"""

from pallas_kernels._arguments import Layout, LowRank
from pallas_kernels._mesh import mesh_of_rows
from pallas_kernels._sharding_types import (
    axes_of,
    in_auto_axes,
    product_spec,
    rows_as_cut,
    spec_entries,
    vary_alike,
)
from pallas_kernels._stack import layer_of
from pallas_kernels._triton_config import TritonConfig
from pallas_kernels.candidates import configs_to_try
from pallas_kernels.cards import CARDS, Card, find_card
from pallas_kernels.codebooks import (
    BLOCKSIZES,
    CODEBOOKS,
    DYNAMIC_SIGNED,
    DYNAMIC_UNSIGNED,
    NESTED_BLOCKSIZE,
)
from pallas_kernels.dispatch import Choice, which_implementation
from pallas_kernels.nf4_dequantize.api import nf4_dequantize
from pallas_kernels.nf4_gemv.api import nf4_gemv
from pallas_kernels.nf4_gemv.mosaic_plan import GemvConfig
from pallas_kernels.nf4_matmul.api import nf4_matmul, reads_layers
from pallas_kernels.nf4_matmul.mosaic_plan import MatmulConfig
from pallas_kernels.nf4_matmul_transposed.api import nf4_matmul_transposed

__all__ = [
    "BLOCKSIZES",
    "CARDS",
    "CODEBOOKS",
    "DYNAMIC_SIGNED",
    "DYNAMIC_UNSIGNED",
    "NESTED_BLOCKSIZE",
    "Card",
    "Choice",
    "GemvConfig",
    "Layout",
    "LowRank",
    "MatmulConfig",
    "TritonConfig",
    "axes_of",
    "configs_to_try",
    "find_card",
    "in_auto_axes",
    "layer_of",
    "mesh_of_rows",
    "nf4_dequantize",
    "nf4_gemv",
    "nf4_matmul",
    "nf4_matmul_transposed",
    "product_spec",
    "reads_layers",
    "rows_as_cut",
    "spec_entries",
    "vary_alike",
    "which_implementation",
]
