"""The Hopper GEMV that the copy engine feeds: its lane program, run thread by thread on NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.nf4_gemv.mosaic_ring import Plan, RingConfig, lane_program, why_not_ring
from pallas_kernels.simt.emulate import Machine
from tests.pallas_kernels.test_mosaic_gemv import problem


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "config"),
    [
        (1, 72, 1024, "bfloat16", RingConfig(4, split=4, tiles=2, half=128, stages=2, ctas=2)),
        (1, 96, 2048, "bfloat16", RingConfig(8, split=4, tiles=1, half=256, stages=3, ctas=5)),
        (2, 40, 1408, "bfloat16", RingConfig(4, split=2, tiles=2, half=128, stages=2, ctas=2)),
        (4, 48, 640, "float16", RingConfig(8, split=8, tiles=2, half=128, stages=2, ctas=2)),
        (5, 16, 768, "bfloat16", RingConfig(4, split=4, tiles=1, half=128, stages=2)),
        (8, 136, 512, "float16", RingConfig(8, split=2, tiles=4, half=128, stages=2, ctas=3)),
    ],
)
def test_lane_program_is_the_product(m, n, k, dtype, config):
    rng = np.random.default_rng(m)
    plan = Plan(m, n, k, dtype, True, config)
    assert why_not_ring(plan) is None
    inputs, exact = problem(rng, m, n, k, dtype, True)
    out = np.asarray(jnp.full((m, n), jnp.nan, dtype)).copy()
    for cta in range(plan.grid):
        lane_program(Machine(cta, plan.threads, plan.shared_bytes), plan, *inputs, out)
    exact = exact + inputs[5]
    error = np.linalg.norm(out.astype(np.float64) - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() < (2.5e-3 if dtype == "bfloat16" else 1e-3)
