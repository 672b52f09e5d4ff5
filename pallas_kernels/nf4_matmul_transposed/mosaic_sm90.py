"""dy · W for many rows on Hopper: `nf4_matmul.mosaic_sm90` with the weight's other side up.

Again the product is computed transposed, dxᵀ = Wᵀ · dyᵀ, and the decoded weights are `wgmma`'s
register operand: 64 columns of W, one quantization block wide, by 64 rows of W a step. Three things
differ from the forward kernel:

- What lies next to each other in the fragment are two *rows* of W, so a lane's 16 bytes of a step
  come from 16 rows. They are fetched by the copy engine, with dy, and read from shared memory byte
  by byte; the 64-byte swizzle keeps the lanes of a group apart.
- Every row of a step has its own scale. The warpgroup that feeds the others decodes them, one per
  thread (64 rows × the two computing warpgroups' blocks), a step ahead of need.
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
from pallas_kernels._mosaic import BLOCK, SMS, call, check_mosaic
from pallas_kernels._mosaic_decoder import (
    TABLE_BYTES,
    look_up_absmax,
    look_up_pair,
    lookup_tables,
)
from pallas_kernels.codebooks import NESTED_BLOCKSIZE
from pallas_kernels.nf4_matmul.mosaic_cluster import (
    drain,
    emptied,
    launch_shape,
    own_block,
    shared_by,
)
from pallas_kernels.nf4_matmul.mosaic_lanes import fill_table, load_offset, store_sums
from pallas_kernels.nf4_matmul.mosaic_plan import (
    COMPUTE,
    MatmulConfig,
    choose_config,
    place,
    tiles_of,
)
from pallas_kernels.simt import arrays

TILE_BYTES = BLOCK // 2 * COMPUTE  # of a row of codes, for all computing warpgroups


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
        """Along dy's rows and along dx's columns, of a cluster."""
        return tiles_of(self.config, self.m, self.n)

    @property
    def grid(self) -> int:
        """Clusters of blocks of threads."""
        return min(SMS // self.config.cluster, math.prod(self.tiles))


def load_scale(m, plan, column, step, absmax, nested):
    """The raw scale of this thread of the feeding warpgroup, four words (two fill up).

    Threads 0–63 take the rows of the step in the first computing warpgroup's block, threads 64–127
    in the second's. `column`: the first column of W of the tile.
    """
    row = step * BLOCK + (m.thread & 63)
    blocks = plan.n // BLOCK
    block = row * blocks + m.minimum(column // BLOCK + (m.thread >> 6 & 1), blocks - 1)
    if plan.double_quant:
        words = [m.load_byte(absmax, block), *m.load(nested, block // NESTED_BLOCKSIZE * 4)]
    else:
        words = [*m.load(absmax, block * 4), m.word(0)]
    return words + [m.word(0)] * 2


def store_scale(m, plan, words, offset, scales):
    """Decode the scale and put it into the step's 128 scales in shared memory."""
    scale = m.as_float(words[0])
    if plan.double_quant:
        table_lane = (m.thread & 31) << 2
        value = look_up_absmax(m, words[0], 0, table_lane)
        scale = m.fma(value, m.as_float(words[1]), m.as_float(offset[0]))
    m.shared_store((m.thread & 127) << 2, [m.as_word(scale)], region=scales)


