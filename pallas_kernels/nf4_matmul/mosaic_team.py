"""Thousands of rows on Hopper: blocks that need the same rows of W decode them together, once.

The other Hopper matmuls decode a weight in every block that multiplies by it: for 4096 rows of x,
16 times. That costs the warps that multiply their time and the card its power, and is what lies
between them and a 16-bit product (docs/kernel_limits.md). Here the blocks whose tiles of y lie side
by side along x's rows, a *team*, have one share each of the decoding:

- A team works on 128 rows of W at a time, in groups of 16 steps (1024 columns). While a block's
  copies of group s are under way, its feeding warpgroup decodes a share of group s + 1 and stores
  it in the team's *room* in global memory, in x's dtype; then it counts itself at the team's
  semaphore. Nobody copies from a group before all of the team have been counted for it.
- The room holds four groups, 1 MiB. It is written and read within microseconds, so it stays in the
  second-level cache; with all teams' it is 8 MiB for 4096 rows, whatever the weight's size.
- The two computing warpgroups do nothing but multiply: both operands of `wgmma` come from shared
  memory, where the copy engine puts tiles of x and of W.

A group is overwritten by the one four behind it. A block stores group s + 1 after it has seen all
counted for s; each of them counted itself in the midst of copying group s − 1, so it has used all
of group s − 3, from which on it has copied more steps than the ring has stages. (Groups are of 16
steps, but a row's last one, and two short ones never follow each other, since a row has 16 steps or
more. So these are 9 steps or more: 8 of group s − 1, or all of s − 2, and one of the other.)

All blocks have to run at the same time: there are at most as many as multiprocessors, one to each,
and no kernel at the side that waits as well may hold one (docs/kernel_limits.md).

The transposed product, dxᵀ = Wᵀ · dyᵀ, is the same with W's other side up: a team has 128 columns
of W, a group 1024 of its rows, and `wgmma` reads its tiles of W transposed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels._arguments import Layout, LowRank
from pallas_kernels._mosaic import BLOCK, SMS, call, filled_up
from pallas_kernels.nf4_matmul.mosaic_lanes import store_sums
from pallas_kernels.nf4_matmul.mosaic_plan import COMPUTE, TEAM, MatmulConfig
from pallas_kernels.nf4_matmul.mosaic_ring import free_slot, load_offset
from pallas_kernels.nf4_matmul.mosaic_table import fill_table, tables_of
from pallas_kernels.nf4_matmul.mosaic_team_lanes import (
    GROUP,
    PIECES,
    RAW,
    ROOM,
    Plan,
    await_members,
    load_share,
    publish,
    scales_of_share,
    store_piece,
)
from pallas_kernels.simt import arrays

FIRST_HALF = GROUP // 2
"""Steps of a group during which the next one is decoded."""

ARRIVALS = 1 + COMPUTE
"""What makes a slot of the ring full: a tile of x, and one of W for each computing warpgroup."""

COMPUTING_REGISTERS, FEEDING_REGISTERS = 200, 104
"""Of a thread, by what its warpgroup does; together what a block is launched with, 3 · 168."""


def _with_rows_exchanged(b: Array) -> Array:
    """[n, rank], a row of it where `exchanged` puts W's."""
    return b.reshape(len(b) // 16, 8, 2, -1).swapaxes(1, 2).reshape(b.shape)


def multiply_in_teams(
    x: Array,
    codes: Array,
    absmax: Array,
    nested_absmax: Array | None,
    offset: Array | None,
    bias: Array | None = None,
    lora: LowRank | None = None,
    *,
    layout: Layout,
    config: MatmulConfig,
    transposed: bool = False,
) -> Array:
    """x · Wᵀ + bias + xa · bᵀ, or transposed x · W alone.

    Args:
        x: [..., k], or transposed [..., n], in bfloat16 or float16.
        codes, absmax, nested_absmax, offset, bias, lora: as `nf4_matmul` takes them.
        layout: of W [n, k].
        config: with `team`.
        transposed: whether to multiply by W, not by Wᵀ; without bias and adapter.

    Returns:
        [..., n], or transposed [..., k], in x's dtype.

    Raises:
        ValueError: too few or too many rows of x, or too few columns; a device with fewer
            multiprocessors than blocks.
    """
    contracted, batch = x.shape[-1], x.shape[:-1]
    x = x.reshape(-1, contracted)
    n = layout.shape[1 if transposed else 0]
    low: tuple[Array, ...] = ()
    if lora is not None:
        xa, b = filled_up(lora[0].reshape(len(x), -1), 8, BLOCK), filled_up(lora[1], 1, BLOCK)
        low = xa, _with_rows_exchanged(b)
    plan = Plan(
        m=len(x),
        n=n,
        contracted=contracted,
        transposed=transposed,
        dtype=str(x.dtype),
        double_quant=layout.double_quant,
        has_bias=bias is not None,
        config=config,
        rank=low[1].shape[1] if low else 0,
    )
    if plan.members not in TEAM or plan.steps < GROUP:
        few, most = (count * config.rows for count in (TEAM[0] - 1, TEAM[-1]))
        raise ValueError(
            f"config is {config}, for {plan.m} rows of {contracted}; a team needs more than {few} "
            f"and at most {most} rows, of {GROUP * BLOCK} or more: take team=False"
        )
    cores = [getattr(device, "core_count", None) or SMS for device in jax.local_devices()]
    if plan.grid > min(cores):
        raise ValueError(
            f"config is {config}, which runs {plan.grid} blocks at the same time, but a device "
            f"here has {min(cores)} multiprocessors: take team=False"
        )
    unused = jnp.zeros((1,), jnp.float32)
    y = call(
        _without_rooms(_kernel(plan)),
        # The copy engine's tiles are 8 rows high; rows beyond an array's end read as zeros.
        filled_up(x, 8),
        *low,
        codes.reshape(-1),
        absmax,
        unused if nested_absmax is None else nested_absmax,
        unused if offset is None else offset.reshape(1),
        unused if bias is None else bias.astype(jnp.float32),
        jnp.asarray(tables_of(config, layout.quant_type)),
    )
    return y.reshape(*batch, n)


def _without_rooms(kernel: Callable[..., list[Array]]) -> Callable[..., Array]:
    def result(*operands: Array) -> Array:
        return kernel(*operands)[0]

    return result


def _kernel(plan: Plan):
    cfg, (high, wide) = plan.config, plan.room_shape
    dtype = jnp.dtype(plan.dtype)
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def body(x, *refs):
        *low, codes, absmax, nested, offset, bias, tables, out, room = refs[:-5]
        table, x_tiles, w_tiles, full, empty = refs[-5:]
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        team, member = lax.div(cta, plan.members), lax.rem(cta, plan.members)
        counted = pl.get_global(plgpu.SemaphoreType.REGULAR((plan.teams,)))
        token = member * cfg.rows
        count = lax.div(plan.columns - 1 - team, plan.teams) + 1
        arrays.run(lambda m, t: fill_table(m, cfg, t), table, [tables])

        def column_of(index):
            """The first column of y of the team's `index`-th tiles."""
            return (team + index * plan.teams) * (BLOCK * COMPUTE)

        def place_of(number):
            """Where the team's `number`-th group stands among all rooms' groups."""
            return team * ROOM + lax.rem(number, ROOM)

        @pl.when(wg == COMPUTE)
        def _feed():
            plgpu.set_max_registers(FEEDING_REGISTERS, action="decrease")
            mean = arrays.run(
                lambda m, o: load_offset(m, plan, o), table, [offset], arrays.words_type(4)
            )

            def whereabouts(number):
                """The first column of y and the group of the row, of the team's `number`-th."""
                return column_of(lax.div(number, plan.groups)), lax.rem(number, plan.groups)

            def load(number):
                return arrays.run(
                    lambda m, i, c, g, w, a, e: load_share(m, plan, i, c, g, w, a, e),
                    table,
                    [member, *whereabouts(number), codes, absmax, nested],
                    arrays.words_type(RAW * plan.share),
                )

            def scale(raw):
                return arrays.run(
                    lambda m, r, o: scales_of_share(m, plan, r, o),
                    table,
                    [raw, mean],
                    arrays.words_type(4),
                )

            def store(piece, raw, scales, number):
                arrays.run(
                    lambda m, r, s, i, c, g, p, o: store_piece(m, plan, piece, r, s, i, c, g, p, o),
                    table,
                    [raw, scales, member, *whereabouts(number), place_of(number), room],
                )

            def copy_tile(source, row, step, tile, slot):
                part = source.at[pl.ds(row, tile.shape[0]), pl.ds(step * BLOCK, BLOCK)]
                plgpu.copy_gmem_to_smem(part, tile, full.at[slot])

            def count_in():
                arrays.run(lambda m: publish(m), table, [])
                plgpu.semaphore_signal(counted.at[team], 1, memory_scope="gpu")

            def await_all(number):
                value = plan.members * (number + 1)
                arrays.run(
                    lambda m, c, t, v: await_members(m, c, t, v), table, [counted, team, value]
                )

            zero, one = jnp.int32(0), jnp.int32(1)
            raw = load(zero)
            scales = scale(raw)
            for piece in range(PIECES):
                store(piece, raw, scales, zero)
            count_in()

            def one_group(number, raw):
                index, group = lax.div(number, plan.groups), lax.rem(number, plan.groups)
                first = group * GROUP
                here = jnp.minimum(GROUP, plan.steps - first)

                def fill(i, carry=None):
                    step = first + i
                    slot = free_slot(cfg, empty, index * plan.all_steps + plan.low_steps + step)
                    copy_tile(x, token, step, x_tiles.at[slot], slot)
                    for h in range(COMPUTE):
                        row, col = (i, h) if plan.transposed else (h, i)
                        row = place_of(number) * high + row * BLOCK
                        copy_tile(room, row, col, w_tiles.at[slot, h], slot)
                    return carry

                def fill_low(step, carry):
                    slot = free_slot(cfg, empty, index * plan.all_steps + step)
                    copy_tile(low[0], token, step, x_tiles.at[slot], slot)
                    for h in range(COMPUTE):
                        row = column_of(index) + h * BLOCK
                        copy_tile(low[1], row, step, w_tiles.at[slot, h], slot)
                    return carry

                if low:
                    of_tile = jnp.where(group == 0, plan.low_steps, 0)
                    lax.fori_loop(0, of_tile, fill_low, None)
                await_all(number)
                scales = None
                for i in range(FIRST_HALF):
                    pl.when(i < here)(functools.partial(fill, i))
                    if i == 0:
                        scales = scale(raw)
                    elif i <= PIECES:
                        store(i - 1, raw, scales, number + 1)
                count_in()
                # Under way until the next turn.
                raw = load(number + 2)
                lax.fori_loop(FIRST_HALF, here, fill, None)
                return raw

            lax.fori_loop(0, count * plan.groups, one_group, load(one))

        @pl.when(wg < COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")

            def one_tile(index, carry):
                base = index * plan.all_steps

                def accumulate(acc):
                    def multiply(i):
                        slot = lax.rem(base + i, cfg.stages)
                        weights = w_tiles.at[slot, wg]
                        if plan.transposed:
                            weights = weights.transpose((1, 0))
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, weights, x_tiles.at[slot].transpose((1, 0)))
                        return slot

                    def step(i, before):
                        slot = multiply(i)
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(empty.at[before])
                        return slot

                    last = lax.fori_loop(1, plan.all_steps, step, multiply(0))
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[last])
                    return acc[...]

                sums = pl.run_scoped(accumulate, plgpu.ACC((BLOCK, cfg.rows), jnp.float32))
                arrays.run(
                    # Else 256 addresses would be kept from tile to tile, which have the same rows.
                    lambda m, s, r, t, b, o: store_sums(m, plan, s, r, m.anew(t), b, o),
                    table,
                    [sums, column_of(index) + wg * BLOCK, token, bias, out],
                )
                return carry

            lax.fori_loop(0, count, one_tile, None)

    body.__name__ = "nf4_matmul_transposed" if plan.transposed else "nf4_matmul"
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((plan.m, plan.n), dtype),
            jax.ShapeDtypeStruct((plan.teams * ROOM * high, wide), dtype),
        ],
        scratch_types=[
            plgpu.SMEM((cfg.table_bytes // 4,), jnp.uint32),
            plgpu.SMEM((cfg.stages, cfg.rows, BLOCK), dtype, transforms=swizzle),
            plgpu.SMEM((cfg.stages, COMPUTE, BLOCK, BLOCK), dtype, transforms=swizzle),
            plgpu.Barrier(num_arrivals=ARRIVALS, num_barriers=cfg.stages),
            plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=cfg.stages),
        ],
        grid=(plan.grid,),
        grid_names=("cta",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
