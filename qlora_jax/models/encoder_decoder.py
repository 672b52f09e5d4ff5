"""The encoder–decoder transformer: T5 v1.0, v1.1 and Flan-T5 (arXiv 1910.10683, 2210.11416).

The encoder reads the whole source; the decoder writes the target token by token, and in every layer
looks at its own tokens so far (`SelfAttention`), then at the encoder's output (`EncDecAttention`).
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

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.models.attention import AttentionName, check_attention
from qlora_jax.models.cache import Pair, kept, read, store
from qlora_jax.models.dropped_attention import View, key_mask
from qlora_jax.models.embedding import check_ids
from qlora_jax.models.encoder_config import EncoderDecoderConfig
from qlora_jax.models.encoder_decoder_layer import LAYER_KEYS, DecoderLayer, EncoderLayer
from qlora_jax.models.norm import RMSNorm
from qlora_jax.models.relative_bias import RelativeBias
from qlora_jax.models.spread import scores_of
from qlora_jax.models.stack import (
    Storage,
    check_options,
    draw,
    scan_layers,
    split_key,
    stack_layers,
)
from qlora_jax.nn import LoraConfig
from qlora_jax.nn.lora import dropout
from qlora_jax.quant import QuantConfig


class EncoderDecoderCache(NamedTuple):
    """What generation keeps between tokens; the leading axis of keys and values is the layers'.

    Attributes:
        key, value: of the decoder's tokens, as in `Cache`, with a group for each head.
        source_key, source_value: of the encoder's output, likewise.
        source_mask: where the source is real, `[batch, source]`.
        filled: how many slots are filled; a row's tokens all stand at the same positions.
    """

    key: Float[Array, "layers batch heads length d_kv"]
    value: Float[Array, "layers batch heads d_kv length"]
    source_key: Float[Array, "layers batch heads source d_kv"]
    source_value: Float[Array, "layers batch heads d_kv source"]
    source_mask: Bool[Array, "batch source"]
    filled: Int[Array, ""]


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
        check_attention(attention, biased=True)
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
        view = View(bias, key_mask(decoder_attention_mask), True, self.attention)
        source_view = View(None, key_mask(attention_mask), False, self.attention)

        def apply(layer: DecoderLayer, x: Array, key: Array | None) -> tuple[Array, None]:
            return layer(x, source, view, source_view, draw(key, LAYER_KEYS)), None

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
        check_ids(input_ids)
        keys = draw(dropout_key, 3)
        rate, depth = self.config.dropout_rate, self.encoder.depth
        x = dropout(self._embed(input_ids), rate, next(keys))
        positions = jnp.arange(x.shape[1])
        bias = self.encoder.bias(positions, positions, longest=x.shape[1])
        view = View(bias, key_mask(attention_mask), False, self.attention)

        def apply(layer: EncoderLayer, x: Array, key: Array | None) -> tuple[Array, None]:
            return layer(x, view, draw(key, LAYER_KEYS)), None

        layer_keys = split_key(next(keys), depth)
        x, _ = scan_layers(self.encoder.layers, apply, x, layer_keys, remat=self.remat)
        return dropout(self.encoder.final_layer_norm(x), rate, next(keys))

    def head(
        self, hidden: Float[Array, "*batch embed"], *, few: bool = False
    ) -> Float[Array, "*batch vocab"]:
        """Float32 logits of hidden states; `few` as of a `Decoder`'s."""
        if self.config.scale_decoder_outputs:
            hidden = hidden * self.config.d_model**-0.5
        head = self.shared if self.lm_head is None else self.lm_head
        return scores_of(hidden, head) if few else head.attend(hidden)

    def prefill(
        self,
        input_ids: Int[Array, "batch source"],
        attention_mask: Bool[Array, "batch source"] | Int[Array, "batch source"] | None = None,
        *,
        cache_length: int,
    ) -> tuple[Float[Array, "batch vocab"], EncoderDecoderCache]:
        """Reads the source and writes the start token: logits of the first token, and the cache.

        Args:
            input_ids: of the source, padded on either side.
            attention_mask: nonzero where it is real; None: everywhere.
            cache_length: slots for the target's tokens, the start token's included.
        """
        if attention_mask is None:
            attention_mask = jnp.ones(input_ids.shape, bool)
        source = self.encode(input_ids, attention_mask)

        def apply(layer: DecoderLayer, x: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            return x, kept(*layer.EncDecAttention.sources(x, draw(None, 2)), x.shape[1])

        _, (source_key, source_value) = scan_layers(
            self.decoder.layers, apply, source, None, remat="none"
        )
        heads, width = source_key.shape[:3], source_key.shape[-1]
        cache = EncoderDecoderCache(
            jnp.zeros((*heads, cache_length, width), source.dtype),
            jnp.zeros((*heads, width, cache_length), source.dtype),
            source_key,
            source_value,
            attention_mask.astype(bool),
            jnp.int32(0),
        )
        start = jnp.full(input_ids.shape[:1], self.config.decoder_start_token_id, jnp.int32)
        return self.decode_step(start, cache)

    def decode_step(
        self, tokens: Int[Array, " batch"], cache: EncoderDecoderCache
    ) -> tuple[Float[Array, "batch vocab"], EncoderDecoderCache]:
        """One token more: logits of the next, and the cache with this one in it. Where it is full
        already, logits are NaN."""
        length = cache.key.shape[3]
        slots = jnp.arange(length)
        bias = self.decoder.bias(cache.filled[None], slots, longest=length)
        view = View(bias, (slots <= cache.filled)[None, None, None], False, self.attention)
        source_view = View(None, key_mask(cache.source_mask), False, self.attention)

        def apply(
            layer: DecoderLayer, carry: tuple[Array, Pair], given: tuple[Array, Pair]
        ) -> tuple[tuple[Array, Pair], None]:
            x, cached = carry
            number, source = given

            def mix(new: Pair) -> tuple[Pair, Pair]:
                return store(cached, new, number, cache.filled)

            return layer.step(x, mix, read(*source), view, source_view), None

        numbers = jnp.arange(self.decoder.depth, dtype=jnp.int32)
        carry = (self._embed(tokens[:, None]), (cache.key, cache.value))
        given = (numbers, (cache.source_key, cache.source_value))
        (x, (key, value)), _ = scan_layers(
            self.decoder.layers, apply, carry, given, remat="none", rows=len(tokens)
        )
        x = jnp.where(cache.filled < length, self.decoder.final_layer_norm(x[:, 0]), jnp.nan)
        return self.head(x, few=True), cache._replace(key=key, value=value, filled=cache.filled + 1)

    def _embed(self, ids: Array) -> Array:
        return self.shared(ids).astype(self.compute_dtype)
