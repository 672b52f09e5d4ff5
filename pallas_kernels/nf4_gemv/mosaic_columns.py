"""How rows of x stand in the matrix B of `mma.m16n8k16`, and whose sums its result then holds.

The lanes of an instruction hold weights of two blocks of 64 (`mosaic_weight`), which have different
scales, and its sum runs over both. So that a scale is applied once per 64 weights, in float32, the
two sums have to be told apart:

- `Apart`, for up to four rows of x at a time: columns 0–3 of B see the even blocks (their rows of B
  for odd blocks are zero), columns 4–7 the odd ones. One instruction for 4 rows.
- `Together`, for up to eight: every column is a row of x, and the instruction runs twice, once with
  all of B and once with its even blocks alone. Even blocks' sum · their scale + (sum of all - even
  blocks' sum) · the odd ones' scale. Two instructions for 8 rows: as many, but no lane reads zeros,
  the lanes of a fragment share the sums evenly, and there are half as many of those.
"""

from pallas_kernels.nf4_gemv.mosaic_plan import STEP


def columns_of(m, plan, reader):
    """The plan's way to multiply; both have the methods of `Apart`."""
    return (Together if plan.config.together == 8 else Apart)(m, plan, reader)


class Apart:
    """Even and odd blocks in columns of their own."""

    def __init__(self, m, plan, reader):
        self.m, self.plan, self.reader = m, plan, reader
        self.columns = (0,) if plan.m == 1 else (0, 1)
        self.totals = 2 * plan.groups * len(self.columns)
        self.unscale = []
        self.starts, self.strides, self.active = [], [], []
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
            self.starts.append(m.where(real, at, zero + plan.zeros_at))
            turn = m.word(plan.x_bytes(plan.config.warps * plan.chunk))
            self.strides.append(m.where(real, turn, m.word(0)))
            self.active.append(real if plan.config.skip_zeros else None)

    def keep(self, row, unscale):
        """Take the inverse of the scale of a row of x, in the order of the rows."""
        self.unscale.append(unscale)

    def row_of_b(self, group):
        """The row of x in this lane's column of B, and whether it is one."""
        row_x = self.reader.g + 4 * group
        return row_x, (self.reader.g < 4) & (row_x < self.plan.m)

    def read(self, turn, c):
        """Per group of rows of x this lane's column of B for step c: 16 words."""
        m, plan, out = self.m, self.plan, []
        for start, stride, when in zip(self.starts, self.strides, self.active, strict=True):
            at = start + turn * stride
            column = [
                m.shared_load(at, 4, offset=c * plan.x_bytes(plan.step) + 16 * j, when=when)
                for j in range(4)
            ]
            out.append([word for words in column for word in words])
        return out

    def multiply(self, a, xs, j, sums):
        """sums + the j-th of a step's eight fragments, A, times its part of `read`."""
        sums = sums or [[self.m.number(0.0)] * 4 for _ in xs]
        return [
            self.m.mma(here, a, x[2 * j : 2 * j + 2], "float16")
            for here, x in zip(sums, xs, strict=True)
        ]

    def scaled(self, sums, scale, c, totals):
        """totals + sums · scales: `scale` [half][step] is the lane's own, of a tile."""
        parts = (
            (h, self.reader.own(here[2 * h : 2 * h + 2], column))
            for here in sums
            for h in (0, 1)
            for column in self.columns
        )
        return [
            self.m.fma(part, scale[h][c], total)
            for (h, part), total in zip(parts, totals, strict=True)
        ]

    def results(self, totals, low):
        """A tile's sums, as (half, row of x, value, which lanes store it); `low` joins them.

        `low`: per group of rows of x an adapter's fragment, or None.
        """
        m, plan, reader = self.m, self.plan, self.reader
        totals = iter(totals)
        for group in range(plan.groups):
            for h in (0, 1):
                for column in self.columns:
                    value = reader.whole(next(totals))
                    row_x = 2 * reader.t + (4 * group + column)
                    back = self.unscale[min(4 * group + column, plan.m - 1)]
                    other = 4 * group + column + 2
                    if other < plan.m:
                        back = m.where(reader.t == 1, self.unscale[other], back)
                    value = value * back
                    if low:
                        value = value + low[group][2 * h + column]
                    yield h, row_x, value, reader.stores() & (row_x < plan.m)


