"""Rows of a packed matrix: taken, put and appended as codes, and multiplied a piece at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.codebooks import CODEBOOKS
from qlora_jax.quant import (
    QuantConfig,
    QuantizedTensor,
    append_rows,
    dequantize_dynamic,
    mean_row,
    put_rows,
    quantize,
    quantize_dynamic,
    row_config,
    row_scores,
    rows,
    take_rows,
)

ROWS, WIDTH = 11, 96


def matrix(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(ROWS, WIDTH)).astype(np.float32)


def zeros(shape, *stack) -> QuantizedTensor:
    """INT8 in blocks of 32."""
    blocks = np.prod(shape) // 32
    codes, absmax = jnp.full((*stack, *shape), 128, jnp.uint8), jnp.ones((*stack, blocks))
    options = {"dtype": "float32", "quant_type": "int8", "blocksize": 32}
    return QuantizedTensor(codes, absmax, shape=shape, **options)


def decoded(w) -> np.ndarray:
    """What the codes stand for, in float64, from the bytes alone."""
    codes = np.asarray(w.codes)
    if w.quant_type == "int8":
        values = (codes.astype(np.float64) - 128) / 127
    else:
        table = CODEBOOKS["nf4"].astype(np.float64)
        values = np.stack([table[codes >> 4], table[codes & 15]], -1).reshape(w.shape)
    return values * np.repeat(np.asarray(w.absmax, np.float64), w.blocksize).reshape(w.shape)


def assert_same_bits(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", [8, 4])
@settings(max_examples=5)
@given(seed=st.integers(0, 2**32 - 1), cut=st.sampled_from([1, 4]), data=st.data())
def test_a_row_does_not_depend_on_the_others(bits, seed, cut, data) -> None:
    config, whole = row_config(bits, WIDTH), matrix(seed)
    packed = quantize(whole, config)
    top, bottom = quantize(whole[:cut], config), quantize(whole[cut:], config)
    assert_same_bits(append_rows(top, bottom), packed)
    order = jnp.asarray(data.draw(st.permutations(range(ROWS))))
    other = quantize(matrix(seed + 1), config)
    assert_same_bits(put_rows(other, order, take_rows(packed, order)), packed)
    ids = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=4, max_size=4))
    # Four rows, any of them more than once.
    assert_same_bits(take_rows(packed, jnp.asarray(ids)), quantize(whole[ids], config))


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_stand_for_what_their_bytes_say(bits) -> None:
    packed = quantize(matrix(), row_config(bits, WIDTH))
    ids = jnp.asarray([[3, 0], [10, 3]])
    found = take_rows(packed, ids).dequantize(jnp.float32)
    np.testing.assert_allclose(found, decoded(packed)[np.asarray(ids)], rtol=1e-6)
    assert packed.bits_per_weight == bits + 32 / 32
    # Ids that there is no row for give NaN, and no other row.
    outside = take_rows(packed, jnp.asarray([2, ROWS, -ROWS - 1])).dequantize()
    np.testing.assert_array_equal(np.isnan(outside).all(1), [False, True, True])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("piece", [4, 100])
def test_scores_and_their_gradient_against_float64(bits, piece, monkeypatch) -> None:
    """In pieces of which the last begins among the rows of the one before it, and in one."""
    monkeypatch.setattr(rows, "PIECE", piece * WIDTH)
    packed = quantize(matrix(), row_config(bits, WIDTH))
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 3, WIDTH)).astype(np.float32)
    weights = rng.normal(size=(2, 3, ROWS)).astype(np.float32)

    def total(x):
        scores = row_scores(x, packed)
        return jnp.sum(scores * weights), scores

    (_, scores), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(x)
    np.testing.assert_allclose(scores, x.astype(np.float64) @ decoded(packed).T, atol=1e-5)
    np.testing.assert_allclose(gradient, weights.astype(np.float64) @ decoded(packed), atol=1e-5)
    for count in (7, ROWS + 5):
        mean = decoded(packed)[:count].mean(0)
        np.testing.assert_allclose(mean_row(packed, count), mean, atol=1e-6)


def test_scores_of_narrow_activations_are_wide() -> None:
    packed = quantize(matrix(), row_config(8, WIDTH))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, WIDTH)), jnp.bfloat16)
    scores, pull = jax.vjp(lambda x: row_scores(x, packed), x)
    assert scores.dtype == jnp.float32
    # The weight is rounded to x's dtype and the products are summed in float32.
    weight = np.asarray(packed.dequantize(jnp.bfloat16), np.float64)
    np.testing.assert_allclose(scores, np.asarray(x, np.float64) @ weight.T, atol=1e-4)
    (gradient,) = pull(jnp.ones_like(scores))
    assert gradient.dtype == jnp.bfloat16
    # Products' operands are as narrow as x: more of the scores' gradient is not seen.
    (again,) = pull(jnp.full_like(scores, 1 + 2**-10))
    np.testing.assert_array_equal(again, gradient)
    found = np.asarray(gradient, np.float64)
    np.testing.assert_allclose(found, [weight.sum(0)] * 4, rtol=1e-2, atol=0.02)


def test_blocks_are_of_64_where_they_fill_rows_and_pieces_of_one_row_or_more() -> None:
    assert [row_config(8, width).blocksize for width in (192, 96)] == [64, 32]
    assert rows.rows_at_once(2**24 + 1) == 1
    assert rows.rows_at_once(2**12) == 2**12


def test_even_steps_suit_weights_better_than_the_dynamic_map() -> None:
    """Why 8 bits are INT8 here."""
    x = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    even = quantize(x, row_config(8, 64)).dequantize()
    codes, absmax = quantize_dynamic(jnp.asarray(x), signed=True, blocksize=64)
    dynamic = dequantize_dynamic(codes, absmax, signed=True, blocksize=64)
    error, other = (float(jnp.sqrt(jnp.mean((y - x) ** 2))) for y in (even, dynamic))
    assert error < 2 / 3 * other


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: row_config(3, 64), "embedding_bits is 3, but 8 or 4"),
        (lambda: row_config(8, 48), "48 numbers, which are not whole blocks of 32"),
        (
            lambda: row_scores(jnp.ones((1, 32)), quantize(matrix(), row_config(8, 96))),
            "rows of 96",
        ),
        # Blocks over the ends of rows, absmax that depends on all rows.
        (lambda: take_rows(quantize(matrix(), QuantConfig()), jnp.asarray([0])), "row_config"),
        (
            lambda: take_rows(
                quantize(matrix(), QuantConfig(double_quant=False)), jnp.asarray([0])
            ),
            "do not cross rows",
        ),
        # A stack of matrices, and a tensor of three axes.
        (lambda: take_rows(zeros((11, 96), 2), jnp.asarray([0])), "one matrix alone"),
        (lambda: take_rows(zeros((2, 32, 96)), jnp.asarray([0])), "one matrix alone"),
    ],
)
def test_bad_input(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()
