"""What is tried on a card: the configs among which its rules are measured.

`benchmarks/gpu_kernels.py --autotune` times them and writes the winners as a card's rules, as
`dispatch` reads them. The Hopper kernels' candidates stand beside their plans.
"""

import dataclasses
from collections.abc import Sequence

from pallas_kernels._table import Config
from pallas_kernels._triton_config import TritonConfig
from pallas_kernels.nf4_gemv import mosaic_plan as gemv_plan
from pallas_kernels.nf4_matmul import mosaic_plan as matmul_plan

_SCALAR_ROWS = 4
"""Rows up to which scalar products beat a tensor-core tile padded to 16 rows."""


def configs_to_try(
    op: str, rows: int, n: int, k: int, implementation: str = "triton"
) -> Sequence[Config]:
    """The candidates among which a card's rules are measured, for one shape.

    For "mosaic_gpu" the first is what the kernel takes by itself.
    """
    if implementation == "mosaic_gpu":
        if op == "nf4_gemv":
            return gemv_plan.configs_to_try(rows, n, k)
        if op == "nf4_matmul_transposed":
            return matmul_plan.configs_to_try(rows, transposed=True)
        return matmul_plan.configs_to_try(rows) + matmul_plan.split_configs_to_try(rows, k)
    found: list[TritonConfig] = []
    if op == "nf4_dequantize":
        for block in (1024, 2048, 4096, 8192):
            found += [
                TritonConfig(1, 1, block, num_warps=w, num_stages=1, decoder="table")
                for w in (2, 4, 8)
            ]
        found += [TritonConfig(1, 1, block, num_warps=8, num_stages=1) for block in (16384, 32768)]
        return found
    if op == "nf4_gemv" and rows <= _SCALAR_ROWS:
        for block_n in (4, 8, 16, 32):
            for block_k in (1024, 2048, 4096):
                for warps in (4, 8, 16):
                    loads = block_n * block_k // 2 // 16 / (32 * warps)
                    if 1 <= loads <= 4 and loads * rows <= 8:
                        found.append(
                            TritonConfig(1, block_n, block_k, num_warps=warps, num_stages=2)
                        )
        return found
    if op == "nf4_gemv":
        return _few_rows(n, k)
    turned = op == "nf4_matmul_transposed"
    unfused = [
        TritonConfig(1, 1, block, num_warps=4, num_stages=1, decoder="table", fused=False)
        for block in (2048, 4096)
    ]
    return [_turn(config) if turned else config for config in _many_rows(rows)] + unfused


def _few_rows(n: int, k: int) -> list[TritonConfig]:
    """Tiles of 16 rows; the sum is split until the card is filled."""
    return [
        TritonConfig(16, block_n, block_k, num_warps=4, num_stages=stages, split_k=split_k)
        for block_n, block_k, stages in ((32, 128, 4), (64, 128, 3), (64, 64, 4), (128, 64, 3))
        for split_k in (1, 2, 4, 8)
        if n // block_n * split_k <= 2048 and k >= 2 * block_k * split_k
    ]


def _many_rows(rows: int) -> list[TritonConfig]:
    """Tiles that do not spill; as high as the rows of x go, because rows share the decoding."""
    if rows <= 128:
        block_m = 32 if rows <= 32 else 64 if rows <= 64 else 128
        return [
            TritonConfig(block_m, block_n, block_k, num_warps=warps, num_stages=stages)
            for block_n, block_k in ((32, 128), (64, 64), (64, 128), (128, 64))
            for warps, stages in ((4, 3), (4, 4), (8, 3))
            if block_m * block_n >= 32 * 32 * warps
        ]
    return [
        TritonConfig(128, 128, 64, num_warps=8, num_stages=2),
        TritonConfig(128, 128, 64, num_warps=8, num_stages=3),
        TritonConfig(128, 128, 64, num_warps=8, num_stages=4),
        TritonConfig(128, 128, 128, num_warps=8, num_stages=2),
        TritonConfig(128, 128, 64, num_warps=4, num_stages=3),
        TritonConfig(128, 64, 64, num_warps=4, num_stages=3),
        TritonConfig(256, 128, 64, num_warps=8, num_stages=2),
        TritonConfig(256, 128, 64, num_warps=8, num_stages=3),
        TritonConfig(256, 128, 64, num_warps=16, num_stages=3),
        TritonConfig(256, 64, 64, num_warps=8, num_stages=3),
        TritonConfig(128, 256, 64, num_warps=8, num_stages=3),
    ]


def _turn(config: TritonConfig) -> TritonConfig:
    """The same tile with W's rows as the axis that is summed."""
    return dataclasses.replace(config, block_n=config.block_k, block_k=config.block_n)
