"""The Hopper GEMV's lane program, run thread by thread on NumPy: the source that becomes SASS."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Layout
from pallas_kernels._mosaic import SHARED_LIMIT
from pallas_kernels._mosaic_decoder import byte_planes, lookup_tables, select_pairs
from pallas_kernels.codebooks import CODEBOOKS, DYNAMIC_SIGNED
from pallas_kernels.nf4_gemv import mosaic_plan, mosaic_sm90
from pallas_kernels.nf4_gemv.mosaic_early import MOST, ask_for_first_unit
from pallas_kernels.nf4_gemv.mosaic_lanes import lane_program
from pallas_kernels.nf4_gemv.mosaic_plan import GemvConfig, Plan, choose_config, configs_to_try
from pallas_kernels.nf4_gemv.mosaic_sm90 import _program, _program_in_stack, nf4_gemv_mosaic
from pallas_kernels.simt.emulate import Machine


def problem(rng, m, n, k, dtype, double_quant, quant_type="nf4"):
    """Random inputs in the kernel's own form, and the product in float64."""
    x = rng.normal(size=(m, k)).astype(np.float32)
    if dtype == "bfloat16":
        x *= 10.0 ** rng.integers(-6, 5, (m, 1))
    x[:, rng.integers(0, k, 3)] *= 300.0
    x = np.array(jnp.asarray(x, dtype))
    codes = rng.integers(0, 256, (n, k // 2), dtype=np.uint8)
    blocks = n * k // 64
    if double_quant:
        absmax = rng.integers(0, 256, blocks, dtype=np.uint8)
        nested = rng.uniform(0.01, 0.02, -(-blocks // 256)).astype(np.float32)
        offset = np.full(1, 0.03, np.float32)
        scale = DYNAMIC_SIGNED[absmax].astype(np.float64) * nested[np.arange(blocks) // 256] + 0.03
    else:
        absmax = rng.uniform(0.001, 0.1, blocks).astype(np.float32)
        nested = offset = np.zeros(1, np.float32)
        scale = absmax.astype(np.float64)
    table = CODEBOOKS[quant_type].astype(np.float64)
    weight = np.stack([table[codes >> 4], table[codes & 15]], -1).reshape(n, k)
    weight *= np.repeat(scale, 64).reshape(n, k)
    bias = rng.normal(size=n).astype(np.float32)
    exact = x.astype(np.float64) @ weight.T
    return (x, codes, absmax, nested, offset, bias, lookup_tables(quant_type)), exact


def emulate(plan, inputs, program=_program):
    """Every block of the grid in turn; the output starts out as NaN."""
    out = np.asarray(jnp.full((plan.split, plan.m, plan.n), jnp.nan, plan.out_dtype)).copy()
    for cta in range(plan.grid):
        program(plan, Machine(cta, plan.threads, plan.shared_bytes), *inputs, out)
    return out.astype(np.float64).sum(0)


@pytest.mark.parametrize(
    ("m", "n", "k", "dtype", "double_quant", "config"),
    [
        (1, 72, 1024, "bfloat16", True, GemvConfig(warps=4, tiles=2, steps=2, ctas=2)),
        (2, 40, 1344, "bfloat16", True, GemvConfig(warps=4, tiles=1, steps=2, ctas=2)),
        (3, 33, 2560, "float16", True, GemvConfig(warps=4, tiles=2, steps=4)),
        (4, 17, 640, "bfloat16", False, GemvConfig(warps=4, tiles=1, steps=1)),
        (5, 96, 768, "bfloat16", True, GemvConfig(warps=8, tiles=2, steps=2, ctas=2)),
        (8, 16, 512, "float16", False, GemvConfig(warps=4, tiles=1, steps=2)),
        (1, 16, 512, "bfloat16", True, GemvConfig(4, 1, 1, selects=3, skip_zeros=True)),
        (1, 37, 2048, "bfloat16", True, GemvConfig(4, 2, 1, ctas=2, segments=4)),
        (1, 24, 2048, "float16", True, GemvConfig(4, 1, 2, skip_zeros=True, segments=2)),
        (1, 19, 1600, "bfloat16", True, GemvConfig(4, 2, 1, segments=4)),
        (1, 16, 1024, "float16", False, GemvConfig(4, 1, 2, segments=4)),
        (4, 20, 2048, "bfloat16", True, GemvConfig(4, 1, 2, split=2)),
        (1, 40, 1984, "float16", True, GemvConfig(4, 1, 1, ctas=6, segments=2, split=2)),
        (5, 33, 1024, "bfloat16", True, GemvConfig(4, 2, 2, together=8)),
        (8, 48, 1600, "float16", False, GemvConfig(4, 1, 1, ctas=4, together=8, split=4)),
        (11, 40, 2048, "bfloat16", True, GemvConfig(8, 2, 2, ctas=1, together=8)),
        (16, 24, 1024, "bfloat16", True, GemvConfig(4, 1, 4, together=8)),
        # Two units in two rounds, the second of them not full.
        (16, 40, 4096, "bfloat16", True, GemvConfig(8, 2, 2, ctas=1, together=8)),
    ],
)
def test_lane_program_is_the_product(m, n, k, dtype, double_quant, config):
    rng = np.random.default_rng(m)
    plan = Plan(m, n, k, dtype, double_quant, True, config)
    assert plan.shared_bytes <= SHARED_LIMIT
    if plan.split > 1:  # the bias is added to the sum of the parts
        plan = dataclasses.replace(plan, has_bias=False)
        assert plan.out_dtype == "float32"
    inputs, exact = problem(rng, m, n, k, dtype, double_quant)
    got = emulate(plan, inputs)
    exact = exact + inputs[5] * plan.has_bias
    error = np.linalg.norm(got - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() < (2.5e-3 if dtype == "bfloat16" else 1e-3)


class BankMachine(Machine):
    """Counts the turns that reads of 16 bytes take: each quarter of a warp one, if no bank of 4
    bytes has two different words to give."""

    def shared_load(self, address, words=1, *, offset=0, when=None, region=None):
        if words == 4:
            self.reads = getattr(self, "reads", 0) + self.threads // 8
            word = (address.astype(np.int64) + offset) // 4
            for eight in range(0, self.threads, 8):
                lanes = [i for i in range(eight, eight + 8) if when is None or when[i]]
                wanted = {int(word[i]) + j for i in lanes for j in range(4)}
                banks = np.bincount([w % 32 for w in wanted], minlength=32)
                self.turns = getattr(self, "turns", 0) + max(1, banks.max())
        return super().shared_load(address, words, offset=offset, when=when, region=region)


@pytest.mark.parametrize(
    ("m", "config"),
    [
        (1, GemvConfig(warps=8, tiles=1, steps=2)),
        (4, GemvConfig(warps=4, tiles=1, steps=2)),
        (1, GemvConfig(warps=8, tiles=1, steps=2, segments=2)),
        (1, GemvConfig(warps=4, tiles=1, steps=1, segments=4)),
        (1, GemvConfig(warps=4, tiles=1, steps=4, segments=2, skip_zeros=True)),
        (16, GemvConfig(warps=8, tiles=1, steps=2, together=8)),
        (8, GemvConfig(warps=4, tiles=1, steps=4, together=8)),
    ],
)
def test_lanes_read_x_from_different_banks(m, config):
    plan = Plan(m, 16, 4096, "bfloat16", True, True, config)
    inputs, _ = problem(np.random.default_rng(0), m, 16, 4096, "bfloat16", True)
    machine = BankMachine(0, plan.threads, plan.shared_bytes)
    out = np.asarray(jnp.zeros((m, 16), jnp.bfloat16)).copy()
    lane_program(machine, plan, *inputs, out)
    assert machine.turns == machine.reads


class RaceMachine(Machine):
    """Between two barriers no warp may touch a byte of shared memory that another one writes
    (CUDA programming guide, "Thread Synchronization")."""

    def __init__(self, cta, threads, shared_bytes):
        super().__init__(cta, threads, shared_bytes)
        self.phase = 1
        # Of each byte the phase of the last write and read, and the warp; -1 for several.
        self.wrote, self.wrote_by, self.read, self.read_by = np.zeros((4, shared_bytes), np.int64)

    def barrier(self):
        self.phase += 1

    def _touched(self, address, width, offset, when):
        active = np.ones(self.threads, bool) if when is None else when
        at = (address.astype(np.int64) + offset)[active][:, None] + np.arange(width)
        return at.reshape(-1), np.repeat(self.thread[active] // 32, width).astype(np.int64)

    def shared_load(self, address, words=1, *, offset=0, when=None, region=None):
        if region is None:
            at, warp = self._touched(address, 4 * words, offset, when)
            assert not ((self.wrote[at] == self.phase) & (self.wrote_by[at] != warp)).any(), "race"
            fresh = self.read[at] != self.phase
            self.read_by[at[fresh]], self.read[at] = warp[fresh], self.phase
            self.read_by[at[self.read_by[at] != warp]] = -1
        return super().shared_load(address, words, offset=offset, when=when, region=region)

    def shared_store(self, address, values, *, offset=0, when=None, region=None):
        if region is None:
            at, warp = self._touched(address, 4 * len(values), offset, when)
            for phase, by in ((self.wrote, self.wrote_by), (self.read, self.read_by)):
                assert not ((phase[at] == self.phase) & (by[at] != warp)).any(), "race"
            self.wrote[at], self.wrote_by[at] = self.phase, warp
            assert (self.wrote_by[at] == warp).all(), "race"
        super().shared_store(address, values, offset=offset, when=when, region=region)


@pytest.mark.parametrize(
    ("m", "n", "k", "config"),
    [
        (1, 72, 1024, GemvConfig(warps=4, tiles=2, steps=2, ctas=1)),
        # In two rounds, whose sums are no whole turns of all threads.
        (11, 72, 6144, GemvConfig(8, 2, 2, ctas=1, together=8)),
    ],
)
def test_warps_wait_before_they_read_what_others_wrote(m, n, k, config):
    plan = Plan(m, n, k, "bfloat16", True, True, config)
    assert (plan.held < plan.units_per_cta) == (m == 11)
    inputs, _ = problem(np.random.default_rng(0), m, n, k, "bfloat16", True)
    out = np.asarray(jnp.zeros((m, n), jnp.bfloat16)).copy()
    lane_program(RaceMachine(0, plan.threads, plan.shared_bytes), plan, *inputs, out)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_selects_are_the_look_up(quant_type):
    """All 65,536 pairs of bytes, in either half of a word: the table's float16, bit for bit."""
    threads = 1 << 16
    machine = Machine(0, threads, 0)
    planes = [[machine.word(w) for w in plane] for plane in byte_planes(quant_type)]
    both = np.arange(threads, dtype=np.uint32)
    table = CODEBOOKS[quant_type].astype(np.float16)
    for upper in (False, True):
        word = both << np.uint32(16 * upper) | (both * 40503 & 0xFFFF) << np.uint32(
            16 * (not upper)
        )
        pairs = select_pairs(machine, word.astype(np.uint32), upper, planes)
        for byte, pair in zip((both & 255, both >> 8), pairs, strict=True):
            expected = np.stack([table[byte >> 4], table[byte & 15]], -1)
            np.testing.assert_array_equal(pair[:, None].view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize(
    ("m", "n", "dtype", "rank", "bias"),
    [
        (1, 40, "bfloat16", 16, False),
        (1, 27, "float16", 80, True),
        (2, 33, "float16", 8, True),
        (4, 24, "bfloat16", 80, True),  # a warp's second slice is loaded late
        (8, 47, "float16", 64, False),
        (8, 16, "bfloat16", 20, True),
        (12, 24, "bfloat16", 80, False),
        (16, 16, "float16", 16, True),
    ],
)
def test_an_adapter_is_more_of_the_same_sum(m, n, dtype, rank, bias):
    rng = np.random.default_rng(rank)
    tiles, segments = 1 if m > 4 else 2, 4 if n == 27 else 1
    k, together = 512, 8 if m > 8 else 4
    config = GemvConfig(4, tiles, 1, ctas=1, segments=segments, together=together)
    inputs, exact = problem(rng, m, n, k, dtype, double_quant=True)
    xa, b = (np.array(jnp.asarray(rng.normal(size=s), dtype)) for s in ((m, rank), (n, rank)))
    # As large as the product that it is added to.
    xa *= (np.abs(exact).mean(1, keepdims=True) / rank**0.5).astype(xa.dtype)
    low = xa.astype(np.float64) @ b.astype(np.float64).T
    got = emulate(Plan(m, n, k, dtype, True, bias, config, rank), [*inputs, xa, b])
    exact = exact + low + inputs[5] * bias
    error = np.linalg.norm(got - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.max() < (2.5e-3 if dtype == "bfloat16" else 1e-3)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_of_a_stack(double_quant):
    """To the bit as alone. Bounds are those of its own part of the stacks."""
    rng, config = np.random.default_rng(0), GemvConfig(warps=4, tiles=1, steps=2)
    plan = Plan(2, 24, 512, "bfloat16", double_quant, True, config, rank=8)
    weights = [problem(rng, 2, 24, 512, "bfloat16", double_quant)[0] for _ in range(3)]
    x, *_, bias, tables = weights[0]
    adapter = [np.array(jnp.asarray(rng.normal(size=s), "bfloat16")) for s in ((2, 8), (24, 8))]
    stacks = [np.stack(parts) for parts in zip(*(weight[1:5] for weight in weights), strict=True)]
    sizes = [stack[0].nbytes for stack in stacks]
    for number, weight in enumerate(weights):
        alone = emulate(plan, [x, *weight[1:5], bias, tables, *adapter])
        inputs = [np.array([number], np.int32), x, *stacks, bias, tables, *adapter]
        got = emulate(plan, inputs, functools.partial(_program_in_stack, sizes))
        np.testing.assert_array_equal(got, alone)


@pytest.mark.parametrize(
    ("n", "k", "double_quant", "config"),
    [
        (72, 1024, True, GemvConfig(4, 2, 2, ctas=2)),
        (33, 2560, False, GemvConfig(4, 2, 4)),
        (37, 2048, True, GemvConfig(4, 2, 1, ctas=2, segments=4)),
        (40, 1984, True, GemvConfig(4, 1, 1, ctas=6, segments=2, split=2)),
        (16, 128, True, GemvConfig(4, 1, 1)),
        # A unit of less than two nested blocks has a part of three.
        (336, 1984, True, GemvConfig(4, 1, 1)),
        (32, 28672, True, GemvConfig(8, 2, 1)),  # more than what blocks together may ask for
    ],
)
def test_a_block_asks_early_for_what_it_reads_first(n, k, double_quant, config):
    plan = Plan(1, n, k, "bfloat16", double_quant, True, config)
    inputs, _ = problem(np.random.default_rng(0), 1, n, k, "bfloat16", double_quant)
    width, sizes = (1 if double_quant else 4), [part.nbytes for part in inputs[1:4]]
    for cta in range(plan.grid):
        machine = Machine(cta, plan.threads, 0)
        ask_for_first_unit(machine, plan, *inputs)
        first = cta % plan.blocks * plan.rows
        last = min(first + plan.rows, n)
        blocks = [row * k // 64 for row in (first, last)]
        # The bytes that the unit's rows take; pieces of 16 around them, inside of the buffer.
        wanted = [[row * k // 2 for row in (first, last)], [width * block for block in blocks]]
        wanted[0][1] = min(wanted[0][1], wanted[0][0] + MOST)
        if double_quant:
            wanted.append([4 * (blocks[0] // 256), 4 * ((blocks[1] - 1) // 256 + 1)])
        sizes = sizes[: len(wanted)]
        for asked, (start, end), size in zip(machine.asked, wanted, sizes, strict=True):
            end = min(end, size // 16 * 16)
            assert (start >= end and not asked) or (
                asked[0][0] in range(start - 15, start + 1)
                and end <= sum(asked[0]) < max(end, start + 16) + 32
                and len(asked) == 1
            )


@pytest.mark.parametrize("together", [4, 8])
def test_bad_rows_stay_alone(together):
    """A row of x with inf or NaN is lost; the others are untouched."""
    rng = np.random.default_rng(0)
    config = GemvConfig(warps=4, tiles=1, steps=2, together=together)
    inputs, exact = problem(rng, 4, 32, 512, "bfloat16", True)
    inputs[0][1, 100], inputs[0][3, 7] = np.inf, np.nan
    xa, b = (np.array(jnp.ones((rows, 8), jnp.bfloat16)) for rows in (4, 32))
    xa[1] = np.nan
    exact += 8
    plan = Plan(4, 32, 512, "bfloat16", True, False, config, rank=8)
    got = emulate(plan, [*inputs, xa, b])
    assert not np.isfinite(got[[1, 3]]).any()
    np.testing.assert_allclose(got[[0, 2]], exact[[0, 2]], rtol=0.1, atol=0.01 * abs(exact).max())


def test_rows_of_any_magnitude():
    """Zeros, and numbers at the ends of bfloat16's range, which float16 does not reach."""
    config = GemvConfig(warps=4, tiles=1, steps=2)
    inputs, _ = problem(np.random.default_rng(0), 4, 16, 512, "bfloat16", True)
    plain = np.random.default_rng(1).normal(size=512).astype(inputs[0].dtype)
    scales = np.array([0, 2.0**-114, 1, 2.0**100]).astype(plain.dtype)
    inputs[0][:] = scales[:, None] * plain
    got = emulate(Plan(4, 16, 512, "bfloat16", True, False, config), inputs)
    assert not got[0].any()
    np.testing.assert_array_equal(got[1:] / np.float64(scales[1:, None]), got[[2, 2, 2]])


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (11008, 4096), (4096, 11008), (8192, 28672)])
@pytest.mark.parametrize("m", [1, 2])
def test_llama_shapes_fit(m, n, k):
    plan = Plan(m, n, k, "bfloat16", True, False, mosaic_plan.choose_config(m, n, k))
    assert plan.shared_bytes <= SHARED_LIMIT
    assert plan.efficiency > 0.75


def test_eight_warps_unless_the_work_is_a_tenth_more_even():
    def best(m, n, k):
        return choose_config(m, n, k)

    even = Plan(1, 4096, 4096, "bfloat16", True, False, GemvConfig())
    assert even.efficiency == pytest.approx(128 / 132)  # units on multiprocessors
    assert best(1, 4096, 4096) == best(1, 5120, 1024) == GemvConfig()
    assert (best(4, 5120, 5120).warps, best(4, 5120, 5120).steps) == (20, 2)
    # 96 registers a lane: from five rows on one step at a time, and of eight together one tile.
    assert (best(5, 5120, 5120).warps, best(5, 5120, 5120).steps) == (20, 1)
    for cut, rows, goes in (
        (GemvConfig(20, 1, 2), 4, True),
        (GemvConfig(20, 1, 2), 5, False),
        (GemvConfig(12, 2, 2), 8, True),
        (GemvConfig(12, 2, 2, together=8), 8, False),
        (GemvConfig(12, 1, 2, together=8), 8, True),
        (GemvConfig(8, 2, 2, together=8), 8, True),
    ):
        plan = Plan(rows, 4096, 4096, "bfloat16", True, False, cut)
        assert mosaic_plan.fits(plan) == goes, (cut, rows)


@pytest.mark.parametrize(
    ("m", "k", "together", "split"),
    [(8, 4096, 4, 1), (9, 4096, 8, 1), (4, 28672, 4, 2), (8, 28672, 8, 4)],
)
def test_more_rows_than_eight_and_those_that_do_not_fit(m, k, together, split):
    plan = Plan(m, 8192, k, "bfloat16", True, False, choose_config(m, 8192, k))
    assert (plan.config.together, plan.split) == (together, split)
    assert plan.shared_bytes <= SHARED_LIMIT


def test_no_part_of_the_columns_is_empty():
    """Of five turns four blocks would take two each: three have them all."""
    config = GemvConfig(4, 1, 1, split=4)
    assert Plan(1, 16, 5 * 512, "bfloat16", True, False, config).split == 3


def test_parts_of_a_sum_are_added_up_before_bias_and_adapter(monkeypatch):
    """By XLA, and the kernel is asked for neither."""
    rng, (m, n, k) = np.random.default_rng(0), (3, 32, 1024)
    x, weight = (np.array(jnp.asarray(rng.normal(size=s), "bfloat16")) for s in ((m, k), (n, k)))
    xa, b = (jnp.asarray(rng.normal(size=s), "bfloat16") for s in ((m, 8), (n, 8)))
    bias = jnp.asarray(rng.normal(size=n), jnp.float32)

    def parts(x, _weight, bias, lora, _layer, plan):
        assert (bias, lora, plan.has_bias, plan.rank) == (None, None, False, 0)
        pieces = zip(*(np.split(np.float32(a), plan.split, 1) for a in (x, weight)), strict=True)
        return jnp.concatenate([x @ w.T for x, w in pieces])

    monkeypatch.setattr(mosaic_sm90, "_call", parts)
    arrays = (jnp.zeros((n, k // 2), jnp.uint8), jnp.ones((n * k // 64,)), None, None)
    layout, config = Layout((n, k), "nf4", 64, double_quant=False), GemvConfig(4, 1, 1, split=2)
    got = nf4_gemv_mosaic(jnp.asarray(x), *arrays, bias, (xa, b), layout=layout, config=config)
    x, weight, xa, b = (np.asarray(a, np.float64) for a in (x, weight, xa, b))
    want = x @ weight.T + xa @ b.T + np.asarray(bias, np.float64)
    assert (got.shape, got.dtype) == ((m, n), jnp.bfloat16)
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-3)


def test_what_is_launched(monkeypatch):
    """An adapter of whole fours; a part of the sum for each split; nothing early that may depend on
    the kernel in front."""
    seen = []

    def launch(program, out, *, early, **_):
        def run(*inputs):
            seen.append((out, early, inputs))
            return jnp.zeros(out.shape, out.dtype)

        return run

    monkeypatch.setattr(mosaic_sm90, "launch", launch)
    monkeypatch.setattr(mosaic_sm90, "call", lambda kernel, *inputs: kernel(*inputs))
    monkeypatch.setattr(mosaic_sm90, "STARTS_EARLY", True)
    layout, x = Layout((32, 1024), "nf4", 64, double_quant=False), jnp.ones((2, 1024), jnp.bfloat16)
    codes, absmax = jnp.zeros((3, 32, 512), jnp.uint8), jnp.ones((3, 512))

    def launched(config, lora=None, layer=None):
        weight = (codes, absmax) if layer is not None else (codes[0], absmax[0])
        nf4_gemv_mosaic(x, *weight, None, None, None, lora, layer, layout=layout, config=config)
        return seen[-1]

    lora = (jnp.ones((2, 6), x.dtype), jnp.ones((32, 6), x.dtype))
    out, early, inputs = launched(GemvConfig(4, 1, 1), lora)
    assert (out.shape, out.dtype, early) == ((2, 32), x.dtype, None)
    assert [part.shape for part in inputs[-2:]] == [(2, 8), (32, 8)]
    assert not inputs[-1][:, 6:].any()
    out, early, _ = launched(GemvConfig(4, 1, 1, split=2, early=True))
    assert (out.shape, out.dtype, early.func) == ((4, 32), jnp.float32, mosaic_sm90._early)
    *_, early, _ = launched(GemvConfig(4, 1, 1, early=True), layer=jnp.int32(1))
    assert early is mosaic_sm90._nothing


@pytest.mark.parametrize("module", ["nf4_gemv", "nf4_matmul", "nf4_matmul_transposed"])
def test_a_kernel_called_by_itself_refuses_what_it_does_not_take(module):
    kernel = importlib.import_module(f"pallas_kernels.{module}.mosaic_sm90")
    layout, after = Layout((64, 128), "nf4", 64, double_quant=False), (None,)
    weight = (jnp.zeros((64, 64), jnp.uint8), jnp.ones((128,)), None, None)
    x = jnp.ones((1, 128))
    if module == "nf4_matmul_transposed":
        x, after = jnp.ones((1, 64)), ()
    with pytest.raises(ValueError, match="takes bfloat16 and float16 activations, not float32"):
        getattr(kernel, f"{module}_mosaic")(x, *weight, *after, layout=layout)


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_candidates_are_different_and_those_that_start_early_need_jax_0_11(rows, monkeypatch):
    configs = configs_to_try(rows, 4096, 4096)
    assert len(set(configs)) == len(configs)
    assert configs[0] == choose_config(rows, 4096, 4096)
    assert any(config.early for config in configs) is (jax.__version_info__ >= (0, 11))
    monkeypatch.setattr(mosaic_plan, "STARTS_EARLY", True)
    first, *others = configs_to_try(rows, 4096, 4096)
    assert first == choose_config(rows, 4096, 4096)
    assert dataclasses.replace(first, early=True) in others


@pytest.mark.parametrize(
    ("rows", "config", "message"),
    [
        (2, GemvConfig(segments=2), r"segments=2; expected one of \(1,\) for 2 rows"),
        (8, GemvConfig(warps=32, tiles=8), "bytes of shared memory; expected at most 230400"),
    ],
)
def test_a_config_that_cannot_be_is_refused(rows, config, message):
    layout = Layout((16, 4096), "nf4", 64, double_quant=False)
    weight = (jnp.zeros((16, 2048), jnp.uint8), jnp.ones((1024,)), None, None)
    with pytest.raises(ValueError, match=message):
        nf4_gemv_mosaic(
            jnp.ones((rows, 4096), jnp.bfloat16), *weight, None, layout=layout, config=config
        )
