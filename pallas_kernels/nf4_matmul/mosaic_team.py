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

import dataclasses
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
from pallas_kernels.codebooks import NESTED_BLOCKSIZE
from pallas_kernels.nf4_matmul.mosaic_lanes import store_sums
from pallas_kernels.nf4_matmul.mosaic_plan import COMPUTE, TEAM, MatmulConfig
from pallas_kernels.nf4_matmul.mosaic_ring import free_slot, load_offset
from pallas_kernels.nf4_matmul.mosaic_table import (
    fill_table,
    look_up_absmax,
    tables_of,
    weights_of,
)
from pallas_kernels.simt import arrays

GROUP = 16
"""Steps of 64 that a team decodes at a time."""

ROOM = 4
"""Groups in a team's room."""

FIRST_HALF = GROUP // 2
"""Steps of a group during which the next one is decoded."""

PIECES = 4
"""Parts of a block of 64 weights, decoded a step apart, so that copies never wait for long."""

ARRIVALS = 1 + COMPUTE
"""What makes a slot of the ring full: a tile of x, and one of W for each computing warpgroup."""

COMPUTING_REGISTERS, FEEDING_REGISTERS = 200, 104
"""Of a thread, by what its warpgroup does; together what a block is launched with, 3 · 168."""

_RAW = 12
"""Words of a block as it is loaded: codes, its absmax and the nested one's, two that fill up."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All sizes of one kernel: x [m, contracted], the result [m, n].

    Attributes:
        transposed: whether the weight is [contracted, n], not [n, contracted].
    """

    m: int
    n: int
    contracted: int
    transposed: bool
    dtype: str
    double_quant: bool
    has_bias: bool
    config: MatmulConfig
    rank: int = 0
    """Of the adapter, a multiple of 64; 0 for none."""

    @property
    def steps(self) -> int:
        """Blocks of 64 along the contracted axis."""
        return self.contracted // BLOCK

    @property
    def low_steps(self) -> int:
        """Blocks of 64 along the adapter's rank."""
        return self.rank // BLOCK

    @property
    def all_steps(self) -> int:
        """Of a tile: the adapter's, then the weight's."""
        return self.low_steps + self.steps

    @property
    def groups(self) -> int:
        """Of steps; the last may be shorter."""
        return -(-self.steps // GROUP)

    @property
    def columns(self) -> int:
        """Tiles along n."""
        return -(-self.n // (BLOCK * COMPUTE))

    @property
    def members(self) -> int:
        """Blocks of a team: tiles along m."""
        return -(-self.m // self.config.rows)

    @property
    def teams(self) -> int:
        """As many as run at the same time, if there is work for all."""
        return min(SMS // self.members, self.columns)

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return self.teams * self.members

    @property
    def share(self) -> int:
        """Blocks of 64 weights that a thread decodes of each group, 1 or 2."""
        return -(-GROUP // self.members)

    @property
    def room_shape(self) -> tuple[int, int]:
        """Of one group, decoded: rows of W in the order of `wgmma`'s, or its rows as they are."""
        shape = (BLOCK * COMPUTE, BLOCK * GROUP)
        return shape[::-1] if self.transposed else shape


# -- what a thread of the feeding warpgroup does ---------------------------------------------------


def load_share(m, plan, member, column, group, codes, absmax, nested):
    """The thread's blocks of 64 weights of a group as they lie there, `_RAW` words each.

    A warp's blocks lie one behind the other in memory, 32 bytes of codes each.
    """
    words = []
    for i in range(plan.share):
        block = _weights_of_share(m, plan, member, column, group, i)[0]
        words += m.load(codes, block * 32, 4) + m.load(codes, block * 32, 4, offset=16)
        if plan.double_quant:
            words += [m.load_byte(absmax, block)]
            words += m.load(nested, block // NESTED_BLOCKSIZE * 4)
        else:
            words += [*m.load(absmax, block * 4), m.word(0)]
        words += [m.word(0)] * 2
    return words


def scales_of_share(m, plan, raw, offset):
    """The scales of the thread's blocks, of what `load_share` has loaded; four words."""
    scales = []
    for i in range(plan.share):
        absmax, nested = raw[_RAW * i + 8 : _RAW * i + 10]
        scale = m.as_float(absmax)
        if plan.double_quant:
            value = look_up_absmax(m, plan.config, absmax)
            scale = m.add_unfused(value * m.as_float(nested), m.as_float(offset[0]))
        scales.append(m.as_word(scale))
    return scales + [m.word(0)] * (4 - plan.share)


def store_piece(m, plan, piece, raw, scales, member, column, group, place, room):
    """Decode 16 weights of each of the thread's blocks and store them at the group's `place`.

    They become what the reference makes of them: table and scale are float32, rounded once.
    """
    for i in range(plan.share):
        _, at, inside = _weights_of_share(m, plan, member, column, group, i)
        at = at + place * (2 * BLOCK * COMPUTE * BLOCK * GROUP) + piece * 32
        words = raw[_RAW * i + 2 * piece : _RAW * i + 2 * piece + 2]
        pairs = weights_of(m, plan.config, [w >> 8 * b & 0xFF for w in words for b in range(4)])
        scale = m.as_float(scales[i])
        pairs = [(even * scale, odd * scale) for even, odd in pairs]
        if plan.transposed:
            even, odd = zip(*pairs, strict=True)
            flat = [*even, *odd]
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
        packed = [m.pack(low, high, plan.dtype) for low, high in pairs]
        for half in (0, 1):
            m.store_words(room, at + 16 * half, packed[4 * half : 4 * half + 4], when=inside)


def publish(m):
    """What the warpgroup has stored can be copied, by whoever learns of it."""
    m.copies_see_memory()
    m.warpgroup_barrier()


def await_members(m, counted, team, value):
    """Wait until the team has been counted so often; what was stored before can be copied."""
    m.await_at_least(counted, team * 4, value)
    m.warpgroup_barrier()
    m.copies_see_memory()


def _weights_of_share(m, plan, member, column, group, i):
    """The i-th block of 64 weights of the thread's share: its number in the weight, its first byte
    in the group's place, and whether there is one.

    Of 16 rows of a tile of yᵀ, row g is W's row 2g and row g + 8 is 2g + 1 (`mosaic_lanes`). So
    rows of the place are exchanged, or for dx a row's columns, which `store_piece` does.
    """
    number = (member * plan.share + i) * 128 + (m.thread & 127)
    inside = number < BLOCK * COMPUTE * GROUP
    if plan.transposed:
        row, half = number // COMPUTE, number % COMPUTE
        w_row, wide = group * (GROUP * BLOCK) + row, plan.n // BLOCK
        inside = inside & (w_row < plan.contracted)
        block = m.minimum(w_row, plan.contracted - 1) * wide
        block = block + m.minimum(column // BLOCK + half, wide - 1)
        return block, number * (2 * BLOCK), inside
    row, step = number // GROUP, number % GROUP
    w_row, w_step = column + row, group * GROUP + step
    inside = inside & (w_step < plan.steps)
    block = m.minimum(w_row, plan.n - 1) * plan.steps + m.minimum(w_step, plan.steps - 1)
    return block, (_exchanged(row) * GROUP + step) * (2 * BLOCK), inside


def _exchanged(row):
    """Where a row of W stands among the rows of `wgmma`'s tiles."""
    return row // 16 * 16 + row % 2 * 8 + row // 2 % 8


def _with_rows_exchanged(b: Array) -> Array:
    """[n, rank], a row of it where `_exchanged` puts W's."""
    return b.reshape(len(b) // 16, 8, 2, -1).swapaxes(1, 2).reshape(b.shape)


# -- the kernel ------------------------------------------------------------------------------------


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
    """x · Wᵀ + bias + xa · bᵀ as `nf4_matmul` takes them, or transposed x · W alone.

    Raises:
        ValueError: too few or too many rows of x, or too few columns.
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
                    arrays.words_type(_RAW * plan.share),
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
