"""`nf4_matmul` for NVIDIA cards: W's tile is decoded beside the tensor cores, never in memory.

A program owns a tile of the result. Along k it decodes a tile of W once into x's dtype (the very
values of the reference) and multiplies all its rows of x with it, so the cost of decoding is shared
by `block_m` rows. With `split_k` several programs share a result tile and leave float32 partial
sums, which are added afterwards: for few rows, where one program per tile leaves the card idle.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int, UInt8

from pallas_kernels._arguments import Layout, LowRank, rows_of
from pallas_kernels._stack import layer_of
from pallas_kernels._triton import (
    below,
    both,
    launch,
    load,
    load_columns,
    lora_operands,
    rank_block,
    rank_of,
    read_tile,
    weight_operands,
    weight_tile,
)
from pallas_kernels._triton_config import TritonConfig
from pallas_kernels._triton_decoder import make_decoder
from pallas_kernels.nf4_dequantize.triton import nf4_dequantize_triton
from pallas_kernels.nf4_matmul.reference import matmul_dense, product


def _kernel(
    x_ref: Any,
    codes_ref: Any,
    *refs: Any,
    rows: int,
    layout: Layout,
    config: TritonConfig,
    has_bias: bool,
    rank: int,
    interpret: bool,
) -> None:
    *others, table_ref, out_ref = refs
    bias_ref = others.pop(0) if has_bias else None
    lora_refs = (others.pop(0), others.pop(0)) if rank else None
    scale_refs = tuple(others)
    n, k = layout.shape
    m_index = pl.program_id(0) * config.block_m + jnp.arange(config.block_m)
    row = pl.program_id(1) * config.block_n + jnp.arange(config.block_n)
    part = pl.program_id(2)
    m_mask, row_mask = below(m_index, rows, config.block_m), below(row, n, config.block_n)
    in_m = None if m_mask is None else m_mask[:, None]
    decode = make_decoder(config.decoder, table_ref, config.num_warps, interpret)
    tiles = pl.cdiv(pl.cdiv(k, config.block_k), config.split_k)
    # Programs of a split may start beyond k: their tiles read nothing and add zero.
    reach = config.block_k * (1 if config.split_k == 1 else tiles * config.split_k)

    def add_tile(tile: Any, total: Array) -> Array:
        here = part * tiles + tile
        column = here * config.block_k + jnp.arange(config.block_k)
        in_k = None if k % reach == 0 else (column < k)[None, :]
        mask = both(in_m, in_k)
        if mask is not None:
            mask = jnp.broadcast_to(mask, (config.block_m, config.block_k))
        x = load(x_ref, (m_index[:, None], column[None, :]), mask, 0.0)
        codes, scale = read_tile(
            codes_ref,
            scale_refs,
            row,
            here,
            config.block_k,
            layout,
            row_mask,
            ragged=k % reach != 0,
        )
        return total + _dot(x, weight_tile(codes, scale, decode, x.dtype))

    total = jnp.zeros((config.block_m, config.block_n), jnp.float32)
    if lora_refs is not None:
        # Once, however many programs share the tile.
        first = None if config.split_k == 1 else jnp.full_like(m_index, part) == 0
        total = _low_rank(lora_refs, rank, m_index, row, both(m_mask, first), row_mask)
    total = jax.lax.fori_loop(0, tiles, add_tile, total)
    if bias_ref is not None:
        total = total + load(bias_ref, (row,), row_mask, 0.0).astype(jnp.float32)[None, :]
    mask = both(in_m, None if row_mask is None else row_mask[None, :])
    if mask is not None:
        mask = jnp.broadcast_to(mask, total.shape)
    where: tuple[Array, ...] = (m_index[:, None], row[None, :])
    if config.split_k > 1:
        where = (jnp.full_like(where[0], part), *where)
    plgpu.store(out_ref.at[where], total.astype(out_ref.dtype), mask=mask)


def _low_rank(
    lora_refs: tuple[Any, Any],
    rank: int,
    m_index: Array,
    row: Array,
    m_mask: Array | None,
    row_mask: Array | None,
) -> Array:
    """The tile of xa · bᵀ in float32; zero where `m_mask` is False."""
    xa_ref, b_ref = lora_refs
    total = jnp.zeros((m_index.size, row.size), jnp.float32)
    width = rank_block(rank)
    for start in range(0, rank, width):
        column = start + jnp.arange(width)
        in_rank = below(column, rank, width)
        xa = load_columns(xa_ref, m_index, column, m_mask, in_rank)
        total += _dot(xa, load_columns(b_ref, row, column, row_mask, in_rank))
    return total


def _dot(x: Array, w: Array) -> Array:
    """x · wᵀ in float32, on the tensor cores."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(x, w.T, preferred_element_type=jnp.float32, precision=precision)


@functools.partial(jax.jit, static_argnames=("layout", "config", "interpret"))
def nf4_matmul_triton(
    x: Float[Array, "*batch k"],
    codes: UInt8[Array, "..."],
    absmax: UInt8[Array, "*stack blocks"] | Float32[Array, "*stack blocks"],
    nested_absmax: Float32[Array, "*stack nested"] | None,
    offset: Float32[Array, "*stack"] | None,
    bias: Float[Array, " n"] | None,
    lora: LowRank | None = None,
    layer: Int[Array, ""] | None = None,
    *,
    layout: Layout,
    config: TritonConfig,
    interpret: bool = False,
) -> Float[Array, "*batch n"]:
    """x · Wᵀ + xa · bᵀ + bias; the rows of W must be whole blocks. With a `layer`, W is that one of
    a stack."""
    if not config.fused:
        if layer is not None:
            weight = layer_of(layer, codes, absmax, nested_absmax, offset)
            codes, absmax, nested_absmax, offset = weight
        dense = nf4_dequantize_triton(
            codes,
            absmax,
            nested_absmax,
            offset,
            layout=layout,
            dtype=x.dtype,
            config=config,
            interpret=interpret,
        )
        if bias is None and lora is None:
            # A GPU's product sums in float32 within a tile whatever it returns; asked for float32,
            # it leaves the rounding to one more kernel, as often as not (docs/kernels.md).
            return product(x, dense, x.dtype)
        return matmul_dense(x, dense, bias, lora)
    rows, n = rows_of(x), layout.shape[0]
    split = config.split_k > 1
    fused_bias = None if split else bias
    weight, *scales_and_table = weight_operands(
        layout, codes, absmax, nested_absmax, offset, in_stack=layer is not None
    )
    kernel = functools.partial(
        _kernel,
        rows=rows,
        layout=layout,
        config=config,
        has_bias=fused_bias is not None,
        rank=rank_of(lora),
        interpret=interpret,
    )
    out_shape = (config.split_k, rows, n) if split else (rows, n)
    out = launch(
        kernel,
        "nf4_matmul",
        (pl.cdiv(rows, config.block_m), pl.cdiv(n, config.block_n), config.split_k),
        jax.ShapeDtypeStruct(out_shape, jnp.float32 if split else x.dtype),
        config,
        interpret,
        x.reshape(rows, -1),
        weight,
        *(() if fused_bias is None else (fused_bias,)),
        *lora_operands(lora, rows),
        *scales_and_table,
        layer=layer,
    )
    if split:
        out = out.sum(axis=0)
        if bias is not None:
            out = out + bias.astype(jnp.float32)
    return out.astype(x.dtype).reshape(*x.shape[:-1], n)
