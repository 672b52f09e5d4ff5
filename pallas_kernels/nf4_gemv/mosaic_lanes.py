"""The Hopper gemv's lane program: what one thread does from the first load to the last store.

Sixteen rows of W are the matrix A of `mma.m16n8k16`; up to four rows of x are the matrix B, twice:
columns 0–3 see the even 64-blocks (their rows of B for odd blocks are zero), columns 4–7 the odd
ones. So one instruction keeps the sums of two blocks apart, and the block's scale is applied once
per 64 weights, in float32.

Along k the warps of a block take chunks in turn; a block runs through its tiles of rows without any
barrier, partial sums in shared memory, and adds the warps' shares up at the end. The loads of a
warp's next chunk, of the next unit's first one as well, are issued before the present one is used.
"""

from pallas_kernels._mosaic_decoder import byte_planes
from pallas_kernels.nf4_gemv.mosaic_ends import load_x, stage_x, write_out
from pallas_kernels.nf4_gemv.mosaic_lora import add_slice, load_slice, slices
from pallas_kernels.nf4_gemv.mosaic_plan import STEP
from pallas_kernels.nf4_gemv.mosaic_weight import Reader


def lane_program(m, plan, x, codes, absmax, nested, offset, bias, tables, *rest):
    """One thread of the kernel on machine `m` (see `pallas_kernels.simt`).

    `rest`: an adapter's xa and b where the plan has a rank, then the result.
    """
    *lora, out = rest
    cfg, tid = plan.config, m.thread
    lane, warp = tid & 31, tid >> 5
    units = (plan.units - 1 - m.cta) // plan.grid + 1
    reader = Reader(m, plan, codes, absmax, nested)

    # -- before the loop: first loads, tables, x ---------------------------------------------------

    start = reader.place(m.cta, m.word(0))
    held = [[reader.load_codes(start, r, c, None) for r in reader.tiles] for c in reader.steps]
    held_absmax = reader.load_absmax(start, None)
    shift = m.as_float(m.load(offset, m.word(0))[0]) if plan.double_quant else None

    entries, fills = 256 * 16, []
    for first in range(0, entries, plan.threads):
        # Entry at/16: 32 copies of the pair, then 32 copies of the map's value; 16 bytes a thread.
        at = tid + first
        when = at < entries
        fills.append((at, when, m.load(tables, ((at >> 4) * 2 + (at >> 3 & 1)) * 4, when=when)))
    early = plan.m * plan.turns <= 8
    rows_x = [load_x(m, plan, x, lane, warp, row) for row in range(plan.m)] if early else None
    zeros = (plan.x_at - plan.zeros_at) // 16
    for first in range(0, zeros, plan.threads):
        at = ((tid + first) << 4) + plan.zeros_at
        m.shared_store(at, [m.word(0)] * 4, when=tid + first < zeros)
    # Everything above is on its way before anything below waits for a part of it: the compiler
    # moves no load down across a barrier, and nothing up that needs this zero from behind it.
    m.barrier()
    (late_zero,) = m.shared_load(m.word(plan.zeros_at))
    for at, when, word in fills:
        m.shared_store(at << 4, word * 4, when=when)
    # Added to a zero that the compiler does not know, or it would make the words anew at every use.
    planes = [[late_zero + word for word in plane] for plane in byte_planes(plan.quant_type)]
    unscale = []
    for row in range(plan.m):
        loaded = rows_x[row] if rows_x else load_x(m, plan, x, lane, warp, row)
        unscale.append(stage_x(m, plan, loaded, late_zero, lane, warp, row))
    m.barrier()

    # -- the loop -------------------------------------------------------------------------------

    read_x = _x_columns(m, plan, reader)
    columns = (0,) if plan.m == 1 else (0, 1)
    sums = 2 * cfg.tiles * plan.groups * len(columns)
    zero = m.number(0.0)

    def pack(held, held_absmax):
        flat = [w for by_c in held for by_r in by_c for half in by_r for w in half]
        return flat + [w for words in held_absmax for w in words]

    def unpack(flat):
        flat = iter(flat)

        def take(n):
            return [next(flat) for _ in range(n)]

        held = [[[take(4), take(4)] for _ in reader.tiles] for _ in reader.steps]
        return held, [take(len(words)) for words in held_absmax]

    def one_chunk(unit, turn, held, held_absmax, totals):
        scale = reader.scales(held_absmax, shift)
        last = turn + 1 >= plan.turns
        next_unit = m.where(last, unit + plan.grid, unit)
        next_turn = m.where(last, m.word(0), turn + 1)
        more = next_unit < plan.units
        where = reader.place(next_unit, next_turn)
        next_absmax = reader.load_absmax(where, more)
        next_held = []
        totals = list(totals)
        for c in reader.steps:
            xs = read_x(turn, c)
            row_held = []
            for r in reader.tiles:
                sums_here = [[zero] * 4 for _ in range(plan.groups)]
                for j in range(8):
                    a = reader.decode(held[c][r], j, planes)
                    for group in range(plan.groups):
                        b = xs[group][2 * j : 2 * j + 2]
                        sums_here[group] = m.mma(sums_here[group], a, b, "float16")
                row_held.append(reader.load_codes(where, r, c, more))
                i = r * (sums // cfg.tiles)
                for group in range(plan.groups):
                    for h in (0, 1):
                        for column in columns:
                            part = reader.own(sums_here[group][2 * h : 2 * h + 2], column)
                            totals[i] = m.fma(part, scale[r][h][c], totals[i])
                            i += 1
            next_held.append(row_held)
        return next_held, next_absmax, totals

    def one_unit(index, flat):
        unit = m.cta + index * plan.grid
        first_slice = load_slice(m, plan, reader, lora, unit, 0) if lora else None

        def body(turn, carry):
            held, held_absmax = unpack(carry[sums:])
            held, held_absmax, totals = one_chunk(unit, turn, held, held_absmax, carry[:sums])
            return [*totals, *pack(held, held_absmax)]

        carry = [zero] * sums + list(flat)
        carry = body(m.word(0), carry) if plan.turns == 1 else m.loop(plan.turns, body, carry)
        totals = carry[:sums]
        low = [[[zero] * 4 for _ in range(plan.groups)] for _ in reader.tiles]
        for i in range(slices(plan)):
            words = load_slice(m, plan, reader, lora, unit, i) if i else first_slice
            low = add_slice(m, plan, reader, words, i, low)
        i = 0
        for r in reader.tiles:
            for group in range(plan.groups):
                for h in (0, 1):
                    for column in columns:
                        value = reader.whole(totals[i])
                        i += 1
                        row_x = 2 * reader.t + (4 * group + column)
                        back = unscale[min(4 * group + column, plan.m - 1)]
                        other = 4 * group + column + 2
                        if other < plan.m:
                            back = m.where(reader.t == 1, unscale[other], back)
                        value = value * back
                        if lora:
                            value = value + low[r][group][2 * h + column]
                        at = ((index * cfg.warps + warp) * plan.m + row_x) * plan.rows
                        at = (at + reader.row + reader.below(r, h)) * 4 + plan.partial_at
                        when = reader.stores() & (row_x < plan.m)
                        m.shared_store(at, [m.as_word(value)], when=when)
        return list(carry[sums:])

    m.loop(units, one_unit, pack(held, held_absmax))
    m.barrier()
    write_out(m, plan, tid, units, bias, out)


def _x_columns(m, plan, reader):
    """A function (turn, step) -> per group of four rows of x, this lane's column of B: 16 words.

    The column is a row of x for even (columns 0–3) or odd blocks, or zeros: read from memory, or
    made by lanes that sit the read out.
    """
    starts, strides, active = [], [], []
    for group in range(plan.groups):
        row_x = (reader.g & 3) + 4 * group
        # With segments the four columns are those of the one row, 128 elements apart.
        several = plan.config.segments > 1
        real = (reader.odd == (reader.g >> 2)) & (
            row_x < (plan.config.segments if several else plan.m)
        )
        at = (
            row_x * (plan.x_bytes(STEP) if several else plan.x_stride)
            + reader.warp * plan.x_bytes(plan.chunk)
            + reader.t * 64
            + plan.x_at
        )
        # Zeros are read from banks that the other lanes of the phase leave free.
        zero = m.word(16) if several else (1 - (reader.g >> 1 & 1)) * 32
        starts.append(m.where(real, at, zero + plan.zeros_at))
        turn = m.word(plan.x_bytes(plan.config.warps * plan.chunk))
        strides.append(m.where(real, turn, m.word(0)))
        active.append(real if plan.config.skip_zeros else None)

    def read(turn, c):
        out = []
        for start, stride, when in zip(starts, strides, active, strict=True):
            at = start + turn * stride
            column = [
                m.shared_load(at, 4, offset=c * plan.x_bytes(plan.step) + 16 * j, when=when)
                for j in range(4)
            ]
            out.append([word for words in column for word in words])
        return out

    return read
