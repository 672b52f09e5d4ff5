"""`settle`: the same layer with the adapter's constant parts computed once."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qlora_jax as ql
from qlora_jax.nn.settle import settle, settle_adapters
from tests.nn.test_adapt import MIXED, adapted, trained


def layer_of(compute_dtype: jnp.dtype, **lora) -> ql.QuantDense:
    """A layer whose adapter does something."""
    layer = ql.QuantDense(
        64,
        48,
        use_bias=True,
        lora=ql.LoraConfig(r=4, **lora),
        compute_dtype=compute_dtype,
        rngs=nnx.Rngs(0),
    )
    enliven(layer)
    return layer


def enliven(layer: ql.QuantDense) -> None:
    """B that is not zero, and a magnitude that is not the row's own; of layers with a scale."""
    scale = jnp.ones(()) if layer.lora_scaling is None else layer.lora_scaling[...]
    drawn = 0.3 * jax.random.normal(jax.random.key(1), layer.lora_B.shape)
    drawn = drawn * (scale != 0)[..., None, None]
    layer.lora_B[...] = drawn.astype(layer.lora_B.dtype)
    if layer.lora_magnitude_vector is not None:
        layer.lora_magnitude_vector[...] *= 1.5


def outputs(layer: ql.QuantDense) -> np.ndarray:
    x = jax.random.normal(jax.random.key(2), (3, 64))
    return np.asarray(layer(x), np.float32)


def test_a_scale_that_is_a_power_of_two_changes_no_bit() -> None:
    layer = layer_of(jnp.bfloat16, alpha=2)
    before = outputs(layer)
    settle(layer)
    np.testing.assert_array_equal(outputs(layer), before)
    assert layer.lora_A.dtype == layer.lora_B.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "lora", [{"alpha": 3}, {"alpha": 3, "use_rslora": True}, {"alpha": 5, "use_dora": True}]
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_settled_layer_is_the_same_function(lora: dict, dtype: jnp.dtype) -> None:
    """With adapters that are cast, and such as have the compute dtype."""
    layer = layer_of(jnp.float32, dtype=dtype, **lora)
    before = outputs(layer)
    for _ in range(2):  # a second time it changes nothing
        settle(layer)
        np.testing.assert_allclose(outputs(layer), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_a_stack_is_settled_layer_by_layer(dora: bool) -> None:
    """Its layers have scales of their own, and one has no adapter."""
    model = trained(adapted(replace(MIXED, use_dora=dora, dtype=jnp.bfloat16)))
    x = jax.random.normal(jax.random.key(2), (3, 32))
    before = model(x)
    settle(model.layers)
    assert model.layers.lora_scaling is None
    np.testing.assert_allclose(model(x), before, rtol=1e-5, atol=1e-5)


def test_a_model_whose_weights_stream_is_left_alone() -> None:
    model = adapted(replace(MIXED, dtype=jnp.bfloat16))
    for streams, dtype in ((True, jnp.bfloat16), (False, jnp.float32)):
        model.stream_weights = streams
        assert settle_adapters(model).layers.lora_A.dtype == dtype


def test_a_layer_without_an_adapter_stays_as_it_is() -> None:
    layer = ql.QuantDense(64, 48, rngs=nnx.Rngs(0))
    before = outputs(layer)
    settle(layer)
    np.testing.assert_array_equal(outputs(layer), before)
