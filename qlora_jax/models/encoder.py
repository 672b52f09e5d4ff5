"""The encoder with a classification head: RoBERTa (arXiv 1907.11692), for GLUE.

BERT's architecture (arXiv 1810.04805): every token sees every other, positions are learned, and a
norm follows each half of a layer instead of preceding it. The head reads the first token (`<s>`):
dense → tanh → out_proj. One output is a regression, several are classes.

The head is new for every task, so it is not frozen: its weights are `TrainedParam`s, trained along
with the adapters in float32 and saved whole beside them, as PEFT does for sequence classification
(`modules_to_save`). Names are Hugging Face's (`attention.self.query`, `classifier.out_proj`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from qlora_jax.models.attention import AttentionName, check_attention
from qlora_jax.models.dropped_attention import View, dropped_attention, key_mask, project_heads
from qlora_jax.models.embedding import Embedding, check_ids
from qlora_jax.models.encoder_config import EncoderConfig
from qlora_jax.models.norm import LayerNorm
from qlora_jax.models.stack import (
    Keys,
    Storage,
    check_options,
    draw,
    scan_layers,
    split_key,
    stack_layers,
)
from qlora_jax.nn import LoraConfig, TrainedParam
from qlora_jax.nn.lora import dropout
from qlora_jax.quant import QuantConfig

_LAYER_KEYS = 9


class Embeddings(nnx.Module):
    """Word + position + segment, normalised. Padding has a position of its own, before all."""

    def __init__(self, config: EncoderConfig, storage: Storage, rngs: nnx.Rngs) -> None:
        def table(rows: int) -> Embedding:
            return Embedding(rows, config.hidden_size, dtype=storage.param_dtype, rngs=rngs)

        self.word_embeddings = table(config.vocab_size)
        self.position_embeddings = table(config.max_position_embeddings)
        self.token_type_embeddings = table(config.type_vocab_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pad_token_id = config.pad_token_id
        self.compute_dtype = storage.compute_dtype

    def __call__(self, input_ids: Int[Array, "batch seq"]) -> Float[Array, "batch seq embed"]:
        """In `compute_dtype`."""
        real = input_ids != self.pad_token_id
        positions = jnp.cumsum(real, axis=-1, dtype=jnp.int32) * real + self.pad_token_id
        x = (
            self.word_embeddings(input_ids)
            + self.position_embeddings(positions)
            + self.token_type_embeddings(jnp.zeros_like(input_ids))
        )
        return self.LayerNorm(x.astype(self.compute_dtype))


class SelfAttention(nnx.Module):
    """The three projections of attention, and attention itself."""

    def __init__(self, config: EncoderConfig, storage: Storage, rngs: nnx.Rngs) -> None:
        dense = storage.dense("layers.attention.self", rngs)
        size = config.hidden_size
        self.query = dense("query", size, size, use_bias=True)
        self.key = dense("key", size, size, use_bias=True)
        self.value = dense("value", size, size, use_bias=True)
        self.num_heads = config.num_attention_heads
        self.rate = config.attention_probs_dropout_prob

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        view: View,
        keys: Keys,
    ) -> Float[Array, "batch seq embed"]:
        """What each token finds among all, before the output projection."""

        query, key, value = (
            project_heads(projection, x, self.num_heads, next(keys))
            for projection in (self.query, self.key, self.value)
        )
        mixed = dropped_attention(
            query,
            key,
            value,
            **view._asdict(),
            scale=query.shape[-1] ** -0.5,
            rate=self.rate,
            dropout_key=next(keys),
        )
        return mixed.reshape(x.shape)


class Output(nnx.Module):
    """norm(residual + dense(x)): how both halves of a layer end."""

    def __init__(
        self, config: EncoderConfig, path: str, inputs: int, storage: Storage, rngs: nnx.Rngs
    ) -> None:
        dense = storage.dense(path, rngs)
        self.dense = dense("dense", inputs, config.hidden_size, use_bias=True)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rate = config.hidden_dropout_prob

    def __call__(
        self,
        x: Float[Array, "batch seq inputs"],
        residual: Float[Array, "batch seq embed"],
        keys: Keys,
    ) -> Float[Array, "batch seq embed"]:
        """The shape and dtype of the residual."""
        y = dropout(self.dense(x, dropout_key=next(keys)), self.rate, next(keys))
        return self.LayerNorm(residual + y)


class Attention(nnx.Module):
    """Self-attention, its output projection and norm; the first is called `self`."""

    def __init__(self, config: EncoderConfig, storage: Storage, rngs: nnx.Rngs) -> None:
        self.self = SelfAttention(config, storage, rngs)
        self.output = Output(config, "layers.attention.output", config.hidden_size, storage, rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        view: View,
        keys: Keys,
    ) -> Float[Array, "batch seq embed"]:
        """The same shape and dtype as x."""
        return self.output(self.self(x, view, keys), x, keys)


class Intermediate(nnx.Module):
    """gelu(dense(x)): the wide part of the feed-forward half."""

    def __init__(self, config: EncoderConfig, storage: Storage, rngs: nnx.Rngs) -> None:
        dense = storage.dense("layers.intermediate", rngs)
        self.dense = dense("dense", config.hidden_size, config.intermediate_size, use_bias=True)

    def __call__(
        self, x: Float[Array, "batch seq embed"], keys: Keys
    ) -> Float[Array, "batch seq inner"]:
        """In x's dtype."""
        return jax.nn.gelu(self.dense(x, dropout_key=next(keys)), approximate=False)


