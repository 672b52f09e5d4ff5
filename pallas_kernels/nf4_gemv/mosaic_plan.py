"""How the Hopper gemv is cut: its configuration, and all sizes and addresses that follow from it.

A *unit* of work is `16 · tiles` rows of W; the warps of a block share a unit's columns and take
*chunks* of `128 · steps` of them in turn (with `segments`, so many times fewer rows and more
columns). Shared memory holds, in this order, the look-up tables, zeros, the scales of x, x as
float16, and the partial sums of the block's units, or of so many as fit: a *round*. Where x does
not fit, the sum is split: a block has a part of the columns, of x and of W.
"""

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import replace

import jax

from pallas_kernels._arguments import check_fields, check_kinds
from pallas_kernels._mosaic import SHARED_LIMIT, SMS
from pallas_kernels._mosaic_decoder import TABLE_BYTES

STARTS_EARLY = jax.__version_info__ >= (0, 11)
"""Whether JAX tells the driver that a kernel waits for the one in front of it by itself."""

STEP = 128  # columns that a warp's 32 lanes cover with one 16-byte load of 8 rows


@dataclasses.dataclass(frozen=True)
class GemvConfig:
    """How the work is cut; every choice gives the same sums up to their order.

    Attributes:
        warps: warps of a block, a multiple of 4; they share the columns of a row.
        tiles: tiles of 16 rows that a warp works on at a time.
        steps: 128-column steps in a chunk: 2 `steps · tiles` 16-byte loads per lane are in flight.
        ctas: blocks, at most; 0 stands for one per multiprocessor of an H100 or H200.
        selects: of the 8 pairs of bytes that a lane loads at once, those decoded by selects in
            registers instead of look-ups in shared memory.
        skip_zeros: lanes without a row of x read nothing, instead of zeros: for 1 or 2 rows of x
            (or segments) half of the quarters of a warp, in which a 16-byte read is served, fall
            away.
        segments: for one row of x, 1, 2 or 4: rows of the matrix A that are one row of W, each with
            its own 128 of `128 · segments` columns, so that a load touches fewer rows of W.
        together: rows of x that are multiplied at a time, 4 or 8 (`mosaic_columns`).
        split: blocks that share a unit, each with a part of the columns; the parts of the sum are
            added up afterwards. 0 stands for the fewest whose part of x fits into shared memory.
        early: the kernel starts before the one in front of it has ended (`mosaic_early`); before
            jax 0.11 it does not.
    """

    warps: int = 8
    tiles: int = 2
    steps: int = 2
    ctas: int = 0
    selects: int = 0
    skip_zeros: bool = False
    segments: int = 1
    together: int = 4
    split: int = 0
    early: bool = False

    def __post_init__(self) -> None:
        """A ValueError for what would be refused, or misaligned, on the card."""
        check_kinds(self)
        check_fields(
            self,
            warps=(self.warps in range(4, 33, 4), "a multiple of 4, up to 32"),
            tiles=(self.tiles >= 1, "1 or more"),
            steps=(self.steps in (1, 2, 4, 8), "1, 2, 4 or 8"),
            ctas=(self.ctas >= 0, "0 or more"),
            selects=(self.selects in range(9), "0 to 8"),
            segments=(self.segments in (1, 2, 4), "1, 2 or 4"),
            together=(self.together in (4, 8), "4 or 8"),
            split=(self.split >= 0, "0 or more"),
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All sizes of one kernel: rows of x `m`, a weight [n, k], addresses in shared memory."""

    m: int
    n: int
    k: int
    x_dtype: str
    double_quant: bool
    has_bias: bool
    config: GemvConfig
    rank: int = 0
    """Of the adapter, a multiple of 4; 0 for none."""
    quant_type: str = "nf4"
    """Asked only for selects: look-ups read their table from an argument."""

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 32 * self.config.warps

    @property
    def rows(self) -> int:
        """Rows of W in a unit of work."""
        return 16 * self.config.tiles // self.config.segments

    @property
    def units(self) -> int:
        """Units of work: tiles of rows of W."""
        return -(-self.n // self.rows)

    @property
    def blocks(self) -> int:
        """Blocks of threads that have the same part of the columns."""
        return min(self.units, max(1, (self.config.ctas or SMS) // self.split))

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return self.blocks * self.split

    @property
    def units_per_cta(self) -> int:
        """Units of the busiest block."""
        return -(-self.units // self.blocks)

    @property
    def held(self) -> int:
        """Units of a round, whose partial sums are in shared memory at one time."""
        fit = (SHARED_LIMIT - self.partial_at) // self.partial_unit
        return min(self.units_per_cta, max(1, fit))

    @property
    def chunk(self) -> int:
        """Columns of a chunk."""
        return self.step * self.config.steps

    @property
    def step(self) -> int:
        """Columns of W that a load covers."""
        return STEP * self.config.segments

    @property
    def turns(self) -> int:
        """Chunks that a warp takes of its block's part of each row."""
        return -(-self._all_turns // self.split)

    @property
    def _all_turns(self) -> int:
        return -(-self.k // (self.chunk * self.config.warps))

    @functools.cached_property
    def split(self) -> int:
        """Parts of the columns, none of them empty."""
        everything = self._all_turns
        wanted = self.config.split or next(
            (s for s in range(1, everything) if self._has_room(-(-everything // s))), everything
        )
        return -(-everything // -(-everything // wanted))

    def _has_room(self, turns: int) -> bool:
        """Whether so many turns of x leave room for the partial sums of a unit."""
        return self.x_at + self.m * self._x_stride(turns) + self.partial_unit <= SHARED_LIMIT - 128

    @property
    def groups(self) -> int:
        """Of the rows of x, those that are multiplied together."""
        return -(-self.m // self.config.together)

    @property
    def products(self) -> int:
        """`mma` per fragment of W."""
        return self.groups * (self.config.together // 4)

    @property
    def out_dtype(self) -> str:
        """Of what the kernel writes: [rows of x, n], or of a split sum [split, rows of x, n]."""
        return self.x_dtype if self.split == 1 else "float32"

    @property
    def gap(self) -> int:
        """Bytes behind every 128 columns of x in shared memory: segments meet other banks."""
        return 32 if self.config.segments > 1 else 0

    def x_bytes(self, columns: int) -> int:
        """Bytes of so many columns of x in shared memory, whole steps of 128."""
        return columns // STEP * (2 * STEP + self.gap)

    @property
    def x_stride(self) -> int:
        """Bytes from row to row of x: a multiple of 32 plus 16, so that rows meet other banks."""
        return self._x_stride(self.turns)

    def _x_stride(self, turns: int) -> int:
        return self.x_bytes(turns * self.config.warps * self.chunk) + 16

    @property
    def zeros_at(self) -> int:
        """Where zeros stand that lanes without a row of x read."""
        return TABLE_BYTES

    @property
    def unscale_at(self) -> int:
        """Where the inverse scales of x stand if rows are eight together, [warp, row] float32."""
        return self.zeros_at + -(-(self.chunk * 2 + 128) // 128) * 128

    @property
    def x_at(self) -> int:
        """Where x stands, float16, [row, chunk's turn, warp, column]."""
        scales = self.config.warps * self.m * 4 if self.config.together == 8 else 0
        return self.unscale_at + -(-scales // 128) * 128

    @property
    def partial_at(self) -> int:
        """Where the warps' partial sums stand."""
        return self.x_at + -(-self.m * self.x_stride // 128) * 128

    @property
    def partial_unit(self) -> int:
        """Bytes of the partial sums of one unit: [warp, row of x, row of W] float32."""
        return self.config.warps * self.m * self.rows * 4

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory."""
        return self.partial_at + self.held * self.partial_unit

    @property
    def efficiency(self) -> float:
        """The share of the busiest warp's work that a perfectly even split would give it."""
        columns = self.k / (self.turns * self.config.warps * self.chunk)
        return columns * self.units / (self.units_per_cta * (self.config.ctas or SMS))


OWN_CUTS = (
    GemvConfig(),
    GemvConfig(warps=16, tiles=1),
    GemvConfig(warps=20, tiles=1),
    GemvConfig(warps=20, tiles=1, steps=1),
    GemvConfig(warps=12, tiles=2),
)
"""What `choose_config` chooses from."""


@functools.cache
def choose_config(m: int, n: int, k: int) -> GemvConfig:
    """8 warps, unless another way that fits splits the work more evenly by a tenth.

    Measured on an H200 (docs/kernel_limits.md): at an even split 8 warps are fastest, and an uneven
    one costs about its share, as 5120 columns for 8 warps of 256: there, 20 warps are 1.2 times as
    fast. The same, not measured, where there are more than 8 rows of x, or where they do not fit
    into shared memory: then the sum is split.
    """
    plans = [plan for plan in _plans(m, n, k, OWN_CUTS) if plan.split == 1 and m <= 8]
    if not plans:
        together = 4 if m <= 4 else 8
        plans = _plans(m, n, k, (replace(cut, together=together) for cut in OWN_CUTS))
    best = plans[0]
    for plan in plans:
        if plan.efficiency > 1.1 * best.efficiency:
            best = plan
    return best.config


def _plans(m: int, n: int, k: int, cuts: Iterable[GemvConfig]) -> list[Plan]:
    """Those that fit."""
    return list(filter(fits, (Plan(m, n, k, "bfloat16", True, False, cut) for cut in cuts)))


def fits(plan: Plan) -> bool:
    """Whether a block has the shared memory and its lanes the registers that the plan takes."""
    cut = plan.config
    # A lane of 20 warps has 96 registers: from 5 rows of x on, two steps of codes are too many.
    spills = cut.warps > 16 and cut.steps > 1 and plan.m > 4
    # So are two tiles for one of 12 or 16 if rows are eight together.
    spills |= cut.warps > 8 and cut.tiles > 1 and cut.together == 8
    return plan.shared_bytes <= SHARED_LIMIT and not spills


OTHER_CUTS = (*OWN_CUTS, GemvConfig(16, 2, 1), GemvConfig(8, 4, 1), GemvConfig(8, 1, 4))
SEGMENTED_CUTS = (
    GemvConfig(8, 4, 1, segments=4),
    GemvConfig(8, 4, 1, segments=2),
    GemvConfig(8, 2, 2, segments=2),
    GemvConfig(16, 2, 2, segments=2),
    GemvConfig(16, 2, 1, segments=2),
    GemvConfig(20, 1, 1, segments=2),
)


def configs_to_try(m: int, n: int, k: int) -> list[GemvConfig]:
    """The candidates among which a card's cuts are measured; `choose_config`'s comes first.

    Its cut with every way to decode that can win, then the most even other cuts with the likeliest.
    More than three pairs of bytes by selects would take the integer units longer than the look-ups
    take (docs/kernel_limits.md); what `skip_zeros` and `segments` are good for ends with few rows
    of x. Each cut as it is also starts early. From five rows on, every cut with rows eight
    together, and splits of their sum.
    """
    first = choose_config(m, n, k)

    def most_even(cuts: Iterable[GemvConfig]) -> list[GemvConfig]:
        plans = _plans(m, n, k, (cut for cut in cuts if cut != first))
        return [plan.config for plan in sorted(plans, key=lambda plan: -plan.efficiency)]

    if m > 4:
        eights = [replace(cut, together=8) for cut in OTHER_CUTS]
        split = [replace(eights[0], split=split) for split in (2, 4)]
        return [*_and_early([first]), *most_even(eights), *most_even(split)]
    skip = m <= 2
    found = [replace(first, selects=selects) for selects in range(4)]
    if skip:
        found += [replace(first, selects=selects, skip_zeros=True) for selects in (0, 2)]
    others = most_even(OTHER_CUTS)[:1] + (most_even(SEGMENTED_CUTS)[:4] if m == 1 else [])
    for cut in others:
        few = skip and cut.segments <= 2
        found += [cut, replace(cut, selects=2, skip_zeros=few)]
    return _and_early([first, *others]) + found[1:]


def _and_early(cuts: list[GemvConfig]) -> list[GemvConfig]:
    """The first of the cuts, and all of them starting early, where JAX can."""
    early = [replace(cut, early=True) for cut in cuts] if STARTS_EARLY else []
    return cuts[:1] + early
