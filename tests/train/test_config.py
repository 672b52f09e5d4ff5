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
        ("max_grad_norm", 0.0),
        ("schedule", "polynomial"),
        ("warmup_steps", 1000),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}="):
        TrainConfig(**{field: value})


def test_defaults_are_the_papers():
    config = TrainConfig()
    assert (config.learning_rate, config.schedule, config.b2) == (2e-4, "constant", 0.999)
    assert (config.max_grad_norm, config.batch_size) == (0.3, 16)


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("max_grad_norm", [0.3, None])
def test_optimizer_is_clipped_adamw(paged, max_grad_norm):
    config = TrainConfig(
        steps=9, weight_decay=0.1, paged=paged, page_min_size=0, max_grad_norm=max_grad_norm
    )
    plain = optax.adamw(2e-4, b2=0.999, weight_decay=0.1)
    if max_grad_norm:
        plain = optax.chain(optax.clip_by_global_norm(max_grad_norm), plain)
    params = {"lora_A": jnp.linspace(-1, 1, 20).reshape(4, 5)}
    grads = jax.tree.map(lambda p: p * 3, params)
    tx = config.optimizer()
    found = jax.jit(tx.update)(grads, tx.init(params), params)[0]
    expected = jax.jit(plain.update)(grads, plain.init(params), params)[0]
    np.testing.assert_allclose(found["lora_A"], expected["lora_A"], rtol=1e-6)
