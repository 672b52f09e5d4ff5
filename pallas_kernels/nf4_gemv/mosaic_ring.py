"""x · Wᵀ for few rows on Hopper, fed by the copy engine.

The arithmetic is that of `nf4_gemv.mosaic_sm90` (one look-up for a byte's two weights, a quarter of
an `mma.m16n8k16` per byte); what differs is how bytes arrive. There, every lane holds the codes of
its next tile in registers, and the load path (measured on an H200: 92% busy) is the limit. Here
every warp owns a ring of stages in shared memory which the copy engine fills, so a block has its
next 64–128 KiB on their way at all times, and registers are free for twice the warps.

A *unit* is 8 rows of W. An instruction's 16 rows are the same 8 rows twice: rows 0–7 are the first
half of a warp's chunk of columns, rows 8–15 the second; column 2r + h of B is row r of x on half h.
So 8 rows can be dealt to a block, which keeps 132 multiprocessors evenly busy.

Lane (g, t) looks up bytes 8t … 8t + 7 of each 32-byte block of row g. All four lanes of a group
work on the same block, so a sum needs no zeros to stay apart from its neighbour's, and of several
blocks' sums lane t scales those of block 4i + t alone.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels._arguments import Layout
from pallas_kernels.codebooks import NESTED_BLOCKSIZE
from pallas_kernels.nf4_gemv.mosaic_sm90 import BLOCK, SHARED_LIMIT, TABLE_BYTES, lookup_tables
from pallas_kernels.simt.launch import launch

UNIT = 8  # rows of W


@dataclasses.dataclass(frozen=True)
class RingConfig:
    """How the work is cut; every choice gives the same sums up to their order.

    Attributes:
        warps: warps of a block, a multiple of 4.
        split: of them, how many share the columns of a row; the others take other rows.
        tiles: units that a warp works on at a time.
        half: columns of half a chunk: 128, 256 or 512.
        stages: chunks on their way to each warp.
        ctas: blocks, at most.
    """

    warps: int = 16
    split: int = 16
    tiles: int = 2
    half: int = 256
    stages: int = 2
    ctas: int = 132


@dataclasses.dataclass(frozen=True)
class Plan:
    """All sizes of one kernel: rows of x `m`, a weight [n, k], addresses in shared memory."""

    m: int
    n: int
    k: int
    x_dtype: str
    has_bias: bool
    config: RingConfig

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.config.warps

    @property
    def units(self) -> int:
        """Units of work."""
        return self.n // UNIT

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return min(self.units, self.config.ctas)

    @property
    def most_units(self) -> int:
        """Units of the busiest block."""
        return -(-self.units // self.grid)

    @property
    def at_once(self) -> int:
        """Units that a block works on at a time."""
        return self.config.tiles * (self.config.warps // self.config.split)

    @property
    def blocks(self) -> int:
        """Quantization blocks of a row."""
        return self.k // BLOCK

    @property
    def chunk(self) -> int:
        """Columns of a chunk; as many bytes are a row's share of x's half in shared memory."""
        return 2 * self.config.half

    @property
    def turns(self) -> int:
        """Chunks that a warp takes of each row."""
        return -(-self.k // (self.chunk * self.config.split))

    @property
    def groups(self) -> int:
        """Instructions per four bytes of a lane: four rows of x each."""
        return -(-self.m // 4)

    @property
    def code_pitch(self) -> int:
        """Bytes from row to row of codes in a stage: 32 more than a multiple of 128."""
        return self.config.half + 32

    @property
    def stage_bytes(self) -> int:
        """Bytes of a stage."""
        return self.config.tiles * UNIT * self.code_pitch

    @property
    def half_pitch(self) -> int:
        """Bytes from half to half of x: the two halves of a chunk meet other banks."""
        return 2 * self.config.half + 16

    @property
    def x_pitch(self) -> int:
        """Bytes from row to row of x."""
        return 2 * self.turns * self.config.split * self.half_pitch

    @property
    def pad_absmax(self) -> bool:
        """Whether rows of absmax codes are put apart, because they would meet the same banks."""
        return self.blocks % 16 == 0

    @property
    def absmax_pitch(self) -> int:
        """Bytes from row to row of absmax codes."""
        return self.blocks + 16 * self.pad_absmax

    @property
    def barriers_at(self) -> int:
        """Where the mbarriers stand: of absmax, then of every warp's stages."""
        return TABLE_BYTES

    @property
    def nested_at(self) -> int:
        """Where the nested absmax of the block's rows stand."""
        return self.barriers_at + -(-8 * (1 + self.config.warps * self.config.stages) // 128) * 128

    @property
    def nested_count(self) -> int:
        """How many there are, at most."""
        return -(-self.most_units * UNIT * self.blocks // NESTED_BLOCKSIZE) + 1

    @property
    def absmax_at(self) -> int:
        """Where the absmax codes of the block's rows stand."""
        return self.nested_at + -(-4 * self.nested_count // 128) * 128

    @property
    def x_at(self) -> int:
        """Where x stands, float16, [row, chunk, half, column]."""
        size = self.most_units * UNIT * self.absmax_pitch
        return self.absmax_at + -(-size // 128) * 128

    @property
    def ring_at(self) -> int:
        """Where the stages stand, [warp, stage]."""
        return self.x_at + -(-self.m * self.x_pitch // 128) * 128

    @property
    def partial_at(self) -> int:
        """Where the warps' partial sums stand, [unit, warp, row of x, row of W] float32."""
        return self.ring_at + self.config.warps * self.config.stages * self.stage_bytes

    @property
    def partial_unit(self) -> int:
        """Bytes of the partial sums of a unit."""
        return self.config.split * self.m * UNIT * 4

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory."""
        slots = -(-self.most_units // self.at_once) * self.at_once
        return self.partial_at + slots * self.partial_unit

    @property
    def efficiency(self) -> float:
        """The share of the busiest warp's work that a perfectly even split would give it."""
        rounds = -(-self.most_units // self.at_once)
        spread = self.units / (rounds * self.at_once * self.config.ctas)
        return spread * self.k / (self.turns * self.config.split * self.chunk)


def why_not_ring(plan: Plan) -> str | None:
    """Why this kernel cannot take such a product; None where it can."""
    if plan.n % UNIT or plan.k % 128:
        return f"it takes n in multiples of 8 and k of 128, not {(plan.n, plan.k)}"
    if plan.config.tiles > 4 or plan.nested_count > plan.threads:
        return f"its blocks are too small for {plan.n} rows of {plan.k}"
    if plan.pad_absmax and plan.most_units * UNIT > plan.threads:
        return f"its blocks are too small for {plan.n} rows"
    if plan.shared_bytes > SHARED_LIMIT:
        return f"{plan.m} rows of {plan.k} do not fit into shared memory"
    return None


def lane_program(m, plan, x, codes, absmax, nested, offset, bias, tables, out):
    """One thread of the kernel on machine `m` (see `pallas_kernels.simt`)."""
    cfg, tid = plan.config, m.thread
    tiles, per_half = range(cfg.tiles), cfg.half // BLOCK
    lane, warp = tid & 31, tid >> 5
    g, t = lane >> 2, lane & 3
    column_warp, row_warp = warp % cfg.split, warp // cfg.split
    row_bytes = plan.k // 2
    table_lane = lane << 2
    first_unit = m.cta * plan.units // plan.grid
    count = (m.cta + 1) * plan.units // plan.grid - first_unit
    rounds = (count + (plan.at_once - 1)) // plan.at_once
    first_row = first_unit * UNIT
    first_nested = first_row * plan.blocks // NESTED_BLOCKSIZE
    ring = warp * (cfg.stages * plan.stage_bytes) + plan.ring_at
    barriers = warp * (8 * cfg.stages) + (plan.barriers_at + 8)

    def unit_of(round_, r):
        """Of this block's units, the one that tile `r` of this warp is in that round."""
        return round_ * plan.at_once + row_warp * cfg.tiles + r

    def request(item, slot):
        """Start the copies of the warp's `item`-th chunk into stage `slot`."""
        round_, turn = item // plan.turns, item % plan.turns
        first_byte = (turn * cfg.split + column_warp) * cfg.half
        width = m.minimum(first_byte + cfg.half, row_bytes) - m.minimum(first_byte, row_bytes)
        here = m.minimum(unit_of(round_, cfg.tiles), count) - m.minimum(unit_of(round_, 0), count)
        barrier = barriers + slot * 8
        m.bulk_expect(barrier, here * UNIT * width, when=lane == 0)
        row = first_row + unit_of(round_, 0) * UNIT + lane
        real = (lane < here * UNIT) & (first_byte < row_bytes)
        at = m.where(real, row * row_bytes + first_byte, m.word(0))
        to = ring + slot * plan.stage_bytes + lane * plan.code_pitch
        m.bulk_load(codes, at, to, width, barrier, when=real)

    # -- before the loop -----------------------------------------------------------------------

    m.bulk_barrier(barriers + lane * 8, when=lane < cfg.stages)
    m.bulk_barrier(plan.barriers_at, when=tid == 0)
    m.bulk_fence()
    m.warp_barrier()
    total_items = rounds * plan.turns

    def request_if_any(item, slot):
        more = m.minimum(total_items - m.minimum(total_items, item), 1)

        def body(_, carry):
            request(item, slot)
            return carry

        m.loop(more, body, [])

    for slot in range(cfg.stages):
        request_if_any(m.word(slot), m.word(slot))
    # Entry tid / 2 of the tables, one of its two words, a piece of 16 bytes at a time; the pieces
    # are taken in another order by every lane of a phase, for other banks.
    fills = []
    for first in range(0, 512, plan.threads):
        entry = (tid + first) >> 1
        fills.append((entry, m.load(tables, (tid + first) * 4, when=tid + first < 512), first))
    loaded = [_load_x(m, plan, x, lane, column_warp, row) for row in range(plan.m)]
    last_nested = -(-plan.n * plan.blocks // NESTED_BLOCKSIZE) - 1
    nested_word = m.load(nested, m.minimum(first_nested + tid, last_nested) * 4)
    shift = m.as_float(m.load(offset, m.word(0))[0])
    m.barrier()
    count_rows = count * UNIT
    m.bulk_expect(plan.barriers_at, count_rows * plan.blocks, when=tid == 0)
    absmax_barrier = m.word(plan.barriers_at)
    if plan.pad_absmax:
        real = tid < count_rows
        at = m.where(real, (first_row + tid) * plan.blocks, m.word(0))
        to = tid * plan.absmax_pitch + plan.absmax_at
        m.bulk_load(absmax, at, to, m.word(plan.blocks), absmax_barrier, when=real)
    else:
        at, to = first_row * plan.blocks, m.word(plan.absmax_at)
        m.bulk_load(absmax, at, to, count_rows * plan.blocks, absmax_barrier, when=tid == 0)
    for entry, word, first in fills:
        for i in range(8):
            at = (entry << 8) + ((tid & 1) << 7) + ((tid + i & 7) << 4)
            m.shared_store(at, word * 4, when=tid + first < 512)
    m.shared_store((tid << 2) + plan.nested_at, nested_word, when=tid < plan.nested_count)
    unscale = [_stage_x(m, plan, loaded[row], lane, column_warp, row) for row in range(plan.m)]
    m.barrier()
    m.bulk_wait(absmax_barrier, m.word(0))

    # B's column of this lane: half g % 2 of row g / 2 of x. Columns without a row repeat the last.
    x_lane = []
    for group in range(plan.groups):
        row_x = m.minimum((g >> 1) + 4 * group, plan.m - 1)
        at = row_x * plan.x_pitch + (g & 1) * plan.half_pitch + t * 32 + plan.x_at
        x_lane.append(at + column_warp * (2 * plan.half_pitch))

    # -- the loop ------------------------------------------------------------------------------

    own = range(2 * per_half // 4)
    zero = m.number(0.0)

    def scales_of(round_, turn, r):
        """Scales of the chunk's blocks 4i + t in row g of the unit."""
        unit = m.minimum(unit_of(round_, r), count - 1)
        row = unit * UNIT + g
        made = []
        for i in own:
            block = (turn * cfg.split + column_warp) * (2 * per_half) + (t + 4 * i)
            block = m.minimum(block, plan.blocks - 1)
            code = m.shared_load_byte(row * plan.absmax_pitch + block + plan.absmax_at)
            (value,) = m.shared_load(m.prmt(code, table_lane, 0x5504), offset=128)
            which = ((first_row + row) * plan.blocks + block) // NESTED_BLOCKSIZE - first_nested
            (scale,) = m.shared_load((which << 2) + plan.nested_at)
            made.append(m.fma(m.as_float(value), m.as_float(scale), shift))
        return made

    def one_chunk(round_, turn, totals):
        item = round_ * plan.turns + turn
        slot, barrier_round = item % cfg.stages, item // cfg.stages
        m.bulk_wait(barriers + slot * 8, barrier_round & 1)
        stage = ring + slot * plan.stage_bytes + g * plan.code_pitch + t * 8
        scales = [scales_of(round_, turn, r) for r in tiles]
        at_x = [a + turn * (2 * cfg.split * plan.half_pitch) for a in x_lane]
        totals = list(totals)
        sums = {}
        for b in range(per_half):
            xs = [
                m.shared_load(at, 4, offset=128 * b) + m.shared_load(at, 4, offset=128 * b + 16)
                for at in at_x
            ]
            for r in tiles:
                words = [
                    m.shared_load(
                        stage,
                        2,
                        offset=r * UNIT * plan.code_pitch + h * (cfg.half // 2) + 32 * b,
                    )
                    for h in (0, 1)
                ]
                for group in range(plan.groups):
                    sums[r, b, group] = [zero] * 4
                for j in range(4):
                    a = []
                    for byte in (2 * j, 2 * j + 1):
                        for h in (0, 1):
                            selector = 0x5504 + ((byte % 4) << 4)
                            a += m.shared_load(m.prmt(words[h][byte // 4], table_lane, selector))
                    for group in range(plan.groups):
                        pair = xs[group][2 * j : 2 * j + 2]
                        sums[r, b, group] = m.mma_f16(sums[r, b, group], a, pair)
        for r in tiles:
            for i in own:
                blocks = [divmod(4 * i + e, per_half) for e in range(4)]
                if plan.m == 1:
                    # Every lane of a group has the sums of all four blocks: each scales one.
                    parts = [sums[r, b, 0][3 * h] for h, b in blocks]
                    low = m.where((t & 1) == 0, parts[0], parts[1])
                    high = m.where((t & 1) == 0, parts[2], parts[3])
                    part = m.where(t < 2, low, high)
                    totals[r] = m.fma(part, scales[r][i], totals[r])
                    continue
                for e, (h, b) in enumerate(blocks):
                    scale = m.shuffle_quad(scales[r][i], e)
                    for group in range(plan.groups):
                        at = r * plan.groups + group
                        totals[at] = m.fma(sums[r, b, group][3 * h], scale, totals[at])
        # All lanes have read the stage before it is filled again.
        m.warp_barrier()
        request_if_any(item + cfg.stages, slot)
        return totals

    def one_round(round_, carry):
        totals = [zero] * (cfg.tiles * plan.groups)
        if plan.turns == 1:
            totals = one_chunk(round_, m.word(0), totals)
        else:
            totals = m.loop(plan.turns, lambda turn, c: one_chunk(round_, turn, c), totals)
        for r in tiles:
            for group in range(plan.groups):
                value = totals[r * plan.groups + group]
                back = unscale[min(4 * group, plan.m - 1)]
                if plan.m == 1:
                    value = value + m.shuffle_xor(value, 1)
                    value = value + m.shuffle_xor(value, 2)
                for e in range(1, min(4, plan.m - 4 * group)):
                    back = m.where(t == e, unscale[4 * group + e], back)
                row_x = t + 4 * group
                at = (unit_of(round_, r) * cfg.split + column_warp) * plan.m + row_x
                at = at * (4 * UNIT) + g * 4 + plan.partial_at
                m.shared_store(at, [m.as_word(value * back)], when=row_x < plan.m)
        return carry

    m.loop(rounds, one_round, [])
    m.barrier()
    _write_out(m, plan, tid, first_row, count_rows, bias, out)


def _load_x(m, plan, x, lane, column_warp, row):
    """This lane's part of the warp's columns of one row of x, per turn; zeros past the end."""
    words = plan.chunk // 64
    turns = []
    for turn in range(plan.turns):
        first = ((turn * plan.config.split + column_warp) * 32 + lane) * (2 * words)
        inside = first < plan.k
        got = []
        for part in range(0, words, 4):
            at = m.where(inside, (first + (row * plan.k + 2 * part)) * 2, m.word(0))
            got += m.load(x, at, min(4, words), when=inside)
        turns.append([m.where(inside, w, m.word(0)) for w in got])
    return turns


def _stage_x(m, plan, turns, lane, column_warp, row):
    """Put a row of x into shared memory as float16; returns 1/scale.

    bfloat16 is scaled by the power of two that brings the largest magnitude of the warp's columns
    into [2^14, 2^15): 29 binades below it are then normal numbers.
    """
    unscale = m.number(1.0)
    if plan.x_dtype == "bfloat16":
        peak = m.word(0)
        for got in turns:
            for w in got:
                peak = m.maximum_u16x2(peak, w & 0x7FFF7FFF)
        peak = m.maximum(peak >> 16, peak & 0xFFFF)
        for mask in (16, 8, 4, 2, 1):
            peak = m.maximum(peak, m.shuffle_xor(peak, mask))
        exponent = m.maximum(peak >> 7, 15)
        scale = m.as_float((268 - exponent) << 23)
        unscale = m.as_float((exponent - 14) << 23)
        turns = [
            [
                m.pack(m.as_float(w << 16) * scale, m.as_float(w & 0xFFFF0000) * scale, "float16")
                for w in got
            ]
            for got in turns
        ]
    words = plan.chunk // 64
    for turn, got in enumerate(turns):
        at = (turn * plan.config.split + column_warp) * (2 * plan.half_pitch)
        at = at + (lane >> 4) * plan.half_pitch + (lane & 15) * (4 * words)
        at = at + (plan.x_at + row * plan.x_pitch)
        for part in range(0, words, 4):
            m.shared_store(at, got[part : part + 4], offset=4 * part)
    return unscale


def _write_out(m, plan, tid, first_row, count_rows, bias, out):
    """Add up the warps' shares and store [row of x, row of W] in x's dtype."""
    width = jnp.dtype(plan.x_dtype).itemsize

    def body(turn, carry):
        item = turn * plan.threads + tid
        row_x, row = item // (plan.most_units * UNIT), item % (plan.most_units * UNIT)
        when = (row_x < plan.m) & (row < count_rows)
        at = (row // UNIT) * plan.partial_unit + row_x * (4 * UNIT) + row % UNIT * 4
        at = m.where(when, at, m.word(0)) + plan.partial_at
        total = m.number(0.0)
        for w in range(plan.config.split):
            (part,) = m.shared_load(at, offset=w * plan.m * UNIT * 4)
            total = total + m.as_float(part)
        row = m.where(when, first_row + row, m.word(0))
        if plan.has_bias:
            total = total + m.as_float(m.load(bias, row * 4)[0])
        at = m.where(when, (row_x * plan.n + row) * width, m.word(0))
        m.store(out, at, m.float_bits(total, plan.x_dtype), width, when=when)
        return carry

    m.loop(-(-plan.most_units * UNIT * plan.m // plan.threads), body, [])


def nf4_gemv_ring(
    x: Array,
    codes: Array,
    absmax: Array,
    nested_absmax: Array,
    offset: Array,
    bias: Array | None,
    *,
    layout: Layout,
    config: RingConfig,
) -> Array:
    """`nf4_gemv` on Hopper for double-quantized weights. x: [..., k] bfloat16 or float16.

    Raises:
        ValueError: what this kernel does not do.
    """
    n, k = layout.shape
    rows = math.prod(x.shape[:-1])
    plan = Plan(rows, n, k, str(x.dtype), bias is not None, config)
    problem = why_not_ring(plan)
    if problem:
        raise ValueError(f"implementation is 'mosaic_gpu', but {problem}: use 'triton' or 'xla'")
    inputs = (
        x.reshape(rows, k),
        codes.reshape(-1),
        absmax,
        nested_absmax,
        offset.reshape(1),
        jnp.zeros((1,), jnp.float32) if bias is None else bias.astype(jnp.float32),
        jnp.asarray(lookup_tables(layout.quant_type)),
    )
    y = launch(
        functools.partial(_program, plan),
        jax.ShapeDtypeStruct((rows, n), x.dtype),
        grid=plan.grid,
        warps=plan.config.warps,
        shared_bytes=plan.shared_bytes,
        name="nf4_gemv",
    )(*inputs)
    return y.reshape(*x.shape[:-1], n)


def _program(plan, m, *buffers):
    lane_program(m, plan, *buffers)
