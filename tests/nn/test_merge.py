"""`merge_lora`: the adapted function in one weight."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qlora_jax as ql
from tests.nn.test_adapt import MIXED, NAMES, Stack, adapted, trained
from tests.nn.test_settle import enliven, layer_of, outputs


@pytest.mark.parametrize(
    "lora", [{"alpha": 3}, {"alpha": 3, "use_rslora": True}, {"alpha": 5, "use_dora": True}]
)
def test_the_merged_weight_is_the_adapted_function(lora: dict) -> None:
    layer = layer_of(jnp.float32, **lora)
    weight = np.float64(layer.kernel[...].dequantize())
    weight += layer.lora.scaling * np.float64(layer.lora_B[...]) @ np.float64(layer.lora_A[...])
    if layer.lora.use_dora:
        length = np.linalg.norm(weight, axis=1)
        weight *= (np.float64(layer.lora_magnitude_vector[...]) / length)[:, None]
    before, model = outputs(layer), nnx.List([layer])
    assert ql.merge_lora(model) is model
    np.testing.assert_allclose(layer.kernel[...], weight, rtol=0, atol=1e-6)
    np.testing.assert_allclose(outputs(layer), before, rtol=1e-4, atol=1e-5)
    assert not jax.tree.leaves(nnx.state(layer, nnx.LoRAParam))


def test_packed_again_it_is_the_quantized_sum_of_the_dtype_it_had() -> None:
    layer = ql.QuantDense(64, 48, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    enliven(layer)
    dense = ql.merge_lora(nnx.List([nnx.clone(layer)]))[0].kernel[...]
    assert dense.dtype == jnp.bfloat16
    fp4 = ql.QuantConfig("fp4", double_quant=False)
    packed = ql.merge_lora(nnx.List([layer]), fp4)[0].kernel[...]
    assert (packed.dtype, packed.quant_type, packed.double_quant) == (jnp.bfloat16, "fp4", False)
    error = np.abs(np.float32(packed.dequantize() - dense)).max()
    assert 0 < error < np.abs(np.float32(dense)).max() / 4


@pytest.mark.parametrize("dora", [False, True])
def test_a_stack_is_merged_layer_by_layer(dora: bool) -> None:
    """Its layers have scales of their own, and one has no adapter; others take new ones."""
    model = trained(adapted(replace(MIXED, use_dora=dora)), steps=1)
    packed = ql.merge_lora(nnx.clone(model), ql.QuantConfig()).layers.kernel[...]
    x = jax.random.normal(jax.random.key(2), (3, 32))
    before, head = model(x), model.head.kernel[...]
    ql.merge_lora(model)
    merged, weights = model(x), model.layers.kernel[...]
    np.testing.assert_allclose(merged, before, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(weights[2], Stack().layers.kernel[2].dequantize())
    np.testing.assert_array_equal(packed[1].codes, ql.quantize(weights[1]).codes)
    assert model.head.kernel[...] is head
    ql.add_lora(model, MIXED, rngs=nnx.Rngs(1), names=NAMES)
    np.testing.assert_array_equal(model(x), merged)


def test_models_that_cannot_be_merged() -> None:
    with pytest.raises(ValueError, match="Stack has no adapters to merge"):
        ql.merge_lora(Stack())
    model = adapted(MIXED)
    model.stream_weights = True
    with pytest.raises(ValueError, match="lie in host memory"):
        ql.merge_lora(model)
