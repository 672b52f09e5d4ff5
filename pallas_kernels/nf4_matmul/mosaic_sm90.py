"""x · Wᵀ for many rows on Hopper: weights decoded in registers while the tensor cores work.

The product is computed transposed, yᵀ = W · xᵀ, because `wgmma` takes its *left* operand from
registers: a warpgroup decodes 64 rows × 64 columns of W, one quantization block a row, straight
into the fragment that the instruction reads, and multiplies it with 256 rows of x. No 16-bit weight
is ever in memory, shared or global.

- A block of threads has two warpgroups that compute and one thread that feeds them tiles of x
  through the copy engine (TMA), several steps ahead. 64 rows × 256 rows of x per warpgroup: its
  `wgmma`s take 512 clocks a step, its decoding about 150 issue slots, and the two warpgroups take
  turns, so the tensor cores need not wait.
- Codes come directly from global memory, one step ahead, in registers (`mosaic_lanes` says how a
  lane loads and decodes them). The reference's table is float32, the kernel's float16: here a
  weight has been rounded once more, to 11 bits.
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
from pallas_kernels._mosaic import BLOCK, call, check_mosaic
from pallas_kernels._mosaic_decoder import TABLE_BYTES, lookup_tables
from pallas_kernels.nf4_matmul.mosaic_cluster import (
    drain,
    emptied,
    launch_shape,
    own_block,
    shared_by,
)
from pallas_kernels.nf4_matmul.mosaic_lanes import (
    CODE_WORDS,
    SCALE_WORDS,
    decode_block,
    fill_table,
    load_block,
    load_low_rank,
    load_offset,
    store_sums,
)
from pallas_kernels.nf4_matmul.mosaic_plan import (
    COMPUTE,
    MatmulConfig,
    Plan,
    choose_config,
    place,
)
from pallas_kernels.nf4_matmul.reference import complete
from pallas_kernels.simt import arrays


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
    weight = (codes, absmax, nested_absmax, offset)
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
        low = (_pad(lora[0].reshape(len(x), -1), 8, BLOCK), _pad(lora[1], 1, BLOCK))
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
        _pad(x, 8, 1),
        *low,
        codes.reshape(-1),
        absmax,
        unused if nested_absmax is None else nested_absmax,
        unused if offset is None else offset.reshape(1),
        unused if bias is None else bias.astype(jnp.float32),
        jnp.asarray(lookup_tables(layout.quant_type)),
    )


def _pad(matrix: Array, rows: int, columns: int) -> Array:
    """Zeros at the ends until both sizes are multiples."""
    return jnp.pad(matrix, ((0, -matrix.shape[0] % rows), (0, -matrix.shape[1] % columns)))


def _kernel(plan: Plan):
    cfg = plan.config
    dtype = jnp.dtype(plan.dtype)
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    held_type = arrays.words_type(CODE_WORDS + SCALE_WORDS)

    all_steps = plan.low_steps + plan.steps

    def body(x, *refs):
        *low, codes, absmax, nested, offset, bias, tables, out, table, x_tiles, full, empty = refs
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        block = own_block(cfg)
        count = (plan.work - 1 - cta) // plan.grid + 1

        arrays.run(lambda m, t: fill_table(m, t, 128 * (COMPUTE + 1)), table, [tables])

        def here(index):
            """Of this block's `index`-th tile: its first row of x and of W, the part of its sum."""
            return place(cfg, plan.tiles, cta + index * plan.grid, block)

        @pl.when(wg == COMPUTE)
        def _feed():
            plgpu.set_max_registers(40, action="decrease")

            def one(s, carry):
                slot = lax.rem(s, cfg.stages)
                token, _, part = here(s // all_steps)
                step = lax.rem(s, all_steps)

                @pl.when(s >= cfg.stages)
                def _wait():
                    plgpu.barrier_wait(empty.at[slot])

                def copy(source, step):
                    plgpu.copy_gmem_to_smem(
                        source.at[pl.ds(token, cfg.rows), pl.ds(step * BLOCK, BLOCK)],
                        x_tiles.at[slot],
                        full.at[slot],
                        collective_axes=shared_by(cfg),
                    )

                if low:
                    pl.when(step < plan.low_steps)(lambda: copy(low[0], step))
                    pl.when(step >= plan.low_steps)(lambda: copy(x, step - plan.low_steps))
                else:
                    copy(x, part * plan.steps + step)
                return carry

            lax.fori_loop(0, count * all_steps, one, None)
            drain(cfg, empty, count * all_steps)

        @pl.when(wg < COMPUTE)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            mean = arrays.run(
                lambda m, o: load_offset(m, plan, o), table, [offset], arrays.words_type(4)
            )

            def load(first_row, part, step):
                step = part * plan.steps + jnp.minimum(step, plan.steps - 1)
                return arrays.run(
                    lambda m, r, s, c, a, e: load_block(m, plan, r, s, c, a, e),
                    table,
                    [first_row, step, codes, absmax, nested],
                    held_type,
                )

            fragment = plgpu.ShapeDtypeStruct((64, BLOCK), dtype, plgpu.Layout.WGMMA)

            def decode(held):
                return arrays.run(
                    lambda m, words, o: decode_block(m, plan, words, o),
                    table,
                    [held, mean],
                    fragment,
                )

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
                base = index * all_steps + plan.low_steps

                def accumulate(acc):
                    def multiply(step, weights):
                        slot = lax.rem(base + step, cfg.stages)
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, weights, x_tiles.at[slot].transpose((1, 0)))
                        return slot

                    def low_rank(step, carry):
                        slot = multiply(step - plan.low_steps, load_low(first_row, step))
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])
                        return carry

                    def simple(step, held):
                        weights = decode(held)
                        held = load(first_row, part, step + 1)
                        slot = multiply(step, weights)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])
                        return held

                    def ahead(step, weights, held):
                        slot = multiply(step, weights)
                        weights = decode(held)
                        held = load(first_row, part, step + 2)
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])
                        return weights, held

                    def two_ahead(pair, carry):
                        # Two steps a turn: the fragment being decoded must not take the registers
                        # of the one in use, or ptxas puts the two in sequence.
                        return ahead(2 * pair + 1, *ahead(2 * pair, *carry))

                    held = load(first_row, part, jnp.int32(0))
                    if low:
                        lax.fori_loop(0, plan.low_steps, low_rank, None)
                    if cfg.ahead:
                        carry = decode(held), load(first_row, part, jnp.int32(1))
                        carry = lax.fori_loop(0, plan.steps // 2, two_ahead, carry)
                        if plan.steps % 2:
                            ahead(jnp.int32(plan.steps - 1), *carry)
                    else:
                        lax.fori_loop(0, plan.steps, simple, held)
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
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            (cfg.split * plan.m, plan.n), dtype if cfg.split == 1 else jnp.float32
        ),
        scratch_types=[
            plgpu.SMEM((TABLE_BYTES // 4,), jnp.uint32),
            plgpu.SMEM((cfg.stages, cfg.rows, BLOCK), dtype, transforms=swizzle),
            plgpu.Barrier(num_barriers=cfg.stages),
            emptied(cfg),
        ],
        **launch_shape(cfg, plan.grid),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
