"""16-bit parameters with a float32 master copy in the optimizer's state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.optim import eight_bit, master_weights, paged

WIDE = {
    "a": jax.random.normal(jax.random.key(0), (40, 300)),
    "b": jax.random.normal(jax.random.key(1), (7,)),
}


def _gradients(key):
    return {
        n: jax.random.normal(jax.random.fold_in(key, i), WIDE[n].shape) for i, n in enumerate(WIDE)
    }


def _run(tx, params, steps=20):
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(steps):
        params, state = step(params, state, _gradients(jax.random.key(i)))
    return params, state


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_master_copy_learns_what_float32_learns(dtype):
    narrow = jax.tree.map(lambda p: p.astype(dtype), WIDE)
    start = jax.tree.map(lambda p: p.astype(jnp.float32), narrow)
    # What decays is the master copy, not its rounding.
    tx = optax.adamw(1e-4, weight_decay=1.0)
    # The same gradients, rounded to the same 16 bits.
    rounded = optax.chain(
        optax.stateless(
            lambda g, _: jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), g)
        ),
        tx,
    )
    expected, _ = _run(rounded, start)
    params, state = _run(master_weights(tx), narrow)
    for name in WIDE:
        assert params[name].dtype == dtype
        np.testing.assert_array_equal(params[name], state.master[name].astype(dtype))
        np.testing.assert_allclose(state.master[name], expected[name], rtol=1e-6, atol=1e-7)
    # 1e-4 is less than half a unit in the last place of most of these bfloat16 numbers.
    if dtype == jnp.bfloat16:
        alone, _ = _run(tx, narrow)
        moved = np.mean(np.asarray(alone["a"] != narrow["a"]))
        learned = np.mean(np.asarray(params["a"] != narrow["a"]))
        assert learned > 2 * moved


def test_paged_master_copies_rest_on_the_host_with_the_moments():
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), WIDE)
    tx = master_weights(optax.adamw(1e-3))
    expected = _run(tx, narrow)
    params, state = _run(paged(tx, min_size=100), narrow)
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert state.master["a"].sharding.memory_kind == "pinned_host"
    assert state.inner[0].mu["a"].sharding.memory_kind == "pinned_host"
    assert params["a"].sharding.memory_kind == "device"


def test_a_copy_of_a_float32_parameter_is_donated_beside_it():
    """One array may not be two donated arguments."""
    params = jax.tree.map(jnp.copy, WIDE)
    tx = master_weights(optax.sgd(1e-3))
    step = jax.jit(lambda params, state: (params, state), donate_argnums=(0, 1))
    params, state = step(params, tx.init(params))
    np.testing.assert_array_equal(state.master["a"], params["a"])


def test_parameters_are_needed():
    tx = master_weights(optax.sgd(1.0))
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(WIDE, tx.init(WIDE))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("wrapper", [eight_bit, master_weights, paged])
def test_an_optimizer_that_was_not_called_is_refused(wrapper):
    words = rf"{wrapper.__name__} wraps .* such as optax.adamw\(2e-4\), but was given <function"
    with pytest.raises(TypeError, match=words):
        wrapper(optax.adamw)
