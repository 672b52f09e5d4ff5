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
from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED
from pallas_kernels.nf4_matmul import mosaic_lanes, mosaic_ring, mosaic_sm90, mosaic_table
from pallas_kernels.nf4_matmul.mosaic_plan import COMPUTE, MatmulConfig, Plan, place
from pallas_kernels.simt.emulate import Machine
from tests.pallas_kernels.test_mosaic_gemv import RaceMachine, problem

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


def machine_of(config, quant_type="nf4", kind=Machine):
    """The threads of a block, and its tables in shared memory."""
    machine = kind(0, mosaic_table.THREADS, config.table_bytes)
    mosaic_table.fill_table(machine, config, mosaic_table.tables_of(config, quant_type))
    return machine


def swizzled_rows(codes, first, byte):
    """What the copy engine leaves of 64 rows' 32 bytes: 16-byte chunks exchanged within a row."""
    tile = np.zeros((64, 32), np.uint8)
    part = codes[first : first + 64, byte : byte + 32]
    tile[: len(part)] = part
    address = np.arange(tile.size)
    out = np.empty(tile.size, np.uint8)
    out[address ^ (address >> 7 & 1) << 4] = tile.reshape(-1)
    return out


def scales_of(machine, plan, load, mean):
    """[steps, 128]: what the feeding warpgroup makes of its groups' raw scales, `load(step)`."""
    out = np.full((plan.steps, 128), np.nan, np.float32)
    for step in range(plan.steps):
        i = step % mosaic_ring.GROUP
        raw = load(machine.word(step - i))
        assert len(raw) == mosaic_ring.SCALE_WORDS
        mosaic_ring.store_scale(machine, plan, i, raw, mean, out[step])
    return out


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_tables(quant_type, wide):
    """Every byte's weights and absmax value, as each of the lanes reads them."""
    config, table = MatmulConfig(stages=4, wide=wide), CODEBOOKS[quant_type]
    machine = machine_of(config, quant_type)
    for byte in range(256):
        found = mosaic_table.look_up_ahead(machine, config, [machine.word(byte)])
        ((low, high),) = mosaic_table.weights_of(machine, config, found)
        want = np.asarray([table[byte >> 4], table[byte & 15]], np.float32 if wide else np.float16)
        assert (low == np.float32(want[0])).all()
        assert (high == np.float32(want[1])).all()
        value = mosaic_table.look_up_absmax(machine, config, machine.word(byte))
        assert (value == DYNAMIC_SIGNED[byte]).all()


