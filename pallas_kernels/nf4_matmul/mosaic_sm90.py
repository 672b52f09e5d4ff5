"""x · Wᵀ for many rows on Hopper: weights decoded in registers while the tensor cores work.

The product is computed transposed, yᵀ = W · xᵀ, because `wgmma` takes its *left* operand from
registers: a warpgroup decodes 64 rows × 64 columns of W, one quantization block a row, straight
into the fragment that the instruction reads, and multiplies it with 256 rows of x. No 16-bit weight
is ever in memory, shared or global.

- A block of threads has two warpgroups that compute and one that feeds them, several steps ahead
  (`mosaic_ring`): tiles of x and of codes through the copy engine (TMA), and scales, which it
  decodes. 64 rows × 256 rows of x per warpgroup: its `wgmma`s take 512 clocks a step, in which it
  decodes the next step's weights, and the two warpgroups take turns.
- Codes do not come directly from global memory, because a load takes the path to the first-level
  cache for as many clocks as it touches lines, and that path brings `wgmma` its tiles of x
  (docs/kernel_limits.md). The reference's table is float32, the kernel's float16 (unless
  `config.wide`): here a weight has been rounded once more, to 11 bits.
- An adapter is more of the same sum: xa · bᵀ is r / 64 steps with tiles of xa in place of x's and
  fragments of b, which need no decoding, in place of W's. They come first, while W's first codes
  are on their way.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels._arguments import Layout, LowRank
from pallas_kernels._mosaic import BLOCK, call, check_mosaic, filled_up
from pallas_kernels.nf4_matmul.mosaic_lanes import (
    find_weights,
    load_group,
    load_low_rank,
    read_codes,
    scale_weights,
    store_sums,
)
from pallas_kernels.nf4_matmul.mosaic_plan import (
    COMPUTE,
    COMPUTING_REGISTERS,
    FEEDING_REGISTERS,
    MatmulConfig,
    Plan,
    check_shared_memory,
    choose_config,
    place,
)
from pallas_kernels.nf4_matmul.mosaic_ring import (
    SCALE_WORDS,
    Lanes,
    feed,
    free_slot,
    load_offset,
    multiply_steps,
    pass_scales,
    ring_kernel,
)
from pallas_kernels.nf4_matmul.mosaic_table import fill_table, tables_of
from pallas_kernels.nf4_matmul.mosaic_team import multiply_in_teams
from pallas_kernels.nf4_matmul.reference import complete
from pallas_kernels.simt import arrays

ARRIVALS = 4
"""What makes a slot of the ring full: a tile of x, two of codes, and the scales."""


def nf4_matmul_mosaic(
    x: Array,
    codes: Array,
    absmax: Array,
    nested_absmax: Array | None,
    offset: Array | None,
    bias: Array | None,
    lora: LowRank | None = None,
    *,
    layout: Layout,
    config: MatmulConfig | None = None,
) -> Array:
    """`nf4_matmul` on Hopper. x: [..., k] bfloat16 or float16; see `nf4_matmul`.

    Raises:
        ValueError: what this kernel does not do, and which argument asks for it.
    """
    n, k = layout.shape
    rows = math.prod(x.shape[:-1])
    check_mosaic("nf4_matmul", rows, layout, x.dtype)
    config = config or choose_config(rows)
    check_shared_memory(config)
    weight = (codes, absmax, nested_absmax, offset)
    if config.team:
        return multiply_in_teams(x, *weight, bias, lora, layout=layout, config=config)
    if config.split == 1:
        return _call(x, *weight, bias, lora, layout, config).reshape(*x.shape[:-1], n)
    if k // BLOCK % config.split:
        raise ValueError(
            f"config.split is {config.split}; expected a divisor of {k // BLOCK}, the blocks of 64 "
            f"in a row of a weight of shape {layout.shape}"
        )
    if 4 * config.split * rows * n >= 1 << 32:
        raise ValueError(
            f"config.split is {config.split}, for {rows} rows of {n}; expected less than 4 GiB of "
            "float32 parts: split less"
        )
    parts = _call(x, *weight, None, None, layout, config)
    total = parts.reshape(config.split, *x.shape[:-1], n).sum(axis=0)
    return complete(total, bias, lora, x.dtype)


def _call(
    x: Array,
    codes: Array,
    absmax: Array,
    nested_absmax: Array | None,
    offset: Array | None,
    bias: Array | None,
    lora: LowRank | None,
    layout: Layout,
    config: MatmulConfig,
) -> Array:
    """The kernel's result, [rows, n] in x's dtype, or the parts of its sums, [split · rows, n]."""
    n, k = layout.shape
    x = x.reshape(-1, k)
    unused = jnp.zeros((1,), jnp.float32)
    low: tuple[Array, ...] = ()
    if lora is not None:
        low = filled_up(lora[0].reshape(len(x), -1), 8, BLOCK), filled_up(lora[1], 1, BLOCK)
    plan = Plan(
        m=len(x),
        n=n,
        k=k,
        dtype=str(x.dtype),
        double_quant=layout.double_quant,
        has_bias=bias is not None,
        config=config,
        rank=low[1].shape[1] if low else 0,
    )
    return call(
        _kernel(plan),
        # The copy engine's tiles are 8 rows high; rows beyond an array's end read as zeros.
        filled_up(x, 8),
        *low,
        # A row of this is an even row of W, and the odd one behind it.
        codes.reshape(n // 2, k),
        absmax,
        unused if nested_absmax is None else nested_absmax,
        unused if offset is None else offset.reshape(1),
        unused if bias is None else bias.astype(jnp.float32),
        jnp.asarray(tables_of(config, layout.quant_type)),
    )


def _kernel(plan: Plan):
    cfg = plan.config
    dtype = jnp.dtype(plan.dtype)
    code_swizzle = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(32))
    fragment = plgpu.ShapeDtypeStruct((64, BLOCK), dtype, plgpu.Layout.WGMMA)
    all_steps = plan.low_steps + plan.steps

    def body(x, *refs):
        *low, codes, absmax, nested, offset, bias, tables, out = refs[:-6]
        table, x_tiles, code_tiles, scale_tiles, full, empty = refs[-6:]
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        count = (plan.work - 1 - cta) // plan.grid + 1

        arrays.run(lambda m, t: fill_table(m, cfg, t), table, [tables])

        def here(index):
            """Of this block's `index`-th tile: its first row of x and of W, the part of its sum."""
            return place(cfg, plan.tiles, cta + index * plan.grid)

        @pl.when(wg == COMPUTE)
        def _feed():
            plgpu.set_max_registers(FEEDING_REGISTERS, action="decrease")
            mean = arrays.run(
                lambda m, o: load_offset(m, plan, o), table, [offset], arrays.words_type(4)
            )

            def copy_rows(source, token, step, slot):
                plgpu.copy_gmem_to_smem(
                    source.at[pl.ds(token, cfg.rows), pl.ds(step * BLOCK, BLOCK)],
                    x_tiles.at[slot],
                    full.at[slot],
                )

            def one_tile(index, carry):
                token, column, part = here(index)
                base = index * all_steps

                def fill_low(step, carry):
                    slot = free_slot(cfg, empty, base + step)
                    copy_rows(low[0], token, step, slot)
                    for _ in range(ARRIVALS - 1):
                        plgpu.barrier_arrive(full.at[slot])
                    return carry

                def load(step):
                    return arrays.run(
                        lambda m, r, s, a, e: load_group(m, plan, r, s, a, e),
                        table,
                        [column, part * plan.steps + step, absmax, nested],
                        arrays.words_type(SCALE_WORDS),
                    )

                def fill(step, raw, i):
                    slot = free_slot(cfg, empty, base + plan.low_steps + step)
                    here_k = part * plan.steps + step
                    copy_rows(x, token, here_k, slot)
                    for h in (0, 1):
                        byte = h * (plan.k // 2) + here_k * (BLOCK // 2)
                        plgpu.copy_gmem_to_smem(
                            codes.at[pl.ds(column // 2, BLOCK), pl.ds(byte, BLOCK // 2)],
                            code_tiles.at[slot, h],
                            full.at[slot],
                        )
                    pass_scales(plan, table, i, raw, mean, scale_tiles.at[slot], full.at[slot])

                if low:
                    lax.fori_loop(0, plan.low_steps, fill_low, None)
                feed(plan.steps, load, fill)
                return carry

            lax.fori_loop(0, count, one_tile, None)

        @pl.when(wg < COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")

            def read(slot):
                return arrays.run(
                    lambda m, w, e, o: read_codes(m, plan, w, e, o),
                    table,
                    [wg, *(arrays.Tile(code_tiles.at[slot, h], code_swizzle) for h in (0, 1))],
                    arrays.words_type(16),
                )

            def find(slot, held):
                return arrays.run(
                    lambda m, w, c, s: find_weights(m, plan, w, c, s),
                    table,
                    [wg, held, arrays.Tile(scale_tiles.at[slot])],
                    arrays.words_type(20),
                )

            def scale(found):
                return arrays.run(lambda m, f: scale_weights(m, plan, f), table, [found], fragment)

            def load_low(first_row, step):
                return arrays.run(
                    lambda m, r, s, b: load_low_rank(m, plan, r, s, b),
                    table,
                    [first_row, step, low[1]],
                    fragment,
                )

            def one_tile(index, carry):
                token, column, part = here(index)
                first_row = column + wg * 64
                base = index * all_steps

                def accumulate(acc):
                    def low_rank(step, carry):
                        weights = load_low(first_row, step)
                        slot = lax.rem(base + step, cfg.stages)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, weights, x_tiles.at[slot].transpose((1, 0)))
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])
                        return carry

                    if low:
                        lax.fori_loop(0, plan.low_steps, low_rank, None)
                    ring = (acc, x_tiles, full, empty, Lanes(read, find, scale))
                    multiply_steps(cfg, plan.steps, base + plan.low_steps, *ring)
                    return acc[...]

                sums = pl.run_scoped(accumulate, plgpu.ACC((64, cfg.rows), jnp.float32))
                arrays.run(
                    lambda m, s, r, t, b, o, *p: store_sums(m, plan, s, r, t, b, o, *p),
                    table,
                    [sums, first_row, token, bias, out, *([part] if cfg.split > 1 else [])],
                )
                return carry

            lax.fori_loop(0, count, one_tile, None)

    body.__name__ = "nf4_matmul"
    return ring_kernel(
        body,
        jax.ShapeDtypeStruct(
            (cfg.split * plan.m, plan.n), dtype if cfg.split == 1 else jnp.float32
        ),
        config=cfg,
        dtype=dtype,
        grid=plan.grid,
        codes=plgpu.SMEM((cfg.stages, 2, BLOCK, BLOCK // 2), jnp.uint8, transforms=code_swizzle),
        arrivals=ARRIVALS,
    )
