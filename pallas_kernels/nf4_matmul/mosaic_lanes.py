"""What a thread of the Hopper matmul does: load a block of W, decode it, store its sums.

Lane programs (see `pallas_kernels.simt`). A warpgroup's fragment is 64 rows of W by 64 columns, one
quantization block a row; a warp has 16 of the rows, a lane two of them. Of a warp's 16 rows of the
fragment, row g is W's row 2g and row g + 8 is 2g + 1: so the two sums that a lane holds for a row
of x are neighbours in y, and a group of 8 lanes stores a full sector.

A lane needs byte t of every word of its rows, so the four lanes of a group load the same 32 bytes
(one sector) of a row. A byte becomes two float16 by one look-up in shared memory
(`_mosaic_decoder`); they are scaled in float32 and rounded to x's dtype.
"""

from pallas_kernels._mosaic import BLOCK
from pallas_kernels._mosaic_decoder import look_up_absmax, look_up_pair
from pallas_kernels.codebooks import NESTED_BLOCKSIZE

CODE_WORDS, SCALE_WORDS = 16, 4


def load_block(m, plan, first_row, step, codes, absmax, nested):
    """What a thread needs of its two rows' block `step`: 16 words of codes, 4 for the scales.

    `first_row`: the row of W that the warpgroup's fragment starts with. Rows past the end are
    clamped: their sums are not stored.
    """
    lane, warp = m.thread & 31, m.thread >> 5 & 3
    words, scale_words = [], []
    for h in (0, 1):
        row = m.minimum(first_row + warp * 16 + (lane >> 2) * 2 + h, plan.n - 1)
        at = row * (plan.k // 2) + step * (BLOCK // 2)
        words += m.load(codes, at, 4) + m.load(codes, at, 4, offset=16)
        block = row * (plan.k // BLOCK) + step
        if plan.double_quant:
            scale_words.append(m.load_byte(absmax, block))
            scale_words += m.load(nested, (block // NESTED_BLOCKSIZE) * 4)
        else:
            scale_words += m.load(absmax, block * 4)
            scale_words.append(m.word(0))
    return words + scale_words


def load_offset(m, plan, offset):
    """The mean of the absmax constants, and three words that fill up."""
    return m.load(offset, m.word(0)) + [m.word(0)] * 3


def decode_block(m, plan, words, offset):
    """The `wgmma` fragment of the block: 16 words of two weights in x's dtype, [column / 8][half].

    Register [j][h] of lane (g, t) is columns 8j + 2t and the next, of row 2g + h: byte t of word j.
    """
    lane = m.thread & 31
    table_lane = lane << 2
    scales = []
    for h in (0, 1):
        code, scale = words[CODE_WORDS + 2 * h : CODE_WORDS + 2 * h + 2]
        if plan.double_quant:
            value = look_up_absmax(m, code, 0, table_lane)
            scales.append(m.fma(value, m.as_float(scale), m.as_float(offset[0])))
        else:
            scales.append(m.as_float(code))
    out = []
    for j in range(8):
        for h in (0, 1):
            pair = look_up_pair(m, words[8 * h + j], lane & 3, table_lane)
            low, high = m.half_pair(pair)
            out.append(m.pack(low * scales[h], high * scales[h], plan.dtype))
    return out


def load_low_rank(m, plan, first_row, step, b):
    """`decode_block`'s fragment of block `step` of the adapter's b [n, rank], as it lies there."""
    lane, warp = m.thread & 31, m.thread >> 5 & 3
    out = []
    for j in range(8):
        for h in (0, 1):
            row = m.minimum(first_row + warp * 16 + (lane >> 2) * 2 + h, plan.n - 1)
            at = (row * plan.rank + step * BLOCK + (lane & 3) * 2) * 2
            out += m.load(b, at, offset=16 * j)
    return out


def fill_table(m, tables, threads):
    """Copy the look-up tables to the start of shared memory, 32 copies of each entry."""
    entries = 256 * 16
    for first in range(0, entries, threads):
        at = m.thread + first
        when = at < entries
        word = m.load(tables, ((at >> 4) * 2 + (at >> 3 & 1)) * 4, when=when)
        m.shared_store(at << 4, word * 4, when=when)
    m.barrier()


def store_sums(m, plan, sums, first_row, first_token, bias, out, part=None):
    """Store a warpgroup's sums [64, rows]; `sums[j][h]` are two rows of x, 8j + 2t and the next.

    `part`: of a split sum, which goes to `out` [split · m, n] in float32.
    """
    lane, warp = m.thread & 31, m.thread >> 5 & 3
    row = first_row + warp * 16 + (lane >> 2) * 2
    inside = row < plan.n
    safe = m.minimum(row, plan.n - 2)
    extra = [m.as_float(w) for w in m.load(bias, safe * 4, 2)] if plan.has_bias else None
    for j, by_half in enumerate(sums):
        for e in (0, 1):
            token = first_token + (lane & 3) * 2 + (8 * j + e)
            low, high = by_half[0][e], by_half[1][e]
            if extra:
                low, high = low + extra[0], high + extra[1]
            when = inside & (token < plan.m)
            token = m.where(when, token, m.word(0))
            if part is None:
                at = (token * plan.n + safe) * 2
                m.store(out, at, m.pack(low, high, plan.dtype), 4, when=when)
                continue
            at = ((part * plan.m + token) * plan.n + safe) * 4
            m.store(out, at, m.as_word(low), 4, when=when)
            m.store(out, at + 4, m.as_word(high), 4, when=when)
