"""How the Hopper matmuls are cut: their configuration, and the sizes that follow from it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from pallas_kernels._arguments import check_fields, check_kinds
from pallas_kernels._mosaic import BLOCK, SHARED_LIMIT, SMS

COMPUTE = 2
"""Warpgroups that compute; one more feeds them."""

TEAM = range(8, SMS + 1)
"""Blocks that may decode together: fewer would have too large shares, and all have to run at the
same time."""

COMPUTING_REGISTERS, FEEDING_REGISTERS = 224, 56
"""Of a thread, by what its warpgroup does; together what a block is launched with, 3 · 168."""

TABLE_ENTRIES = 256
"""Of the look-up table: one for each byte."""


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """How the work is cut; every choice gives the same sums, up to their order and, with `wide`, to
    the table's rounding to float16.

    Attributes:
        rows: rows of x in a tile, 16 to 256.
        stages: steps whose tiles are in shared memory, 3 or more.
        group: tiles along n that run side by side, so that their x stays in the second-level cache.
        split: blocks of threads that share a tile, each with a part of the sum; the parts are added
            afterwards. For few rows, whose tiles are fewer than the multiprocessors.
        wide: a look-up is two float32, not two float16: a fifth fewer instructions a step, look-ups
            take twice the reads of shared memory. Of 256 rows at most 4 stages fit beside them. Not
            measured yet (docs/kernel_limits.md).
        team: blocks that multiply by the same rows of W decode them together, once for all rows of
            x, into a room in global memory (`mosaic_team`). Not measured yet.
    """

    rows: int = 256
    stages: int = 5
    group: int = 16
    split: int = 1
    wide: bool = False
    team: bool = False

    def __post_init__(self) -> None:
        """A ValueError for what would be undefined, or would wait forever, on the card."""
        check_kinds(self)
        check_fields(
            self,
            rows=(self.rows % 8 == 0 and 16 <= self.rows <= 256, "a multiple of 8, 16 to 256"),
            stages=(
                self.stages >= 3 and not (self.team and self.stages > 8),
                "3 or more: one multiplied, one decoded, one read; in teams 8 or less",
            ),
            group=(self.group >= 1, "1 or more"),
            split=(self.split >= 1 and not (self.team and self.split > 1), "1 or more, 1 in teams"),
            wide=(not (self.team and self.wide), "False in teams, whose table is float32 anyway"),
        )

    @property
    def float_pairs(self) -> bool:
        """Whether the table of pairs is float32; else it is float16."""
        return self.wide or self.team

    @property
    def copies(self) -> int:
        """Of each pair: one for each lane of a warp, or, where decoding is rare, fewer."""
        return 8 if self.team else 32

    @property
    def pair_bytes(self) -> int:
        """Of the table of pairs, with all copies."""
        return TABLE_ENTRIES * self.copies * (8 if self.float_pairs else 4)

    @property
    def table_bytes(self) -> int:
        """Of shared memory for the tables: the pairs, then the 8-bit dynamic map."""
        return self.pair_bytes + TABLE_ENTRIES * 4

    @property
    def shared_bytes(self) -> int:
        """Of shared memory in all: tables and, a stage, tiles of x and of codes, and scales, or in
        teams tiles of x and of W."""
        weights = 2 * COMPUTE * BLOCK * BLOCK if self.team else BLOCK * (BLOCK + 4 * COMPUTE)
        return self.table_bytes + self.stages * (2 * BLOCK * self.rows + weights)


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
        return tiles_of(self.config, self.m, self.n)

    @property
    def work(self) -> int:
        """Tiles, each as often as it is split."""
        return math.prod(self.tiles) * self.config.split

    @property
    def grid(self) -> int:
        """Blocks of threads."""
        return min(SMS, self.work)


def tiles_of(config: MatmulConfig, m: int, n: int) -> tuple[int, int]:
    """Tiles of a result [m, n]: along m, and along n."""
    return -(-m // config.rows), -(-n // (BLOCK * COMPUTE))


def place(config: MatmulConfig, tiles: tuple[int, int], tile: Any) -> tuple:
    """Which part of the result a block of threads computes.

    Args:
        config: how the work is cut.
        tiles: as `tiles_of` gives them.
        tile: the block's, counted through all parts of the sum.

    Returns:
        Its first row and column of the result, and the number of its part of the sum.
    """
    rows, cols = tiles
    part = jnp.int32(0)
    if config.split > 1:
        part, tile = tile // (rows * cols), tile % (rows * cols)
    width = min(config.group, cols)
    band, rest = tile // (rows * width), tile % (rows * width)
    # The last band may be narrower.
    here = jnp.minimum(width, cols - band * width)
    return (rest // here) * config.rows, (band * width + rest % here) * (BLOCK * COMPUTE), part


def choose_config(rows: int, *, transposed: bool = False) -> MatmulConfig:
    """The smallest tile that holds all rows of x, or the largest there is.

    Stages as an H200 was measured with: forward, 5 were faster than 4; dx ran with 4.
    """
    height = next((r for r in (64, 128) if rows <= r), 256)
    return MatmulConfig(rows=height, stages=4 if transposed else 5)


def configs_to_try(rows: int, *, transposed: bool = False) -> list[MatmulConfig]:
    """The candidates among which a card's cuts are measured; `choose_config`'s comes first.

    One departure from it at a time: the effects are taken to be independent.
    """
    first = choose_config(rows, transposed=transposed)
    other = [dataclasses.replace(first, stages=stages) for stages in (4, 5, 6)]
    other += [dataclasses.replace(first, group=group) for group in (8, 32)]
    other += [dataclasses.replace(first, wide=True, stages=4)]
    if can_team(first, rows):
        other += [dataclasses.replace(first, team=True, stages=4)]
    if first.rows > 64:
        other += [dataclasses.replace(first, rows=first.rows // 2)]
    return [first, *(config for config in other if config != first and _fits(config))]


def can_team(config: MatmulConfig, rows: int) -> bool:
    """Whether the blocks that share rows of W are as many as make a team (`mosaic_team`)."""
    return -(-rows // config.rows) in TEAM


def takes_rows(config: Any, rows: int) -> bool:
    """Whether a kernel's config can multiply so many rows of x: any but that of teams, as a cut
    measured for more rows may be."""
    in_teams = isinstance(config, MatmulConfig) and config.team
    return not in_teams or can_team(config, rows)


def check_shared_memory(config: MatmulConfig) -> None:
    """A ValueError where a block would need more shared memory than there is."""
    if not _fits(config):
        raise ValueError(
            f"config is {config}, which takes {config.shared_bytes} bytes of shared memory; "
            f"expected at most {SHARED_LIMIT}: take fewer stages, or fewer rows"
        )


def _fits(config: MatmulConfig) -> bool:
    return config.shared_bytes <= SHARED_LIMIT


def split_configs_to_try(rows: int, k: int) -> list[MatmulConfig]:
    """Candidates of the forward kernel alone, for rows that one small tile holds."""
    tile = next((r for r in (16, 32, 64, 128) if rows <= r), None)
    if tile is None:
        return []
    first, steps = choose_config(rows), k // BLOCK
    return [
        dataclasses.replace(first, rows=tile, split=split)
        for split in (1, 2, 4, 8)
        if steps % split == 0 and steps >= 8 * split and (tile, split) != (first.rows, 1)
    ]
