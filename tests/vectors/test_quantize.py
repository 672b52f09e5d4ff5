"""Codes, absmax and dequantized values against bitsandbytes 0.50.2, bit for bit."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from tests.shared import SHARED, shared_path
from tests.vectors.arrays import assert_same_numbers, bf16, load_npz

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TENSORS = sorted(p.stem for p in (SHARED / "vectors/quant").glob("*_*[0-9].npz"))
NESTED = sorted(p.stem for p in (SHARED / "vectors/double_quant").glob("w_*.npz"))


def cuda(vectors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """What bitsandbytes' CUDA kernels give: the `_cudarule` array where the CPU's differs."""
    return vectors.get(f"{name}_cudarule", vectors[name])


def differs_in_last_short_block(actual, expected, size: int, blocksize: int) -> bool:
    """Whether all differing bytes lie in a ragged last block."""
    short = size % blocksize
    first = (size - short) // 2 if short else len(expected)
    return bool((actual[:first] == expected[:first]).all())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("name", TENSORS)
def test_codes_and_absmax(name: str, quant_type: str) -> None:
    vectors = load_npz(shared_path(f"vectors/quant/{name}.npz"))
    weight = bf16(vectors["input"])
    for blocksize in BLOCKSIZES:
        config = ql.QuantConfig(quant_type, blocksize, double_quant=False)
        tensor = ql.quantize(jnp.asarray(weight), config)
        key = f"{quant_type}_bs{blocksize}"
        absmax = vectors[f"{key}.absmax"]
        # The CPU stores 1e-38 for a short block of zeros, where CUDA stores 0.
        absmax = np.where(absmax == np.float32(1e-38), np.float32(0), absmax)
        np.testing.assert_array_equal(np.asarray(tensor.absmax), absmax)
        codes, expected = np.asarray(tensor.codes).reshape(-1), cuda(vectors, f"{key}.codes")
        if weight.size % blocksize == 0:
            np.testing.assert_array_equal(codes, expected)
        else:
            # The vectors' short last block was divided by absmax; CUDA and we multiply by the
            # reciprocal, one ulp apart, which can move a value that sits on a midpoint.
            assert differs_in_last_short_block(codes, expected, weight.size, blocksize)
            assert (codes != expected).mean() < 1e-3


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantized_values(name: str, quant_type: str) -> None:
    """Quantized here and read back: bitsandbytes' values, but where its index says that the CPU
    (which made them) and CUDA choose different numbers for a tie."""
    vectors = load_npz(shared_path(f"vectors/quant/{name}.npz"))
    index = json.loads((shared_path("vectors/quant") / "index.json").read_text())
    weight = bf16(vectors["input"])
    checked = 0
    for blocksize in (64, 4096):
        key = f"{quant_type}_bs{blocksize}"
        if f"{key}.dequant" not in vectors:
            continue
        tensor = ql.quantize(
            jnp.asarray(weight), ql.QuantConfig(quant_type, blocksize, double_quant=False)
        )
        actual = np.asarray(tensor.dequantize())
        expected = bf16(vectors[f"{key}.dequant"])
        assert actual.dtype == expected.dtype
        differs = (actual.astype(np.float32) != expected.astype(np.float32)).reshape(-1)
        ties = index["tensors"][name]["cases"][key]["values_differing_from_cuda_rule"]
        whole = weight.size // blocksize * blocksize
        assert differs[:whole].sum() <= ties
        # A short last block is scaled one ulp apart (test_codes_and_absmax).
        assert differs[whole:].sum() <= ties + 1
        if whole == weight.size:
            assert differs.sum() == ties
        checked += 1
    assert checked


@pytest.mark.parametrize("name", NESTED)
def test_double_quantization(name: str) -> None:
    vectors = load_npz(shared_path(f"vectors/double_quant/{name}.npz"))
    tensor = ql.quantize(jnp.asarray(bf16(vectors["input"])), ql.QuantConfig(name.split(".")[1]))
    np.testing.assert_array_equal(np.asarray(tensor.offset), vectors["offset"])
    np.testing.assert_array_equal(np.asarray(tensor.nested_absmax), vectors["nested_absmax"])
    np.testing.assert_array_equal(np.asarray(tensor.absmax), cuda(vectors, "qabsmax"))


@pytest.mark.parametrize("name", NESTED)
def test_double_dequantization(name: str) -> None:
    """From bitsandbytes' own codes, so that both levels of decoding are checked bit for bit."""
    vectors = load_npz(shared_path(f"vectors/double_quant/{name}.npz"))
    weight = bf16(vectors["input"])
    codes = vectors["codes"]
    if weight.shape[-1] % 2 == 0:
        codes = codes.reshape(*weight.shape[:-1], -1)
    tensor = ql.QuantizedTensor(
        *(jnp.asarray(a) for a in (codes, vectors["qabsmax"], vectors["nested_absmax"])),
        jnp.asarray(vectors["offset"]),
        shape=weight.shape,
        dtype=weight.dtype,
        quant_type=name.split(".")[1],
    )
    if "dequant" in vectors:
        assert_same_numbers(np.asarray(tensor.dequantize()), bf16(vectors["dequant"]))


@pytest.mark.parametrize("name", NESTED)
def test_absmax_recovered(name: str) -> None:
    """NF4's last code stands for 1, so a tensor of nothing else dequantizes to its absmax."""
    vectors = load_npz(shared_path(f"vectors/double_quant/{name}.npz"))
    blocks = vectors["qabsmax"].size
    tensor = ql.QuantizedTensor(
        jnp.full((blocks, 32), 0xFF, jnp.uint8),
        *(jnp.asarray(vectors[key]) for key in ("qabsmax", "nested_absmax", "offset")),
        shape=(blocks, 64),
        dtype=jnp.float32,
    )
    np.testing.assert_array_equal(
        np.asarray(tensor.dequantize()), np.repeat(vectors["absmax_recovered"][:, None], 64, 1)
    )


def test_every_vector_was_seen() -> None:
    index = json.loads((shared_path("vectors/quant") / "index.json").read_text())
    assert set(TENSORS) == set(index["tensors"])
