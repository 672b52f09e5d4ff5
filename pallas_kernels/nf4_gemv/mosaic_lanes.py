"""The Hopper gemv's lane program: what one thread does from the first load to the last store.

Sixteen rows of W are the matrix A of `mma.m16n8k16`, rows of x the matrix B (`mosaic_columns`).

Along k the warps of a block take chunks in turn; a block runs through its tiles of rows without any
barrier, partial sums in shared memory, and adds the warps' shares up at the end, or at the end of a
round where shared memory is short. The loads of a warp's next chunk, of the next unit's first one
as well, are issued before the present one is used.
"""

from pallas_kernels._mosaic_decoder import byte_planes
from pallas_kernels.nf4_gemv.mosaic_columns import columns_of
from pallas_kernels.nf4_gemv.mosaic_ends import load_rows, stage_rows, write_out
from pallas_kernels.nf4_gemv.mosaic_lora import add_slice, load_slice, slices
from pallas_kernels.nf4_gemv.mosaic_weight import Reader


def lane_program(m, plan, x, codes, absmax, nested, offset, bias, tables, *rest):
    """One thread of the kernel on machine `m` (see `pallas_kernels.simt`).

    `rest`: an adapter's xa and b where the plan has a rank, then the result.
    """
    *lora, out = rest
    cfg, tid = plan.config, m.thread
    lane = tid & 31
    block, part = (m.cta, 0) if plan.split == 1 else (m.cta % plan.blocks, m.cta // plan.blocks)
    units = (plan.units - 1 - block) // plan.blocks + 1
    reader = Reader(m, plan, codes, absmax, nested, part)
    columns = columns_of(m, plan, reader)

    # -- before the loop: first loads, tables, x ---------------------------------------------------

    start = reader.place(block, m.word(0))
    held = [[reader.load_codes(start, r, c, None) for r in reader.tiles] for c in reader.steps]
    held_absmax = reader.load_absmax(start, None)
    shift = m.as_float(m.load(offset, m.word(0))[0]) if plan.double_quant else None

    entries, fills = 256 * 16, []
    for first in range(0, entries, plan.threads):
        # Entry at/16: 32 copies of the pair, then 32 copies of the map's value; 16 bytes a thread.
        at = tid + first
        when = at < entries
        fills.append((at, when, m.load(tables, ((at >> 4) * 2 + (at >> 3 & 1)) * 4, when=when)))
    first_rows = load_rows(m, plan, reader, x, lane, 0)
    zeros = (plan.unscale_at - plan.zeros_at) // 16
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
    for row, unscale in stage_rows(m, plan, reader, x, first_rows, late_zero, lane):
        columns.keep(row, unscale)
    m.barrier()

    # -- the loop -------------------------------------------------------------------------------

    zero = m.number(0.0)
    totals_of_all = cfg.tiles * columns.totals

    def pack(held, held_absmax):
        flat = [w for by_c in held for by_r in by_c for half in by_r for w in half]
        return flat + [w for words in held_absmax for w in words]

    def unpack(flat):
        flat = iter(flat)

        def take(n):
            return [next(flat) for _ in range(n)]

        held = [[[take(4), take(4)] for _ in reader.tiles] for _ in reader.steps]
        return held, [take(len(words)) for words in held_absmax]

    def by_tile(totals):
        return [totals[r * columns.totals :][: columns.totals] for r in reader.tiles]

    def one_chunk(unit, turn, held, held_absmax, totals):
        scale = reader.scales(held_absmax, shift)
        last = turn + 1 >= plan.turns
        next_unit = m.where(last, unit + plan.blocks, unit)
        next_turn = m.where(last, m.word(0), turn + 1)
        more = next_unit < plan.units
        where = reader.place(next_unit, next_turn)
        next_absmax = reader.load_absmax(where, more)
        next_held, totals = [], by_tile(totals)
        for c in reader.steps:
            xs = columns.read(turn, c)
            row_held = []
            for r in reader.tiles:
                sums = None
                for j in range(8):
                    sums = columns.multiply(reader.decode(held[c][r], j, planes), xs, j, sums)
                row_held.append(reader.load_codes(where, r, c, more))
                totals[r] = columns.scaled(sums, scale[r], c, totals[r])
            next_held.append(row_held)
        return next_held, next_absmax, [total for tile in totals for total in tile]

    def one_unit(index, slot, flat):
        """The block's `index`-th unit, whose partial sums are the `slot`-th in shared memory."""
        unit = block + index * plan.blocks
        first_slice = load_slice(m, plan, reader, columns, lora, unit, 0) if lora else None

        def body(turn, carry):
            held, held_absmax = unpack(carry[totals_of_all:])
            totals = carry[:totals_of_all]
            held, held_absmax, totals = one_chunk(unit, turn, held, held_absmax, totals)
            return [*totals, *pack(held, held_absmax)]

        carry = [zero] * totals_of_all + list(flat)
        carry = body(m.word(0), carry) if plan.turns == 1 else m.loop(plan.turns, body, carry)
        low = [[[zero] * 4 for _ in range(plan.groups)] for _ in reader.tiles] if lora else None
        for i in range(slices(plan)):
            words = load_slice(m, plan, reader, columns, lora, unit, i) if i else first_slice
            low = add_slice(m, plan, reader, columns, words, i, low)
        for r, totals in zip(reader.tiles, by_tile(carry[:totals_of_all]), strict=True):
            for h, row_x, value, when in columns.results(totals, low[r] if low else None):
                at = ((slot * cfg.warps + reader.warp) * plan.m + row_x) * plan.rows
                at = (at + reader.row + reader.below(r, h)) * 4 + plan.partial_at
                m.shared_store(at, [m.as_word(value)], when=when)
        return list(carry[totals_of_all:])

    def one_round(index, flat):
        first = index * plan.held
        here = m.minimum(units - first, plan.held)
        flat = m.loop(here, lambda i, flat: one_unit(first + i, i, flat), flat)
        m.barrier()
        write_out(m, plan, tid, block, part, first, here, bias, out)
        m.barrier()
        return flat

    flat = pack(held, held_absmax)
    if plan.held < plan.units_per_cta:
        m.loop((units + (plan.held - 1)) // plan.held, one_round, flat)
    else:
        m.loop(units, lambda i, flat: one_unit(i, i, flat), flat)
        m.barrier()
        write_out(m, plan, tid, block, part, 0, units, bias, out)
