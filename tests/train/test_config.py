"""A configuration is refused where it is written, not where it fails."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.train import TrainConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("micro_batch_size", 0),
        ("gradient_accumulation_steps", -1),
        ("keep_checkpoints", 0),
        ("log_every", 0),
        ("seed", -1),
        ("save_every", -1),
        ("eval_every", -5),
        ("page_min_size", -1),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("b2", 1.0),
        ("eps", 0.0),
        ("eps", float("inf")),
        # What they are in float32: infinite, 1, 0, and what a processor may take for 0.
        ("learning_rate", 1e39),
        ("b1", 1 - 1e-12),
        ("eps", 1e-50),
        ("eps", 1e-40),
        ("seed", 2**32),
        ("max_grad_norm", 0.0),
        ("loraplus_lr_ratio", 0.0),
        ("loraplus_lr_ratio", float("inf")),
        ("neftune_noise_alpha", -5.0),
        ("schedule", "polynomial"),
        ("optim", "sgd"),
        ("warmup_steps", 1000),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        TrainConfig(**{field: value})


def test_a_paged_optimizers_name_is_told_what_pages():
    with pytest.raises(ValueError, match=r"adamw, adamw_8bit, .* is paged by paged=True"):
        TrainConfig(optim="paged_adamw_32bit")


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("warmup_steps", 0.03),
        ("learning_rate", "2e-4"),
        ("eps", None),
        ("max_grad_norm", "0.3"),
        ("paged", "no"),
        ("loraplus_lr_ratio", None),
        ("steps", True),
        ("learning_rate", True),
    ],
)
def test_values_of_another_kind_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} must be a "):
        TrainConfig(**{field: value})


def test_defaults_are_the_papers():
    config = TrainConfig()
    assert (config.learning_rate, config.schedule, config.b2) == (2e-4, "constant", 0.999)
    assert (config.max_grad_norm, config.batch_size) == (0.3, 16)


@pytest.mark.parametrize(
    ("optim", "paged", "max_grad_norm"),
    [
        ("adamw", True, 0.3),
        ("adamw", True, None),
        ("adamw", False, 0.3),
        ("adamw", False, None),
        ("lion", True, 0.3),
    ],
)
def test_optimizer_is_clipped_optax_by_the_fields(optim, paged, max_grad_norm):
    betas = {"b1": 0.8, "b2": 0.95}
    own = {"eps": 1e-2} if optim == "adamw" else {}
    config = TrainConfig(
        steps=9,
        schedule="linear",
        warmup_steps=2,
        optim=optim,
        weight_decay=0.1,
        paged=paged,
        page_min_size=0,
        max_grad_norm=max_grad_norm,
        **betas,
        **own,
    )
    rates = jnp.array([0, 1e-4, 2e-4, 2e-4 * 6 / 7])
    # What decays is all but the bias.
    decay = {"weight_decay": 0.1, "mask": {"lora_A": True, "bias": False}}
    plain = getattr(optax, optim)(lambda step: rates[step], **betas, **own, **decay)
    if max_grad_norm:
        plain = optax.chain(optax.clip_by_global_norm(max_grad_norm), plain)
    params = {"lora_A": jnp.linspace(-1, 1, 20).reshape(4, 5), "bias": jnp.linspace(1, 2, 5)}
    both = []
    for tx in (config.optimizer(), plain):
        state, update, updates = tx.init(params), jax.jit(tx.update), []
        for step in range(4):
            grads = jax.tree.map(lambda p, step=step: jnp.cos(5.0 * step + p), params)
            found, state = update(grads, state, params)
            updates.append(found)
        both.append(jax.tree.leaves(updates))
    for found, expected in zip(*both, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_loraplus_is_within_the_optimizer():
    params = {"lora_A": jnp.ones((4, 5)), "lora_B": jnp.ones((5, 4))}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = TrainConfig(loraplus_lr_ratio=16.0, max_grad_norm=None).optimizer()
    updates = jax.jit(tx.update)(grads, tx.init(params), params)[0]
    np.testing.assert_allclose(updates["lora_A"], -2e-4, rtol=1e-5)
    np.testing.assert_allclose(updates["lora_B"], -16 * 2e-4, rtol=1e-5)


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "lion", "lion_8bit"])
@pytest.mark.parametrize("master", [True, False])
def test_every_optimizer_learns_paged_and_clipped(optim, master):
    dtype = jnp.bfloat16 if master else jnp.float32
    tx = TrainConfig(
        optim=optim, master_weights=master, learning_rate=1e-2, page_min_size=1000
    ).optimizer()
    params = {"w": jnp.ones((80, 64), dtype)}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    # Three steps of 1e-2 each, whatever the gradient's size: both optimizers normalise it.
    np.testing.assert_allclose(params["w"].astype(jnp.float32), 0.97, atol=3e-3)
    codes = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.uint8]
    assert len(codes) == {"adamw_8bit": 2, "lion_8bit": 1}.get(optim, 0)
