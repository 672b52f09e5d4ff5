import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_jax.models.rope import (
    RopeConfig,
    attention_factor,
    inverse_frequencies,
    rotate,
    rotations,
)

# transformers 5.23.0, ROPE_INIT_FUNCTIONS, head_dim 16, theta 10000.
REFERENCE = {
    RopeConfig(rope_type="linear", factor=4.0): (
        [
            2.5e-1,
            7.905694097e-2,
            2.500000037e-2,
            7.905694656e-3,
            2.499999944e-3,
            7.905694656e-4,
            2.500000119e-4,
            7.905694656e-5,
        ],
        1.0,
    ),
    RopeConfig(rope_type="yarn", factor=8.0, original_max_position_embeddings=32): (
        [
            1.0,
            1.778781116e-1,
            1.250000019e-2,
            3.952847328e-3,
            1.249999972e-3,
            3.952847327e-4,
            1.250000059e-4,
            3.952847328e-5,
        ],
        1.2079441541679836,
    ),
    RopeConfig(
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=32,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
        mscale=1.0,
        mscale_all_dim=0.5,
    ): (
        [
            1.0,
            3.952847049e-2,
            1.250000019e-2,
            3.952847328e-3,
            1.249999972e-3,
            3.952847327e-4,
            1.250000059e-4,
            3.952847328e-5,
        ],
        1.094179988101349,
    ),
    # A ramp that has no length, and one that ends behind the last pair (5.24.0).
    RopeConfig(
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=32,
        beta_fast=8.0,
        beta_slow=6.0,
    ): (
        [
            1.0,
            3.952847048e-2,
            1.250000019e-2,
            3.952847328e-3,
            1.249999972e-3,
            3.952847327e-4,
            1.250000059e-4,
            3.952847328e-5,
        ],
        1.2079441541679836,
    ),
    RopeConfig(
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=32,
        beta_fast=4.0,
        beta_slow=1e-9,
    ): (
        [
            1.0,
            2.977811694e-1,
            8.833333105e-2,
            2.608879283e-2,
            7.666666526e-3,
            2.239946742e-3,
            6.500000018e-4,
            1.871014247e-4,
        ],
        1.2079441541679836,
    ),
    RopeConfig(rope_type="llama3", factor=8.0, original_max_position_embeddings=64): (
        [
            1.0,
            2.443845868e-1,
            1.304225624e-2,
            3.952847328e-3,
            1.249999972e-3,
            3.952847327e-4,
            1.250000059e-4,
            3.952847328e-5,
        ],
        1.0,
    ),
}


@pytest.mark.parametrize("config", REFERENCE, ids=lambda config: config.rope_type)
def test_frequencies_equal_transformers(config):
    frequencies, factor = REFERENCE[config]
    np.testing.assert_allclose(inverse_frequencies(config, 16), frequencies, rtol=3e-7)
    assert attention_factor(config) == pytest.approx(factor, rel=1e-12)


def test_a_yarn_with_one_mscale_has_the_papers_multiplier():
    for one in ({"mscale": 0.5}, {"mscale_all_dim": 0.5}):
        config = RopeConfig(rope_type="yarn", factor=8.0, **one)
        assert attention_factor(config) == pytest.approx(0.1 * np.log(8) + 1)


def test_dynamic_frequencies_grow_with_the_length_read():
    config = RopeConfig(rope_type="dynamic", factor=2.0, original_max_position_embeddings=256)
    # transformers at a length of 600, for a model of 256 positions.
    reference = [1.0, 2.624450028e-1, 6.887736917e-2, 1.807652041e-2]
    reference += [4.744092003e-3, 1.245063264e-3, 3.267606080e-4, 8.575667744e-5]
    for length, expected in [(600, reference), (256, inverse_frequencies(RopeConfig(), 16))]:
        positions = jnp.arange(length)[None]
        cos, sin = rotations(positions, config, 16)
        angle = positions[0, -1] * jnp.asarray(expected)
        # An angle of 599 in float32 is known to 3e-5; the base itself is a float32 power.
        np.testing.assert_allclose(cos[0, -1], jnp.cos(angle), atol=5e-4)
        np.testing.assert_allclose(sin[0, -1], jnp.sin(angle), atol=5e-4)


def test_long_factors_begin_behind_the_original_length():
    config = RopeConfig(
        rope_type="longrope",
        attention_factor=1.0,
        original_max_position_embeddings=8,
        short_factor=(1.0,),
        long_factor=(4.0,),
    )
    for length, factor in ((8, 1), (9, 4)):
        for told in (None, length):
            _, sin = rotations(jnp.arange(length)[None], config, 2, told)
            np.testing.assert_allclose(sin[0, :, 0], np.sin(np.arange(length) / factor), atol=1e-6)


def test_a_share_of_a_head_is_rounded_down():
    """As in transformers."""
    assert RopeConfig(partial_rotary_factor=0.35).turned(8) == 2


@settings(max_examples=20)
@given(st.integers(0, 400), st.integers(0, 400), st.integers(0, 100), st.sampled_from([2, 8, 16]))
def test_a_product_depends_on_the_distance_alone(first, second, shift, dim):
    rng = np.random.default_rng(first + 1000 * second)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, dim)), jnp.float32) for _ in range(2))

    def product(*positions: int) -> float:
        turned = [
            rotate(x, *rotations(jnp.asarray([[position]]), RopeConfig(), dim))
            for x, position in zip((query, key), positions, strict=True)
        ]
        return float(jnp.vdot(*turned))

    assert product(first, second) == pytest.approx(product(first + shift, second + shift), abs=2e-3)
    turned = rotate(query, *rotations(jnp.asarray([[first]]), RopeConfig(), dim))
    assert float(jnp.linalg.norm(turned)) == pytest.approx(float(jnp.linalg.norm(query)), rel=1e-5)


def test_unknown_type_is_refused():
    with pytest.raises(ValueError, match="'proportional', but only default, linear"):
        RopeConfig(rope_type="proportional")
    with pytest.raises(ValueError, match="needs short_factor and long_factor"):
        RopeConfig(rope_type="longrope")
