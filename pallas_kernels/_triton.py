"""What the Triton-lowered Pallas kernels share: masked loads, scales, pairs of weights.

A kernel sees a packed weight as rows of bytes. A run of 16 bytes (one vector load of one thread)
holds 32 weights, and because every block size is a multiple of 32 and blocks start at multiples of
it, all 32 share one absmax: scales are decoded once per run, never per weight.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from pallas_kernels._arguments import Layout, LowRank
from pallas_kernels._decode import add_unfused
from pallas_kernels._sharding_types import varying_as
from pallas_kernels._stack import InStack, reading_layer
from pallas_kernels._triton_config import RUN, TritonConfig
from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED, NESTED_BLOCKSIZE


def launch(
    kernel: Callable[..., None],
    name: str,
    grid: tuple[int, ...],
    out: jax.ShapeDtypeStruct,
    config: TritonConfig,
    interpret: bool,
    *operands: Array | InStack,
    layer: Array | None = None,
) -> Array:
    """Run `kernel` over `grid` through Pallas' Triton lowering; every ref is a whole array, or the
    `layer` of one that is `InStack`."""
    if layer is not None:
        kernel, operands = reading_layer(kernel, layer, operands)
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=varying_as(operands)),
        grid=grid,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        name=name,
    )(*operands)


def weight_operands(
    layout: Layout,
    codes: Array,
    absmax: Array,
    nested_absmax: Array | None,
    offset: Array | None,
    *,
    in_stack: bool = False,
) -> tuple[Any, ...]:
    """What a kernel reads of a weight, or of one in a stack: bytes, scales as `load_scales` wants
    them, code table."""
    stack = absmax.shape[:-1]
    parts = [codes, absmax]
    if len(layout.shape) == 2 and layout.shape[1] % 2 == 0:
        parts[0] = codes.reshape(*stack, layout.shape[0], -1)
    tables = [jnp.asarray(CODEBOOKS[layout.quant_type])]
    if nested_absmax is not None and offset is not None:
        parts += [nested_absmax, offset.reshape(*stack, 1)]
        tables.insert(0, jnp.asarray(DYNAMIC_SIGNED))
    return (*map(InStack, parts), *tables) if in_stack else (*parts, *tables)


def rank_of(lora: LowRank | None) -> int:
    """The rank of an adapter's (xa, b); 0 for none."""
    return 0 if lora is None else lora[1].shape[1]


def rank_block(rank: int) -> int:
    """Columns of an adapter that a kernel takes at once: what a tensor core can, 64 at most."""
    return min(max(16, pl.next_power_of_2(rank)), 64)


def lora_operands(lora: LowRank | None, rows: int) -> tuple[Array, ...]:
    """What a kernel reads of an adapter: xa [rows, r] and b [n, r], or nothing."""
    return () if lora is None else (lora[0].reshape(rows, -1), lora[1])


def load(ref: Any, index: tuple[Any, ...], mask: Array | None = None, other: Any = 0) -> Array:
    """ref[index], with `other` where `mask` is False; all of `index` are arrays."""
    if mask is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=mask, other=other)


def load_columns(
    ref: Any, row: Array, column: Array, row_mask: Array | None, column_mask: Array | None
) -> Array:
    """ref[row, column] as a tile, with 0 where a mask is False."""
    mask = both(
        None if row_mask is None else row_mask[:, None],
        None if column_mask is None else column_mask[None, :],
    )
    if mask is not None:
        mask = jnp.broadcast_to(mask, (row.size, column.size))
    return load(ref, (row[:, None], column[None, :]), mask, 0.0)


def load_scales(scale_refs: tuple[Any, ...], block: Array, mask: Array | None) -> Array:
    """float32 absmax of the blocks numbered `block`, both levels of quantization undone; else 0."""
    if len(scale_refs) == 1:
        return load(scale_refs[0], (block,), mask, 0.0)
    codes_ref, nested_ref, offset_ref, map_ref = scale_refs
    code = load(codes_ref, (block,), mask).astype(jnp.int32)
    nested = load(nested_ref, (divide(block, NESTED_BLOCKSIZE),), mask, 0.0)
    scale = add_unfused(load(map_ref, (code,)) * nested, offset_ref[0])
    return scale if mask is None else jnp.where(mask, scale, 0.0)


