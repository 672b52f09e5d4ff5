"""Sums of gradients: over micro-batches, on the device or on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.evaluate import split_adapters
from qlora_jax.train import TrainConfig, init_state, make_train_step
from qlora_jax.train.accumulate import _in_turn, accumulated
from tests.train.toy import Toy, ToyBatches, toy_loss

# Bits of two programs are compared, so they are compiled as a user's are.
pytestmark = pytest.mark.optimized


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("least", [0, 100])
def test_sums_on_the_host_give_the_same_bits(dtype, least):
    graphdef, lora, frozen = split_adapters(Toy(dropout=0.1, dtype=dtype))
    tx = TrainConfig(page_min_size=0).optimizer()
    ends = []
    for host_from in (None, least):
        state = init_state(jax.tree.map(jnp.copy, lora), tx, seed=3)
        step = make_train_step(graphdef, tx, toy_loss, host_gradients=host_from, state=state)
        for index in range(3):
            state, metrics = step(state, frozen, ToyBatches(4, 2).at(index))
        ends.append([*jax.tree.leaves(state.lora), *jax.tree.leaves(state.opt_state), metrics.loss])
    for device, host in zip(*ends, strict=True):
        assert device.dtype == host.dtype
        np.testing.assert_array_equal(np.asarray(device), np.asarray(host))


def test_only_large_sums_rest_on_the_host():
    kinds = set()

    def gradient(micro, index):
        a = (micro[:, None] * jnp.ones(8)).astype(jnp.bfloat16)
        return (micro.sum(), jnp.int32(micro.size)), {"a": a, "b": micro}

    def spaces(batch):
        like = {"a": jnp.zeros((4, 8), jnp.bfloat16), "b": jnp.zeros(4)}
        return accumulated(gradient, batch, like, host_from=32)

    jaxpr = jax.make_jaxpr(spaces)(jnp.ones((3, 4)))
    (scan,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    for var in scan.outvars:
        kinds.add((var.aval.shape, str(var.aval.dtype), var.aval.memory_space))
    # In 32 bits, though the parameter and its gradient have 16.
    assert ((4, 8), "float32", jax.memory.Space.Host) in kinds
    assert ((4,), "float32", jax.memory.Space.Device) in kinds
    total, tokens, mean = spaces(jnp.arange(12.0).reshape(3, 4))
    assert (float(total), int(tokens)) == (66.0, 12)
    assert mean["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(mean["b"], np.arange(12.0).reshape(3, 4).sum(0) / 12)


def test_two_sums_at_most_visit_the_device():
    """A leaf is fetched once the one before last, of those on the host, is done with."""
    leaves = [jnp.zeros(size) for size in range(1, 6)]
    moves = [True, False, True, True, True]
    jaxpr = jax.make_jaxpr(lambda leaves: _in_turn(lambda _, leaf: leaf + 1, leaves, moves))(leaves)
    waits = [
        tuple(var.aval.size for var in eqn.invars)
        for eqn in jaxpr.eqns
        if eqn.primitive.name == "optimization_barrier"
    ]
    assert waits == [(4, 1), (5, 3)]


def test_the_default_keeps_them_on_the_device():
    assert TrainConfig().host_gradients is None
    assert TrainConfig(gradients_on_host=True, page_min_size=7).host_gradients == 7


def test_many_micro_batches_equal_the_large_batch():
    graphdef, lora, frozen = split_adapters(Toy())
    tx = optax.sgd(1.0)
    many = ToyBatches(4, 2).at(0)
    one = jax.tree.map(lambda leaf: leaf.reshape(1, 8, *leaf.shape[2:]), many)
    step = make_train_step(graphdef, tx, toy_loss, host_gradients=0)
    ends = [
        step(init_state(jax.tree.map(jnp.copy, lora), tx, seed=0), frozen, batch)[0].lora
        for batch in (many, one)
    ]
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
