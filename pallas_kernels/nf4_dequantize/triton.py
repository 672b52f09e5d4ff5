"""`nf4_dequantize` for NVIDIA cards: a stream over the flat bytes, whatever the weight's shape.

Blocks are runs of the flattened weight, so the kernel never looks at rows, and blocks that cross
rows, a short last block and an odd number of elements cost nothing but a mask.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels._arguments import Layout
from pallas_kernels._triton import (
    below,
    divide,
    join_pairs,
    launch,
    load,
    load_scales,
    weight_operands,
)
from pallas_kernels._triton_config import RUN, TritonConfig
from pallas_kernels._triton_decoder import make_decoder


def _kernel(
    codes_ref: Any, *refs: Any, layout: Layout, config: TritonConfig, interpret: bool
) -> None:
    *scale_refs, table_ref, out_ref = refs
    width, runs = config.block_k // 2, config.block_k // 2 // RUN
    decode = make_decoder(config.decoder, table_ref, config.num_warps, interpret)
    tile = pl.program_id(0)
    byte = tile * width + jnp.arange(width)
    run = tile * runs + jnp.arange(runs)
    element = tile * config.block_k + jnp.arange(config.block_k)
    codes = load(codes_ref, (byte,), below(byte, layout.nbytes, width))
    block = divide(run, layout.blocksize // (2 * RUN))
    in_blocks = None if layout.size % config.block_k == 0 else block < layout.blocks
    scale = load_scales(tuple(scale_refs), block, in_blocks)
    scale = jnp.broadcast_to(scale[:, None], (runs, RUN)).reshape(width)
    high, low = decode(codes)
    weight = join_pairs((high * scale).astype(out_ref.dtype), (low * scale).astype(out_ref.dtype))
    plgpu.store(out_ref.at[element], weight, mask=below(element, layout.size, config.block_k))


@functools.partial(jax.jit, static_argnames=("layout", "config", "interpret", "dtype"))
def nf4_dequantize_triton(
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    *,
    layout: Layout,
    dtype: DTypeLike,
    config: TritonConfig,
    interpret: bool = False,
) -> Float[Array, "..."]:
    """The weight itself, of any shape and any 4-bit type; `block_k` elements per program."""
    operands = weight_operands(layout, codes, absmax, nested_absmax, offset)
    out = launch(
        functools.partial(_kernel, layout=layout, config=config, interpret=interpret),
        "nf4_dequantize",
        (pl.cdiv(layout.size, config.block_k),),
        jax.ShapeDtypeStruct((layout.size,), jnp.dtype(dtype)),
        config,
        interpret,
        operands[0].reshape(-1),
        *operands[1:],
    )
    return out.reshape(layout.shape)
