"""What the Llama references have in common: a QLoRA run as PEFT does it, by plain optax."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qlora_jax.checkpoints import load_adapter, load_model, read_adapter_config
from qlora_jax.models import Decoder, next_token_loss
from qlora_jax.quant import QuantConfig


class Run(NamedTuple):
    """Every step's loss and gradient norm, before its update, and the model at the end."""

    losses: np.ndarray
    norms: np.ndarray
    model: Decoder


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def adapted(base: Path, adapter: Path, compute_dtype: Any = jnp.float32) -> Decoder:
    """An NF4 base with double quantization, carrying a saved adapter."""
    model = load_model(
        base, quant=QuantConfig(), lora=read_adapter_config(adapter), compute_dtype=compute_dtype
    )
    load_adapter(adapter, model)
    return model


@jax.jit
def logits(model: Decoder, ids: jax.Array, mask: jax.Array | None) -> jax.Array:
    return model(ids, mask)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(graphdef, lora, rest, ids, labels, mask):
    """Compiled once for all adapters and bases of one shape."""

    def mean(lora):
        return next_token_loss(nnx.merge(graphdef, lora, rest), ids, labels, mask).mean

    return jax.value_and_grad(mean)(lora)


def train(
    model: Decoder,
    batches: list[tuple[jax.Array, jax.Array, jax.Array | None]],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
) -> Run:
    """AdamW at a constant rate behind a gradient clip at norm 0.3, one step a batch."""
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    tx = optax.chain(
        optax.clip_by_global_norm(0.3), optax.adamw(learning_rate, weight_decay=weight_decay)
    )
    state = tx.init(lora)

    @jax.jit
    def update(gradient, lora, state):
        updates, state = tx.update(gradient, state, lora)
        return optax.apply_updates(lora, updates), state, optax.tree.norm(gradient)

    losses, norms = [], []
    for ids, labels, mask in batches:
        value, gradient = loss_and_gradient(graphdef, lora, rest, ids, labels, mask)
        lora, state, norm = update(gradient, lora, state)
        losses.append(float(value))
        norms.append(float(norm))
    return Run(np.array(losses), np.array(norms), nnx.merge(graphdef, lora, rest))
