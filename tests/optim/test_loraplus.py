"""LoRA+: B's updates, and no other, are those of a higher rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.optim import decay_mask, eight_bit, loraplus, master_weights, paged
from tests.train.toy import Toy

PARAMS = {
    "layers": {"q_proj": {"lora_A": np.ones((2, 4, 8)), "lora_B": np.full((2, 8, 4), 0.5)}},
    "q_proj": {"bias": np.ones(8)},
}
PARAMS = jax.tree.map(lambda x: x.astype(np.float32), PARAMS)


def trained(tx: optax.GradientTransformation, steps: int = 3):
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for step in range(steps):
        rng = np.random.default_rng(step)
        grads = jax.tree.map(lambda x, rng=rng: rng.normal(size=x.shape).astype(x.dtype), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_b_learns_by_its_own_rate():
    decay = {"weight_decay": 0.1, "mask": decay_mask}
    found = trained(loraplus(optax.adamw(1e-3, **decay), 16.0))
    slow, fast = (trained(optax.adamw(rate, **decay)) for rate in (1e-3, 16e-3))
    layer, slow_layer, fast_layer = (tree["layers"]["q_proj"] for tree in (found, slow, fast))
    np.testing.assert_array_equal(layer["lora_A"], slow_layer["lora_A"])
    np.testing.assert_array_equal(found["q_proj"]["bias"], slow["q_proj"]["bias"])
    np.testing.assert_allclose(layer["lora_B"], fast_layer["lora_B"], rtol=1e-6)
    assert np.abs(layer["lora_B"] - slow_layer["lora_B"]).min() > 1e-3


@pytest.mark.parametrize("wrapper", [master_weights, eight_bit, lambda tx: paged(tx, min_size=0)])
def test_inside_of_other_wrappers(wrapper):
    alike, apart = (trained(wrapper(loraplus(optax.lion(1e-3), ratio)), 1) for ratio in (1.0, 4.0))
    before = PARAMS["layers"]["q_proj"]
    alike, apart = (tree["layers"]["q_proj"] for tree in (alike, apart))
    np.testing.assert_array_equal(apart["lora_A"], alike["lora_A"])
    moved, plain = (tree["lora_B"] - before["lora_B"] for tree in (apart, alike))
    np.testing.assert_allclose(moved, 4 * plain, rtol=1e-4)


def test_b_is_found_in_a_models_own_state():
    """Flax gives a path's last step a name of its own, by version."""
    lora = nnx.state(Toy(), nnx.LoRAParam)
    tx = loraplus(optax.sgd(1.0), 16.0)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora), tx.init(lora))
    assert set(np.unique(updates["head"]["lora_A"][...])) == {-1}
    assert set(np.unique(updates["head"]["lora_B"][...])) == {-16}


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_ratio():
    for ratio in (0.0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"lr_ratio={ratio} must be a finite number above 0"):
            loraplus(optax.sgd(1.0), ratio)
    for ratio in ("16", None, True):
        with pytest.raises(TypeError, match=f"lr_ratio={ratio!r} must be a number, such as 16"):
            loraplus(optax.sgd(1.0), ratio)
