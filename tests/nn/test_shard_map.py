"""`QuantDense` in a training step that is itself written with `jax.shard_map`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.quant import QuantConfig
from tests.nn.test_explicit_mesh import EMBED, Mlp

DEVICES = 2
MESH = jax.make_mesh(
    (DEVICES,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:DEVICES]
)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("quant", [QuantConfig(), None], ids=["nf4", "dense"])
def test_gradients_are_added_up_over_devices(quant, use_dora):
    """Adapters that every device has, rows of its own."""
    graphdef, adapters, frozen = nnx.split(Mlp(quant, use_dora), nnx.LoRAParam, ...)
    x = jax.random.normal(jax.random.key(3), (8, 16, EMBED))

    def loss(adapters, frozen, x):
        return jnp.mean(nnx.merge(graphdef, adapters, frozen)(x) ** 2)

    def on_one(adapters, frozen, x):
        def mean(adapters, x):
            return jax.lax.pmean(loss(adapters, frozen, x), "data")

        return jax.value_and_grad(mean, argnums=(0, 1))(adapters, x)

    def one_after_another(adapters, frozen, x):
        def mean(adapters, x):
            return sum(loss(adapters, frozen, rows) for rows in jnp.split(x, DEVICES)) / DEVICES

        return jax.value_and_grad(mean, argnums=(0, 1))(adapters, x)

    whole, rows = jax.P(), jax.P("data")
    step = jax.shard_map(
        on_one, mesh=MESH, in_specs=(whole, whole, rows), out_specs=(whole, (whole, rows))
    )
    got = jax.jit(step)(adapters, frozen, x)
    want = jax.jit(one_after_another)(adapters, frozen, x)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        theirs = np.asarray(theirs)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())
