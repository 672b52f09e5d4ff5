"""Quantization error: bitsandbytes' published table, and properties that hold for any tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qlora_jax as ql
from pallas_kernels import CODEBOOKS
from qlora_jax.quant.blockwise import accurate_mean, encode

# ../shared/facts/bitsandbytes.md: mean absolute and relative error on randn 1024 × 1024.
SIGMA = 7e-5
NF4_ERRORS = {
    32: (0.067746, 0.189726),
    64: (0.072798, 0.203339),
    128: (0.076831, 0.215237),
    256: (0.080337, 0.226105),
    512: (0.083547, 0.236079),
    1024: (0.086610, 0.245370),
    2048: (0.089592, 0.254163),
    4096: (0.092547, 0.262473),
}


def errors(config: ql.QuantConfig) -> tuple[float, float]:
    weight = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    error = np.abs(np.asarray(ql.quantize(weight, config).dequantize()) - weight).astype(np.float64)
    return error.mean(), (error / np.abs(weight + 1e-8)).mean()


@pytest.mark.parametrize("blocksize", NF4_ERRORS)
def test_nf4_errors_as_published(blocksize: int) -> None:
    absolute, relative = errors(ql.QuantConfig("nf4", blocksize, double_quant=False))
    expected_absolute, expected_relative = NF4_ERRORS[blocksize]
    assert abs(absolute - expected_absolute) < 7 * SIGMA
    # The relative error's own σ grows with the error; bitsandbytes' limits allow these 7σ.
    assert abs(relative - expected_relative) < 7 * 4 * SIGMA


def test_fp4_errors_as_published() -> None:
    absolute, relative = errors(ql.QuantConfig("fp4", 64, double_quant=False))
    # From the published mean to the limit that bitsandbytes' own tests set.
    assert abs(absolute - 0.096543) < 0.097320 - 0.096543
    assert abs(relative - 0.260125) < 0.262778 - 0.260125


def test_double_quantization_costs_little() -> None:
    absolute, relative = errors(ql.QuantConfig())
    assert absolute < 0.11
    assert relative < 0.28
    assert absolute - NF4_ERRORS[64][0] < 7 * SIGMA


@st.composite
def weights(draw) -> np.ndarray:
    shape = draw(
        st.one_of(
            st.tuples(st.integers(1, 400)),
            st.tuples(st.integers(1, 12), st.integers(1, 70)),
            st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40)),
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10.0 ** draw(st.integers(-20, 20))
    array = (rng.standard_normal(shape) * scale).astype(np.float32)
    if draw(st.booleans()):
        array.reshape(-1)[rng.integers(0, array.size, 1 + array.size // 50)] *= 20
    if draw(st.booleans()):
        array.reshape(-1)[: draw(st.integers(0, array.size))] = 0
    return array


CONFIGS = st.builds(
    ql.QuantConfig,
    quant_type=st.sampled_from(sorted(CODEBOOKS)),
    blocksize=st.sampled_from([32, 64, 256, 4096]),
    double_quant=st.just(False),
)


@settings(max_examples=40)
@given(weights(), CONFIGS)
def test_every_value_goes_to_a_nearest_code(weight: np.ndarray, config: ql.QuantConfig) -> None:
    """The error of each element is that of the nearest table entry, up to float32 rounding (and
    FP4's rounded thresholds)."""
    decoded = np.asarray(ql.quantize(weight, config).dequantize(), np.float64)
    flat = np.asarray(weight, np.float64).reshape(-1)
    table = np.sort(CODEBOOKS[config.quant_type].astype(np.float64))
    for start in range(0, flat.size, config.blocksize):
        block = flat[start : start + config.blocksize]
        absmax = np.abs(block).max()
        best = np.abs(block[:, None] - table * absmax).min(1)
        error = np.abs(block - decoded.reshape(-1)[start : start + config.blocksize])
        assert (error <= best + 1e-6 * absmax).all()


@settings(max_examples=12)
@given(weights(), st.sampled_from(sorted(CODEBOOKS)))
def test_zeros_stay_zero(weight: np.ndarray, quant_type: str) -> None:
    decoded = np.asarray(ql.quantize(weight, ql.QuantConfig(quant_type)).dequantize())
    assert decoded.shape == weight.shape
    assert np.isfinite(decoded).all()
    # An all-zero block's absmax is the offset minus what 8 bits take of it: zero but for rounding,
    # and NF4's and the integers' zero is exact where the block holds other numbers.
    alone = ql.quantize(weight, ql.QuantConfig(quant_type, double_quant=False))
    assert (np.asarray(alone.dequantize())[weight == 0] == 0).all()


@settings(max_examples=40)
@given(st.integers(1, 3000), st.integers(0, 2**32 - 1))
def test_accurate_mean_is_the_float64_mean(count: int, seed: int) -> None:
    values = np.random.default_rng(seed).lognormal(0, 3, count).astype(np.float32)
    expected = np.float32(values.astype(np.float64).mean())
    actual = np.float32(accurate_mean(jnp.asarray(values)))
    assert abs(actual - expected) <= np.spacing(expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_the_nearest_and_of_two_the_even_one(bits: int) -> None:
    half = 2 ** (bits - 1)
    s = np.append(np.linspace(-1, 1, 99), [-0.5, 0.5]).astype(np.float32)
    expected = np.rint(s * np.float32(half - 1)) + half
    np.testing.assert_array_equal(encode(jnp.asarray(s), f"int{bits}"), expected)


def test_quantizing_bfloat16_equals_quantizing_its_float32_values() -> None:
    weight = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)
    np.testing.assert_array_equal(
        ql.quantize(weight).codes, ql.quantize(weight.astype(jnp.float32)).codes
    )
