"""8-bit optimizer state: what it holds, what it refuses, and that `paged` wraps it unchanged."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.codebooks import DYNAMIC_SIGNED, DYNAMIC_UNSIGNED
from qlora_jax.optim import SignedState, UnsignedState, eight_bit, paged
from qlora_jax.optim.eight_bit import unpacked
from qlora_jax.quant import dequantize_dynamic, quantize_dynamic

PARAMS = {
    "large": jax.random.normal(jax.random.key(0), (8, 600)),
    "small": jax.random.normal(jax.random.key(1), (40,)),
}


def _run(tx, steps=4):
    state = tx.init(PARAMS)

    @jax.jit
    def step(params, state, key):
        grads = jax.tree.map(lambda p: p + jax.random.normal(key, p.shape), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = PARAMS
    for i in range(steps):
        params, state = step(params, state, jax.random.key(i))
    return params, state


@pytest.mark.parametrize(
    ("inner", "kinds"),
    [
        (optax.adamw(1e-3), (SignedState, UnsignedState)),
        (optax.adam(1e-3), (SignedState, UnsignedState)),
        (optax.lion(1e-3), (SignedState,)),
        (optax.rmsprop(1e-3), (UnsignedState,)),
    ],
)
def test_large_moments_are_codes_and_small_ones_numbers(inner, kinds):
    _, state = _run(eight_bit(inner))
    found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, SignedState | UnsignedState))
    packed = [x for x in found if isinstance(x, SignedState | UnsignedState)]
    assert tuple(type(x) for x in packed) == kinds
    for leaf in packed:
        assert leaf.codes.shape == PARAMS["large"].shape
        assert leaf.codes.dtype == jnp.uint8
        assert leaf.absmax.shape == (19,)
    small = [x for x in found if getattr(x, "shape", None) == PARAMS["small"].shape]
    assert len(small) == len(kinds)


def test_an_array_of_the_threshold_is_coded_and_of_one_less_is_not():
    def kind(min_size):
        return type(eight_bit(optax.lion(1e-3), min_size=min_size).init(PARAMS)[0].mu["large"])

    size = PARAMS["large"].size
    assert kind(size) is SignedState
    assert kind(size + 1) is not SignedState
    # bitsandbytes' own, where none is given.
    params = {"large": jnp.zeros((64, 64)), "less": jnp.zeros(4095)}
    state = jax.eval_shape(eight_bit(optax.lion(1e-3)).init, params)
    assert type(state[0].mu["large"]) is SignedState
    assert type(state[0].mu["less"]) is not SignedState


def test_moments_of_16_bits_are_left_alone():
    params = {"large": jnp.zeros((64, 64), jnp.bfloat16)}
    state = jax.eval_shape(eight_bit(optax.lion(1e-3)).init, params)
    assert state[0].mu["large"].dtype == jnp.bfloat16


def test_a_single_number_is_not_coded():
    inner = optax.inject_hyperparams(optax.lion)(learning_rate=1e-3)
    state = jax.eval_shape(eight_bit(inner, min_size=0).init, PARAMS)
    assert state.hyperparams["learning_rate"].dtype == jnp.float32
    assert type(state.inner_state[0].mu["small"]) is SignedState


def test_updates_see_the_moments_before_they_are_rounded():
    """The first update starts from zero moments, which 8 bits hold exactly."""
    wide, _ = _run(optax.adamw(1e-3), steps=1)
    narrow, state = _run(eight_bit(optax.adamw(1e-3)), steps=1)
    np.testing.assert_allclose(narrow["large"], wide["large"], rtol=1e-6)
    moment = unpacked(state[0].mu["large"])
    exact = 0.1 * (PARAMS["large"] + jax.random.normal(jax.random.key(0), (8, 600)))
    # Half the widest gap of the map, 1.3 % of the block's largest number.
    gap = np.diff(DYNAMIC_SIGNED).max() / 2 * 1.001
    assert np.max(np.abs(moment - exact)) <= gap * np.max(np.abs(exact))


@pytest.mark.parametrize("inner", [optax.adamw(1e-3), optax.lion(1e-3)])
def test_paged_codes_rest_on_the_host_and_change_nothing(inner):
    expected = _run(eight_bit(inner))
    params, state = _run(paged(eight_bit(inner), min_size=1000))
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert state[0].mu["large"].codes.sharding.memory_kind == "pinned_host"
    assert state[0].mu["large"].absmax.sharding.memory_kind == "device"


def test_paged_inside_is_refused():
    with pytest.raises(ValueError, match=r"put paged outside, paged\(eight_bit\("):
        eight_bit(paged(optax.adamw(1e-3), min_size=0)).init(PARAMS)


def test_a_negative_size_is_refused():
    with pytest.raises(ValueError, match="min_size must be 0 or more elements, but is -1"):
        eight_bit(optax.adam(1e-3), min_size=-1)


@functools.partial(jax.jit, static_argnums=1)
def _round_trip(x, signed):
    return dequantize_dynamic(*quantize_dynamic(x, signed=signed), signed=signed)


@settings(max_examples=40)
@given(
    size=st.sampled_from([1, 255, 256, 700]),
    signed=st.booleans(),
    scale=st.sampled_from([1e-20, 1.0, 1e20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_number_takes_its_nearest_code(size, signed, scale, seed):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(size) * scale).astype(np.float32)
    x[rng.random(size) < 0.2] = 0
    x = x if signed else np.abs(x)
    back = np.asarray(_round_trip(jnp.asarray(x), signed))
    table = (DYNAMIC_SIGNED if signed else DYNAMIC_UNSIGNED).astype(np.float64)
    for start in range(0, size, 256):
        block = x[start : start + 256].astype(np.float64)
        largest = np.abs(block).max()
        nearest = np.abs(block[:, None] - table * largest).min(axis=1)
        error = np.abs(back[start : start + 256] - block)
        np.testing.assert_allclose(error, nearest, rtol=0, atol=3e-7 * largest)
