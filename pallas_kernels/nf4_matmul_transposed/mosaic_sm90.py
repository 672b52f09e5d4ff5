"""dy · W for many rows on Hopper: `nf4_matmul.mosaic_sm90` with the weight's other side up.

Again the product is computed transposed, dxᵀ = Wᵀ · dyᵀ, and the decoded weights are `wgmma`'s
register operand: 64 columns of W, one quantization block wide, by 64 rows of W a step. Three things
differ from the forward kernel:

- What lies next to each other in the fragment are two *rows* of W, so a lane's 16 bytes of a step
  come from 16 rows. They are fetched by the copy engine, with dy, and read from shared memory byte
  by byte; the 64-byte swizzle keeps the lanes of a group apart.
- Every row of a step has its own scale: a thread of the feeding warpgroup has one of 64 rows in one
  of the two computing warpgroups' blocks.
- Of a warp's 16 rows of the fragment, row g is column 2g of its share of W and row g + 8 is
  column 2g + 1: the two weights of one byte.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels._arguments import Layout
from pallas_kernels._mosaic import BLOCK, SMS, call, check_mosaic, filled_up
from pallas_kernels.nf4_matmul.mosaic_lanes import store_sums
from pallas_kernels.nf4_matmul.mosaic_plan import (
    COMPUTE,
    COMPUTING_REGISTERS,
    FEEDING_REGISTERS,
    MatmulConfig,
    check_shared_memory,
    choose_config,
    place,
    tiles_of,
)
from pallas_kernels.nf4_matmul.mosaic_ring import (
    SCALE_WORDS,
    Lanes,
    feed,
    free_slot,
    load_offset,
    load_scales,
    multiply_steps,
    pass_scales,
    ring_kernel,
)
from pallas_kernels.nf4_matmul.mosaic_table import (
    fill_table,
    look_up_ahead,
    tables_of,
    weights_of,
)
from pallas_kernels.nf4_matmul.mosaic_team import multiply_in_teams
from pallas_kernels.simt import arrays

TILE_BYTES = BLOCK // 2 * COMPUTE  # of a row of codes, for all computing warpgroups

ARRIVALS = 3
"""What makes a slot of the ring full: a tile of dy, one of codes, and the scales."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All sizes of one kernel: dy [m, contracted], a weight [contracted, n]; n is dx's width."""

    m: int
    n: int
    contracted: int
    dtype: str
    double_quant: bool
    config: MatmulConfig
    has_bias: bool = False

    @property
    def steps(self) -> int:
        """Blocks of 64 along the contracted axis."""
        return self.contracted // BLOCK

    @property
    def tiles(self) -> tuple[int, int]:
        """Along dy's rows and along dx's columns."""
        return tiles_of(self.config, self.m, self.n)

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return min(SMS, math.prod(self.tiles))


