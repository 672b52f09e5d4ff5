"""`nf4_matmul_transposed` for NVIDIA cards: as `nf4_matmul`, summed over W's rows instead.

The tile of W is decoded in the same orientation, [rows, columns], and multiplies from the right as
it is, so no transposed copy of the weight exists anywhere either.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, UInt8

from pallas_kernels._arguments import Layout, rows_of
from pallas_kernels._triton import (
    below,
    both,
    launch,
    load,
    read_tile,
    weight_operands,
    weight_tile,
)
from pallas_kernels._triton_config import TritonConfig
from pallas_kernels._triton_decoder import make_decoder
from pallas_kernels.nf4_dequantize.triton import nf4_dequantize_triton
from pallas_kernels.nf4_matmul_transposed.reference import matmul_transposed_dense


def _kernel(
    dy_ref: Any,
    codes_ref: Any,
    *refs: Any,
    rows: int,
    layout: Layout,
    config: TritonConfig,
    interpret: bool,
) -> None:
    *scale_refs, table_ref, out_ref = refs
    n, k = layout.shape
    m_index = pl.program_id(0) * config.block_m + jnp.arange(config.block_m)
    column_tile = pl.program_id(1)
    m_mask = below(m_index, rows, config.block_m)
    in_m = None if m_mask is None else m_mask[:, None]
    decode = make_decoder(config.decoder, table_ref, config.num_warps, interpret)

    def add_tile(tile: Any, total: Array) -> Array:
        row = tile * config.block_n + jnp.arange(config.block_n)
        row_mask = below(row, n, config.block_n)
        mask = both(in_m, None if row_mask is None else row_mask[None, :])
        if mask is not None:
            mask = jnp.broadcast_to(mask, (config.block_m, config.block_n))
        dy = load(dy_ref, (m_index[:, None], row[None, :]), mask, 0.0)
        codes, scale = read_tile(
            codes_ref,
            tuple(scale_refs),
            row,
            column_tile,
            config.block_k,
            layout,
            row_mask,
            ragged=k % config.block_k != 0,
        )
        w = weight_tile(codes, scale, decode, dy.dtype)
        precision = jax.lax.Precision.HIGHEST if dy.dtype == jnp.float32 else None
        return total + jnp.dot(dy, w, preferred_element_type=jnp.float32, precision=precision)

    total = jnp.zeros((config.block_m, config.block_k), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(n, config.block_n), add_tile, total)
    column = column_tile * config.block_k + jnp.arange(config.block_k)
    column_mask = below(column, k, config.block_k)
    mask = both(in_m, None if column_mask is None else column_mask[None, :])
    if mask is not None:
        mask = jnp.broadcast_to(mask, total.shape)
    where = (m_index[:, None], column[None, :])
    plgpu.store(out_ref.at[where], total.astype(out_ref.dtype), mask=mask)


@functools.partial(jax.jit, static_argnames=("layout", "config", "interpret"))
def nf4_matmul_transposed_triton(
    dy: Float[Array, "*batch n"],
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, " blocks"] | Float32[Array, " blocks"],
    nested_absmax: Float32[Array, " nested"] | None,
    offset: Float32[Array, ""] | None,
    *,
    layout: Layout,
    config: TritonConfig,
    interpret: bool = False,
) -> Float[Array, "*batch k"]:
    """dy · W; the rows of W must be whole blocks."""
    if not config.fused:
        dense = nf4_dequantize_triton(
            codes,
            absmax,
            nested_absmax,
            offset,
            layout=layout,
            dtype=dy.dtype,
            config=config,
            interpret=interpret,
        )
        return matmul_transposed_dense(dy, dense, dy.dtype)
    rows, k = rows_of(dy), layout.shape[1]
    kernel = functools.partial(
        _kernel, rows=rows, layout=layout, config=config, interpret=interpret
    )
    out = launch(
        kernel,
        "nf4_matmul_transposed",
        (pl.cdiv(rows, config.block_m), pl.cdiv(k, config.block_k)),
        jax.ShapeDtypeStruct((rows, k), dy.dtype),
        config,
        interpret,
        dy.reshape(rows, -1),
        *weight_operands(layout, codes, absmax, nested_absmax, offset),
    )
    return out.reshape(*dy.shape[:-1], k)
