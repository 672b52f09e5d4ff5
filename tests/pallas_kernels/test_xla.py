"""The XLA oracle against float64 NumPy: any shape, any type, under jit, vmap and scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import (
    DYNAMIC_SIGNED,
    nf4_dequantize,
    nf4_gemv,
    nf4_matmul,
    nf4_matmul_transposed,
)
from pallas_kernels._decode import decode_absmax
from tests.pallas_kernels.base import (
    activations,
    adapter,
    assert_adapted,
    assert_product,
    cases,
    dtypes,
    make_case,
)

ALL_TYPES = ("nf4", "fp4", "fp4_e3m0", "int4", "int8")


@settings(max_examples=12)
@given(case=cases(whole_rows=False, types=ALL_TYPES), dtype=dtypes)
def test_dequantize_is_exact(case, dtype):
    out = nf4_dequantize(*case.arrays, dtype=dtype, **case.keywords)
    assert out.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(out).astype(np.float64), case.weight_as(dtype))


@settings(max_examples=8)
@given(
    case=cases(whole_rows=False, types=ALL_TYPES),
    dtype=dtypes,
    rows=st.integers(1, 40),
    biased=st.booleans(),
    rank=st.integers(0, 9),
    fuse=st.booleans(),
)
def test_matmul(case, dtype, rows, biased, rank, fuse):
    x = activations(0, rows, case.k, dtype)
    bias = jnp.arange(case.n, dtype=dtype) if biased else None
    lora = adapter(2, rows, case.n, rank, dtype) if rank else None
    out = nf4_matmul(x, *case.arrays, bias, lora, fuse_lora=fuse, **case.keywords)
    assert_adapted(out, x, case.weight, lora, bias, fuse)


@settings(max_examples=8)
@given(case=cases(whole_rows=False, types=ALL_TYPES), dtype=dtypes, rows=st.integers(1, 40))
def test_matmul_transposed(case, dtype, rows):
    dy = activations(1, rows, case.n, dtype)
    out = nf4_matmul_transposed(dy, *case.arrays, **case.keywords)
    assert_product(out, dy, case.weight.T)


def test_leading_axes_and_no_rows():
    case = make_case(3, 24, 64)
    x = activations(3, 6, 64, "float32")
    flat = nf4_matmul(x, *case.arrays)
    np.testing.assert_array_equal(
        nf4_matmul(x.reshape(2, 3, 64), *case.arrays).reshape(6, 24), flat
    )
    np.testing.assert_allclose(nf4_matmul(x[0], *case.arrays), flat[0], rtol=1e-5, atol=1e-5)
    assert nf4_matmul(x[:0], *case.arrays).shape == (0, 24)
    assert nf4_matmul_transposed(x[:0, :24], *case.arrays).shape == (0, 64)
    np.testing.assert_allclose(nf4_gemv(x, *case.arrays), flat, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_broken_row_stays_alone(value):
    case = make_case(4, 24, 64)
    x = activations(4, 5, 64, "float32").at[2, 7].set(value)
    assert_product(nf4_matmul(x, *case.arrays), x, case.weight)


def test_stacked_weights_under_vmap_and_scan():
    stack = [make_case(s, 16, 128) for s in range(3)]
    leaves = tuple(jnp.stack(parts) for parts in zip(*(c.arrays for c in stack), strict=True))
    x = activations(5, 4, 128, "float32")
    by_hand = jnp.stack([nf4_matmul(x, *c.arrays) for c in stack])
    mapped = jax.jit(jax.vmap(lambda w: nf4_matmul(x, *w)))(leaves)
    _, scanned = jax.lax.scan(lambda carry, w: (carry, nf4_matmul(x, *w)), 0, leaves)
    np.testing.assert_allclose(mapped, by_hand, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(scanned, by_hand, rtol=1e-5, atol=1e-5)


def test_a_broken_scale_is_not_hidden():
    case = make_case(6, 8, 64)
    codes, absmax, nested, offset = case.arrays
    out = nf4_dequantize(codes, absmax, nested * jnp.nan, offset, dtype=jnp.float32)
    assert np.isnan(np.asarray(out)).any()


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    """Programs take the branch that a TPU runs."""

    def tpus_branch(*args, tpu, default):
        return tpu(*args)

    jax.clear_caches()
    monkeypatch.setattr(jax.lax, "platform_dependent", tpus_branch)
    yield
    jax.clear_caches()


def test_what_a_tpu_runs(as_on_a_tpu):
    for quant_type, double_quant, dtype in (
        ("nf4", True, "bfloat16"),
        ("int4", False, "float32"),
        ("int8", True, "float16"),
    ):
        case = make_case(7, 36, 192, quant_type, double_quant=double_quant)
        dense = nf4_dequantize(*case.arrays, dtype=dtype, **case.keywords)
        np.testing.assert_array_equal(
            np.asarray(dense).astype(np.float64), case.weight_as(dtype), strict=True
        )
        x, dy = activations(8, 5, case.k, dtype), activations(9, 5, case.n, dtype)
        lora, bias = adapter(10, 5, case.n, 4, dtype), jnp.arange(case.n, dtype=dtype)
        y = nf4_matmul(x, *case.arrays, bias, lora, fuse_lora=True, **case.keywords)
        assert_adapted(y, x, case.weight, lora, bias, True)
        assert_product(nf4_matmul_transposed(dy, *case.arrays, **case.keywords), dy, case.weight.T)


def test_a_tpu_looks_up_absmax_to_the_last_bit(as_on_a_tpu):
    """All 256 codes of double quantization, through its tree of selects."""
    codes = np.arange(256, dtype=np.uint8)
    absmax = decode_absmax(jnp.asarray(codes), jnp.ones(1), jnp.zeros(()))
    np.testing.assert_array_equal(absmax, DYNAMIC_SIGNED)
