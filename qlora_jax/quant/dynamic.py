"""8-bit block-wise quantization with the dynamic maps: how an 8-bit optimizer keeps its state.

Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861): a block of
256 numbers shares one absmax, and each of them is the nearest of 256 values that lie densely near
zero. The signed map holds numbers of either sign, the unsigned one numbers that are never negative
and gives them its whole range.

Unlike a `QuantizedTensor`, which is frozen, such a tensor is read, changed and written at every
step, so its codes keep the tensor's own shape: a mesh shards them as it shards the parameter.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.codebooks import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from qlora_jax.quant.blockwise import encode_dynamic, quantize_blocks


def quantize_dynamic(
    x: Float[Array, "*shape"], *, signed: bool, blocksize: int = 256
) -> tuple[Array, Float32[Array, " blocks"]]:
    """Codes and scales of a tensor.

    Args:
        x: at least one element, any shape; blocks are runs of its row-major order.
        signed: which map; with the unsigned one, negative numbers become 0.
        blocksize: numbers to a block; the last may be shorter.

    Returns:
        Codes, uint8 in x's shape, and absmax, float32 [ceil(x.size / blocksize)].
    """
    table = DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED
    codes, absmax = quantize_blocks(
        x.reshape(-1), blocksize, functools.partial(encode_dynamic, table=table)
    )
    return codes.reshape(x.shape), absmax


def dequantize_dynamic(
    codes: Any, absmax: Any, *, signed: bool, blocksize: int = 256
) -> Float32[Array, "*shape"]:
    """The numbers that `quantize_dynamic`'s codes stand for: table[code] · absmax, float32.

    Args:
        codes: uint8, any shape.
        absmax: float32 [ceil(codes.size / blocksize)].
        signed, blocksize: as they were quantized.
    """
    table = jnp.asarray(DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED)
    values = table[codes].reshape(-1)
    padding = math.ceil(values.size / blocksize) * blocksize - values.size
    blocks = jnp.pad(values, (0, padding)).reshape(-1, blocksize) * absmax[:, None]
    return blocks.reshape(-1)[: values.size].reshape(codes.shape)
