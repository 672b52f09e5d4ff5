"""Attention of the encoders and of T5's decoder: how queries look at keys.

It differs from a decoder-only model's in that positions may come in as a bias on the scores, that
heads are not grouped, and that in training the probabilities themselves are dropped out.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.models.attention import AttentionName, attend
from qlora_jax.nn import QuantDense
from qlora_jax.nn.lora import dropout


class View(NamedTuple):
    """How queries look at keys.

    Attributes:
        bias: added to the scores; None where positions do not matter.
        mask: true where a key may be seen; None where all may.
        causal: whether a query sees no later keys.
        implementation: of `attend`.
    """

    bias: Float[Array, "1 heads q k"] | None
    mask: Bool[Array, "#batch 1 1 k"] | None
    causal: bool
    implementation: AttentionName


def key_mask(
    real: Bool[Array, "batch k"] | Int[Array, "batch k"] | None,
) -> Bool[Array, "batch 1 1 k"] | None:
    """Which keys may be seen: those that are nonzero; None where all are."""
    return None if real is None else real.astype(bool)[:, None, None, :]


def project_heads(
    projection: QuantDense,
    x: Float[Array, "batch seq embed"],
    heads: int,
    key: Key[Array, ""] | None,
) -> Float[Array, "batch seq heads head_dim"]:
    """A projection's output, head by head; `key` is of its LoRA dropout."""
    y = projection(x, dropout_key=key)
    return y.reshape(*y.shape[:2], heads, -1)


def dropped_attention(
    query: Float[Array, "batch q heads head_dim"],
    key: Float[Array, "batch k heads head_dim"],
    value: Float[Array, "batch k heads head_dim"],
    *,
    bias: Float[Array, "1 heads q k"] | None = None,
    mask: Bool[Array, "#batch 1 1 k"] | None = None,
    causal: bool = False,
    scale: float,
    rate: float,
    dropout_key: Key[Array, ""] | None,
    implementation: AttentionName,
) -> Float[Array, "batch q heads head_dim"]:
    """softmax(scale · query · keyᵀ + bias) · value.

    Without a key it is `attend`. With one the probabilities are written out, since no fused
    attention drops them: memory then grows with q · k.

    Args:
        query, key, value: equally many heads.
        bias: added to the scores.
        mask: true where a key may be seen.
        causal: whether a query sees no later keys.
        scale: of the scores.
        rate: of the probabilities' dropout.
        dropout_key: turns it on.
        implementation: of the attention without dropout.
    """
    if dropout_key is None or rate == 0:
        return attend(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            causal=causal,
            scale=scale,
            implementation=implementation,
        )
    scores = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    if causal:
        seen = jnp.arange(query.shape[1])[:, None] >= jnp.arange(key.shape[1])
        scores = jnp.where(seen, scores, -1e30)
    chances = dropout(jax.nn.softmax(scores, axis=-1), rate, dropout_key)
    return jnp.einsum("bhqk,bkhd->bqhd", chances.astype(value.dtype), value)
