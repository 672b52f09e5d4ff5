"""x · Wᵀ for few rows on Hopper: a byte of codes becomes two weights with one look-up.

Reading the codes is all that such a product should cost, so the arithmetic per byte must fit into
the time in which the byte arrives: about 4 instructions per lane. What is done with a byte:

1. `prmt` puts it into the second byte of an address whose first byte is the lane's own offset;
2. `ld.shared` reads a float16 *pair* (the byte's two weights, before scaling) from a table of 256
   entries of which every lane has its own copy, in its own bank: no two lanes ever collide;
3. a quarter of an `mma.m16n8k16` multiplies it with x and adds up in float32. Sixteen rows of W are
   the matrix A; up to four rows of x are the matrix B, twice: columns 0–3 see the even 64-blocks
   (their rows of B for odd blocks are zero), columns 4–7 the odd ones. So one instruction keeps the
   sums of two blocks apart, and the block's scale is applied once per 64 weights, in float32.

Lane (g, t) of a warp (g = lane / 4, t = lane % 4) loads 16 bytes = 32 weights = half a block at
once, of rows g and g + 8 of each tile of 16. Along k the warps of a block take *chunks* in turn; a
block runs through its tiles of rows without any barrier, partial sums in shared memory, and adds
the warps' shares up at the end. x is scaled by a power of two per warp and row, so that bfloat16
becomes float16 without loss.

The absmax of a block is decoded the same way: the 8-bit dynamic map stands beside the pairs, in the
same copies.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels._arguments import Layout
from pallas_kernels._mosaic import check_mosaic
from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED, NESTED_BLOCKSIZE
from pallas_kernels.simt.launch import launch

BLOCK = 64
SMS = 132
STEP = 128  # columns that a warp's 32 lanes cover with one 16-byte load of 8 rows
TABLE_BYTES = 256 * 256
SHARED_LIMIT = 232448 - 2048


@dataclasses.dataclass(frozen=True)
class GemvConfig:
    """How the work is cut; every choice gives the same sums up to their order.

    Attributes:
        warps: warps of a block, a multiple of 4; they share the columns of a row.
        tiles: tiles of 16 rows that a warp works on at a time.
        steps: 128-column steps in a chunk: 2 `steps · tiles` 16-byte loads per lane are in flight.
        ctas: blocks, at most; 0 stands for one per multiprocessor of an H100 or H200.
    """

    warps: int = 8
    tiles: int = 2
    steps: int = 2
    ctas: int = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """All sizes of one kernel: rows of x `m`, a weight [n, k], addresses in shared memory."""

    m: int
    n: int
    k: int
    x_dtype: str
    double_quant: bool
    has_bias: bool
    config: GemvConfig

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.config.warps

    @property
    def rows(self) -> int:
        """Rows of W in a unit of work."""
        return 16 * self.config.tiles

    @property
    def units(self) -> int:
        """Units of work: tiles of rows of W."""
        return -(-self.n // self.rows)

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return min(self.units, self.config.ctas or SMS)

    @property
    def units_per_cta(self) -> int:
        """Units of the busiest block."""
        return -(-self.units // self.grid)

    @property
    def chunk(self) -> int:
        """Columns of a chunk."""
        return STEP * self.config.steps

    @property
    def turns(self) -> int:
        """Chunks that a warp takes of each row."""
        return -(-self.k // (self.chunk * self.config.warps))

    @property
    def groups(self) -> int:
        """Instructions per 16 bytes of codes, four rows of x each."""
        return -(-self.m // 4)

    @property
    def x_stride(self) -> int:
        """Bytes from row to row of x: a multiple of 128 plus 16, so that rows meet other banks."""
        return self.turns * self.config.warps * self.chunk * 2 + 16

    @property
    def zeros_at(self) -> int:
        """Where zeros stand that lanes without a row of x read."""
        return TABLE_BYTES

    @property
    def x_at(self) -> int:
        """Where x stands, float16, [row, chunk's turn, warp, column]."""
        return self.zeros_at + -(-(self.chunk * 2 + 128) // 128) * 128

    @property
    def partial_at(self) -> int:
        """Where the warps' partial sums stand."""
        return self.x_at + -(-self.m * self.x_stride // 128) * 128

    @property
    def partial_unit(self) -> int:
        """Bytes of the partial sums of one unit: [warp, row of x, row of W] float32."""
        return self.config.warps * self.m * self.rows * 4

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory."""
        return self.partial_at + self.units_per_cta * self.partial_unit

    @property
    def efficiency(self) -> float:
        """The share of the busiest warp's work that a perfectly even split would give it."""
        columns = self.k / (self.turns * self.config.warps * self.chunk)
        return columns * self.units / (self.units_per_cta * (self.config.ctas or SMS))


def lane_program(m, plan, x, codes, absmax, nested, offset, bias, tables, out):
    """One thread of the kernel on machine `m` (see `pallas_kernels.simt`)."""
    cfg, tid = plan.config, m.thread
    tiles, steps, warps = range(cfg.tiles), range(cfg.steps), cfg.warps
    lane, warp = tid & 31, tid >> 5
    g, t = lane >> 2, lane & 3
    row_bytes, blocks = plan.k // 2, plan.k // BLOCK
    whole_chunks = plan.k % plan.chunk == 0
    chunks = -(-plan.k // plan.chunk)
    units = (plan.units - 1 - m.cta) // plan.grid + 1
    table_lane = lane << 2

    # -- loads of one chunk: the `turn`-th of this warp, in unit `unit` ------------------------

    def rows_of(unit):
        first = unit * plan.rows + g
        return [[m.minimum(first + (16 * r + 8 * h), plan.n - 1) for h in (0, 1)] for r in tiles]

    def place(unit, turn):
        """Where the chunk's codes and scales are; past the end of a row, its last columns."""
        chunk = turn * warps + warp
        if whole_chunks:
            chunk = m.minimum(chunk, chunks - 1)
            column = [chunk * (plan.chunk // 2) + t * 16]
        else:
            first = chunk * (plan.chunk // 2) + t * 16
            column = [m.minimum(first + c * (STEP // 2), row_bytes - 16) for c in steps]
        rows = rows_of(unit)
        return {
            "codes": [[[row * row_bytes + b for b in column] for row in pair] for pair in rows],
            "blocks": [
                [
                    [row * blocks + (b // (BLOCK // 2)) for b in column]
                    if not whole_chunks
                    else [row * blocks + chunk * (plan.chunk // BLOCK)]
                    for row in pair
                ]
                for pair in rows
            ],
        }

    def load_codes(where, r, c, when):
        out = []
        for h in (0, 1):
            at = where["codes"][r][h]
            if whole_chunks:
                out.append(m.load(codes, at[0], 4, offset=c * (STEP // 2), when=when))
            else:
                out.append(m.load(codes, at[c], 4, when=when))
        return out

    wide_absmax = whole_chunks and plan.chunk // BLOCK in (4, 8)

    def load_absmax(where, when):
        """Per tile and half: what the chunk's scales are decoded from, as words."""
        out = []
        for r in tiles:
            for h in (0, 1):
                at = where["blocks"][r][h]
                if plan.double_quant and wide_absmax:
                    words = m.load(absmax, at[0], plan.chunk // 256, when=when)
                    words += m.load(nested, (at[0] // NESTED_BLOCKSIZE) * 4, when=when)
                else:
                    words = []
                    for c in steps:
                        block = at[0] + (2 * c + (t >> 1)) if whole_chunks else at[c]
                        if plan.double_quant:
                            words.append(m.load_byte(absmax, block, when=when))
                            words += m.load(nested, (block // NESTED_BLOCKSIZE) * 4, when=when)
                        else:
                            words += m.load(absmax, block * 4, when=when)
                out.append(words)
        return out

    odd = t >> 1

    def scales(words):
        """[tile][half][step] float32."""
        out = []
        for index in range(2 * cfg.tiles):
            w, made = words[index], []
            for c in steps:
                if not plan.double_quant:
                    made.append(m.as_float(w[c]))
                    continue
                if wide_absmax:
                    code, block_scale = w[c // 2], w[-1]
                    selector = 0x5504 + ((odd + 2 * (c % 2)) << 4)
                else:
                    code, block_scale, selector = w[2 * c], w[2 * c + 1], 0x5504
                (value,) = m.shared_load(m.prmt(code, table_lane, selector), offset=128)
                made.append(m.fma(m.as_float(value), m.as_float(block_scale), shift))
            out.append(made)
        return [out[2 * r : 2 * r + 2] for r in tiles]

    # -- before the loop: first loads, tables, x ---------------------------------------------------

    start = place(m.cta, m.word(0))
    held = [[load_codes(start, r, c, None) for r in tiles] for c in steps]
    held_absmax = load_absmax(start, None)
    shift = m.as_float(m.load(offset, m.word(0))[0]) if plan.double_quant else None

    entries, fills = 256 * 16, []
    for first in range(0, entries, plan.threads):
        # Entry at/16: 32 copies of the pair, then 32 copies of the map's value; 16 bytes a thread.
        at = tid + first
        when = at < entries
        fills.append((at, when, m.load(tables, ((at >> 4) * 2 + (at >> 3 & 1)) * 4, when=when)))
    early = plan.m * plan.turns <= 8
    rows_x = [_load_x(m, plan, x, lane, warp, row) for row in range(plan.m)] if early else None
    zero_words = (plan.x_at - plan.zeros_at) // 16
    m.shared_store((tid << 4) + plan.zeros_at, [m.word(0)] * 4, when=tid < zero_words)
    # Everything above is on its way before anything below waits for a part of it: the compiler
    # moves no load down across a barrier, and nothing up that needs this zero from behind it.
    m.barrier()
    (late_zero,) = m.shared_load(m.word(plan.zeros_at))
    for at, when, word in fills:
        m.shared_store(at << 4, word * 4, when=when)
    unscale = []
    for row in range(plan.m):
        loaded = rows_x[row] if rows_x else _load_x(m, plan, x, lane, warp, row)
        unscale.append(_stage_x(m, plan, loaded, late_zero, lane, warp, row))
    m.barrier()

    # B's column of this lane: row `row_x` of x for even (columns 0–3) or odd blocks, or zeros.
    x_lane, x_stride = [], []
    for group in range(plan.groups):
        row_x = (g & 3) + 4 * group
        real = (odd == (g >> 2)) & (row_x < plan.m)
        at = row_x * plan.x_stride + warp * (plan.chunk * 2) + t * 64 + plan.x_at
        # Zeros are read from banks that the other lanes of the phase leave free.
        zero = (1 - (g >> 1 & 1)) * 32 + plan.zeros_at
        x_lane.append(m.where(real, at, zero))
        x_stride.append(m.where(real, m.word(warps * plan.chunk * 2), m.word(0)))

    # -- the loop -------------------------------------------------------------------------------

    sums = 2 * cfg.tiles * plan.groups * (1 if plan.m == 1 else 2)
    columns = (0,) if plan.m == 1 else (0, 1)
    zero = m.number(0.0)

    def pack(held, held_absmax):
        flat = [w for by_c in held for by_r in by_c for half in by_r for w in half]
        return flat + [w for words in held_absmax for w in words]

    def unpack(flat):
        flat = iter(flat)

        def take(n):
            return [next(flat) for _ in range(n)]

        held = [[[take(4), take(4)] for _ in tiles] for _ in steps]
        return held, [take(len(words)) for words in held_absmax]

    def one_chunk(unit, turn, held, held_absmax, totals):
        scale = scales(held_absmax)
        last = turn + 1 >= plan.turns
        next_unit = m.where(last, unit + plan.grid, unit)
        next_turn = m.where(last, m.word(0), turn + 1)
        more = next_unit < plan.units
        where = place(next_unit, next_turn)
        next_absmax = load_absmax(where, more)
        next_held = []
        totals = list(totals)
        for c in steps:
            xs = []
            for group in range(plan.groups):
                at = x_lane[group] + turn * x_stride[group]
                xs.append(
                    [w for j in range(4) for w in m.shared_load(at, 4, offset=c * 256 + 16 * j)]
                )
            row_held = []
            for r in tiles:
                sums_here = [[zero] * 4 for _ in range(plan.groups)]
                for j in range(8):
                    a = []
                    for byte in (2 * j, 2 * j + 1):
                        for h in (0, 1):
                            word, which = held[c][r][h][byte // 4], byte % 4
                            at = m.prmt(word, table_lane, 0x5504 + (which << 4))
                            a += m.shared_load(at)
                    for group in range(plan.groups):
                        b = xs[group][2 * j : 2 * j + 2]
                        sums_here[group] = m.mma_f16(sums_here[group], a, b)
                row_held.append(load_codes(where, r, c, more))
                i = r * (sums // cfg.tiles)
                for group in range(plan.groups):
                    for h in (0, 1):
                        for column in columns:
                            part = sums_here[group][2 * h + column]
                            totals[i] = m.fma(part, scale[r][h][c], totals[i])
                            i += 1
            next_held.append(row_held)
        return next_held, next_absmax, totals

    def one_unit(index, flat):
        unit = m.cta + index * plan.grid

        def body(turn, carry):
            held, held_absmax = unpack(carry[sums:])
            held, held_absmax, totals = one_chunk(unit, turn, held, held_absmax, carry[:sums])
            return [*totals, *pack(held, held_absmax)]

        carry = [zero] * sums + list(flat)
        carry = body(m.word(0), carry) if plan.turns == 1 else m.loop(plan.turns, body, carry)
        totals, i = carry[:sums], 0
        for r in tiles:
            for group in range(plan.groups):
                for h in (0, 1):
                    for column in columns:
                        value = totals[i] + m.shuffle_xor(totals[i], 2)
                        i += 1
                        row_x = 2 * t + (4 * group + column)
                        back = unscale[min(4 * group + column, plan.m - 1)]
                        other = 4 * group + column + 2
                        if other < plan.m:
                            back = m.where(t == 1, unscale[other], back)
                        at = ((index * warps + warp) * plan.m + row_x) * plan.rows
                        at = (at + g + (16 * r + 8 * h)) * 4 + plan.partial_at
                        when = (t < 2) & (row_x < plan.m)
                        m.shared_store(at, [m.as_word(value * back)], when=when)
        return list(carry[sums:])

    m.loop(units, one_unit, pack(held, held_absmax))
    m.barrier()
    _write_out(m, plan, tid, units, bias, out)


def _load_x(m, plan, x, lane, warp, row):
    """This lane's part of the warp's columns of one row of x, per turn; zeros past the end."""
    words = 2 * plan.config.steps
    turns = []
    for turn in range(plan.turns):
        first = ((turn * plan.config.warps + warp) * 32 + lane) * (2 * words)
        inside = first < plan.k
        got = []
        for part in range(0, words, 4):
            at = (first + (row * plan.k + 2 * part)) * 2
            got += m.load(x, at, min(4, words), when=inside)
        turns.append([m.where(inside, w, m.word(0)) for w in got])
    return turns


def _stage_x(m, plan, turns, zero, lane, warp, row):
    """Put a row of x into shared memory as float16; returns 1/scale.

    A warp reads only what it staged itself. bfloat16 is scaled by the power of two that brings the
    warp's largest magnitude into [2^14, 2^15): 29 binades below it are then normal numbers.
    """
    unscale = m.number(1.0)
    if plan.x_dtype == "bfloat16":
        peak = zero
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
    words = 2 * plan.config.steps
    for turn, got in enumerate(turns):
        at = ((turn * plan.config.warps + warp) * 32 + lane) * (4 * words)
        at = at + (plan.x_at + row * plan.x_stride)
        for part in range(0, words, 4):
            m.shared_store(at, got[part : part + 4], offset=4 * part)
    return unscale


def _write_out(m, plan, tid, units, bias, out):
    """Add up the warps' shares and store [row of x, row of W] in x's dtype."""
    per_unit = plan.m * plan.rows
    width = jnp.dtype(plan.x_dtype).itemsize

    def body(turn, carry):
        item = turn * plan.threads + tid
        index, rest = item // per_unit, item % per_unit
        row_x, row = rest // plan.rows, (m.cta + index * plan.grid) * plan.rows + rest % plan.rows
        when = (item < units * per_unit) & (row < plan.n)
        at = m.where(when, index * plan.partial_unit + rest * 4, m.word(0)) + plan.partial_at
        total = m.number(0.0)
        for w in range(plan.config.warps):
            (part,) = m.shared_load(at, offset=w * per_unit * 4)
            total = total + m.as_float(part)
        if plan.has_bias:
            total = total + m.as_float(m.load(bias, m.where(when, row, m.word(0)) * 4)[0])
        at = m.where(when, (row_x * plan.n + row) * width, m.word(0))
        m.store(out, at, m.float_bits(total, plan.x_dtype), width, when=when)
        return carry

    m.loop(-(-plan.units_per_cta * per_unit // plan.threads), body, [])


@functools.cache
def lookup_tables(quant_type: str) -> np.ndarray:
    """[256, 2] words: a byte's two float16 weights (even column low), the dynamic map's float32."""
    half = CODEBOOKS[quant_type].astype(np.float16).view(np.uint16).astype(np.uint32)
    byte = np.arange(256)
    pairs = half[byte >> 4] | half[byte & 15] << 16
    return np.stack([pairs, DYNAMIC_SIGNED.view(np.uint32)], 1)


@functools.cache
def choose_config(m: int, n: int, k: int) -> GemvConfig | None:
    """8 warps, unless another way that fits splits the work more evenly by a tenth.

    Measured on an H200 (docs/kernels.md): at an even split 8 warps are fastest, and an uneven one
    costs about its share, as 5120 columns for 8 warps of 256: there, 20 warps are 1.2 times as
    fast. None where the rows of x do not fit into shared memory.
    """
    best, best_score = None, 0.0
    for warps, tiles in ((8, 2), (16, 1), (20, 1), (12, 2)):
        plan = Plan(m, n, k, "bfloat16", True, False, GemvConfig(warps=warps, tiles=tiles))
        if plan.shared_bytes <= SHARED_LIMIT and plan.efficiency > 1.1 * best_score:
            best, best_score = plan.config, plan.efficiency
    return best


def nf4_gemv_mosaic(
    x: Array,
    codes: Array,
    absmax: Array,
    nested_absmax: Array | None,
    offset: Array | None,
    bias: Array | None,
    *,
    layout: Layout,
    config: GemvConfig | None = None,
) -> Array:
    """`nf4_gemv` on Hopper. x: [..., k] bfloat16 or float16, at most 8 rows; see `nf4_matmul`.

    Raises:
        ValueError: what this kernel does not do, and which argument asks for it.
    """
    n, k = layout.shape
    rows = math.prod(x.shape[:-1])
    check_mosaic("nf4_gemv", rows, layout, x.dtype)
    config = config or choose_config(rows, n, k)
    assert config is not None  # or check_mosaic had refused it
    plan = Plan(
        m=rows,
        n=n,
        k=k,
        x_dtype=str(x.dtype),
        double_quant=layout.double_quant,
        has_bias=bias is not None,
        config=config,
    )
    unused = jnp.zeros((1,), jnp.float32)
    inputs = (
        x.reshape(rows, k),
        codes.reshape(-1),
        absmax,
        unused if nested_absmax is None else nested_absmax,
        unused if offset is None else offset.reshape(1),
        unused if bias is None else bias.astype(jnp.float32),
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