def decode_tile(m, plan, warpgroup, tile, scales):
    """The `wgmma` fragment of a step: 16 words of two weights in dy's dtype, [row of W / 8][half].

    Register [j][h] of lane (g, t) of warp w is column 16w + 2g + h of the warpgroup's share, of W's
    rows 8j + 2t and the next. `tile` is [64, 64] bytes under the 64-byte swizzle: the 16-byte chunk
    c of row r stands at chunk c ^ (r / 2 % 4), which is c ^ t for all rows of a lane.
    """
    lane, warp = m.thread & 31, m.thread >> 5 & 3
    g, t = lane >> 2, lane & 3
    table_lane = lane << 2
    byte = warpgroup * (BLOCK // 2) + warp * 8 + g
    at = t * 128 + (((byte >> 4) ^ t) << 4) + (byte & 15)
    scale_at = (warpgroup * BLOCK + t * 2) * 4
    out = []
    for j in range(8):
        pairs = []
        for e in (0, 1):
            code = m.shared_load_byte(at, offset=(8 * j + e) * 64, region=tile)
            pairs.append(m.half_pair(look_up_pair(m, code, 0, table_lane)))
        scale = [m.as_float(w) for w in m.shared_load(scale_at, 2, offset=32 * j, region=scales)]
        for h in (0, 1):
            out.append(m.pack(pairs[0][h] * scale[0], pairs[1][h] * scale[1], plan.dtype))
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
    config = config or choose_config(rows)
    if config.split != 1:
        raise ValueError(f"config.split is {config.split}; nf4_matmul_transposed takes only 1")
    plan = Plan(
        m=rows,
        n=n,
        contracted=contracted,
        dtype=str(dy.dtype),
        double_quant=layout.double_quant,
        config=config,
    )
    # The copy engine's tiles are 8 rows high; rows beyond an array's end read as zeros.
    dy = jnp.pad(dy.reshape(rows, contracted), ((0, -rows % 8), (0, 0)))
    unused = jnp.zeros((1,), jnp.float32)
    dx = call(
        _kernel(plan),
        dy,
        codes.reshape(contracted, n // 2),
        absmax,
        unused if nested_absmax is None else nested_absmax,
        unused if offset is None else offset.reshape(1),
        jnp.asarray(lookup_tables(layout.quant_type)),
    )
    return dx.reshape(*batch, n)


def _kernel(plan: Plan):
    cfg = plan.config
    dtype = jnp.dtype(plan.dtype)
    swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    code_swizzle = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(64))

    def body(
        dy, codes, absmax, nested, offset, tables, out,
        table, dy_tiles, code_tiles, scale_tiles, full, empty,
    ):  # fmt: skip
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        block = own_block(cfg)
        count = (math.prod(plan.tiles) - 1 - cta) // plan.grid + 1
        arrays.run(lambda m, t: fill_table(m, t, 128 * (COMPUTE + 1)), table, [tables])

        def here(index):
            """First row of dy and first column of dx of this block's `index`-th tile."""
            token, column, _ = place(cfg, plan.tiles, cta + index * plan.grid, block)
            return token, column

        @pl.when(wg == COMPUTE)
        def _feed():
            plgpu.set_max_registers(40, action="decrease")
            mean = arrays.run(
                lambda m, o: load_offset(m, plan, o), table, [offset], arrays.words_type(4)
            )

            def load(s):
                s = jnp.minimum(s, count * plan.steps - 1)
                _, column = here(s // plan.steps)
                return arrays.run(
                    lambda m, c, s, a, e: load_scale(m, plan, c, s, a, e),
                    table,
                    [column, lax.rem(s, plan.steps), absmax, nested],
                    arrays.words_type(4),
                )

            def one(s, raw):
                slot = lax.rem(s, cfg.stages)
                token, column = here(s // plan.steps)
                row = lax.rem(s, plan.steps) * BLOCK

                @pl.when(s >= cfg.stages)
                def _wait():
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(
                    dy.at[pl.ds(token, cfg.rows), pl.ds(row, BLOCK)],
                    dy_tiles.at[slot],
                    full.at[slot],
                    collective_axes=shared_by(cfg),
                )
                plgpu.copy_gmem_to_smem(
                    codes.at[pl.ds(row, BLOCK), pl.ds(column // 2, TILE_BYTES)],
                    code_tiles.at[slot],
                    full.at[slot],
                )
                following = load(s + 1)
                arrays.run(
                    lambda m, w, o, t: store_scale(m, plan, w, o, t),
                    table,
                    [raw, mean, arrays.Tile(scale_tiles.at[slot])],
                )
                plgpu.barrier_arrive(full.at[slot])
                return following

            lax.fori_loop(0, count * plan.steps, one, load(jnp.int32(0)))
            drain(cfg, empty, count * plan.steps)

        @pl.when(wg < COMPUTE)
        def _compute():
            plgpu.set_max_registers(232, action="increase")

            def decode(slot):
                kind = plgpu.ShapeDtypeStruct((BLOCK, BLOCK), dtype, plgpu.Layout.WGMMA)
                return arrays.run(
                    lambda m, w, t, s: decode_tile(m, plan, w, t, s),
                    table,
                    [
                        wg,
                        arrays.Tile(code_tiles.at[slot], code_swizzle),
                        arrays.Tile(scale_tiles.at[slot]),
                    ],
                    kind,
                )

            def one_tile(index, carry):
                token, column = here(index)
                base = index * plan.steps

                def accumulate(acc):
                    def arrived(step):
                        slot = lax.rem(base + step, cfg.stages)
                        plgpu.barrier_wait(full.at[slot])
                        return decode(slot)

                    def multiply(step, weights, following):
                        slot = lax.rem(base + step, cfg.stages)
                        plgpu.wgmma(acc, weights, dy_tiles.at[slot].transpose((1, 0)))
                        weights = arrived(step + 1) if following and cfg.ahead else None
                        plgpu.wgmma_wait(0)
                        plgpu.barrier_arrive(empty.at[slot])
                        return arrived(step + 1) if following and not cfg.ahead else weights

                    def two(pair, weights):
                        # Two steps a turn, for two sets of registers: see the forward kernel.
                        weights = multiply(2 * pair, weights, True)
                        return multiply(2 * pair + 1, weights, True)

                    weights = arrived(jnp.int32(0))
                    weights = lax.fori_loop(0, (plan.steps - 1) // 2, two, weights)
                    for step in range((plan.steps - 1) // 2 * 2, plan.steps):
                        weights = multiply(jnp.int32(step), weights, step + 1 < plan.steps)
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
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.m, plan.n), dtype),
        scratch_types=[
            plgpu.SMEM((TABLE_BYTES // 4,), jnp.uint32),
            plgpu.SMEM((cfg.stages, cfg.rows, BLOCK), dtype, transforms=swizzle),
            plgpu.SMEM((cfg.stages, BLOCK, TILE_BYTES), jnp.uint8, transforms=code_swizzle),
            plgpu.SMEM((cfg.stages, BLOCK * COMPUTE), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=cfg.stages),
            emptied(cfg),
        ],
        **launch_shape(cfg, plan.grid),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