class EncoderLayer(nnx.Module):
    """Attention, then a GELU feed-forward layer; each added to its input and then normalised."""

    def __init__(self, config: EncoderConfig, storage: Storage, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, storage, rngs)
        self.intermediate = Intermediate(config, storage, rngs)
        self.output = Output(config, "layers.output", config.intermediate_size, storage, rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        view: View,
        keys: Keys,
    ) -> Float[Array, "batch seq embed"]:
        """The same shape and dtype as x."""
        x = self.attention(x, view, keys)
        return self.output(self.intermediate(x, keys), x, keys)


class TrainedDense(nnx.Module):
    """A linear layer in float32 that is trained whole: `weight` [out, in] and `bias` [out]."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs) -> None:
        weight = 0.02 * jax.random.normal(rngs.params(), (outputs, inputs), jnp.float32)
        self.weight = TrainedParam(weight)
        self.bias = TrainedParam(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """In float32."""
        return jnp.einsum("...i,oi->...o", x, self.weight[...]) + self.bias[...]


class ClassificationHead(nnx.Module):
    """From the first token's hidden state to one score per label."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.dense = TrainedDense(config.hidden_size, config.hidden_size, rngs=rngs)
        self.out_proj = TrainedDense(config.hidden_size, config.num_labels, rngs=rngs)
        self.rate = config.head_dropout

    def __call__(
        self, first: Float[Array, "batch embed"], keys: Keys
    ) -> Float[Array, "batch labels"]:
        """Scores, float32."""
        x = dropout(first.astype(jnp.float32), self.rate, next(keys))
        x = dropout(jnp.tanh(self.dense(x)), self.rate, next(keys))
        return self.out_proj(x)


class EncoderClassifier(nnx.Module):
    """A sequence classifier: token ids in, float32 scores of each label out.

    Args:
        config: the model's shape.
        quant, lora, compute_dtype, param_dtype, remat, attention, matmul, rngs: as in `Decoder`.

    Raises:
        ValueError: an option that is not known, or adapters that fit no layer.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        quant: QuantConfig | None = None,
        lora: LoraConfig | None = None,
        compute_dtype: Any = jnp.float32,
        param_dtype: Any = None,
        remat: str = "full",
        attention: AttentionName = "xla",
        matmul: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        check_attention(attention)
        self.config = config
        self.compute_dtype = compute_dtype
        self.remat = remat
        self.attention = attention
        storage = Storage(quant, lora, compute_dtype, param_dtype or compute_dtype, matmul)
        self.embeddings = Embeddings(config, storage, rngs)
        self.layers = stack_layers(
            lambda stream: EncoderLayer(config, storage, stream), config.num_hidden_layers, rngs
        )
        self.classifier = ClassificationHead(config, rngs=rngs)
        check_options(remat, lora, self, ("query", "key", "value", "dense"))

    def __call__(
        self,
        input_ids: Int[Array, "batch seq"],
        attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch labels"]:
        """Float32 scores of each sequence; arguments as in `hidden`."""
        keys = draw(dropout_key, 3)
        hidden = self.hidden(input_ids, attention_mask, dropout_key=next(keys))
        return self.classifier(hidden[:, 0], keys)

    def hidden(
        self,
        input_ids: Int[Array, "batch seq"],
        attention_mask: Bool[Array, "batch seq"] | Int[Array, "batch seq"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch seq embed"]:
        """The last layer's output, in `compute_dtype`.

        Args:
            input_ids: beginning with `<s>`, padded on the right with `pad_token_id`, by which
                positions are counted.
            attention_mask: nonzero where a token is real.
            dropout_key: turns on LoRA dropout and the model's own.

        Raises:
            ValueError: more tokens than the model has positions for.
            TypeError: input_ids are no such array.
        """
        check_ids(input_ids)
        if input_ids.shape[1] > self.config.max_length:
            raise ValueError(
                f"input_ids have {input_ids.shape[1]} tokens, but the model has positions for "
                f"{self.config.max_length}: cut the text."
            )
        view = View(None, key_mask(attention_mask), False, self.attention)
        keys = draw(dropout_key, 2)
        x = dropout(self.embeddings(input_ids), self.config.hidden_dropout_prob, next(keys))

        def apply(layer: EncoderLayer, x: Array, key: Array | None) -> tuple[Array, None]:
            return layer(x, view, draw(key, _LAYER_KEYS)), None

        layer_keys = split_key(next(keys), self.config.num_hidden_layers)
        return scan_layers(self.layers, apply, x, layer_keys, remat=self.remat)[0]
