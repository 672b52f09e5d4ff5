"""The layers of T5: attention with positions as biases, and a feed-forward half (arXiv 1910.10683).

A layer normalises what each of its parts reads (RMSNorm) and adds what it gives; a decoder's layer
has attention twice, to its own words and to the encoder's output. Names are Hugging Face's.
"""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.models.cache import Pair
from qlora_jax.models.dropped_attention import View, dropped_attention, project_heads
from qlora_jax.models.encoder_config import EncoderDecoderConfig
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.stack import Keys, Storage, draw
from qlora_jax.nn.lora import dropout

LAYER_KEYS = 20
"""Dropout keys that a layer draws at most."""


class Attention(nnx.Module):
    """Multi-head attention without bias and without a scale; positions come in as a bias."""

    def __init__(
        self, config: EncoderDecoderConfig, path: str, storage: Storage, rngs: nnx.Rngs
    ) -> None:
        inner = config.num_heads * config.d_kv
        dense = storage.dense(path, rngs)
        # T5's initial queries make up for the scale that is not there.
        narrow = nnx.initializers.normal((config.d_model * config.d_kv) ** -0.5)
        self.q = dense("q", config.d_model, inner, kernel_init=narrow)
        self.k = dense("k", config.d_model, inner)
        self.v = dense("v", config.d_model, inner)
        self.o = dense("o", inner, config.d_model)
        self.num_heads, self.rate = config.num_heads, config.dropout_rate

    def sources(
        self, x: Float[Array, "batch k embed"], keys: Keys
    ) -> tuple[Float[Array, "batch k heads d_kv"], Float[Array, "batch k heads d_kv"]]:
        """Keys and values of what is looked at."""
        return (
            project_heads(self.k, x, self.num_heads, next(keys)),
            project_heads(self.v, x, self.num_heads, next(keys)),
        )

    def __call__(
        self,
        x: Float[Array, "batch q embed"],
        key: Float[Array, "batch k heads d_kv"],
        value: Float[Array, "batch k heads d_kv"],
        view: View,
        keys: Keys,
    ) -> Float[Array, "batch q embed"]:
        """What the queries of x find among keys and values."""
        mixed = dropped_attention(
            project_heads(self.q, x, self.num_heads, next(keys)),
            key,
            value,
            **view._asdict(),
            scale=1.0,
            rate=self.rate,
            dropout_key=next(keys),
        )
        return self.o(mixed.reshape(*x.shape[:2], -1), dropout_key=next(keys))


class FeedForward(nnx.Module):
    """wo(act(wi(x))), or wo(act(wi_0(x)) · wi_1(x)) where the activation is gated."""

    def __init__(
        self, config: EncoderDecoderConfig, path: str, storage: Storage, rngs: nnx.Rngs
    ) -> None:
        dense = storage.dense(path, rngs)
        self.activation, self.rate = config.feed_forward_proj, config.dropout_rate
        if self.activation.startswith("gated-"):
            self.wi_0 = dense("wi_0", config.d_model, config.d_ff)
            self.wi_1 = dense("wi_1", config.d_model, config.d_ff)
        else:
            self.wi = dense("wi", config.d_model, config.d_ff)
        self.wo = dense("wo", config.d_ff, config.d_model)

    def __call__(
        self, x: Float[Array, "batch seq embed"], keys: Keys
    ) -> Float[Array, "batch seq embed"]:
        """The same shape and dtype as x."""
        match self.activation:
            case "gated-gelu":
                gate = jax.nn.gelu(self.wi_0(x, dropout_key=next(keys)), approximate=True)
                inner = gate * self.wi_1(x, dropout_key=next(keys))
            case "gated-silu":
                gate = jax.nn.silu(self.wi_0(x, dropout_key=next(keys)))
                inner = gate * self.wi_1(x, dropout_key=next(keys))
            case "gelu":
                inner = jax.nn.gelu(self.wi(x, dropout_key=next(keys)), approximate=False)
            case _:
                inner = jax.nn.relu(self.wi(x, dropout_key=next(keys)))
        inner = dropout(inner, self.rate, next(keys))
        return self.wo(inner, dropout_key=next(keys))


class EncoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: EncoderDecoderConfig, storage: Storage, rngs: nnx.Rngs) -> None:
        eps = config.layer_norm_epsilon
        self.layer_norm_0 = RMSNorm(config.d_model, eps=eps)
        self.SelfAttention = Attention(config, "encoder.layers.SelfAttention", storage, rngs)
        self.layer_norm_1 = RMSNorm(config.d_model, eps=eps)
        self.DenseReluDense = FeedForward(config, "encoder.layers.DenseReluDense", storage, rngs)
        self.rate = config.dropout_rate

    def __call__(
        self, x: Float[Array, "batch seq embed"], view: View, keys: Keys
    ) -> Float[Array, "batch seq embed"]:
        """The same shape and dtype as x."""
        y = self.layer_norm_0(x)
        y = self.SelfAttention(y, *self.SelfAttention.sources(y, keys), view, keys)
        x = x + dropout(y, self.rate, next(keys))
        y = self.DenseReluDense(self.layer_norm_1(x), keys)
        return x + dropout(y, self.rate, next(keys))


class DecoderLayer(nnx.Module):
    """x + self-attention, x + attention to the source, x + feed-forward; each after a norm."""

    def __init__(self, config: EncoderDecoderConfig, storage: Storage, rngs: nnx.Rngs) -> None:
        eps = config.layer_norm_epsilon
        self.layer_norm_0 = RMSNorm(config.d_model, eps=eps)
        self.SelfAttention = Attention(config, "decoder.layers.SelfAttention", storage, rngs)
        self.layer_norm_1 = RMSNorm(config.d_model, eps=eps)
        self.EncDecAttention = Attention(config, "decoder.layers.EncDecAttention", storage, rngs)
        self.layer_norm_2 = RMSNorm(config.d_model, eps=eps)
        self.DenseReluDense = FeedForward(config, "decoder.layers.DenseReluDense", storage, rngs)
        self.rate = config.dropout_rate

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        source: Float[Array, "batch source embed"],
        view: View,
        source_view: View,
        keys: Keys,
    ) -> Float[Array, "batch seq embed"]:
        """The same shape and dtype as x, which looks at itself, then at the encoder's output."""
        y = self.layer_norm_0(x)
        y = self.SelfAttention(y, *self.SelfAttention.sources(y, keys), view, keys)
        x = x + dropout(y, self.rate, next(keys))
        return self._rest(x, *self.EncDecAttention.sources(source, keys), source_view, keys)

    def step(
        self,
        x: Float[Array, "batch 1 embed"],
        mix: Callable[[Pair], tuple[Pair, Pair]],
        source: Pair,
        view: View,
        source_view: View,
    ) -> tuple[Float[Array, "batch 1 embed"], Pair]:
        """One token: what comes out, and what `mix` kept.

        Args:
            x: the token.
            mix: takes its keys and values, and gives what is to be kept and those of all tokens so
                far.
            source: keys and values of the encoder's output.
            view, source_view: of the tokens so far and of the source.
        """
        y = self.layer_norm_0(x)
        kept, target = mix(self.SelfAttention.sources(y, draw(None, 2)))
        x = x + self.SelfAttention(y, *target, view, draw(None, LAYER_KEYS))
        return self._rest(x, *source, source_view, draw(None, LAYER_KEYS)), kept

    def _rest(self, x: Array, key: Array, value: Array, source_view: View, keys: Keys) -> Array:
        y = self.EncDecAttention(self.layer_norm_1(x), key, value, source_view, keys)
        x = x + dropout(y, self.rate, next(keys))
        y = self.DenseReluDense(self.layer_norm_2(x), keys)
        return x + dropout(y, self.rate, next(keys))
