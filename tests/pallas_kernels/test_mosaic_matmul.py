"""The Hopper matmul's lane programs on NumPy: decoded fragments and stored sums, lane by lane."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import Layout
from pallas_kernels.codebooks import CODEBOOKS
from pallas_kernels.nf4_matmul import mosaic_lanes, mosaic_sm90
from pallas_kernels.nf4_matmul.mosaic_plan import COMPUTE, MatmulConfig, Plan, place
from pallas_kernels.simt.emulate import Machine
from tests.pallas_kernels.test_mosaic_gemv import problem

LANES = np.arange(128)
WARP, GROUP, QUAD = LANES // 32, LANES % 32 // 4, LANES % 4


def from_fragment(words, dtype):
    """[64, columns] float64 from the words of a 16-bit array in the WGMMA layout, [j][half]."""
    out = np.full((64, 4 * len(words)), np.nan)
    for i, word in enumerate(words):
        pair = np.asarray(word, np.uint32)[:128].copy().view(np.uint16).reshape(128, 2)
        for e in (0, 1):
            value = np.asarray(jnp.asarray(pair[:, e]).view(dtype).astype(jnp.float32))
            out[16 * WARP + 8 * (i % 2) + GROUP, 8 * (i // 2) + 2 * QUAD + e] = value
    return out


def to_sums(tile, threads):
    """`store_sums`' argument: the float32 registers of [64, columns] in the WGMMA layout."""

    def pick(j, h, e):
        return np.resize(
            tile[16 * WARP + 8 * h + GROUP, 8 * j + 2 * QUAD + e].astype(np.float32), threads
        )

    return [[[pick(j, h, e) for e in (0, 1)] for h in (0, 1)] for j in range(tile.shape[1] // 8)]


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "double_quant"),
    [
        (70, 96, 320, "bfloat16", True),
        (64, 64, 128, "float16", False),
    ],
)
def test_lane_programs_are_the_product(m, n, k, dtype, double_quant):
    rng = np.random.default_rng(n)
    plan = Plan(m, n, k, dtype, double_quant, True, MatmulConfig(rows=64))
    inputs, exact = problem(rng, m, n, k, dtype, double_quant)
    x, codes, absmax, nested, offset, bias, tables = inputs
    machine = Machine(0, 128, mosaic_sm90.TABLE_BYTES)
    mosaic_lanes.fill_table(machine, tables, machine.threads)
    mean = mosaic_lanes.load_offset(machine, plan, offset)
    out = np.asarray(jnp.full((m, n), jnp.nan, dtype)).copy()
    padded = np.zeros((-(-m // 64) * 64, k))
    padded[:m] = x.astype(np.float64)
    for first_row in range(0, n, 64):
        weight = []
        for step in range(plan.steps):
            held = mosaic_lanes.load_block(
                machine, plan, machine.word(first_row), machine.word(step), codes, absmax, nested
            )
            assert len(held) == mosaic_lanes.CODE_WORDS + mosaic_lanes.SCALE_WORDS
            block = mosaic_lanes.decode_block(machine, plan, held, mean)
            weight.append(from_fragment(block, dtype))
        sums = np.concatenate(weight, 1) @ padded.T
        for token in range(0, len(padded), 64):
            mosaic_lanes.store_sums(
                machine,
                plan,
                to_sums(sums[:, token : token + 64], machine.threads),
                machine.word(first_row),
                machine.word(token),
                bias,
                out,
            )
    exact = exact + bias
    error = np.linalg.norm(out.astype(np.float64) - exact) / np.linalg.norm(exact)
    assert error < (4e-3 if dtype == "bfloat16" else 1e-3)


def test_parts_of_a_split_sum_are_stored_in_float32():
    """Each to its own copy of y; nothing else is written."""
    plan = Plan(20, 70, 256, "bfloat16", True, False, MatmulConfig(rows=64, split=2))
    assert (plan.steps, plan.work, plan.grid) == (2, 2, 2)
    tile = np.random.default_rng(0).normal(size=(64, 64))
    # Row g of a warp's fragment is row 2g, row g + 8 is 2g + 1.
    row = 16 * (np.arange(64) // 16) + 2 * (np.arange(64) % 8) + np.arange(64) % 16 // 8
    out = np.full((2 * 20, 70), np.nan, np.float32)
    machine = Machine(0, 128, mosaic_sm90.TABLE_BYTES)
    sums = to_sums(tile, machine.threads)
    for first_row in (0, 64):
        place = (machine.word(first_row), machine.word(0))
        mosaic_lanes.store_sums(machine, plan, sums, *place, None, out, machine.word(1))
    want = np.zeros((64, 64), np.float32)
    want[row] = tile
    assert np.isnan(out[:20]).all()
    np.testing.assert_array_equal(out[20:, :64], want[:, :20].T)
    np.testing.assert_array_equal(out[20:, 64:], want[:6, :20].T)


@given(
    sizes=st.tuples(st.integers(1, 2000), st.integers(1, 3000)),
    rows=st.sampled_from([16, 64, 256]),
    group=st.integers(1, 20),
    split=st.sampled_from([1, 2, 4]),
    cluster=st.sampled_from([1, 2]),
)
def test_every_sum_is_computed_once(sizes, rows, group, split, cluster):
    """And what the blocks of a cluster share are rows of x: they have the same."""
    config = MatmulConfig(rows=rows, group=group, split=split, cluster=cluster)
    plan = Plan(*sizes, 256, "bfloat16", True, False, config)
    every = np.arange(plan.work)[:, None]
    token, column, part = np.broadcast_arrays(
        *place(config, plan.tiles, every, np.arange(cluster)[None, :])
    )
    assert (token == token[:, :1]).all()
    assert (part == part[:, :1]).all()
    found = np.stack([token, column, part], axis=-1).reshape(-1, 3)
    beyond = found[:, 1] >= plan.n
    wanted = itertools.product(range(0, plan.m, rows), range(0, plan.n, 64 * COMPUTE), range(split))
    assert sorted(map(tuple, found[~beyond])) == sorted(wanted)
    # Past the end are at most the last cluster's columns of a row of tiles.
    assert beyond.sum() <= (cluster - 1) * plan.tiles[0] * split


def test_a_split_that_does_not_go_is_refused():
    def run(config, rows):
        layout = Layout((1024, 4096), "nf4", 64, double_quant=False)
        weight = (jnp.zeros((1024, 2048), jnp.uint8), jnp.ones((65536,)), None, None)
        x = jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16)
        call = functools.partial(mosaic_sm90.nf4_matmul_mosaic, layout=layout, config=config)
        jax.eval_shape(lambda x: call(x, *weight, None), x)

    with pytest.raises(ValueError, match=r"split is 3; expected a divisor of 64"):
        run(MatmulConfig(rows=64, split=3), 64)
    with pytest.raises(ValueError, match=r"split is 8, for 131072 rows .* split less"):
        run(MatmulConfig(split=8), 2**17)


def test_an_adapters_fragment_is_b():
    """The words that `wgmma` takes of b [n, 128], rows past the end repeating the last."""
    rng = np.random.default_rng(0)
    plan = Plan(64, 80, 64, "bfloat16", True, False, MatmulConfig(rows=64), rank=128)
    b = np.array(jnp.asarray(rng.normal(size=(80, 128)), jnp.bfloat16))
    machine = Machine(0, 128, mosaic_sm90.TABLE_BYTES)
    for step in (0, 1):
        words = mosaic_lanes.load_low_rank(machine, plan, machine.word(64), machine.word(step), b)
        got = from_fragment(words, "bfloat16")
        # Row g of a warp's fragment is row 2g, row g + 8 is 2g + 1.
        row = 64 + 16 * (np.arange(64) // 16) + 2 * (np.arange(64) % 8) + np.arange(64) % 16 // 8
        want = b[np.minimum(row, 79), 64 * step : 64 * step + 64].astype(np.float64)
        np.testing.assert_array_equal(got, want)


def test_weights_are_rounded_once():
    """float16 tables, exact where the code's value is: 1 · scale is the scale in x's dtype."""
    table = CODEBOOKS["nf4"].astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(table, CODEBOOKS["nf4"], rtol=2**-11)
    assert table[15] == 1.0
    assert table[0] == -1.0
    assert table[7] == 0.0