def divide(index: Array, power_of_two: int) -> Array:
    """index // power_of_two for index >= 0, as a shift: `//` also provides for negative numbers."""
    return index >> (power_of_two.bit_length() - 1)


def both(*masks: Array | None) -> Array | None:
    """The conjunction of masks that broadcast; None means everything."""
    given = [m for m in masks if m is not None]
    if not given:
        return None
    shape = jnp.broadcast_shapes(*(m.shape for m in given))
    result = jnp.broadcast_to(given[0], shape)
    for mask in given[1:]:
        result = result & jnp.broadcast_to(mask, shape)
    return result


def below(index: Array, limit: int, block: int) -> Array | None:
    """index < limit, or None where whole blocks of `block` make it always true."""
    return None if limit % block == 0 else index < limit


def pack_pairs(x: Array) -> Array:
    """x[rows, k] with two neighbours in one element: a free view for 16-bit x, [rows, k/2] uint32.

    float32 becomes [rows, k/2, 2].
    """
    pairs = x.reshape(x.shape[0], x.shape[1] // 2, 2)
    return pairs if x.dtype == jnp.float32 else jax.lax.bitcast_convert_type(pairs, jnp.uint32)


def join_pairs(even: Array, odd: Array) -> Array:
    """[..., 2k] with `even` and `odd` alternating, in registers."""
    *batch, half = even.shape
    joined = jnp.concatenate([even[..., None], odd[..., None]], axis=-1)
    return joined.reshape(*batch, 2 * half)


def read_tile(
    codes_ref: Any,
    scale_refs: tuple[Any, ...],
    row: Array,
    tile: Array | int,
    block_k: int,
    layout: Layout,
    row_mask: Array | None,
    *,
    ragged: bool,
) -> tuple[Array, Array]:
    """Codes and scales of the tile-th `block_k` columns of W's rows `row`.

    `ragged` says that the tile may reach beyond W's last column, `row_mask` which rows are W's;
    outside of W both results are 0.

    Returns:
        bytes [rows, block_k / 2], and float32 scales [rows, block_k / 32], one per run.
    """
    _, k = layout.shape
    rows, width = row.shape[0], block_k // 2
    runs = width // RUN
    byte = tile * width + jnp.arange(width)
    run = tile * runs + jnp.arange(runs)
    byte_mask, run_mask = (byte < k // 2, run < k // 2 // RUN) if ragged else (None, None)
    in_rows = None if row_mask is None else row_mask[:, None]
    mask = both(in_rows, None if byte_mask is None else byte_mask[None, :])
    scale_mask = both(in_rows, None if run_mask is None else run_mask[None, :])
    if mask is not None and scale_mask is not None:
        mask = jnp.broadcast_to(mask, (rows, width))
        scale_mask = jnp.broadcast_to(scale_mask, (rows, runs))
    codes = load(codes_ref, (row[:, None], byte[None, :]), mask)
    in_row = divide(run, layout.blocksize // (2 * RUN))
    block = row[:, None] * (k // layout.blocksize) + in_row[None, :]
    return codes, load_scales(scale_refs, block, scale_mask)


def weight_tile(
    codes: Array, scale: Array, decode: Callable[[Array], tuple[Array, Array]], dtype: Any
) -> Array:
    """What `read_tile` read, as weights [rows, block_k] in `dtype`, rounded once."""
    rows, runs = scale.shape
    by_byte = jnp.broadcast_to(scale[:, :, None], (rows, runs, RUN)).reshape(codes.shape)
    high, low = decode(codes)
    return join_pairs((high * by_byte).astype(dtype), (low * by_byte).astype(dtype))