def load_group(m, plan, column, step, absmax, nested):
    """The raw scales of this thread of the feeding warpgroup for a group of steps from `step`.

    Threads 0–63 take the rows of a step in the first computing warpgroup's block, threads 64–127
    in the second's. `column`: the first column of W of the tile.
    """
    row = step * BLOCK + (m.thread & 63)
    blocks = plan.n // BLOCK
    first = row * blocks + m.minimum(column // BLOCK + (m.thread >> 6 & 1), blocks - 1)
    every = plan.contracted * blocks
    return load_scales(m, plan, first, BLOCK * blocks, every, absmax, nested)


def read_codes(m, plan, warpgroup, tile):
    """A thread's 16 bytes of a step, a word each, [row of W / 8][row of two].

    `tile` is [64, 64] bytes under the 64-byte swizzle: the 16-byte chunk c of row r stands at chunk
    c ^ (r / 2 % 4), which is c ^ t for all rows of a lane.
    """
    lane, warp = m.thread & 31, m.thread >> 5 & 3
    g, t = lane >> 2, lane & 3
    byte = warpgroup * (BLOCK // 2) + warp * 8 + g
    at = t * 128 + (((byte >> 4) ^ t) << 4) + (byte & 15)
    return [
        m.shared_load_byte(at, offset=(8 * j + e) * 64, region=tile)
        for j in range(8)
        for e in (0, 1)
    ]


def find_weights(m, plan, warpgroup, codes, scales):
    """What `scale_weights` needs: as the forward kernel's, with a scale for each of 16 rows."""
    at = (warpgroup * BLOCK + (m.thread & 3) * 2) * 4
    rows = [w for j in range(8) for w in m.shared_load(at, 2, offset=32 * j, region=scales)]
    return [*look_up_ahead(m, plan.config, codes), *rows]


def scale_weights(m, plan, found):
    """The `wgmma` fragment of a step: 16 words of two weights in dy's dtype, [row of W / 8][half].

    Register [j][h] of lane (g, t) of warp w is column 16w + 2g + h of the warpgroup's share, of W's
    rows 8j + 2t and the next.
    """
    weights = weights_of(m, plan.config, found[:16])
    scale = [m.as_float(w) for w in found[16:]]
    out = []
    for row in range(0, 16, 2):
        for h in (0, 1):
            first, second = weights[row][h] * scale[row], weights[row + 1][h] * scale[row + 1]
            out.append(m.pack(first, second, plan.dtype))
    return out


def nf4_matmul_transposed_mosaic(
    dy: Array,
    codes: Array,
    absmax: Array,
    nested_absmax: Array | None,
    offset: Array | None,
    *,
    layout: Layout,
    config: MatmulConfig | None = None,
) -> Array:
    """`nf4_matmul_transposed` on Hopper. dy: [..., n] bfloat16 or float16.

    Raises:
        ValueError: what this kernel does not do, and which argument asks for it.
    """
    contracted, n = layout.shape
    batch = dy.shape[:-1]
    rows = math.prod(batch)
    check_mosaic("nf4_matmul_transposed", rows, layout, dy.dtype)
    config = config or choose_config(rows, transposed=True)
    if config.split != 1:
        raise ValueError(f"config.split is {config.split}; nf4_matmul_transposed takes only 1")
    check_shared_memory(config)
    if config.team:
        weight = codes, absmax, nested_absmax, offset
        return multiply_in_teams(dy, *weight, layout=layout, config=config, transposed=True)
    plan = Plan(
        m=rows,
        n=n,
        contracted=contracted,
        dtype=str(dy.dtype),
        double_quant=layout.double_quant,
        config=config,
    )
    unused = jnp.zeros((1,), jnp.float32)
    dx = call(
        _kernel(plan),
        # The copy engine's tiles are 8 rows high; rows beyond an array's end read as zeros.
        filled_up(dy.reshape(rows, contracted), 8),
        codes.reshape(contracted, n // 2),
        absmax,
        unused if nested_absmax is None else nested_absmax,
        unused if offset is None else offset.reshape(1),
        jnp.asarray(tables_of(config, layout.quant_type)),
    )
    return dx.reshape(*batch, n)


def _kernel(plan: Plan):
    cfg = plan.config
    dtype = jnp.dtype(plan.dtype)
    code_swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(64))

    def body(
        dy, codes, absmax, nested, offset, tables, out,
        table, dy_tiles, code_tiles, scale_tiles, full, empty,
    ):  # fmt: skip
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        count = (math.prod(plan.tiles) - 1 - cta) // plan.grid + 1
        arrays.run(lambda m, t: fill_table(m, cfg, t), table, [tables])

        def here(index):
            """First row of dy and first column of dx of this block's `index`-th tile."""
            token, column, _ = place(cfg, plan.tiles, cta + index * plan.grid)
            return token, column

        @pl.when(wg == COMPUTE)
        def _feed():
            plgpu.set_max_registers(FEEDING_REGISTERS, action="decrease")
            mean = arrays.run(
                lambda m, o: load_offset(m, plan, o), table, [offset], arrays.words_type(4)
            )

            def one_tile(index, carry):
                token, column = here(index)

                def load(step):
                    return arrays.run(
                        lambda m, c, s, a, e: load_group(m, plan, c, s, a, e),
                        table,
                        [column, step, absmax, nested],
                        arrays.words_type(SCALE_WORDS),
                    )

                def fill(step, raw, i):
                    slot = free_slot(cfg, empty, index * plan.steps + step)
                    row = step * BLOCK
                    plgpu.copy_gmem_to_smem(
                        dy.at[pl.ds(token, cfg.rows), pl.ds(row, BLOCK)],
                        dy_tiles.at[slot],
                        full.at[slot],
                    )
                    plgpu.copy_gmem_to_smem(
                        codes.at[pl.ds(row, BLOCK), pl.ds(column // 2, TILE_BYTES)],
                        code_tiles.at[slot],
                        full.at[slot],
                    )
                    pass_scales(plan, table, i, raw, mean, scale_tiles.at[slot], full.at[slot])

                feed(plan.steps, load, fill)
                return carry

            lax.fori_loop(0, count, one_tile, None)

        @pl.when(wg < COMPUTE)
        def _compute():
            plgpu.set_max_registers(COMPUTING_REGISTERS, action="increase")

            def read(slot):
                return arrays.run(
                    lambda m, w, t: read_codes(m, plan, w, t),
                    table,
                    [wg, arrays.Tile(code_tiles.at[slot], code_swizzle)],
                    arrays.words_type(16),
                )

            def find(slot, held):
                return arrays.run(
                    lambda m, w, c, s: find_weights(m, plan, w, c, s),
                    table,
                    [wg, held, arrays.Tile(scale_tiles.at[slot])],
                    arrays.words_type(32),
                )

            def scale(found):
                kind = plgpu.ShapeDtypeStruct((BLOCK, BLOCK), dtype, plgpu.Layout.WGMMA)
                return arrays.run(lambda m, f: scale_weights(m, plan, f), table, [found], kind)

            def one_tile(index, carry):
                token, column = here(index)

                def accumulate(acc):
                    ring = (acc, dy_tiles, full, empty, Lanes(read, find, scale))
                    multiply_steps(cfg, plan.steps, index * plan.steps, *ring)
                    return acc[...]

                sums = pl.run_scoped(accumulate, plgpu.ACC((BLOCK, cfg.rows), jnp.float32))
                arrays.run(
                    lambda m, s, c, t, o: store_sums(m, plan, s, c, t, None, o),
                    table,
                    [sums, column + wg * BLOCK, token, out],
                )
                return carry

            lax.fori_loop(0, count, one_tile, None)

    body.__name__ = "nf4_matmul_transposed"
    return ring_kernel(
        body,
        jax.ShapeDtypeStruct((plan.m, plan.n), dtype),
        config=cfg,
        dtype=dtype,
        grid=plan.grid,
        codes=plgpu.SMEM((cfg.stages, BLOCK, TILE_BYTES), jnp.uint8, transforms=code_swizzle),
        arrivals=ARRIVALS,
    )
