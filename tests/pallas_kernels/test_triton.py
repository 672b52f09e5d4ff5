"""The Triton kernels, interpreted on the CPU, against float64 NumPy. Tiny: interpreting is slow."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import (
    TritonConfig,
    nf4_dequantize,
    nf4_gemv,
    nf4_matmul,
    nf4_matmul_transposed,
)
from tests.pallas_kernels.base import (
    activations,
    adapter,
    assert_adapted,
    assert_product,
    cases,
    dtypes,
    make_case,
)

RUN = {"implementation": "triton", "interpret": True}
GEMV = TritonConfig(1, 8, 128, num_warps=1)
MATMUL = TritonConfig(16, 16, 64, num_warps=1)
SPLIT = TritonConfig(16, 16, 64, num_warps=1, split_k=2)
UNFUSED = TritonConfig(1, 1, 256, num_warps=1, fused=False)
FEW = settings(max_examples=8)


@FEW
@given(case=cases(whole_rows=False), dtype=dtypes)
def test_dequantize_is_exact(case, dtype):
    config = TritonConfig(1, 1, 256, num_warps=1, decoder="table")
    out = nf4_dequantize(*case.arrays, dtype=dtype, config=config, **RUN, **case.keywords)
    np.testing.assert_array_equal(np.asarray(out).astype(np.float64), case.weight_as(dtype))


@FEW
@given(
    case=cases(whole_rows=True),
    dtype=dtypes,
    rows=st.integers(1, 18),
    config=st.sampled_from([MATMUL, SPLIT, UNFUSED]),
    biased=st.booleans(),
    rank=st.sampled_from([0, 16, 80]),
    fuse=st.booleans(),
)
def test_matmul(case, dtype, rows, config, biased, rank, fuse):
    x = activations(0, rows, case.k, dtype)
    bias = jnp.arange(case.n, dtype=dtype) if biased else None
    lora = adapter(3, rows, case.n, rank, dtype) if rank else None
    out = nf4_matmul(
        x, *case.arrays, bias, lora, fuse_lora=fuse, config=config, **RUN, **case.keywords
    )
    assert_adapted(out, x, case.weight, lora, bias, fuse)


@FEW
@given(
    case=cases(whole_rows=True),
    dtype=dtypes,
    rows=st.integers(1, 18),
    config=st.sampled_from([TritonConfig(16, 16, 64, num_warps=1), UNFUSED]),
)
def test_matmul_transposed(case, dtype, rows, config):
    dy = activations(1, rows, case.n, dtype)
    out = nf4_matmul_transposed(dy, *case.arrays, config=config, **RUN, **case.keywords)
    assert_product(out, dy, case.weight.T)


@FEW
@given(
    case=cases(whole_rows=True),
    dtype=dtypes,
    rows=st.integers(1, 4),
    biased=st.booleans(),
    rank=st.sampled_from([0, 3, 80]),
)
def test_gemv(case, dtype, rows, biased, rank):
    x = activations(2, rows, case.k, dtype)
    bias = jnp.arange(case.n, dtype=jnp.float32) if biased else None
    lora = adapter(3, rows, case.n, rank, dtype) if rank else None
    out = nf4_gemv(x, *case.arrays, bias, lora, fuse_lora=True, config=GEMV, **RUN, **case.keywords)
    assert_adapted(out, x, case.weight, lora, bias, fuse=True)


def test_few_rows_too_can_be_left_to_xla():
    """A config that is not fused decodes the weight to x's dtype; the gemv would keep float32."""
    case, x = make_case(9, 24, 256), activations(9, 2, 256, "bfloat16")
    run = functools.partial(nf4_matmul, x, *case.arrays)
    np.testing.assert_array_equal(run(config=UNFUSED, **RUN), run(implementation="xla"))
    assert (run(config=GEMV, **RUN) != run(implementation="xla")).any()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("config", [GEMV, MATMUL, SPLIT], ids=["gemv", "matmul", "split"])
