"""What the Hopper gemv does before and after its loop: x into shared memory, sums out of it."""

import jax.numpy as jnp


def load_x(m, plan, x, lane, warp, row):
    """This lane's part of the warp's columns of one row of x, per turn; zeros past the end."""
    words = plan.chunk // 64
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


def stage_x(m, plan, turns, zero, lane, warp, row):
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
        at = at + (plan.x_at + row * plan.x_stride)
        for part in range(0, words, 4):
            m.shared_store(at, got[part : part + 4], offset=4 * part)
    return unscale


def write_out(m, plan, tid, units, bias, out):
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
