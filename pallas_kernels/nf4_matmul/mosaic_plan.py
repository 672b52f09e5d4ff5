"""How the Hopper matmuls are cut: their configuration, and the sizes that follow from it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

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
        cluster: blocks of threads, side by side along n, that share their tiles of x: each fetches
            a part of them for all, and the second-level cache is read so many times less.
    """

    rows: int = 256
    stages: int = 4
    ahead: bool = True
    group: int = 16
    split: int = 1
    cluster: int = 1

    def __post_init__(self) -> None:
        """A ValueError for what would be undefined, or would wait forever, on the card."""
        check_fields(
            self,
            rows=(self.rows % 8 == 0 and 16 <= self.rows <= 256, "a multiple of 8, 16 to 256"),
            stages=(self.stages >= 2, "2 or more: one is read while the next is filled"),
            group=(self.group >= 1, "1 or more"),
            split=(self.split >= 1, "1 or more"),
            cluster=(
                self.cluster in (1, 2) and self.rows % (8 * self.cluster) == 0,
                "1, or 2 with rows in multiples of 16",
            ),
        )

    @property
    def columns(self) -> int:
        """Columns of the result in a cluster's tile."""
        return BLOCK * COMPUTE * self.cluster


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
        """Along x's rows and along n, of a cluster."""
        return tiles_of(self.config, self.m, self.n)

    @property
    def work(self) -> int:
        """Tiles, each as often as it is split."""
        return math.prod(self.tiles) * self.config.split

    @property
    def grid(self) -> int:
        """Clusters of blocks of threads."""
        return min(SMS // self.config.cluster, self.work)


def tiles_of(config: MatmulConfig, m: int, n: int) -> tuple[int, int]:
    """Clusters' tiles of a result [m, n]: along m, and along n."""
    return -(-m // config.rows), -(-n // config.columns)


def place(config: MatmulConfig, tiles: tuple[int, int], tile: Any, block: Any) -> tuple:
    """Which part of the result a block of threads computes.

    Args:
        config: how the work is cut.
        tiles: as `tiles_of` gives them.
        tile: the cluster's, counted through all parts of the sum.
        block: its number in the cluster.

    Returns:
        Its first row and column of the result, and the number of its part of the sum. The last
        cluster's second block may be given a column past the result's end: it stores nothing.
    """
    rows, cols = tiles
    part = jnp.int32(0)
    if config.split > 1:
        part, tile = tile // (rows * cols), tile % (rows * cols)
    width = min(max(config.group // config.cluster, 1), cols)
    band, rest = tile // (rows * width), tile % (rows * width)
    # The last band may be narrower.
    here = jnp.minimum(width, cols - band * width)
    column = (band * width + rest % here) * config.columns
    return (rest // here) * config.rows, column + block * (BLOCK * COMPUTE), part


def choose_config(rows: int) -> MatmulConfig:
    """The smallest tile that holds all rows of x, or the largest there is."""
    return MatmulConfig(rows=next((r for r in (64, 128) if rows <= r), 256))


def configs_to_try(rows: int) -> list[MatmulConfig]:
    """The candidates among which a card's cuts are measured; `choose_config`'s comes first."""
    first = choose_config(rows)
    heights = [r for r in (first.rows, first.rows // 2) if r >= 64]
    found = [
        MatmulConfig(height, stages, ahead, group, cluster=cluster)
        for height in heights
        for stages in (4, 3, 5)
        for ahead in (True, False)
        for group in (16, 8, 32)
        for cluster in (1, 2)
    ]

    def departures(config: MatmulConfig) -> int:
        """In how many fields but the tile's height a candidate is not as the first."""
        fields = ("stages", "ahead", "group", "cluster")
        return sum(getattr(config, name) != getattr(first, name) for name in fields)

    # One departure at a time: the effects are taken to be independent.
    return [config for config in found if departures(config) <= 1 and _fits(config)]


def _fits(config: MatmulConfig) -> bool:
    """Whether a config's tiles have place in shared memory, in the dx kernel too.

    That also keeps a step's codes, 64 bytes of each of 64 rows, in a stage.
    """
    stage = config.rows * BLOCK * 2 + 64 * BLOCK
    return TABLE_BYTES + config.stages * stage <= SHARED_LIMIT


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
