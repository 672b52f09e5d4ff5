"""The decoder-only transformer: one file for every family, differences are configuration.

At rest the architecture is Llama's (arXiv 2302.13971): RMSNorm before each half of a layer, rotary
positions (`rope.py`), grouped-query attention (arXiv 2305.13245), SwiGLU; `config.py` tells what
else there is. Linear layers are `nn.QuantDense`, so that the same module is a 4-bit base with
adapters, a 16-bit one with adapters, or a plain model.

How to think of it:

- **Layers are stacked.** `decoder.layers` is one `DecoderLayer` whose every Variable carries a
  leading axis of `num_hidden_layers`; the forward pass is one `jax.lax.scan` along it. So the
  program is as long for 80 layers as for 2, and compiles as fast.
- **Nothing outlives its layer but its input.** With `remat="full"` the backward pass recomputes a
  layer from what entered it; a frozen weight is held as packed codes and never as a residual.
- **Names are Hugging Face's** (`layers.self_attn.q_proj`), so a checkpoint's and an adapter's keys
  are read off the tree (`families/`).

`model.hidden(...)` and `model.head(...)` are the two halves of a forward pass; a loss that never
holds all logits at once calls them apart.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.models.alibi import alibi_bias
from qlora_jax.models.attention import AttentionName, attend, check_attention
from qlora_jax.models.cache import (
    Cache,
    Pair,
    advance,
    kept,
    slot_positions,
    start,
    store,
    visible,
)
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder_layer import DecoderLayer, times
from qlora_jax.models.embedding import Embedding, check_ids
from qlora_jax.models.layer_kinds import LayerKinds, chosen, layer_kinds, turns_for
from qlora_jax.models.neftune import with_noise
from qlora_jax.models.norm import norm_for
from qlora_jax.models.positions import positions_of
from qlora_jax.models.remat import check_remat
from qlora_jax.models.spread import scores_of
from qlora_jax.models.stack import Storage, check_options, scan_layers, split_key, stack_layers
from qlora_jax.models.tile import check_mlp_tile
from qlora_jax.nn import LoraConfig
from qlora_jax.quant import QuantConfig


class Decoder(nnx.Module):
    """A causal language model: token ids in, float32 logits of the next token out.

    Args:
        config: the model's shape.
        quant: how the layers' linear weights are stored; None keeps them dense in `param_dtype`.
        lora: adapters on the layers' linear weights; None for none.
        compute_dtype: dtype of activations and matmuls.
        param_dtype: dtype of embedding, head and dense weights; None means `compute_dtype`.
        embedding_bits: 8 or 4 keeps embedding and head packed (`Embedding`); None keeps them dense.
            Learned positions stay dense.
        remat: one of `REMAT`: what the backward pass finds saved instead of recomputing it.
        stream_weights: the layers' frozen weights lie in pinned host memory and come in one layer
            at a time (`streaming.py`). `load_model` puts them there, `move_to_host` a model's.
        mlp_tile: tokens that an MLP reads at once (`tile.py`); None for all.
        attention: implementation of `attend`; see `attention_for`.
        matmul: implementation of the 4-bit matmul (`pallas_kernels`); None lets the op choose.
        rngs: stream `params`. Base weights start random.

    `model.remat`, `model.stream_weights`, `model.mlp_tile` and `model.attention` may be set again
    later; none changes results beyond rounding (but `mlp_tile` which units LoRA dropout drops).
    `model.neftune_noise_alpha` adds noise to the embeddings (`neftune.py`) wherever a dropout key
    is given; None adds none.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        quant: QuantConfig | None = None,
        lora: LoraConfig | None = None,
        compute_dtype: Any = jnp.float32,
        param_dtype: Any = None,
        embedding_bits: int | None = None,
        remat: str = "full",
        stream_weights: bool = False,
        mlp_tile: int | None = None,
        attention: AttentionName = "xla",
        matmul: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        check_remat(remat, stream_weights=stream_weights)
        check_attention(attention, biased=config.alibi)
        check_mlp_tile(mlp_tile, experts=config.num_local_experts)
        self.config = config
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.stream_weights = stream_weights
        self.mlp_tile = mlp_tile
        self.attention = attention
        self.neftune_noise_alpha: float | None = None
        stored = param_dtype or compute_dtype
        storage = Storage(quant, lora, compute_dtype, stored, matmul, embedding_bits)
        vocab, embed = config.vocab_size, config.hidden_size
        narrow = config.word_embed_proj_dim or embed
        self.embed_tokens = storage.vocabulary(vocab, narrow, rngs)
        self.layers = stack_layers(
            lambda rngs: DecoderLayer(config, storage, rngs), config.num_hidden_layers, rngs
        )
        self.norm = nnx.data(norm_for(config, embed) if config.final_norm else None)
        self.lm_head = (
            None if config.tie_word_embeddings else storage.vocabulary(vocab, narrow, rngs)
        )
        self.embed_norm = nnx.data(norm_for(config, narrow) if config.embedding_norm else None)
        if config.learned_positions:
            rows = config.max_position_embeddings + config.position_offset
            self.embed_positions = Embedding(rows, embed, dtype=stored, rngs=rngs)
        outside = storage.dense("", rngs)
        self.project_in, self.project_out = (
            nnx.data(outside(name, shape.inputs, shape.outputs) if shape else None)
            for name in ("project_in", "project_out")
            for shape in (config.outer_linears.get(name),)
        )
        linears = (*config.attention_linears, *config.mlp_linears, *config.outer_linears)
        check_options(remat, lora, self, linears)

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"],
        attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        *,
        segments: Int[Array, "batch seq"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch seq vocab"]:
        """Float32 logits. Arguments as in `hidden`; where the mask is 0 they mean nothing."""
        return self.head(
            self.hidden(
                input_ids, attention_mask, positions, segments=segments, dropout_key=dropout_key
            )
        )

    def hidden(
        self,
        input_ids: Int[Array, "batch seq"],
        attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
        positions: Int[Array, "batch seq"] | None = None,
        *,
        segments: Int[Array, "batch seq"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """What the head reads: the last layer's output, normalised, in `compute_dtype`.

        Args:
            input_ids: int32 token ids.
            attention_mask: nonzero where a token is real, on whichever side the padding lies. Where
                all padding is on the right it can be left out: causality hides it already, and
                attention without a mask is linear in memory under cuDNN.
            positions: of each token; None counts the real tokens from 0, in each segment anew.
            segments: ids of packed sequences, from 1, each in one piece; 0 is padding. A token sees
                its own segment only.
            dropout_key: turns LoRA dropout on, and NEFTune's noise; every layer and module gets its
                own key from it.

        Raises:
            ValueError: the sequence is longer than the learned positions.
            TypeError: input_ids are no such array.
        """
        check_ids(input_ids)
        mask = None if attention_mask is None else attention_mask.astype(bool)
        if positions is None:
            positions = positions_of(input_ids, mask, segments)
        self._check_length(input_ids.shape[1])
        return self._forward(input_ids, mask, positions, segments, dropout_key)[0]

    def prefill(
        self,
        input_ids: Int[Array, "batch seq"],
        attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
        *,
        cache_length: int,
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Reads prompts: the float32 logits after each one's last real token, and a cache.

        Args:
            input_ids: int32 token ids; prompts of unequal lengths are padded, best on the left,
                since the tokens that are decoded follow the last slot.
            attention_mask: nonzero where a token is real; None where all are.
            cache_length: slots of a row: those of the prompt and of every token to come. Rotary
                scalings that depend on the length of the text ("dynamic", "longrope") take this
                for it, so that early and late keys are turned alike.

        Raises:
            ValueError: the cache is too short for the prompt, or longer than the learned positions.
            TypeError: input_ids are no such array.
        """
        check_ids(input_ids)
        length = input_ids.shape[1]
        if cache_length < length:
            raise ValueError(
                f"cache_length is {cache_length}, but the prompt has {length} slots: give room for "
                "the prompt and for every token to come."
            )
        self._check_length(cache_length)
        mask = None if attention_mask is None else attention_mask.astype(bool)
        positions = positions_of(input_ids, mask, None)
        x, (key, value) = self._forward(
            input_ids, mask, positions, None, None, cache_length=cache_length
        )
        real = jnp.ones(input_ids.shape, bool) if mask is None else mask
        last = length - 1 - jnp.argmax(real[:, ::-1], axis=1)
        hidden = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
        return self.head(hidden, few=True), start(key, value, real)

    def decode_step(
        self, tokens: Int[Array, " batch"], cache: Cache
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Reads one more token a row: the float32 logits after it, and the cache with it.

        Args:
            tokens: int32 ids. Donate the cache with `jax.jit(..., donate_argnames="cache")`, and it
                is changed in place. Where weights stream, all of them come in for every token.
            cache: of `prefill` or an earlier step. Where it is full already, logits are NaN.
        """
        config, positions = self.config, cache.positions[:, None]
        turns = turns_for(config, positions, cache.length)
        seen = visible(cache, None)
        near = None if config.sliding_window is None else visible(cache, config.sliding_window)
        alike = near if all(config.sliding_layers) else seen
        bias = self._bias(slot_positions(cache))

        def apply(
            layer: DecoderLayer, carry: tuple[Array, Pair], given: tuple[LayerKinds, Array]
        ) -> tuple[tuple[Array, Pair], None]:
            x, cached = carry
            kind, number = given

            def mix(query: Array, key: Array, value: Array) -> tuple[Array, Pair]:
                whole, (key, value) = store(cached, (key, value), number, cache.filled)
                mixed = attend(
                    query,
                    key,
                    value,
                    mask=chosen(kind.sliding, near, alike),
                    causal=False,
                    scale=config.attention_scale,
                    softcap=config.attn_logit_softcapping,
                    bias=bias,
                    implementation=self.attention,
                )
                return mixed, whole

            return layer(x, turns.of(kind), mix, dropout_key=None), None

        numbers = jnp.arange(config.num_hidden_layers, dtype=jnp.int32)
        carry = (self._embed(tokens[:, None], positions, None), (cache.key, cache.value))
        given = (layer_kinds(config), numbers)
        (x, cached), _ = scan_layers(
            self.layers,
            apply,
            carry,
            given,
            # Without a gradient nothing is computed again, but a stream takes no other name.
            remat="full" if self.stream_weights else "none",
            stream_weights=self.stream_weights,
            rows=len(tokens),
        )
        x = jnp.where(cache.filled < cache.length, self._finish(x, None)[:, 0], jnp.nan)
        return self.head(x, few=True), advance(cache, *cached)

    def _forward(
        self,
        input_ids: Int[Array, "batch seq"],
        mask: Bool[Array, "batch seq"] | None,
        positions: Int[Array, "batch seq"],
        segments: Int[Array, "batch seq"] | None,
        dropout_key: Key[Array, ""] | None,
        *,
        cache_length: int | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Any]:
        """`hidden`, and every layer's part of a cache if one is to be made."""
        config = self.config
        bias = self._bias(positions)

        def mix(sliding: Array | None, query: Array, key: Array, value: Array) -> tuple[Array, Any]:
            def within(window: int | None) -> Array:
                return attend(
                    query,
                    key,
                    value,
                    mask=None if mask is None else mask[:, None, None, :],
                    causal=True,
                    window=window,
                    scale=config.attention_scale,
                    softcap=config.attn_logit_softcapping,
                    bias=bias,
                    segments=None if segments is None else (segments, segments),
                    implementation=self.attention,
                )

            if sliding is None:
                mixed = within(config.sliding_window if all(config.sliding_layers) else None)
            else:
                # Not a mask by a traced window: a static one lets an implementation skip blocks.
                mixed = jax.lax.cond(
                    sliding, lambda: within(config.sliding_window), lambda: within(None)
                )
            return mixed, None if cache_length is None else kept(key, value, cache_length)

        turns = turns_for(config, positions, cache_length)

        def apply(
            layer: DecoderLayer, x: Array, given: tuple[LayerKinds, Array | None]
        ) -> tuple[Array, Any]:
            kind, key = given
            return layer(
                x,
                turns.of(kind),
                functools.partial(mix, kind.sliding),
                dropout_key=key,
                mlp_tile=self.mlp_tile,
            )

        keys = split_key(dropout_key, config.num_hidden_layers)
        x, caches = scan_layers(
            self.layers,
            apply,
            self._embed(input_ids, positions, dropout_key),
            (layer_kinds(config), keys),
            remat=self.remat,
            stream_weights=self.stream_weights,
        )
        return self._finish(x, dropout_key), caches

    def head(
        self, hidden: Float[Array, "*batch embed"], *, few: bool = False
    ) -> Float[Array, "*batch vocab"]:
        """Float32 logits of hidden states; of `few`, the next token of each text, see
        `spread.scores_of`."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        logits = scores_of(hidden, head) if few else head.attend(hidden)
        config, cap = self.config, self.config.final_logit_softcapping
        if config.logits_scaling != 1:
            logits = logits / config.logits_scaling
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _embed(
        self, ids: Array, positions: Array, dropout_key: Array | None
    ) -> Float[Array, "batch seq embed"]:
        """What enters the first layer, in `compute_dtype`."""
        config = self.config
        x = self.embed_tokens(ids).astype(self.compute_dtype)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, x.dtype)
        # On what transformers' embedding gives, whose own the scale is, and what follows is not.
        x = with_noise(x, positions, self.neftune_noise_alpha, self._outer_key(dropout_key, 2))
        x = times(x, config.embedding_multiplier)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.project_in is not None:
            x = self.project_in(x, dropout_key=self._outer_key(dropout_key, 0))
        if config.learned_positions:
            learned = self.embed_positions(positions + config.position_offset)
            x = x + learned.astype(self.compute_dtype)
        return x

    def _finish(self, x: Array, dropout_key: Array | None) -> Float[Array, "batch seq embed"]:
        """What the head reads of the last layer's output."""
        if self.norm is not None:
            x = self.norm(x)
        if self.project_out is not None:
            x = self.project_out(x, dropout_key=self._outer_key(dropout_key, 1))
        return x

    def _outer_key(self, key: Array | None, number: int) -> Array | None:
        """A key of its own for what is random outside of the stack: `split` gives layer i what
        `fold_in` makes of i, so the numbers go on behind the layers'."""
        number += self.config.num_hidden_layers
        return None if key is None else jax.random.fold_in(key, number)

    def _check_length(self, length: int) -> None:
        """Refuses what learned positions have no row for; rotary ones have no end."""
        longest = self.config.max_position_embeddings
        if self.config.learned_positions and length > longest:
            raise ValueError(
                f"The sequence has {length} tokens, but the model has learned {longest} positions: "
                "shorten it."
            )

    def _bias(self, positions: Array) -> Float[Array, "batch heads 1 keys"] | None:
        """What the positions of keys add to the scores."""
        return alibi_bias(positions, self.config.num_attention_heads) if self.config.alibi else None
