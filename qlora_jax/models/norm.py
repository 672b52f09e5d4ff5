"""Normalisation layers, computed in float32 whatever the activations' dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.models.config import DecoderConfig
from qlora_jax.nn import FrozenParam


class RMSNorm(nnx.Module):
    """x / rms(x) · (weight + offset) over the last axis, in x's dtype (arXiv 1910.07467)."""

    def __init__(self, size: int, *, eps: float, offset: float = 0.0) -> None:
        self.weight = FrozenParam(jnp.full((size,), 1.0 - offset, jnp.float32))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """The same shape and dtype as x."""
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        weight = self.weight[...] + self.offset if self.offset else self.weight[...]
        return (wide * scale * weight).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean(x)) / std(x) · weight + bias over the last axis, in x's dtype (1607.06450)."""

    def __init__(self, size: int, *, eps: float) -> None:
        self.weight = FrozenParam(jnp.ones((size,), jnp.float32))
        self.bias = FrozenParam(jnp.zeros((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """The same shape and dtype as x."""
        wide = x.astype(jnp.float32)
        centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + self.eps)
        return (centred * scale * self.weight[...] + self.bias[...]).astype(x.dtype)


def norm_for(config: DecoderConfig, size: int) -> RMSNorm | LayerNorm:
    """A fresh norm of the kind that a decoder uses."""
    if config.norm == "layer":
        return LayerNorm(size, eps=config.norm_eps)
    return RMSNorm(size, eps=config.norm_eps, offset=config.norm_offset)
