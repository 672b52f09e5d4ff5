"""Causal grouped-query attention (arXiv 2305.13245) with rotary positions."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.rope import rotate
from qlora_jax.nn import QuantDense

AttentionName = Literal["xla", "cudnn"]


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, dense: Callable[..., QuantDense]) -> None:
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = dense("self_attn.q_proj", config.hidden_size, queries, config.qkv_bias)
        self.k_proj = dense("self_attn.k_proj", config.hidden_size, keys, config.qkv_bias)
        self.v_proj = dense("self_attn.v_proj", config.hidden_size, keys, config.qkv_bias)
        self.o_proj = dense("self_attn.o_proj", queries, config.hidden_size, config.o_bias)
        self.head_dim = config.head_dim

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        turns: tuple[Array, Array],
        mask: Bool[Array, "batch 1 1 seq"] | None,
        *,
        implementation: AttentionName,
        dropout_keys: list[Key[Array, ""] | None],
    ) -> Float[Array, "batch seq embed"]:
        """`mask`: true where a key is real; `turns`: cos, sin; one dropout key a projection."""

        def heads(projection: QuantDense, key: Array | None) -> Array:
            y = projection(x, dropout_key=key)
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        query = rotate(heads(self.q_proj, dropout_keys[0]), *turns)
        key = rotate(heads(self.k_proj, dropout_keys[1]), *turns)
        value = heads(self.v_proj, dropout_keys[2])
        if mask is not None and implementation == "cudnn":
            # cuDNN broadcasts a mask over batch and heads, but not over queries.
            mask = jnp.broadcast_to(mask, (mask.shape[0], 1, x.shape[1], x.shape[1]))
        mixed = jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=True, implementation=implementation
        )
        return self.o_proj(mixed.reshape(*x.shape[:2], -1), dropout_key=dropout_keys[3])


def attention_for(platform: str, compute_dtype: Any, head_dim: int) -> AttentionName:
    """The attention to ask for: "cudnn" where it is a CUDA target and cuDNN takes the case.

    Args:
        platform: of the *target*, "cpu", "cuda" (or "gpu"), "tpu"; never guessed from this machine,
            which may only be compiling for another.
        compute_dtype: cuDNN takes bfloat16 and float16 only.
        head_dim: cuDNN takes multiples of 8 up to 128.
    """
    narrow = jnp.dtype(compute_dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    fits = head_dim % 8 == 0 and head_dim <= 128
    return "cudnn" if platform in ("cuda", "gpu") and narrow and fits else "xla"
