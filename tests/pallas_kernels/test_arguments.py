"""A bad argument is refused before tracing, in a sentence that names it."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    GemvConfig,
    MatmulConfig,
    TritonConfig,
    nf4_dequantize,
    nf4_gemv,
    nf4_matmul,
    nf4_matmul_transposed,
)
from tests.pallas_kernels.base import make_case

CASE = make_case(0, 8, 128)
CODES, ABSMAX, NESTED, OFFSET = CASE.arrays
X = jnp.ones((2, 128), jnp.bfloat16)
GOOD = {"codes": CODES, "absmax": ABSMAX, "nested_absmax": NESTED, "offset": OFFSET}


pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": CODES.astype(jnp.int32)}, "codes has dtype int32; expected uint8"),
        ({"codes": CODES[:-1]}, r"absmax has shape \(16,\)"),
        ({"codes": CODES.reshape(-1)}, "shape= is not given"),
        ({"shape": (8, 100)}, "codes has shape"),
        ({"shape": (0, 128)}, "shape is"),
        ({"shape": ()}, r"shape is \(\); expected one or more dimensions"),
        ({"absmax": ABSMAX[:-1]}, "absmax has shape"),
        ({"absmax": ABSMAX.astype(jnp.float16)}, "absmax has dtype float16"),
        ({"absmax": ABSMAX.astype(jnp.float32)}, "nested_absmax is given"),
        ({"absmax": ABSMAX.astype(jnp.float32), "nested_absmax": None}, "offset is given"),
        ({"nested_absmax": None}, "nested_absmax is missing"),
        ({"nested_absmax": NESTED.astype(jnp.bfloat16)}, "nested_absmax is bfloat16"),
        ({"nested_absmax": jnp.ones(3)}, "nested_absmax is float32"),
        ({"offset": None}, "offset is missing"),
        ({"offset": jnp.ones((1,))}, "offset is float32"),
        ({"offset": OFFSET.astype(jnp.float16)}, r"offset is float16 \(\); expected float32"),
        ({"quant_type": "nf3"}, "quant_type is 'nf3'"),
        ({"blocksize": 48}, "blocksize is 48"),
        ({"dtype": jnp.int8}, "dtype is int8"),
        ({"dtype": "bf16"}, "dtype is 'bf16'; expected bfloat16"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ],
)
def test_weight(change, message):
    with pytest.raises(ValueError, match=message):
        nf4_dequantize(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("op", "x", "message"),
    [
        (nf4_matmul, X[:, :64], r"x has shape \(2, 64\)"),
        (nf4_matmul, X[0, 0], r"x has shape \(\); expected \[\.\.\., 128\]"),
        (nf4_matmul, X.astype(jnp.int32), "x's dtype is int32"),
        (nf4_matmul_transposed, X, r"dy has shape \(2, 128\)"),
        (nf4_gemv, jnp.ones((17, 128)), "x has 17 rows"),
    ],
)
def test_activations(op, x, message):
    with pytest.raises(ValueError, match=message):
        op(x, **GOOD)


def test_bias():
    with pytest.raises(ValueError, match="bias is float32"):
        nf4_matmul(X, **GOOD, bias=jnp.ones(7))
    with pytest.raises(ValueError, match=r"bias is int32 \(8,\); expected a float array"):
        nf4_matmul(X, **GOOD, bias=jnp.ones(8, jnp.int32))


@pytest.mark.parametrize(
    ("xa", "b", "message"),
    [
        (X[:, :4], jnp.ones((7, 4), X.dtype), r"lora's b has shape \(7, 4\); expected \(8, r\)"),
        (X[:1, :4], jnp.ones((8, 4), X.dtype), r"lora's xa has shape \(1, 4\); expected \(2, 4\)"),
        (X[:, :0], jnp.ones((8, 0), X.dtype), r"lora's b has shape \(8, 0\); expected \(8, r\)"),
        (X[:, :4], jnp.ones((8, 4, 1), X.dtype), r"lora's b has shape \(8, 4, 1\); expected"),
        (X[:, :4], jnp.ones((8, 4)), "lora's b is float32; expected x's dtype, bfloat16"),
        (jnp.ones((2, 4)), jnp.ones((8, 4), X.dtype), "lora's xa is float32; expected x's dtype"),
    ],
)
@pytest.mark.parametrize("op", [nf4_matmul, nf4_gemv])
def test_adapter(op, xa, b, message):
    with pytest.raises(ValueError, match=message):
        op(X, **GOOD, lora=(xa, b))


def test_an_adapter_is_a_pair():
    with pytest.raises(ValueError, match=r"lora is a tuple; expected a pair of arrays, \(xa, b\)"):
        nf4_matmul(X, **GOOD, lora=(X[:, :4],))


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (GemvConfig, "warps", 6),
        (GemvConfig, "steps", 3),  # 24 bytes of x a lane, which no 16-byte load may begin at
        (GemvConfig, "selects", 9),
        (GemvConfig, "segments", 3),
        (MatmulConfig, "rows", 100),
        (MatmulConfig, "stages", 2),  # a warpgroup would wait for a slot that it holds itself
        (MatmulConfig, "split", 0),
        (functools.partial(MatmulConfig, team=True), "stages", 9),  # a group would be overwritten
        (functools.partial(MatmulConfig, team=True), "split", 2),
        (functools.partial(MatmulConfig, team=True), "wide", True),
        (functools.partial(TritonConfig, 16, 16), "block_k", 48),
        (functools.partial(TritonConfig, 16, 16), "block_k", 16),  # half of a run of bytes
        (functools.partial(TritonConfig, 16, 16, 64), "num_warps", 64),  # 1024 threads are most
        (functools.partial(TritonConfig, 16, 16, 64), "num_warps", 3),  # Triton aborts the process
        (functools.partial(TritonConfig, 16, 16, 64), "decoder", "tabel"),
    ],
)
def test_a_config_names_the_field_that_cannot_be(make, field, value):
    with pytest.raises(ValueError, match=f"Config's {field} is {value!r}; expected"):
        make(**{field: value})


def test_a_weight_must_be_a_matrix_to_multiply():
    with pytest.raises(ValueError, match="expected a matrix"):
        nf4_matmul(X, **GOOD, shape=(2, 4, 128))
    assert nf4_dequantize(**GOOD, shape=(2, 4, 128)).shape == (2, 4, 128)


def test_numpy_arrays_are_taken():
    parts = {name: np.asarray(value) for name, value in GOOD.items()}
    np.testing.assert_array_equal(nf4_dequantize(**parts), nf4_dequantize(**GOOD))
