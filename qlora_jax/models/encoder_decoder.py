"""The encoder–decoder transformer: T5 v1.0, v1.1 and Flan-T5 (arXiv 1910.10683, 2210.11416).

The encoder reads the whole source; the decoder writes the target word by word, and in every layer
looks at its own words so far (`SelfAttention`), then at the encoder's output (`EncDecAttention`).
What sets it apart from a decoder-only model:

- **Positions are biases** on the scores, by distance, from one table for each stack
  (`relative_bias.py`); scores are not divided by √d_kv.
- **The norm is RMSNorm**, as T5 had it first; the residual stream is never normalised in place.
- **v1.0** has a ReLU feed-forward layer and a head that is the embedding, applied to hidden states
  over √d_model; **v1.1** and Flan a gated GELU and, as a rule, a head of its own.

Layers are stacked under `lax.scan` and named as Hugging Face names them (`q`, `k`, `v`, `o`,
`wi_0`, `wo`), so that PEFT's adapters fit. Generation encodes once: keys and values of the source
are computed in `prefill` and kept in the cache.
"""

from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.models.attention import AttentionName
from qlora_jax.models.dropped_attention import dropped_attention
from qlora_jax.models.encoder_config import EncoderDecoderConfig
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.relative_bias import RelativeBias
from qlora_jax.models.stack import (
    Keys,
    Storage,
    check_options,
    draw,
    scan_layers,
    split_key,
    stack_layers,
)
from qlora_jax.nn import LoraConfig, QuantDense
from qlora_jax.nn.lora import dropout
from qlora_jax.quant import QuantConfig

_LAYER_KEYS = 20


class EncoderDecoderCache(NamedTuple):
    """What generation keeps between words; the leading axis of keys and values is the layers'.

    Attributes:
        key, value: of the decoder's words, `[layers, batch, length, heads, d_kv]`.
        source_key, source_value: of the encoder's output, `[layers, batch, source, heads, d_kv]`.
        source_mask: where the source is real, `[batch, source]`.
        filled: how many slots are filled; a row's words all stand at the same positions.
    """

    key: Float[Array, "layers batch length heads d_kv"]
    value: Float[Array, "layers batch length heads d_kv"]
    source_key: Float[Array, "layers batch source heads d_kv"]
    source_value: Float[Array, "layers batch source heads d_kv"]
    source_mask: Bool[Array, "batch source"]
    filled: Int[Array, ""]


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

    def _heads(self, projection: QuantDense, x: Array, key: Array | None) -> Array:
        y = projection(x, dropout_key=key)
        return y.reshape(*y.shape[:2], self.num_heads, -1)

    def sources(
        self, x: Float[Array, "batch k embed"], keys: Keys
    ) -> tuple[Float[Array, "batch k heads d_kv"], Float[Array, "batch k heads d_kv"]]:
        """Keys and values of what is looked at."""
        return self._heads(self.k, x, next(keys)), self._heads(self.v, x, next(keys))

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
            self._heads(self.q, x, next(keys)),
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
        cached: tuple[Array, Array, Array, Array],
        index: Int[Array, ""],
        view: View,
        source_view: View,
    ) -> tuple[Float[Array, "batch 1 embed"], tuple[Array, Array]]:
        """One word at `index`, with this layer's keys and values (own, then the source's); returns
        what comes out and its own, the word's included."""
        key, value, source_key, source_value = cached
        y = self.layer_norm_0(x)
        new_key, new_value = self.SelfAttention.sources(y, draw(None, 2))
        key = jax.lax.dynamic_update_slice_in_dim(key, new_key.astype(key.dtype), index, 1)
        value = jax.lax.dynamic_update_slice_in_dim(value, new_value.astype(key.dtype), index, 1)
        x = x + self.SelfAttention(y, key, value, view, draw(None, _LAYER_KEYS))
        x = self._rest(x, source_key, source_value, source_view, draw(None, _LAYER_KEYS))
        return x, (key, value)

    def _rest(self, x: Array, key: Array, value: Array, source_view: View, keys: Keys) -> Array:
        y = self.EncDecAttention(self.layer_norm_1(x), key, value, source_view, keys)
        x = x + dropout(y, self.rate, next(keys))
        y = self.DenseReluDense(self.layer_norm_2(x), keys)
        return x + dropout(y, self.rate, next(keys))


