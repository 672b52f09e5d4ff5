"""Dequantization equals bitsandbytes' definition bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import nf4_dequantize
from pallas_kernels._decode import decode_absmax
from tests.shared import shared_path

QUANT = shared_path("vectors/quant")
DOUBLE = shared_path("vectors/double_quant")
TENSORS = json.loads((QUANT / "index.json").read_text())["tensors"]


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


@pytest.mark.parametrize("name", TENSORS)
def test_single_quantization(name):
    """Every case of every tensor that stores its dequantized values, in every stored dtype."""
    file = np.load(QUANT / f"{name}.npz")
    shape, own_dtype = tuple(TENSORS[name]["shape"]), TENSORS[name]["dtype"]
    seen = 0
    for key in file.files:
        case, _, kind = key.rpartition(".")
        if not kind.startswith("dequant") or "wrong" in kind:
            continue
        dtype = kind.removeprefix("dequant").removeprefix("_") or own_dtype
        dtype = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(dtype, dtype)
        quant_type, blocksize = case.split("_bs")
        weight = nf4_dequantize(
            jnp.asarray(file[f"{case}.codes"]),
            jnp.asarray(file[f"{case}.absmax"]),
            shape=shape,
            dtype=dtype,
            quant_type=quant_type,
            blocksize=int(blocksize),
            implementation="xla",
        )
        # bitsandbytes returns a one-dimensional tensor of even size as [1, N].
        np.testing.assert_array_equal(
            bits(weight), bits(file[key]).reshape(shape), err_msg=f"{name} {key}"
        )
        seen += 1
    assert seen >= 2


@pytest.mark.parametrize("path", sorted(DOUBLE.glob("w_*.npz")), ids=lambda p: p.stem)
@pytest.mark.parametrize("jit", [False, True])
def test_double_quantization(path, jit):
    """The recovered absmax has two roundings (no fused multiply-add), compiled or not."""
    file = np.load(path)
    quant_type = path.stem.rpartition(".")[2]
    nested = jnp.asarray(file["nested_absmax"]).reshape(-1)
    offset = jnp.asarray(file["offset"]).reshape(())
    q = jnp.asarray(file["qabsmax"]).reshape(-1)
    recover = jax.jit(decode_absmax) if jit else decode_absmax
    np.testing.assert_array_equal(bits(recover(q, nested, offset)), bits(file["absmax_recovered"]))

    if "dequant" not in file.files:  # bitsandbytes' own kernel was wrong here
        return
    wanted = file["dequant"]
    dtype = jnp.bfloat16 if wanted.dtype == np.uint16 else wanted.dtype

    def run(codes, q, nested, offset):
        return nf4_dequantize(
            codes,
            q,
            nested,
            offset,
            shape=file["input"].shape,
            dtype=dtype,
            quant_type=quant_type,
            implementation="xla",
        )

    weight = (jax.jit(run) if jit else run)(jnp.asarray(file["codes"]), q, nested, offset)
    np.testing.assert_array_equal(bits(weight), bits(wanted).reshape(weight.shape))
