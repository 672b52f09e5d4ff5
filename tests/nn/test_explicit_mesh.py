"""`QuantDense` on a mesh as `jax.make_mesh` makes it, where types say how arrays are cut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.nn import LoraConfig, QuantDense, merge_lora, quantize_module
from qlora_jax.quant import QuantConfig, quantize

MESH = jax.make_mesh(
    (2, 2), ("data", "model"), (jax.sharding.AxisType.Explicit,) * 2, devices=jax.devices()[:4]
)
EMBED, HIDDEN = 128, 256
SPEC = jax.sharding.PartitionSpec


class Mlp(nnx.Module):
    """Two layers as a user writes them: dropout, biases, adapters that are not zero."""

    def __init__(self, quant, use_dora):
        options = {
            "quant": quant,
            "lora": LoraConfig(r=8, lora_dropout=0.1, use_dora=use_dora),
            "compute_dtype": jnp.float32,
            "use_bias": True,
        }
        self.up = QuantDense(EMBED, HIDDEN, rngs=nnx.Rngs(0), **options)
        self.down = QuantDense(HIDDEN, EMBED, rngs=nnx.Rngs(1), **options)
        for seed, layer in enumerate((self.up, self.down)):
            b = layer.lora_B
            b[...] = 0.1 * jax.random.normal(jax.random.key(seed), b.shape)

    def __call__(self, x):
        up, down = jax.random.split(jax.random.key(2))
        return self.down(jax.nn.gelu(self.up(x, dropout_key=up)), dropout_key=down)


def whole(path, leaf):
    return SPEC()


def by_rows(path, leaf):
    """Fully sharded: along the axis that the batch is cut along."""
    return SPEC("data") if leaf.ndim and leaf.shape[0] % 2 == 0 else SPEC()


def by_tensor(path, leaf):
    """Tensor parallel: `up` has rows of its weight, and `down` columns."""
    is_a, is_up = "lora_A" in path, "up" in path
    if is_up and leaf.ndim and leaf.shape[0] % 2 == 0 and not is_a:
        return SPEC("model")
    is_weight = leaf.ndim == 2 and "kernel" in path
    return SPEC(None, "model") if not is_up and (is_weight or is_a) else SPEC()


def placed(tree, cut):
    def place(path, leaf):
        at = jax.sharding.NamedSharding(MESH, cut(jax.tree_util.keystr(path), leaf))
        return jax.device_put(leaf, at)

    return jax.tree_util.tree_map_with_path(place, tree)


@pytest.mark.parametrize("cut", [whole, by_rows, by_tensor])
@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("quant", [QuantConfig(), None], ids=["nf4", "dense"])
def test_loss_and_gradients_are_those_of_one_device(quant, use_dora, cut):
    graphdef, adapters, frozen = nnx.split(Mlp(quant, use_dora), nnx.LoRAParam, ...)
    x = jax.random.normal(jax.random.key(3), (8, 16, EMBED))

    @jax.jit
    def step(adapters, frozen, x):
        def loss(adapters, x):
            return jnp.mean(nnx.merge(graphdef, adapters, frozen)(x) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(adapters, x)

    there = placed(adapters, cut)
    rows = jax.device_put(x, jax.sharding.NamedSharding(MESH, SPEC("data")))
    got, want = step(there, placed(frozen, cut), rows), step(adapters, frozen, x)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        theirs = np.asarray(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())
    # A gradient lies as what it is the gradient of.
    (of_adapters, of_x) = got[1]
    for grad, leaf in zip(jax.tree.leaves(of_adapters), jax.tree.leaves(there), strict=True):
        assert grad.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert of_x.sharding.is_equivalent_to(rows.sharding, rows.ndim)


def test_a_layer_outside_of_jit_cuts_its_result_as_its_input():
    layer = QuantDense(EMBED, HIDDEN, rngs=nnx.Rngs(0))
    x = jnp.ones((8, EMBED))
    graphdef, state = nnx.split(layer)
    rows = jax.device_put(x, jax.sharding.NamedSharding(MESH, SPEC("data")))
    y = nnx.merge(graphdef, placed(state, whole))(rows)
    assert jax.typeof(y).sharding.spec == SPEC("data", None)
    np.testing.assert_array_equal(y, layer(x))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(
    ("shape", "spec", "codes", "absmax"),
    [
        ((256, 128), SPEC("model"), SPEC("model", None), SPEC("model")),
        (
            (256, 128),
            SPEC(("data", "model")),
            SPEC(("data", "model"), None),
            SPEC(("data", "model")),
        ),
        ((256, 128), SPEC(None, "model"), SPEC(None, None), SPEC(None)),
        ((256, 128), SPEC("data", "model"), SPEC("data", None), SPEC("data")),
        ((6, 32), SPEC("data"), SPEC("data", None), SPEC(None)),  # a block has rows of both
        ((4, 33), SPEC("data"), SPEC(None), SPEC(None)),  # flat codes
        ((4096,), SPEC("data"), SPEC(None), SPEC(None)),
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_weight_is_quantized_to_the_same_bits_and_stays_cut_by_its_rows(
    shape, spec, codes, absmax, double_quant, wrap
):
    weight = jax.random.normal(jax.random.key(0), shape)
    config = QuantConfig(double_quant=double_quant)
    there = jax.device_put(weight, jax.sharding.NamedSharding(MESH, spec))
    found = wrap(lambda weight: quantize(weight, config))(there)
    assert (found.codes.sharding.spec, found.absmax.sharding.spec) == (codes, absmax)
    jax.tree.map(np.testing.assert_array_equal, found, quantize(weight, config))


def test_a_module_that_was_made_cut_is_quantized():
    with jax.set_mesh(MESH):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        model = nnx.Sequential(nnx.Linear(EMBED, HIDDEN, kernel_init=init, rngs=nnx.Rngs(0)))
        x = jax.device_put(jnp.ones((8, EMBED)), SPEC("data"))
        dense = model(x)
        y = quantize_module(model, QuantConfig("int8"))(x)
    assert model.layers[0].kernel.get_value().codes.sharding.spec == SPEC("model", None)
    assert jax.typeof(y).sharding.spec == SPEC("data", "model")
    np.testing.assert_allclose(y, dense, rtol=0, atol=0.05)


@pytest.mark.parametrize(("quant", "rows"), [(QuantConfig(), None), (None, "data")])
def test_a_layer_is_made_cut(quant, rows):
    """Codes are cut as the rows of the weight; a dense weight as it is named."""
    named = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("model", rows))
    options = {"quant": quant, "lora": LoraConfig(r=8), "rngs": nnx.Rngs(0)}
    with jax.set_mesh(MESH):
        layer = QuantDense(EMBED, HIDDEN, kernel_init=named, **options)
        y = layer(jax.device_put(jnp.ones((8, EMBED)), SPEC("data")))
    weight = jax.tree.leaves(layer.kernel.get_value())[0]
    assert weight.sharding.spec == SPEC("model", rows)
    assert jax.typeof(y).sharding.spec == SPEC("data", "model")


def test_adapters_are_merged_to_the_same_bits():
    model = Mlp(QuantConfig(), use_dora=True)
    graphdef, state = nnx.split(model)
    there = nnx.merge(graphdef, placed(state, by_rows))
    merge_lora(there, QuantConfig())
    merge_lora(model, QuantConfig())
    jax.tree.map(np.testing.assert_array_equal, there.up.kernel[...], model.up.kernel[...])
