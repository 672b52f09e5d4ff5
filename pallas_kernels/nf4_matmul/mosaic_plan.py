"""How the Hopper matmuls are cut: their configuration, and the sizes that follow from it."""

import dataclasses
import math

from pallas_kernels._arguments import check_fields
from pallas_kernels._mosaic import BLOCK, SHARED_LIMIT, SMS
from pallas_kernels._mosaic_decoder import TABLE_BYTES

COMPUTE = 2  # warpgroups that compute


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """How the work is cut; every choice gives the same sums.

    Attributes:
        rows: rows of x in a tile, 16 to 256.
        stages: tiles of x in shared memory.
        ahead: decode the next step's weights before waiting for this step's `wgmma`.
        group: tiles along n that run side by side, so that their x stays in the second-level cache.
        split: blocks of threads that share a tile, each with a part of the sum; the parts are added
            afterwards. For few rows, whose tiles are fewer than the multiprocessors.
    """

    rows: int = 256
    stages: int = 4
    ahead: bool = True
    group: int = 16
    split: int = 1

    def __post_init__(self) -> None:
        """A ValueError for what would be undefined, or would wait forever, on the card."""
        check_fields(
            self,
            rows=(self.rows % 8 == 0 and 16 <= self.rows <= 256, "a multiple of 8, 16 to 256"),
            stages=(self.stages >= 2, "2 or more: one is read while the next is filled"),
            group=(self.group >= 1, "1 or more"),
            split=(self.split >= 1, "1 or more"),
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """All sizes of one kernel: x [m, k], a weight [n, k]."""

    m: int
    n: int
    k: int
    dtype: str
    double_quant: bool
    has_bias: bool
    config: MatmulConfig
    rank: int = 0
    """Of the adapter, a multiple of 64; 0 for none."""

    @property
    def steps(self) -> int:
        """Blocks of 64 along a block of threads' part of the contracted axis."""
        return self.k // BLOCK // self.config.split

    @property
    def low_steps(self) -> int:
        """Blocks of 64 along the adapter's rank."""
        return self.rank // BLOCK

    @property
    def tiles(self) -> tuple[int, int]:
        """Along x's rows and along n."""
        return -(-self.m // self.config.rows), -(-self.n // (64 * COMPUTE))

    @property
    def work(self) -> int:
        """Tiles, each as often as it is split."""
        return math.prod(self.tiles) * self.config.split

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return min(SMS, self.work)


def choose_config(rows: int) -> MatmulConfig:
    """The smallest tile that holds all rows of x, or the largest there is."""
    return MatmulConfig(rows=next((r for r in (64, 128) if rows <= r), 256))


def configs_to_try(rows: int) -> list[MatmulConfig]:
    """The candidates among which a card's cuts are measured; `choose_config`'s comes first."""
    first = choose_config(rows)
    tiles = [r for r in (first.rows, first.rows // 2) if r >= 64]
    return [
        MatmulConfig(tile, stages, ahead, group)
        for tile in tiles
        for stages in (4, 3, 5)
        for ahead in (True, False)
        for group in (16, 8, 32)
        # The dx kernel also keeps a step's codes, 64 bytes of each of 64 rows, in a stage.
        if TABLE_BYTES + stages * (tile * BLOCK * 2 + 64 * BLOCK) <= SHARED_LIMIT
        # One departure at a time from the first: the effects are taken to be independent.
        if (stages != first.stages) + (ahead != first.ahead) + (group != first.group) <= 1
    ]


def split_configs_to_try(rows: int, k: int) -> list[MatmulConfig]:
    """Candidates of the forward kernel alone, for rows that one small tile holds."""
    tile = next((r for r in (16, 32, 64, 128) if rows <= r), None)
    if tile is None:
        return []
    first, steps = choose_config(rows), k // BLOCK
    return [
        MatmulConfig(tile, split=split)
        for split in (1, 2, 4, 8)
        if steps % split == 0 and steps >= 8 * split and (tile, split) != (first.rows, 1)
    ]