class Together:
    """Eight rows in eight columns; the odd blocks' sums are what the even ones leave of all."""

    def __init__(self, m, plan, reader):
        self.m, self.plan, self.reader = m, plan, reader
        self.totals = 4 * plan.groups
        self.even = m.where(reader.odd == 0, m.word(0xFFFFFFFF), m.word(0))
        # A lane's 64 bytes of x are two halves, and lanes of odd blocks have them the other way
        # round: so the eight lanes that are served at a time read from different banks.
        half, self.starts = reader.odd * 32, []
        for group in range(plan.groups):
            row_x = m.minimum(reader.g + 8 * group, plan.m - 1)
            at = row_x * plan.x_stride + reader.warp * plan.x_bytes(plan.chunk)
            at = at + (reader.t * 64 + plan.x_at)
            self.starts.append((at + half, at + (32 - half)))

    def _unscale_at(self, row):
        return (self.reader.warp * self.plan.m + row) * 4 + self.plan.unscale_at

    def keep(self, row, unscale):
        """As `Apart.keep`, in shared memory: up to 16 registers are too many."""
        lane = self.m.thread & 31
        at = self._unscale_at(row)
        self.m.shared_store(at, [self.m.as_word(unscale)], when=lane == 0)

    def row_of_b(self, group):
        """As `Apart.row_of_b`."""
        row_x = self.reader.g + 8 * group
        return row_x, row_x < self.plan.m

    def read(self, turn, c):
        """As `Apart.read`."""
        m, plan = self.m, self.plan
        past = turn * plan.x_bytes(plan.config.warps * plan.chunk)
        step = c * plan.x_bytes(plan.step)
        return [
            [
                word
                for start in halves
                for j in (0, 1)
                for word in m.shared_load(start + past, 4, offset=step + 16 * j)
            ]
            for halves in self.starts
        ]

    def multiply(self, a, xs, j, sums):
        """As `Apart.multiply`; per group the sum of all blocks and of the even ones."""
        sums = sums or [([self.m.number(0.0)] * 4,) * 2 for _ in xs]
        out = []
        for (every, even), x in zip(sums, xs, strict=True):
            b = x[2 * j : 2 * j + 2]
            masked = [word & self.even for word in b]
            out.append((self.m.mma(every, a, b, "float16"), self.m.mma(even, a, masked, "float16")))
        return out

    def scaled(self, sums, scale, c, totals):
        """As `Apart.scaled`; the other block's scale is a neighbour's."""
        m, odd = self.m, self.reader.odd == 1
        scales = []
        for h in (0, 1):
            own = scale[h][c]
            other = m.shuffle_xor(own, 2)
            of_odd, of_even = m.where(odd, own, other), m.where(odd, other, own)
            scales.append((of_odd, m.fma(of_odd, m.number(-1.0), of_even)))
        out = []
        for group, (every, even) in enumerate(sums):
            for i in range(4):
                of_odd, more = scales[i // 2]
                total = m.fma(even[i], more, totals[4 * group + i])
                out.append(m.fma(every[i], of_odd, total))
        return out

    def results(self, totals, low):
        """As `Apart.results`."""
        m, plan = self.m, self.plan
        for group in range(plan.groups):
            for i in range(4):
                row_x = 2 * self.reader.t + (8 * group + i % 2)
                real = row_x < plan.m
                (back,) = m.shared_load(self._unscale_at(m.minimum(row_x, plan.m - 1)))
                value = totals[4 * group + i] * m.as_float(back)
                if low:
                    value = value + low[group][i]
                yield i // 2, row_x, value, real