def test_a_broken_row_stays_alone(value, config):
    """Also where rows, columns and k are padded to the tile: 0 · inf is NaN."""
    case = make_case(7, 13, 192)
    x = activations(7, 3, 192, "bfloat16").at[1, 5].set(value)
    assert_product(nf4_matmul(x, *case.arrays, config=config, **RUN), x, case.weight)
    xa, b = adapter(8, 3, 13, 20, "bfloat16")
    lora = (xa.at[1].set(value), b)
    out = nf4_matmul(x, *case.arrays, None, lora, fuse_lora=True, config=config, **RUN)
    assert_adapted(out, x, case.weight, lora, None, fuse=True)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_broken_gradient_row_stays_alone(value):
    case = make_case(8, 24, 64)
    dy = activations(8, 3, 24, "bfloat16").at[1, 5].set(value)
    out = nf4_matmul_transposed(dy, *case.arrays, config=MATMUL, **RUN)
    assert_product(out, dy, case.weight.T)


def test_stacked_weights_under_vmap_and_scan():
    stack = [make_case(s, 16, 128) for s in range(2)]
    leaves = tuple(jnp.stack(parts) for parts in zip(*(c.arrays for c in stack), strict=True))
    x = activations(5, 2, 128, "float32")
    run = functools.partial(nf4_matmul, x, config=GEMV, **RUN)
    by_hand = jnp.stack([run(*c.arrays) for c in stack])
    _, scanned = jax.lax.scan(lambda carry, w: (carry, run(*w)), 0, leaves)
    np.testing.assert_array_equal(scanned, by_hand)
    np.testing.assert_array_equal(jax.vmap(lambda w: run(*w))(leaves), by_hand)


def kernels_of(function, *arrays):
    """The names of the kernels in a function's program, and how many loops it has."""
    text = str(jax.make_jaxpr(function)(*arrays))
    return re.findall(r"name=(nf4_\w+)", text), text.count(" scan[") + text.count(" while[")


@pytest.mark.parametrize("lora_too", [False, True])
def test_x_mapped_alone_is_one_product_with_more_rows(lora_too):
    """W is read once, by the kernel for that many rows, as if they had come together."""
    case = make_case(6, 32, 128)
    x = activations(6, 40, 128, "float32").reshape(2, 20, 128)
    xa, b = adapter(7, 40, 32, 16, "float32")

    def product(x, xa):
        lora = (xa, b) if lora_too else None
        return nf4_matmul(x, *case.arrays, None, lora, fuse_lora=True, **RUN)

    xa = xa.reshape(2, 20, 16)
    rows = jax.vmap(jax.vmap(product))
    together = product(x, xa)
    assert kernels_of(rows, x, xa) == kernels_of(product, x, xa)
    np.testing.assert_array_equal(rows(x, xa), together)
    if lora_too:
        same = xa[0, 0]
        got = jax.vmap(lambda x: product(x, same))(x[0])
        np.testing.assert_array_equal(got, product(x[0], jnp.broadcast_to(same, (20, 16))))


def test_gradients_of_x_mapped_alone_are_one_product_too():
    case = make_case(6, 32, 128)
    dy = activations(6, 40, 32, "float32")
    one = functools.partial(nf4_matmul_transposed, **RUN)
    rows = jax.vmap(lambda dy: one(dy, *case.arrays))
    assert kernels_of(rows, dy) == kernels_of(one, dy, *case.arrays)
    np.testing.assert_array_equal(rows(dy), one(dy, *case.arrays))


def test_what_was_asked_for_is_mapped_as_it_is():
    """A config is for one call's rows: it is kept, and so is an adapter of each element's own."""
    case = make_case(6, 32, 128)
    x = activations(6, 20, 128, "float32")
    names, _ = kernels_of(jax.vmap(lambda x: nf4_matmul(x, *case.arrays, config=GEMV, **RUN)), x)
    assert names[-1] == "nf4_gemv"
    xa, b = adapter(7, 20, 32, 16, "float32")
    own = jnp.stack([b * i for i in range(20)])
    got = jax.vmap(lambda x, xa, b: nf4_matmul(x, *case.arrays, None, (xa, b), **RUN))(x, xa, own)
    want = [nf4_matmul(x[i], *case.arrays, None, (xa[i], own[i]), **RUN) for i in range(20)]
    np.testing.assert_allclose(got, jnp.stack(want), rtol=1e-5, atol=1e-4)