class Stack(nnx.Module):
    """The layers of one side, with its table of position biases and its last norm."""

    def __init__(
        self,
        config: EncoderDecoderConfig,
        layer: type[EncoderLayer] | type[DecoderLayer],
        storage: Storage,
        rngs: nnx.Rngs,
    ) -> None:
        encoder = layer is EncoderLayer
        self.bias = RelativeBias(
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
            config.num_heads,
            bidirectional=encoder,
            dtype=storage.param_dtype,
            rngs=rngs,
        )
        depth = config.num_layers if encoder else config.num_decoder_layers
        self.layers = stack_layers(lambda stream: layer(config, storage, stream), depth, rngs)
        self.final_layer_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.depth = depth


class EncoderDecoder(nnx.Module):
    """A sequence-to-sequence model: source ids and target ids in, float32 logits out.

    Args:
        config: the model's shape.
        quant, lora, compute_dtype, param_dtype, embedding_bits, remat, matmul, rngs: as in
            `Decoder`.
        attention: implementation of `attend`, not "cudnn": its backward pass takes no bias.

    Raises:
        ValueError: an option that is not known, or adapters that fit no layer.
    """

    def __init__(
        self,
        config: EncoderDecoderConfig,
        *,
        quant: QuantConfig | None = None,
        lora: LoraConfig | None = None,
        compute_dtype: Any = jnp.float32,
        param_dtype: Any = None,
        embedding_bits: int | None = None,
        remat: str = "full",
        attention: AttentionName = "xla",
        matmul: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if attention not in get_args(AttentionName) or attention == "cudnn":
            raise ValueError(
                f"attention is {attention!r}, but T5's position biases need 'xla': cuDNN's "
                "backward pass takes no bias."
            )
        self.config = config
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.attention = attention
        stored = param_dtype or compute_dtype
        storage = Storage(quant, lora, compute_dtype, stored, matmul, embedding_bits)
        self.shared = storage.vocabulary(config.vocab_size, config.d_model, rngs)
        self.encoder = Stack(config, EncoderLayer, storage, rngs)
        self.decoder = Stack(config, DecoderLayer, storage, rngs)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else storage.vocabulary(config.vocab_size, config.d_model, rngs)
        )
        gated = config.feed_forward_proj.startswith("gated-")
        inner = ("wi_0", "wi_1") if gated else ("wi",)
        check_options(remat, lora, self, ("q", "k", "v", "o", *inner, "wo"))

    def __call__(
        self,
        input_ids: Int[Array, "batch source"],
        decoder_input_ids: Int[Array, "batch seq"],
        attention_mask: Bool[Array, "batch source"] | Int[Array, "batch source"] | None = None,
        decoder_attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Float32 logits. Arguments as in `hidden`."""
        return self.head(
            self.hidden(
                input_ids,
                decoder_input_ids,
                attention_mask,
                decoder_attention_mask,
                dropout_key=dropout_key,
            )
        )

    def hidden(
        self,
        input_ids: Int[Array, "batch source"],
        decoder_input_ids: Int[Array, "batch seq"],
        attention_mask: Bool[Array, "batch source"] | Int[Array, "batch source"] | None = None,
        decoder_attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """What the head reads: the decoder's last layer, normalised, in `compute_dtype`.

        Args:
            input_ids: of the source.
            decoder_input_ids: the target moved one to the right behind `decoder_start_token_id`.
            attention_mask: nonzero where the source is real, on whichever side its padding lies.
            decoder_attention_mask: of the target; not needed where its padding is on the right,
                which causality hides.
            dropout_key: turns on LoRA dropout and the model's own (`dropout_rate`).
        """
        keys = draw(dropout_key, 4)
        source = self.encode(input_ids, attention_mask, dropout_key=next(keys))
        rate, depth = self.config.dropout_rate, self.decoder.depth
        x = dropout(self._embed(decoder_input_ids), rate, next(keys))
        positions = jnp.arange(x.shape[1])
        bias = self.decoder.bias(positions, positions, longest=x.shape[1])
        view = View(bias, _key_mask(decoder_attention_mask), True, self.attention)
        source_view = View(None, _key_mask(attention_mask), False, self.attention)

        def apply(layer: DecoderLayer, x: Array, key: Array | None) -> tuple[Array, None]:
            return layer(x, source, view, source_view, draw(key, _LAYER_KEYS)), None

        layer_keys = split_key(next(keys), depth)
        x, _ = scan_layers(self.decoder.layers, apply, x, layer_keys, remat=self.remat)
        return dropout(self.decoder.final_layer_norm(x), rate, next(keys))

    def encode(
        self,
        input_ids: Int[Array, "batch source"],
        attention_mask: Bool[Array, "batch source"] | Int[Array, "batch source"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch source embed"]:
        """The encoder's output, normalised, in `compute_dtype`; arguments as in `hidden`."""
        keys = draw(dropout_key, 3)
        rate, depth = self.config.dropout_rate, self.encoder.depth
        x = dropout(self._embed(input_ids), rate, next(keys))
        positions = jnp.arange(x.shape[1])
        bias = self.encoder.bias(positions, positions, longest=x.shape[1])
        view = View(bias, _key_mask(attention_mask), False, self.attention)

        def apply(layer: EncoderLayer, x: Array, key: Array | None) -> tuple[Array, None]:
            return layer(x, view, draw(key, _LAYER_KEYS)), None

        layer_keys = split_key(next(keys), depth)
        x, _ = scan_layers(self.encoder.layers, apply, x, layer_keys, remat=self.remat)
        return dropout(self.encoder.final_layer_norm(x), rate, next(keys))

    def head(self, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
        """Float32 logits of hidden states."""
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        return (self.shared if self.lm_head is None else self.lm_head).attend(hidden)

    def prefill(
        self,
        input_ids: Int[Array, "batch source"],
        attention_mask: Bool[Array, "batch source"] | Int[Array, "batch source"] | None = None,
        *,
        cache_length: int,
    ) -> tuple[Float[Array, "batch vocab"], EncoderDecoderCache]:
        """Reads the source and writes the start token: logits of the first word, and the cache.

        Args:
            input_ids: of the source, padded on either side.
            attention_mask: nonzero where it is real; None: everywhere.
            cache_length: slots for the target's words, the start token's included.
        """
        if attention_mask is None:
            attention_mask = jnp.ones(input_ids.shape, bool)
        source = self.encode(input_ids, attention_mask)

        def apply(layer: DecoderLayer, x: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            return x, layer.EncDecAttention.sources(x, draw(None, 2))

        _, (source_key, source_value) = scan_layers(
            self.decoder.layers, apply, source, None, remat="none"
        )
        own = jnp.zeros((*source_key.shape[:2], cache_length, *source_key.shape[3:]), source.dtype)
        cache = EncoderDecoderCache(
            own, own, source_key, source_value, attention_mask.astype(bool), jnp.int32(0)
        )
        start = jnp.full(input_ids.shape[:1], self.config.decoder_start_token_id, jnp.int32)
        return self.decode_step(start, cache)

    def decode_step(
        self, tokens: Int[Array, " batch"], cache: EncoderDecoderCache
    ) -> tuple[Float[Array, "batch vocab"], EncoderDecoderCache]:
        """One word more: logits of the next, and the cache with this one in it."""
        length = cache.key.shape[2]
        slots = jnp.arange(length)
        bias = self.decoder.bias(cache.filled[None], slots, longest=length)
        # One query: there is nothing for another implementation to save.
        view = View(bias, (slots <= cache.filled)[None, None, None], False, "xla")
        source_view = View(None, _key_mask(cache.source_mask), False, "xla")

        def apply(layer: DecoderLayer, x: Array, cached: Any) -> tuple[Array, tuple[Array, Array]]:
            return layer.step(x, cached, cache.filled, view, source_view)

        x, (key, value) = scan_layers(
            self.decoder.layers, apply, self._embed(tokens[:, None]), tuple(cache[:4]), remat="none"
        )
        logits = self.head(self.decoder.final_layer_norm(x[:, 0]))
        return logits, cache._replace(key=key, value=value, filled=cache.filled + 1)

    def _embed(self, ids: Array) -> Array:
        return self.shared(ids).astype(self.compute_dtype)


def _key_mask(mask: Array | None) -> Array | None:
    return None if mask is None else mask.astype(bool)[:, None, None, :]
