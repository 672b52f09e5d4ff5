"""`paged(adamw)` against torch's AdamW and bitsandbytes' 32-bit AdamW: three recorded steps.

Tolerance: that of bitsandbytes' own test suite for 32-bit optimizers, atol 1e-6 and rtol 1e-5. No
smaller, because torch multiplies the parameter by (1 - lr · wd) before it subtracts the update,
where optax subtracts both at once: one rounding of the parameter, 6e-8 of it, per step.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import qlora_jax.optim as optim
from tests.shared import shared_path

SETTINGS = {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    return load_file(shared_path("vectors/optim") / "adam.safetensors")


def _three_steps(vectors, tx):
    params = {name: jnp.asarray(vectors[f"init.{name}"]) for name in ("p0", "p1")}
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(3):
        grads = {name: jnp.asarray(vectors[f"grad{i}.{name}"]) for name in params}
        params, state = step(params, state, grads)
    return params, state


@pytest.mark.parametrize("reference", ["torch_adamw", "bnb_adamw32"])
@pytest.mark.parametrize("min_size", [0, 4096, 100_000])
def test_paged_adamw_equals_the_recorded_parameters(vectors, reference, min_size):
    params, _ = _three_steps(vectors, optim.paged(optax.adamw(**SETTINGS), min_size=min_size))
    for name, value in params.items():
        np.testing.assert_allclose(
            value, vectors[f"{reference}.final.{name}"], rtol=1e-5, atol=1e-6
        )


def test_paged_moments_equal_bitsandbytes(vectors):
    _, state = _three_steps(vectors, optim.paged(optax.adamw(**SETTINGS), min_size=4096))
    adam = state[0]
    assert adam.mu["p1"].sharding.memory_kind == "pinned_host"
    assert adam.mu["p0"].sharding.memory_kind == "device"
    for name in ("p0", "p1"):
        for moment, key in ((adam.mu, "state1"), (adam.nu, "state2")):
            np.testing.assert_allclose(
                moment[name], vectors[f"bnb_adamw32.{key}.{name}"], rtol=1e-5, atol=1e-10
            )


def test_paged_equals_unpaged_bit_for_bit_on_the_recorded_gradients(vectors):
    plain = optax.adamw(**SETTINGS)
    expected = _three_steps(vectors, plain)
    found = _three_steps(vectors, optim.paged(plain, min_size=0))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
