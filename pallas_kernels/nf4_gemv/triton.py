"""`nf4_gemv` for NVIDIA cards: a program holds a few rows of W in flight and never a 16-bit weight.

One row of x against W is read-bound: 4.127 bits per weight against bf16's 16. The kernel therefore
spends as few instructions per weight as it can: the unscaled products of a run of 32 weights are
summed first, and the run's absmax multiplies the sum once. x stays in registers for all the rows of
a tile. Weights keep their float32 table values; nothing is rounded before the result.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int, UInt8

from pallas_kernels._arguments import Layout, LowRank, rows_of
from pallas_kernels._triton import (
    below,
    launch,
    load,
    load_columns,
    lora_operands,
    pack_pairs,
    rank_block,
    rank_of,
    read_tile,
    weight_operands,
)
from pallas_kernels._triton_config import RUN, TritonConfig
from pallas_kernels._triton_decoder import make_decoder, pair_product, pair_product_interpreted
from pallas_kernels.nf4_matmul.triton import nf4_matmul_triton


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
    runs = config.block_k // 2 // RUN
    row = pl.program_id(0) * config.block_n + jnp.arange(config.block_n)
    row_mask = below(row, n, config.block_n)
    tiles = pl.cdiv(k, config.block_k)
    ragged = k % config.block_k != 0

    def fetch(tile: Any) -> tuple[Array, Array]:
        return read_tile(
            codes_ref,
            scale_refs,
            row,
            tile,
            config.block_k,
            layout,
            row_mask,
            ragged=ragged,
        )

    # The first bytes are on their way while the decoder's table is filled.
    fetched = fetch(0)
    multiply = pair_product_interpreted if interpret else pair_product
    decode = make_decoder(config.decoder, table_ref, config.num_warps, interpret)

    def add_tile(tile: Any, fetched: tuple[Array, Array], sums: tuple[Array, ...]) -> Any:
        codes, scale = fetched
        pair = tile * (config.block_k // 2) + jnp.arange(config.block_k // 2)
        pair_mask = pair < k // 2 if ragged else None
        high, low = decode(codes)
        added = []
        for m in range(rows):
            x_row = jnp.full_like(pair, m)
            products = multiply(high, low, x_ref, x_row, pair, pair_mask, out_ref.dtype)
            by_run = products.reshape(config.block_n, runs, RUN).sum(axis=2)
            added.append(sums[m] + by_run * scale)
        return tuple(added)

    def step(tile: Any, carry: Any) -> Any:
        fetched, sums = carry
        # The next tile is on its way while this one is used.
        following = fetch(tile + 1)
        return following, add_tile(tile, fetched, sums)

    sums: tuple[Array, ...] = (jnp.zeros((config.block_n, runs), jnp.float32),) * rows
    if tiles > 1:
        fetched, sums = jax.lax.fori_loop(0, tiles - 1, step, (fetched, sums))
    sums = add_tile(tiles - 1, fetched, sums)
    bias = 0.0 if bias_ref is None else load(bias_ref, (row,), row_mask, 0.0).astype(jnp.float32)
    low = (0.0,) * rows if lora_refs is None else _low_rank(lora_refs, rank, rows, row, row_mask)
    for m in range(rows):
        result = (sums[m].sum(axis=1) + low[m] + bias).astype(out_ref.dtype)
        plgpu.store(out_ref.at[jnp.full_like(row, m), row], result, mask=row_mask)


def _low_rank(
    lora_refs: tuple[Any, Any], rank: int, rows: int, row: Array, row_mask: Array | None
) -> tuple[Any, ...]:
    """Per row of x: its xa · bᵀ for the program's rows of W, float32."""
    xa_ref, b_ref = lora_refs
    totals: list[Any] = [0.0] * rows
    width = rank_block(rank)
    for start in range(0, rank, width):
        column = start + jnp.arange(width)
        in_rank = below(column, rank, width)
        b = load_columns(b_ref, row, column, row_mask, in_rank).astype(jnp.float32)
        for m in range(rows):
            xa = load(xa_ref, (jnp.full_like(column, m), column), in_rank, 0.0)
            totals[m] += (b * xa.astype(jnp.float32)[None, :]).sum(axis=1)
    return tuple(totals)


@functools.partial(jax.jit, static_argnames=("layout", "config", "interpret"))
def nf4_gemv_triton(
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
    """x · Wᵀ + xa · bᵀ + bias for a few rows of x; the rows of W must be whole blocks. With a
    `layer`, W is that one of a stack.

    A `config` with block_m above 1 asks for `nf4_matmul`'s tensor-core tiles, padded to that many
    rows: from about five rows on the scalar products here cost more than reading the weight. So
    does one that is not `fused`.
    """
    if config.block_m > 1 or not config.fused:
        return nf4_matmul_triton(
            x,
            codes,
            absmax,
            nested_absmax,
            offset,
            bias,
            lora,
            layer,
            layout=layout,
            config=config,
            interpret=interpret,
        )
    rows, n = rows_of(x), layout.shape[0]
    weight, *scales_and_table = weight_operands(
        layout, codes, absmax, nested_absmax, offset, in_stack=layer is not None
    )
    kernel = functools.partial(
        _kernel,
        rows=rows,
        layout=layout,
        config=config,
        has_bias=bias is not None,
        rank=rank_of(lora),
        interpret=interpret,
    )
    out = launch(
        kernel,
        "nf4_gemv",
        (pl.cdiv(n, config.block_n),),
        jax.ShapeDtypeStruct((rows, n), x.dtype),
        config,
        interpret,
        pack_pairs(x.reshape(rows, -1)),
        weight,
        *(() if bias is None else (bias,)),
        *lora_operands(lora, rows),
        *scales_and_table,
        layer=layer,
    )
    return out.reshape(*x.shape[:-1], n)
