"""What the Hopper gemv does before and after its loop: x into shared memory, sums out of it."""

import jax.numpy as jnp


def _batches(plan):
    """The rows of x, as many at a time as a lane has registers to wait for."""
    words = plan.turns * plan.chunk // 64
    most = 64 if plan.config.warps <= 8 else 16
    several = max(1, most // words)
    return [range(i, min(i + several, plan.m)) for i in range(0, plan.m, several)]


def load_rows(m, plan, reader, x, lane, batch):
    """This lane's part of the rows of x of a batch, per row and turn; past the last batch none."""
    rows = _batches(plan)[batch : batch + 1]
    return [_load_x(m, plan, reader, x, lane, row) for batch in rows for row in batch]


def stage_rows(m, plan, reader, x, loaded, zero, lane):
    """Stage all rows of x, the first batch of which is `loaded`; yields (row, 1/scale).

    The next batch is on its way while one is staged.
    """
    for i, rows in enumerate(_batches(plan)):
        coming = load_rows(m, plan, reader, x, lane, i + 1)
        for row, turns in zip(rows, loaded, strict=True):
            yield row, _stage_x(m, plan, turns, zero, lane, reader.warp, row)
        loaded = coming


def _load_x(m, plan, reader, x, lane, row):
    """This lane's part of the warp's columns of one row of x, per turn; zeros past the end."""
    words = plan.chunk // 64
    turns = []
    for turn in range(plan.turns):
        chunk = (reader.first_turn + turn) * plan.config.warps + reader.warp
        first = (chunk * 32 + lane) * (2 * words)
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
    words = plan.chunk // 64
    for turn, got in enumerate(turns):
        at = ((turn * plan.config.warps + warp) * 32 + lane) * (4 * words)
        if plan.gap:
            at = at + (at >> 8) * plan.gap
        for part in range(0, words, 4):
            piece = at + 4 * part
            if plan.config.together == 8:
                # Of odd blocks' lanes the halves of 64 bytes change places (`mosaic_columns`).
                piece = piece ^ ((piece >> 7 & 1) << 5)
            m.shared_store(piece, got[part : part + 4], offset=plan.x_at + row * plan.x_stride)
    return unscale


def write_out(m, plan, tid, block, part, first, units, bias, out):
    """Add up the warps' shares of `units` units, the block's `first` and those behind it; store.

    [row of x, row of W] in x's dtype, or the part of a split sum, [part, row of x, row of W].
    """
    per_unit = plan.m * plan.rows
    width = jnp.dtype(plan.out_dtype).itemsize

    def body(turn, carry):
        item = turn * plan.threads + tid
        index, rest = item // per_unit, item % per_unit
        row_x, row = rest // plan.rows, (block + (first + index) * plan.blocks) * plan.rows
        row = row + rest % plan.rows
        when = (item < units * per_unit) & (row < plan.n)
        at = m.where(when, index * plan.partial_unit + rest * 4, m.word(0)) + plan.partial_at
        total = m.number(0.0)
        for w in range(plan.config.warps):
            (share,) = m.shared_load(at, offset=w * per_unit * 4)
            total = total + m.as_float(share)
        if plan.has_bias:
            total = total + m.as_float(m.load(bias, m.where(when, row, m.word(0)) * 4)[0])
        at = m.where(when, ((part * plan.m + row_x) * plan.n + row) * width, m.word(0))
        m.store(out, at, m.float_bits(total, plan.out_dtype), width, when=when)
        return carry

    m.loop(-(-plan.held * per_unit // plan.threads), body, [])
