"""What a thread of the Hopper gemv does with the weight: load its part of a chunk, decode it.

Lane (g, t) of a warp (g = lane / 4, t = lane % 4) loads 16 bytes = 32 weights = half a block at
once, of rows g and g + 8 of each tile of 16: t = 0, 1 hold the even block of a step of 128 columns,
t = 2, 3 the odd one.

So a load reads 64 bytes of each of 8 rows of W, and the first-level cache takes a row at a time
(docs/kernel_limits.md). Where x is one row, three of its four columns in the matrix B are free:
then `segments` rows of A can be one row of W, the s-th its s-th 128 columns, multiplied with the
s-th column of B. A load reads longer pieces of fewer rows. Each product stands in the one lane
whose g and t belong to the same segment.
"""

from pallas_kernels._mosaic import BLOCK
from pallas_kernels._mosaic_decoder import look_up_absmax, look_up_pair, select_pairs
from pallas_kernels.codebooks import NESTED_BLOCKSIZE
from pallas_kernels.nf4_gemv.mosaic_plan import STEP


class Reader:
    """One thread's view of the weight; its results are lists by tile `r`, half `h` and step `c`.

    `part`: which of the parts of the columns the block has.
    """

    def __init__(self, m, plan, codes, absmax, nested, part):
        self.m, self.plan = m, plan
        self.codes, self.absmax, self.nested = codes, absmax, nested
        lane, self.warp = m.thread & 31, m.thread >> 5
        self.g, self.t = lane >> 2, lane & 3
        self.odd = self.t >> 1
        self.segments = plan.config.segments
        several = self.segments > 1
        self.segment = self.g & (self.segments - 1) if several else 0
        self.row = self.g // self.segments if several else self.g
        self.table_lane = lane << 2
        self.tiles, self.steps = range(plan.config.tiles), range(plan.config.steps)
        self.first_turn = part * plan.turns
        self.whole_chunks = plan.k % plan.chunk == 0
        self.wide_absmax = self.whole_chunks and plan.chunk // BLOCK in (4, 8, 16)

    def rows(self, unit):
        """Per tile and half the thread's row of W; past the end, the last one."""
        m, plan = self.m, self.plan
        first = unit * plan.rows + self.row
        return [
            [m.minimum(first + self.below(r, h), plan.n - 1) for h in (0, 1)] for r in self.tiles
        ]

    def below(self, r, h):
        """How far the row of tile r and half h is below the lane's first."""
        return (16 * r + 8 * h) // self.segments

    def place(self, unit, turn):
        """Where the warp's `turn`-th chunk of the unit's rows is: {"codes": …, "blocks": …}.

        Past the end of a row, its last columns: x is zero there.
        """
        m, plan = self.m, self.plan
        row_bytes, blocks = plan.k // 2, plan.k // BLOCK
        chunk = (turn + self.first_turn) * plan.config.warps + self.warp
        within = self.t * 16 + self.segment * (STEP // 2)
        if self.whole_chunks:
            chunk = m.minimum(chunk, -(-plan.k // plan.chunk) - 1)
            column = [chunk * (plan.chunk // 2) + within]
        else:
            first = chunk * (plan.chunk // 2) + within
            column = [m.minimum(first + c * (plan.step // 2), row_bytes - 16) for c in self.steps]
        rows = self.rows(unit)
        return {
            "codes": [[[row * row_bytes + b for b in column] for row in pair] for pair in rows],
            "blocks": [
                [
                    [row * blocks + (b // (BLOCK // 2)) for b in column]
                    if not self.whole_chunks
                    else [row * blocks + chunk * (plan.chunk // BLOCK)]
                    for row in pair
                ]
                for pair in rows
            ],
        }

    def load_codes(self, where, r, c, when):
        """Per half four words of codes."""
        out = []
        for h in (0, 1):
            at = where["codes"][r][h]
            if self.whole_chunks:
                out.append(
                    self.m.load(self.codes, at[0], 4, offset=c * (self.plan.step // 2), when=when)
                )
            else:
                out.append(self.m.load(self.codes, at[c], 4, when=when))
        return out

    def decode(self, halves, j, planes):
        """The j-th pair of the 16 bytes of both halves, as `mma`'s fragment: two bytes by half."""
        if j < self.plan.config.selects:
            by_half = [select_pairs(self.m, words[j // 2], j % 2, planes) for words in halves]
            return [pairs[i] for i in (0, 1) for pairs in by_half]
        return [
            look_up_pair(self.m, words[j // 2], 2 * (j % 2) + i, self.table_lane)
            for i in (0, 1)
            for words in halves
        ]

    def load_absmax(self, where, when):
        """Per tile and half, in one list: what the chunk's scales are decoded from, as words."""
        m, plan, out = self.m, self.plan, []
        for r in self.tiles:
            for h in (0, 1):
                at = where["blocks"][r][h]
                if plan.double_quant and self.wide_absmax:
                    words = self._load_words(at[0], when)
                    words += m.load(self.nested, (at[0] // NESTED_BLOCKSIZE) * 4, when=when)
                else:
                    words = []
                    for c in self.steps:
                        block = at[0] + self._block(c) if self.whole_chunks else at[c]
                        if plan.double_quant:
                            words.append(m.load_byte(self.absmax, block, when=when))
                            words += m.load(self.nested, (block // NESTED_BLOCKSIZE) * 4, when=when)
                        else:
                            words += m.load(self.absmax, block * 4, when=when)
                out.append(words)
        return out

    def _load_words(self, first, when):
        """The absmax codes of a chunk from its first on.

        A word is four blocks: two steps, a step of two segments, or half a step of four.
        """
        if self.segments < 4:
            return self.m.load(self.absmax, first, self.plan.chunk // 256, when=when)
        at, step = first + (self.segment >> 1) * 4, self.plan.step // BLOCK
        return [
            word
            for c in self.steps
            for word in self.m.load(self.absmax, at, offset=c * step, when=when)
        ]

    def _block(self, c):
        """The lane's block of step c, counted from the chunk's first."""
        return self.odd + (self.segment * 2 + c * (self.plan.step // BLOCK))

    def scales(self, words, offset):
        """[tile][half][step] float32, from the words of `load_absmax` and the float32 `offset`."""
        m, out = self.m, []
        for w in words:
            made = []
            for c in self.steps:
                if not self.plan.double_quant:
                    made.append(m.as_float(w[c]))
                    continue
                if self.wide_absmax and self.segments == 1:
                    code, block_scale, byte = w[c // 2], w[-1], self.odd + 2 * (c % 2)
                elif self.wide_absmax:
                    code, block_scale, byte = w[c], w[-1], self.odd + (self.segment & 1) * 2
                else:
                    code, block_scale, byte = w[2 * c], w[2 * c + 1], 0
                value = look_up_absmax(m, code, byte, self.table_lane)
                made.append(m.fma(value, m.as_float(block_scale), offset))
            out.append(made)
        return [out[2 * r : 2 * r + 2] for r in self.tiles]

    # -- sums: where the products of this lane's rows stand ----------------------------------------

    def own(self, pair, column):
        """Of a fragment's two columns the lane's: with segments, of its own segment's x."""
        if self.segments == 1:
            return pair[column]
        return self.m.where((self.segment & 1) == 0, pair[0], pair[1])

    def whole(self, total):
        """A row's sum over even and odd blocks, and over segments, in the lanes that store it."""
        m = self.m
        if self.segments == 1:
            return total + m.shuffle_xor(total, 2)
        # The other lanes multiplied their segment of W with another segment of x.
        total = m.where((self.t & 1) == (self.segment >> 1), total, m.number(0.0))
        for mask in (1, 2, 4, 8)[: 2 + self.segments // 2]:
            total = total + m.shuffle_xor(total, mask)
        return total

    def stores(self):
        """Whether the lane stores its rows' sums, of two rows of x or, with segments, of one."""
        if self.segments == 1:
            return self.t < 2
        return (self.t < 1) & (self.segment < 1)
