"""`QuantDenseGeneral`, in the place of `nnx.LinearGeneral` and inside `nnx.MultiHeadAttention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qlora_jax as ql
from qlora_jax.nn import QuantDenseGeneral


class Holder(nnx.Module):
    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("inputs", "outputs", "axis", "shape"),
    [
        (32, (4, 8), -1, (2, 5, 32)),
        ((4, 8), 16, (-2, -1), (2, 5, 4, 8)),
        ((3, 8), (2, 7), (1, -1), (2, 3, 5, 8)),
        ((3, 8), 6, (-1, 1), (2, 3, 5, 8)),
    ],
)
@pytest.mark.parametrize("use_bias", [True, False])
def test_unquantized_it_is_the_layer(inputs, outputs, axis, shape, use_bias):
    linear = nnx.LinearGeneral(
        inputs,
        outputs,
        axis=axis,
        use_bias=use_bias,
        bias_init=nnx.initializers.normal(),
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(1), shape)
    want = linear(x)
    model = ql.quantize_module(Holder(linear), None)
    assert isinstance(model.layer, QuantDenseGeneral)
    np.testing.assert_allclose(model(x), want, rtol=1e-5, atol=1e-5)


def attention(**options):
    return Holder(nnx.MultiHeadAttention(4, 64, decode=False, rngs=nnx.Rngs(0), **options))


def test_attention_is_quantized_and_adapted():
    """Its projections become 4-bit; what trains is the adapters alone, and they do train."""
    model, plain = attention(), attention()
    x = jax.random.normal(jax.random.key(1), (2, 5, 64))
    ql.quantize_module(model)
    quantized = model(x)
    for name in ("query", "key", "value", "out"):
        kernel = getattr(plain.layer, name).kernel
        weight = getattr(model.layer, name).kernel.get_value().dequantize(jnp.float32)
        kernel[...] = weight.T.reshape(kernel.shape)
    np.testing.assert_allclose(plain(x), quantized, rtol=1e-4, atol=1e-5)
    lora = ql.LoraConfig(r=4, target_modules=("query", "value"), use_dora=True)
    ql.add_lora(model, lora, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model(x), quantized, rtol=1e-5, atol=1e-5)
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    assert len(jax.tree.leaves(adapters)) == 2 * 3

    def loss(adapters):
        return jnp.sum(nnx.merge(graphdef, adapters, rest)(x) ** 2)

    gradient = jax.jit(jax.grad(loss))(adapters)
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, adapters, gradient)
    assert loss(moved) < loss(adapters)


def test_the_product_is_that_of_the_dequantized_weight():
    linear = nnx.LinearGeneral((4, 16), (2, 32), axis=(-2, -1), rngs=nnx.Rngs(0))
    model = ql.quantize_module(Holder(linear))
    weight = np.asarray(model.layer.kernel.get_value().dequantize(jnp.float32), np.float64)
    x = np.random.default_rng(0).standard_normal((3, 4, 16)).astype(np.float32)
    want = x.reshape(3, 64).astype(np.float64) @ weight.T
    np.testing.assert_allclose(model(jnp.asarray(x)), want.reshape(3, 2, 32), rtol=1e-4, atol=1e-5)


def test_heads_cut_over_a_mesh():
    """As `MultiHeadAttention` asks for it: data parallel, the heads on an axis of their own."""
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), kinds, devices=jax.devices()[:4])
    spec = jax.sharding.PartitionSpec

    def put(array, *entries):
        return jax.device_put(array, jax.sharding.NamedSharding(mesh, spec(*entries)))

    layer = QuantDenseGeneral(64, (4, 16), rngs=nnx.Rngs(0), compute_dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(1), (4, 5, 64))
    graphdef, state = nnx.split(layer)
    there = nnx.merge(graphdef, jax.tree.map(put, state))
    plain = there(put(x, "data"))
    heads = there(put(x, "data"), out_sharding=spec("data", None, "model", None))
    assert jax.typeof(plain).sharding.spec == spec("data", None, None, None)
    assert jax.typeof(heads).sharding.spec == spec("data", None, "model", None)
    np.testing.assert_allclose(plain, layer(x), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(heads, layer(x), rtol=1e-5, atol=1e-5)


def test_what_does_not_go_is_refused():
    layer = QuantDenseGeneral((4, 8), 16, axis=(-2, -1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x has shape \(2, 8, 4\), but the layer takes \(4, 8\)"):
        layer(jnp.ones((2, 8, 4)))
    with pytest.raises(ValueError, match="one axis for each size"):
        QuantDenseGeneral((4, 8), 16, rngs=nnx.Rngs(0))
    batched = nnx.LinearGeneral(8, 4, batch_axis={0: 3}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"layer has a kernel of shape \(3, 8, 4\)"):
        ql.quantize_module(Holder(batched))