def test_stages_that_do_not_fit_are_refused():
    layout = Layout((256, 256), "nf4", 64, double_quant=False)
    weight = (jnp.zeros((256, 128), jnp.uint8), jnp.ones((1024,)), None, None)
    x = jnp.ones((256, 256), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"takes \d+ bytes .* at most 230400: take fewer stages"):
        mosaic_sm90.nf4_matmul_mosaic(
            x, *weight, None, layout=layout, config=MatmulConfig(wide=True)
        )


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "double_quant", "wide"),
    [
        (70, 208, 320, "bfloat16", True, False),
        (64, 64, 128, "float16", False, False),
        (64, 144, 256, "bfloat16", True, True),
    ],
)
def test_lane_programs_are_the_product(m, n, k, dtype, double_quant, wide):
    rng = np.random.default_rng(n)
    config = MatmulConfig(rows=64, stages=4, wide=wide)
    plan = Plan(m, n, k, dtype, double_quant, True, config)
    inputs, exact = problem(rng, m, n, k, dtype, double_quant)
    x, codes, absmax, nested, offset, bias, _ = inputs
    machine = machine_of(config, kind=RaceMachine)
    mean = mosaic_ring.load_offset(machine, plan, offset)
    out = np.asarray(jnp.full((m, n), jnp.nan, dtype)).copy()
    padded = np.zeros((-(-m // 64) * 64, k))
    padded[:m] = x.astype(np.float64)
    codes = codes.reshape(n, k // 2)
    for column in range(0, n, 64 * COMPUTE):

        def load(step, column=column):
            return mosaic_lanes.load_group(
                machine, plan, machine.word(column), step, absmax, nested
            )

        scales = scales_of(machine, plan, load, mean)
        for wg in range(COMPUTE):
            weight = []
            for step in range(plan.steps):
                tiles = [swizzled_rows(codes[h::2], column // 2, 32 * step) for h in (0, 1)]
                held = mosaic_lanes.read_codes(machine, plan, machine.word(wg), *tiles)
                found = mosaic_lanes.find_weights(
                    machine, plan, machine.word(wg), held, scales[step]
                )
                assert len(found) == 20
                fragment = mosaic_lanes.scale_weights(machine, plan, found)
                weight.append(from_fragment(fragment, dtype))
            sums = np.concatenate(weight, 1) @ padded.T
            for token in range(0, len(padded), 64):
                mosaic_lanes.store_sums(
                    machine,
                    plan,
                    to_sums(sums[:, token : token + 64], machine.threads),
                    machine.word(column + 64 * wg),
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
    machine = Machine(0, 128, 0)
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
)
def test_every_sum_is_computed_once(sizes, rows, group, split):
    config = MatmulConfig(rows=rows, group=group, split=split)
    plan = Plan(*sizes, 256, "bfloat16", True, False, config)
    # As many for every example, of which each length would be compiled.
    placed = np.broadcast_arrays(*place(config, plan.tiles, np.arange(2**14)))
    found = np.stack(placed, axis=-1)[: plan.work]
    assert len(found) == plan.work
    wanted = itertools.product(range(0, plan.m, rows), range(0, plan.n, 64 * COMPUTE), range(split))
    assert sorted(map(tuple, found.tolist())) == sorted(wanted)


def test_bias_and_adapter_are_added_to_the_parts(monkeypatch):
    rng, (m, n, k) = np.random.default_rng(0), (5, 32, 128)
    x, xa, b = (jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((m, k), (m, 8), (n, 8)))
    bias, sums = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((n,), (2 * m, n)))

    def parts(x, codes, absmax, nested, offset, bias, lora, layout, config):
        assert (bias, lora, config.split) == (None, None, 2)
        return sums

    monkeypatch.setattr(mosaic_sm90, "_call", parts)
    layout = Layout((n, k), "nf4", 64, double_quant=False)
    weight = (jnp.zeros((n, k // 2), jnp.uint8), jnp.ones((n * k // 64,)), None, None)
    run = functools.partial(mosaic_sm90.nf4_matmul_mosaic, layout=layout)
    got = run(x, *weight, bias, (xa, b), config=MatmulConfig(rows=64, split=2))
    low = np.asarray(xa, np.float64) @ np.asarray(b, np.float64).T
    want = np.asarray(sums, np.float64).reshape(2, m, n).sum(0) + low + np.asarray(bias)
    assert (got.shape, got.dtype) == ((m, n), jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-3)


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
    with pytest.raises(ValueError, match=r"takes \d+ bytes of shared memory; expected at most"):
        run(MatmulConfig(stages=7), 64)
    from pallas_kernels.nf4_matmul_transposed.mosaic_sm90 import nf4_matmul_transposed_mosaic

    layout = Layout((1024, 4096), "nf4", 64, double_quant=False)
    weight = (jnp.zeros((1024, 2048), jnp.uint8), jnp.ones((65536,)), None, None)
    back = functools.partial(nf4_matmul_transposed_mosaic, layout=layout)
    dy = jnp.ones((64, 1024), jnp.bfloat16)
    for config, message in (
        (MatmulConfig(split=2), "split is 2; nf4_matmul_transposed takes only 1"),
        (MatmulConfig(stages=7), "bytes of shared memory; expected at most"),
    ):
        with pytest.raises(ValueError, match=message):
            back(dy, *weight, config=config)


def test_an_adapters_fragment_is_b():
    """The words that `wgmma` takes of b [n, 128], rows past the end repeating the last."""
    rng = np.random.default_rng(0)
    plan = Plan(64, 80, 64, "bfloat16", True, False, MatmulConfig(rows=64), rank=128)
    b = np.array(jnp.asarray(rng.normal(size=(80, 128)), jnp.bfloat16))
    machine = Machine(0, 128, 0)
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
