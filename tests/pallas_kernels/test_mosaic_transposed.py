"""The Hopper dx kernel's lane programs on NumPy: swizzled bytes, scales and fragments."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_matmul import mosaic_lanes
from pallas_kernels.nf4_matmul.mosaic_plan import MatmulConfig
from pallas_kernels.nf4_matmul_transposed import mosaic_sm90
from pallas_kernels.nf4_matmul_transposed.mosaic_sm90 import Plan
from tests.pallas_kernels.test_mosaic_gemv import problem
from tests.pallas_kernels.test_mosaic_matmul import (
    from_fragment,
    machine_of,
    scales_of,
    to_sums,
)


def swizzled_tile(codes, row, byte):
    """What the copy engine leaves of [64, 64] bytes: 16-byte chunks exchanged within a row."""
    tile = np.zeros((64, 64), np.uint8)
    part = codes[row : row + 64, byte : byte + 64]
    tile[: part.shape[0], : part.shape[1]] = part
    address = np.arange(64 * 64)
    out = np.empty(64 * 64, np.uint8)
    out[address ^ (address >> 7 & 3) << 4] = tile.reshape(-1)
    return out


@pytest.mark.parametrize(
    ("m", "contracted", "n", "dtype", "double_quant", "wide"),
    [
        (40, 384, 192, "bfloat16", True, False),
        (64, 64, 128, "float16", False, False),
        (64, 64, 128, "bfloat16", True, True),
    ],
)
def test_lane_programs_are_the_product(m, contracted, n, dtype, double_quant, wide):
    rng = np.random.default_rng(n)
    config = MatmulConfig(rows=64, stages=4, wide=wide)
    plan = Plan(m, n, contracted, dtype, double_quant, config)
    inputs, _ = problem(rng, 1, contracted, n, dtype, double_quant)
    _, codes, absmax, nested, offset, _, _ = inputs
    identity = np.eye(n, dtype=np.float32)
    dy = np.array(jnp.asarray(rng.normal(size=(m, contracted)).astype(np.float32), dtype))

    machine = machine_of(config)
    mean = mosaic_sm90.load_offset(machine, plan, offset)
    out = np.asarray(jnp.full((m, n), jnp.nan, dtype)).copy()
    weight = np.full((contracted, -(-n // 128) * 128), np.nan)
    for column in range(0, n, 128):

        def load(step, column=column):
            return mosaic_sm90.load_group(machine, plan, machine.word(column), step, absmax, nested)

        scales = scales_of(machine, plan, load, mean)
        for step in range(plan.steps):
            tile = swizzled_tile(codes, 64 * step, column // 2)
            for wg in (0, 1):
                held = mosaic_sm90.read_codes(machine, plan, machine.word(wg), tile)
                found = mosaic_sm90.find_weights(
                    machine, plan, machine.word(wg), held, scales[step]
                )
                assert len(found) == 32
                words = mosaic_sm90.scale_weights(machine, plan, found)
                share = from_fragment(words, dtype)  # [fragment's row, row of W]
                row = np.arange(64)
                place = 16 * (row // 16) + 2 * (row % 8) + row % 16 // 8
                block = weight[64 * step : 64 * step + 64, column + 64 * wg :]
                block[:, place] = share.T
                assert np.isfinite(share).all()
        for wg in (0, 1):
            here = weight[:, column + 64 * wg : column + 64 * wg + 64][:, place]
            sums = here.T @ np.pad(dy.astype(np.float64), ((0, 64 - m), (0, 0))).T
            mosaic_lanes.store_sums(
                machine,
                plan,
                to_sums(sums, machine.threads),
                machine.word(column + 64 * wg),
                machine.word(0),
                None,
                out,
            )
    exact_weight = _dense(codes, absmax, nested, offset, double_quant)
    exact = dy.astype(np.float64) @ exact_weight @ identity
    error = np.linalg.norm(out.astype(np.float64) - exact) / np.linalg.norm(exact)
    assert error < (4e-3 if dtype == "bfloat16" else 1e-3)


def _dense(codes, absmax, nested, offset, double_quant):
    from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED

    table = CODEBOOKS["nf4"].astype(np.float64)
    scale = absmax.astype(np.float64)
    if double_quant:
        scale = DYNAMIC_SIGNED[absmax] * nested[np.arange(absmax.size) // 256] + float(offset[0])
    weight = np.stack([table[codes >> 4], table[codes & 15]], -1).reshape(codes.shape[0], -1)
    return weight * np.repeat(scale, 64).reshape(weight.shape)
