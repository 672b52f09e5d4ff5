"""LoftQ and PiSSA against their papers' algorithms, with NumPy's SVD in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as ql
from qlora_jax.nn import start_from_weight

QUANT = ql.QuantConfig("nf4", 64, False)


def weight(dtype=jnp.float32) -> jax.Array:
    return (0.02 * jax.random.normal(jax.random.key(0), (48, 64))).astype(dtype)


def truncated(matrix: np.ndarray, r: int) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix)
    return u[:, :r] * s[:r] @ v[:r]


def quantized(matrix: np.ndarray) -> np.ndarray:
    return np.asarray(ql.quantize(jnp.asarray(matrix, jnp.float32), QUANT).dequantize(), np.float64)


@pytest.mark.parametrize("rounds", [1, 3])
def test_loftq(rounds: int) -> None:
    w = weight()
    lora = ql.LoraConfig(r=8, alpha=4, init_lora_weights="loftq", loftq_iter=rounds)
    base, a, b = start_from_weight(w, QUANT, lora)
    exact, low = np.asarray(w, np.float64), np.zeros(w.shape)
    for _ in range(rounds):
        codes = quantized(exact - low)
        low = truncated(exact - codes, 8)
    np.testing.assert_allclose(lora.scaling * b @ a, low, atol=1e-7)
    # The same codes; the scales come from float32 and float64 sums.
    np.testing.assert_allclose(base.dequantize(jnp.float32), codes, atol=1e-7)
    error = np.linalg.norm(exact - codes - low)
    assert error < 0.8 * np.linalg.norm(exact - quantized(exact))


def test_one_round_leaves_plain_codes() -> None:
    w = weight(jnp.bfloat16)
    base, a, _ = start_from_weight(
        w, ql.QuantConfig(), ql.LoraConfig(r=4, init_lora_weights="loftq")
    )
    jax.tree.map(np.testing.assert_array_equal, base, ql.quantize(w, ql.QuantConfig()))
    assert a.dtype == jnp.float32


@pytest.mark.parametrize("quant", [QUANT, None])
def test_pissa(quant: ql.QuantConfig | None) -> None:
    w = weight()
    lora = ql.LoraConfig(r=8, alpha=4, init_lora_weights="pissa")
    base, a, b = start_from_weight(w, quant, lora)
    top = truncated(np.asarray(w, np.float64), 8)
    np.testing.assert_allclose(lora.scaling * b @ a, top, atol=1e-6)
    rest = np.asarray(w, np.float64) - top
    if quant is None:
        np.testing.assert_allclose(base, rest, atol=1e-6)
    else:
        # Each code as near to what float64's SVD leaves as that one's own, to float32's SVD.
        found = np.asarray(base.dequantize(jnp.float32), np.float64)
        rounding = 8 * np.finfo(np.float32).eps * np.linalg.norm(np.float64(w), 2)
        assert (np.abs(found - rest) <= np.abs(quantized(rest) - rest) + rounding).all()
        assert np.abs(found - quantized(rest)).mean() <= rounding


def test_as_many_singular_vectors_as_there_are() -> None:
    w, lora = weight(), ql.LoraConfig(r=48, init_lora_weights="pissa")
    base, a, b = start_from_weight(w, None, lora)
    narrow = start_from_weight(w, None, replace(lora, dtype=jnp.bfloat16))
    assert [x.dtype for x in narrow] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    np.testing.assert_allclose(base, np.zeros(w.shape), atol=1e-6)
    np.testing.assert_allclose(lora.scaling * b @ a, w, atol=1e-6)


@pytest.mark.parametrize(
    ("quant", "options", "words"),
    [(None, {"r": 4}, "nothing was lost"), (QUANT, {"r": 49}, "no more than 48 singular")],
)
def test_bad_input(quant, options: dict, words: str) -> None:
    lora = ql.LoraConfig(init_lora_weights="loftq", **options)
    with pytest.raises(ValueError, match=words):
        start_from_weight(weight(), quant, lora)
