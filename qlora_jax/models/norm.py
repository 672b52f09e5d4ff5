"""Normalisation layers, computed in float32 whatever the activations' dtype."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.nn import FrozenParam


class RMSNorm(nnx.Module):
    """x / rms(x) · weight over the last axis, in float32, returned as x's dtype (1910.07467)."""

    def __init__(self, size: int, *, eps: float) -> None:
        self.weight = FrozenParam(jnp.ones((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """The same shape and dtype as x."""
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale * self.weight[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x − mean) / deviation · weight + bias over the last axis, in float32 (1607.06450)."""

    def __init__(self, size: int, *, eps: float) -> None:
        self.weight = FrozenParam(jnp.ones((size,), jnp.float32))
        self.bias = FrozenParam(jnp.zeros((size,), jnp.float32))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        """The same shape and dtype as x."""
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale * self.weight[...] + self.bias[...]).astype(x.dtype)
