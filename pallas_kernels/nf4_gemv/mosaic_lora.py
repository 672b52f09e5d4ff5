"""The adapter's part of the Hopper gemv, xa · bᵀ: a little more of the same sum.

The warps of a block take slices of 16 of the rank in turn; a slice is one `mma` per tile of 16
rows of W, and its sums join the warp's own partial sums. Of a slice, lane t holds elements 4t to
4t + 3 of a row, 8 bytes, and gives them to the instruction as its k = 2t, 2t + 1, 2t + 8, 2t + 9:
the terms of a sum may have any order, if only both matrices agree.

The first slice is loaded before the loop over the unit's chunks and waits in registers, 4 words per
tile and 2 per group of rows of x; ranks above 16 per warp load the rest when they need it.
"""

SLICE = 16


def slices(plan):
    """Slices that a warp takes."""
    return -(-plan.rank // (SLICE * plan.config.warps))


def load_slice(m, plan, reader, columns, lora, unit, turn):
    """Words of the warp's `turn`-th slice: per tile and half of b's rows, per group of xa's rows.

    Undefined past the rank's end and past x's last row.
    """
    xa, b = lora
    column, inside = _column(m, plan, reader, turn)
    rows = reader.rows(unit)
    of_b = [
        [m.load(b, (row * plan.rank + column) * 2, 2, when=inside) for row in pair] for pair in rows
    ]
    of_xa = []
    for group in range(plan.groups):
        row_x, real = columns.row_of_b(group)
        of_xa.append(m.load(xa, (row_x * plan.rank + column) * 2, 2, when=inside & real))
    return of_b, of_xa


def add_slice(m, plan, reader, columns, held, turn, sums):
    """sums[tile][group] += the slice's products, float32 fragments."""
    of_b, of_xa = held
    _, inside = _column(m, plan, reader, turn)
    nothing = m.word(0)
    right = []
    for group, words in enumerate(of_xa):
        _, real = columns.row_of_b(group)
        right.append([m.where(inside & real, w, nothing) for w in words])
    out = []
    for halves, by_group in zip(of_b, sums, strict=True):
        left = [m.where(inside, halves[h][i], nothing) for i in (0, 1) for h in (0, 1)]
        out.append([m.mma(c, left, x, plan.x_dtype) for c, x in zip(by_group, right, strict=True)])
    return out


def _column(m, plan, reader, turn):
    """This lane's first element of the slice, and whether the rank reaches it."""
    column = (reader.warp + turn * plan.config.warps) * SLICE + reader.t * 4
    return column, column < plan.rank
