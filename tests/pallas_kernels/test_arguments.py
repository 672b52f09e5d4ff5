"""A bad argument is refused before tracing, in a sentence that names it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    GemvConfig,
    Layout,
    MatmulConfig,
    TritonConfig,
    nf4_dequantize,
    nf4_gemv,
    nf4_matmul,
    nf4_matmul_transposed,
    which_implementation,
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
        ({"codes": CODES.reshape(-1, 1)}, r"codes has shape \(512, 1\) and shape= is not given"),
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
        ({"quant_type": ["nf4"]}, r"quant_type is \['nf4'\]; expected one of"),
        ({"blocksize": 48}, "blocksize is 48"),
        ({"blocksize": 64.0}, r"blocksize is 64\.0; expected one of"),
        ({"config": {"block_k": 64}}, "config is a dict, and nf4_dequantize runs 'xla' here"),
        ({"config": TritonConfig(1, 1, 1024)}, "config is a TritonConfig, .* pass config=None"),
        ({"dtype": jnp.int8}, "dtype is int8"),
        ({"dtype": "bf16"}, "dtype is 'bf16'; expected bfloat16"),
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ],
)
def test_weight(change, message):
    with pytest.raises(ValueError, match=message):
        nf4_dequantize(**{**GOOD, **change})


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (nf4_dequantize, {"codes": CODES.tolist()}, "codes is of type list; expected an array"),
        (nf4_dequantize, {"absmax": None}, "absmax is None; expected an array"),
        (nf4_dequantize, {"nested_absmax": [1.0]}, "nested_absmax is of type list"),
        (nf4_dequantize, {"offset": "0"}, "offset is of type str"),
        (nf4_dequantize, {"shape": 1024}, r"shape is 1024; expected a tuple .* \(n, k\)"),
        (nf4_dequantize, {"shape": "8"}, "shape is '8'; expected a tuple"),
        (nf4_dequantize, {"shape": (8.5, 128)}, r"shape is \(8\.5, 128\); expected a tuple"),
        (nf4_dequantize, {"interpret": "yes"}, "interpret is 'yes'; expected True or False"),
        (nf4_matmul, {"x": [[1.0]]}, "x is of type list"),
        (nf4_gemv, {"x": None}, "x is None"),
        (nf4_matmul_transposed, {"dy": "x"}, "dy is of type str"),
        (nf4_matmul, {"x": X, "bias": [0.0] * 8}, "bias is of type list"),
        (nf4_matmul, {"x": X, "lora": (None, X)}, "lora's xa is None"),
        (nf4_matmul, {"x": X, "lora": (X, [[1.0]])}, "lora's b is of type list"),
        (nf4_matmul, {"x": X, "fuse_lora": "yes"}, "fuse_lora is 'yes'; expected True or False"),
    ],
)
def test_an_argument_of_another_kind(op, change, message):
    with pytest.raises(TypeError, match=message):
        op(**{**GOOD, **change})


def test_whole_numbers_of_numpy_and_jax_are_taken():
    got = nf4_dequantize(**GOOD, shape=[np.int64(8), jnp.int32(128)], blocksize=jnp.int32(64))
    np.testing.assert_array_equal(got, nf4_dequantize(**GOOD))
    assert Layout(np.array([8, 128]), "nf4", np.int32(64), True) == Layout(
        (8, 128), "nf4", 64, True
    )


STACK = {name: jnp.stack([part] * 3) for name, part in GOOD.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 3}, "layer is 3; expected 0 to 2, one of the 3 in the stack"),
        ({"layer": np.int64(-1)}, "layer is -1; expected 0 to 2"),
        ({"layer": jnp.int32(7)}, "layer is 7; expected 0 to 2"),
        ({"layer": 1.0}, r"layer is 1\.0; expected a whole number, 0 to 2"),
        ({"layer": "1"}, "layer is '1'; expected a whole number"),
        ({"layer": jnp.arange(3)}, "layer is Array.* expected a whole number"),
        ({"absmax": STACK["absmax"][:2]}, r"absmax has shape \(2, 16\); expected a stack"),
        ({"nested_absmax": STACK["nested_absmax"][:2]}, r"nested_absmax has shape \(2, 1\)"),
        ({"offset": STACK["offset"][:2]}, r"offset has shape \(2,\); expected a stack"),
        ({"offset": OFFSET}, r"offset has shape \(\); expected a stack"),
        (GOOD, r"layer is given, but absmax .* codes \(8, 64\): leave layer out"),
    ],
)
@pytest.mark.parametrize("op", [nf4_matmul, nf4_gemv])
def test_stack(op, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        op(X, **{**STACK, "layer": 0, **change})
    jax.eval_shape(lambda layer: op(X, **STACK, layer=layer), 7)  # traced: taken at its word


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
        (GemvConfig, "warps", 8.0),
        (GemvConfig, "early", 1),
        (GemvConfig, "steps", 3),  # 24 bytes of x a lane, which no 16-byte load may begin at
        (GemvConfig, "selects", 9),
        (GemvConfig, "segments", 3),
        (MatmulConfig, "rows", 100),
        (MatmulConfig, "stages", 2),  # a warpgroup would wait for a slot that it holds itself
        (MatmulConfig, "split", 0),
        (MatmulConfig, "stages", "4"),
        (functools.partial(MatmulConfig, team=True), "stages", 9),  # a group would be overwritten
        (functools.partial(MatmulConfig, team=True), "split", 2),
        (functools.partial(MatmulConfig, team=True), "wide", True),
        (functools.partial(TritonConfig, 16, 16), "block_k", 48),
        (functools.partial(TritonConfig, 16, 16), "block_k", 16),  # half of a run of bytes
        (functools.partial(TritonConfig, 16, 16), "block_k", "64"),
        (functools.partial(TritonConfig, 16, 16, 64), "num_warps", 64),  # 1024 threads are most
        (functools.partial(TritonConfig, 16, 16, 64), "num_warps", 3),  # Triton aborts the process
        (functools.partial(TritonConfig, 16, 16, 64), "decoder", "tabel"),
    ],
)
def test_a_config_names_the_field_that_cannot_be(make, field, value):
    with pytest.raises(ValueError, match=f"Config's {field} is {value!r}; expected"):
        make(**{field: value})


LAYOUT = Layout((8, 128), "nf4", 64, double_quant=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": -4}, ValueError, "rows is -4; expected a whole number, 0 or more"),
        ({"rows": 4.5}, ValueError, r"rows is 4\.5"),
        ({"op": "nf4_gemv", "rows": 17}, ValueError, "rows is 17, but nf4_gemv takes up to 16"),
        ({"layout": GOOD}, TypeError, "layout is of type dict; expected a pallas_kernels.Layout"),
        ({"dtype": jnp.int32}, ValueError, "dtype is int32; expected bfloat16"),
        ({"kind": "H200"}, ValueError, "kind is 'H200'; .* did you mean 'h200'"),
        ({"kind": "nvidia h200"}, ValueError, "did you mean 'NVIDIA H200'"),
        ({"kind": "hopper"}, ValueError, "kind is 'hopper'; .* the cards are .*'h200'"),
        ({"kind": jax.devices()[0]}, ValueError, "kind is .*; expected a card's name"),
    ],
)
def test_a_question_that_means_nothing(change, error, message):
    question = {"op": "nf4_matmul", "rows": 4, "layout": LAYOUT, **change}
    with pytest.raises(error, match=message):
        which_implementation(**question)


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v5 lite", "AMD Instinct MI300X", "Tesla K80", "NVIDIA H20", "rtx-4090"]
)
def test_devices_of_any_kind(kind):
    assert which_implementation("nf4_matmul", 64, LAYOUT, kind=kind)


@pytest.mark.parametrize("field", [{"quant_type": "nf5"}, {"blocksize": 60}, {"shape": (0, 64)}])
def test_a_layout_that_no_weight_has(field):
    (name, value), *_ = field.items()
    with pytest.raises(ValueError, match=f"{name} is {re.escape(repr(value))}; expected"):
        dataclasses.replace(LAYOUT, **field)


def test_a_weight_must_be_a_matrix_to_multiply():
    with pytest.raises(ValueError, match="expected a matrix"):
        nf4_matmul(X, **GOOD, shape=(2, 4, 128))
    assert nf4_dequantize(**GOOD, shape=(2, 4, 128)).shape == (2, 4, 128)


def test_numpy_arrays_are_taken():
    parts = {name: np.asarray(value) for name, value in GOOD.items()}
    np.testing.assert_array_equal(nf4_dequantize(**parts), nf4_dequantize(**GOOD))
