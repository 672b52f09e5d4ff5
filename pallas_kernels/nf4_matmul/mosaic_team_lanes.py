"""How a team of the Hopper matmul shares its decoding: sizes, and what a thread of it does.

Lane programs (see `pallas_kernels.simt`) of the feeding warpgroups; `mosaic_team` says when each
runs. A group of 128 rows of W by 1024 columns is 2048 blocks of 64 weights, a quantization block
each; the team's threads have one or two of them, in the order in which they lie in memory.
"""

import dataclasses

from pallas_kernels._mosaic import BLOCK, SMS
from pallas_kernels.codebooks import NESTED_BLOCKSIZE
from pallas_kernels.nf4_matmul.mosaic_plan import COMPUTE, MatmulConfig
from pallas_kernels.nf4_matmul.mosaic_table import look_up_absmax, weights_of

GROUP = 16
"""Steps of 64 that a team decodes at a time."""

ROOM = 4
"""Groups in a team's room."""

PIECES = 4
"""Parts of a block of 64 weights, decoded a step apart, so that copies never wait for long."""

RAW = 12
"""Words of a block as it is loaded: codes, its absmax and the nested one's, two that fill up."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """All sizes of one kernel: x [m, contracted], the result [m, n].

    Attributes:
        transposed: whether the weight is [contracted, n], not [n, contracted].
    """

    m: int
    n: int
    contracted: int
    transposed: bool
    dtype: str
    double_quant: bool
    has_bias: bool
    config: MatmulConfig
    rank: int = 0
    """Of the adapter, a multiple of 64; 0 for none."""

    @property
    def steps(self) -> int:
        """Blocks of 64 along the contracted axis."""
        return self.contracted // BLOCK

    @property
    def low_steps(self) -> int:
        """Blocks of 64 along the adapter's rank."""
        return self.rank // BLOCK

    @property
    def all_steps(self) -> int:
        """Of a tile: the adapter's, then the weight's."""
        return self.low_steps + self.steps

    @property
    def groups(self) -> int:
        """Of steps; the last may be shorter."""
        return -(-self.steps // GROUP)

    @property
    def columns(self) -> int:
        """Tiles along n."""
        return -(-self.n // (BLOCK * COMPUTE))

    @property
    def members(self) -> int:
        """Blocks of a team: tiles along m."""
        return -(-self.m // self.config.rows)

    @property
    def teams(self) -> int:
        """As many as run at the same time, if there is work for all."""
        return min(SMS // self.members, self.columns)

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return self.teams * self.members

    @property
    def share(self) -> int:
        """Blocks of 64 weights that a thread decodes of each group, 1 or 2."""
        return -(-GROUP // self.members)

    @property
    def room_shape(self) -> tuple[int, int]:
        """Of one group, decoded: rows of W in the order of `wgmma`'s, or its rows as they are."""
        shape = (BLOCK * COMPUTE, BLOCK * GROUP)
        return shape[::-1] if self.transposed else shape


def load_share(m, plan, member, column, group, codes, absmax, nested):
    """The thread's blocks of 64 weights of a group as they lie there, `RAW` words each.

    A warp's blocks lie one behind the other in memory, 32 bytes of codes each.
    """
    words = []
    for i in range(plan.share):
        block = _weights_of_share(m, plan, member, column, group, i)[0]
        words += m.load(codes, block * 32, 4) + m.load(codes, block * 32, 4, offset=16)
        if plan.double_quant:
            words += [m.load_byte(absmax, block)]
            words += m.load(nested, block // NESTED_BLOCKSIZE * 4)
        else:
            words += [*m.load(absmax, block * 4), m.word(0)]
        words += [m.word(0)] * 2
    return words


def scales_of_share(m, plan, raw, offset):
    """The scales of the thread's blocks, of what `load_share` has loaded; four words."""
    scales = []
    for i in range(plan.share):
        absmax, nested = raw[RAW * i + 8 : RAW * i + 10]
        scale = m.as_float(absmax)
        if plan.double_quant:
            value = look_up_absmax(m, plan.config, absmax)
            scale = m.add_unfused(value * m.as_float(nested), m.as_float(offset[0]))
        scales.append(m.as_word(scale))
    return scales + [m.word(0)] * (4 - plan.share)


def store_piece(m, plan, piece, raw, scales, member, column, group, place, room):
    """Decode 16 weights of each of the thread's blocks and store them at the group's `place`.

    They become what the reference makes of them: table and scale are float32, rounded once.
    """
    for i in range(plan.share):
        _, at, inside = _weights_of_share(m, plan, member, column, group, i)
        at = at + place * (2 * BLOCK * COMPUTE * BLOCK * GROUP) + piece * 32
        words = raw[RAW * i + 2 * piece : RAW * i + 2 * piece + 2]
        pairs = weights_of(m, plan.config, [w >> 8 * b & 0xFF for w in words for b in range(4)])
        scale = m.as_float(scales[i])
        pairs = [(even * scale, odd * scale) for even, odd in pairs]
        if plan.transposed:
            even, odd = zip(*pairs, strict=True)
            flat = [*even, *odd]
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
        packed = [m.pack(low, high, plan.dtype) for low, high in pairs]
        for half in (0, 1):
            m.store_words(room, at + 16 * half, packed[4 * half : 4 * half + 4], when=inside)


def publish(m):
    """What the warpgroup has stored can be copied, by whoever learns of it."""
    m.copies_see_memory()
    m.warpgroup_barrier()


def await_members(m, counted, team, value):
    """Wait until the team has been counted so often; what was stored before can be copied."""
    m.await_at_least(counted, team * 4, value)
    m.warpgroup_barrier()
    m.copies_see_memory()


def _weights_of_share(m, plan, member, column, group, i):
    """The i-th block of 64 weights of the thread's share: its number in the weight, its first byte
    in the group's place, and whether there is one.

    Of 16 rows of a tile of yᵀ, row g is W's row 2g and row g + 8 is 2g + 1 (`mosaic_lanes`). So
    rows of the place are exchanged, or for dx a row's columns, which `store_piece` does.
    """
    number = (member * plan.share + i) * 128 + (m.thread & 127)
    inside = number < BLOCK * COMPUTE * GROUP
    if plan.transposed:
        row, half = number // COMPUTE, number % COMPUTE
        w_row, wide = group * (GROUP * BLOCK) + row, plan.n // BLOCK
        inside = inside & (w_row < plan.contracted)
        block = m.minimum(w_row, plan.contracted - 1) * wide
        block = block + m.minimum(column // BLOCK + half, wide - 1)
        return block, number * (2 * BLOCK), inside
    row, step = number // GROUP, number % GROUP
    w_row, w_step = column + row, group * GROUP + step
    inside = inside & (w_step < plan.steps)
    block = m.minimum(w_row, plan.n - 1) * plan.steps + m.minimum(w_step, plan.steps - 1)
    return block, (exchanged(row) * GROUP + step) * (2 * BLOCK), inside


def exchanged(row):
    """Where a row of W stands among the rows of `wgmma`'s tiles."""
    return row // 16 * 16 + row % 2 * 8 + row // 2 % 8
