"""The learning rates are Hugging Face's, step by step; biases and norms do not decay."""

import math

import jax.numpy as jnp
import pytest

from qlora_jax.optim import decay_mask, learning_rate_schedule


def _hugging_face(kind: str, t: int, steps: int, warmup: int) -> float:
    """transformers.optimization's lambdas (warmup, then constant, linear or cosine)."""
    if t < warmup:
        return t / max(1, warmup)
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return max(0.0, (steps - t) / max(1, steps - warmup))
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (t - warmup) / max(1, steps - warmup))))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_schedule_equals_hugging_face(kind, warmup):
    rate = learning_rate_schedule(kind, 2e-4, steps=20, warmup_steps=warmup)
    for t in range(21):
        expected = 2e-4 * _hugging_face(kind, t, 20, warmup)
        assert float(rate(jnp.int32(t))) == pytest.approx(expected, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize(
    ("kind", "steps", "warmup", "words"),
    [
        ("polynomial", 10, 0, "'polynomial'"),
        ("constant", 10, 10, "warmup_steps=10"),
        ("constant", 10, -1, "warmup_steps=-1"),
    ],
)
def test_bad_schedules_are_refused(kind, steps, warmup, words):
    with pytest.raises(ValueError, match=words):
        learning_rate_schedule(kind, 1e-3, steps=steps, warmup_steps=warmup)


def test_biases_and_norms_do_not_decay():
    params = {
        "q_proj": {"lora_A": 1.0, "lora_B": 1.0, "bias": 1.0},
        "input_layernorm": {"weight": 1.0},
        "ln_1": {"scale": 1.0},
        "LayerNorm": {"weight": 1.0},
        "encoder": {"relative_attention_bias": {"weight": 1.0}},
    }
    assert decay_mask(params) == {
        "q_proj": {"lora_A": True, "lora_B": True, "bias": False},
        "input_layernorm": {"weight": False},
        "ln_1": {"scale": False},
        "LayerNorm": {"weight": False},
        "encoder": {"relative_attention_bias": {"weight": False}},
    }
