"""What a thread of the Hopper matmul does: load scales, decode a step of W, store its sums.

Lane programs (see `pallas_kernels.simt`). A warpgroup's fragment is 64 rows of W by 64 columns, one
quantization block a row; a warp has 16 of the rows, a lane two of them. Of a warp's 16 rows of the
fragment, row g is W's row 2g and row g + 8 is 2g + 1: so the two sums that a lane holds for a row
of x are neighbours in y, and a group of 8 lanes stores a full sector.
"""

from pallas_kernels._mosaic import BLOCK
from pallas_kernels.nf4_matmul.mosaic_ring import load_scales
from pallas_kernels.nf4_matmul.mosaic_table import look_up_ahead, weights_of


def load_group(m, plan, first_row, step, absmax, nested):
    """The raw scales of this thread of the feeding warpgroup for a group of steps from `step`.

    A thread for each row of W, from the block of threads' `first_row` on.
    """
    row = m.minimum(first_row + (m.thread & 127), plan.n - 1)
    blocks = plan.k // BLOCK
    return load_scales(m, plan, row * blocks + step, 1, plan.n * blocks, absmax, nested)


def read_codes(m, plan, warpgroup, even, odd):
    """The thread's 16 bytes of a step, a word each, [column / 8][half]: of row 2g + h byte 4j + t.

    `even` and `odd` are the block of threads' even and odd rows, [64, 32] bytes each under the
    32-byte swizzle: the 16-byte chunk c of row r stands at chunk c ^ (r / 4 % 2). So the lanes of a
    warp read from different banks.
    """
    lane = m.thread & 31
    chunk = (lane >> 4) << 4
    first = _pair_of(m, warpgroup) * 32 + (lane & 3)
    at = [first + (chunk ^ upper) for upper in (0, 16)]
    return [
        m.shared_load_byte(at[j // 4], offset=j % 4 * 4, region=tile)
        for j in range(8)
        for tile in (even, odd)
    ]


def find_weights(m, plan, warpgroup, codes, scales):
    """What `scale_weights` needs: what is looked up of the codes, and the thread's two scales."""
    scale = m.shared_load(_pair_of(m, warpgroup) << 3, 2, region=scales)
    return [*look_up_ahead(m, plan.config, codes), *scale, m.word(0), m.word(0)]


def scale_weights(m, plan, found):
    """The `wgmma` fragment of a step: 16 words of two weights in x's dtype, [column / 8][half].

    Register [j][h] of lane (g, t) is columns 8j + 2t and the next, of row 2g + h.
    """
    scale = [m.as_float(w) for w in found[16:18]]
    out = []
    for i, (low, high) in enumerate(weights_of(m, plan.config, found[:16])):
        out.append(m.pack(low * scale[i % 2], high * scale[i % 2], plan.dtype))
    return out


def _pair_of(m, warpgroup):
    """The thread's pair of rows, of the block of threads' 64."""
    return warpgroup * 32 + (m.thread >> 5 & 3) * 8 + ((m.thread & 31) >> 2)


def load_low_rank(m, plan, first_row, step, b):
    """`scale_weights`' fragment of block `step` of the adapter's b [n, rank], as it lies there."""
    lane, warp = m.thread & 31, m.thread >> 5 & 3
    out = []
    for j in range(8):
        for h in (0, 1):
            row = m.minimum(first_row + warp * 16 + (lane >> 2) * 2 + h, plan.n - 1)
            at = (row * plan.rank + step * BLOCK + (lane & 3) * 2) * 2
            out += m.load(b, at, offset=16 * j)
    return out


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
