"""What shape is an encoder, or an encoder–decoder? Fields are named as in their `config.json`."""

from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("relu", "gelu", "gated-gelu", "gated-silu")
"""What `feed_forward_proj` may be: "gelu" is exact, "gated-gelu" T5's tanh approximation."""


def _check_sizes(config: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}, but a positive integer is needed.")


def _check_rates(config: Any, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"{name} is {value!r}, but a probability in [0, 1) is needed.")


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Shape of a T5 (arXiv 1910.10683); v1.0, v1.1 and Flan-T5 differ in fields alone.

    Attributes:
        vocab_size: rows of the embedding that encoder and decoder share.
        d_model: width of the residual stream.
        d_kv: width of a head; not always `d_model / num_heads`.
        d_ff: width of the feed-forward layer.
        num_layers: depth of the encoder.
        num_decoder_layers: depth of the decoder.
        num_heads: of every attention.
        relative_attention_num_buckets: of the position biases.
        relative_attention_max_distance: from which on distances share a bucket.
        layer_norm_epsilon: added to the mean square before the root.
        dropout_rate: of embeddings, attention, and each layer's halves, in training.
        feed_forward_proj: one of `ACTIVATIONS`: "relu" (v1.0), "gated-gelu" (v1.1, Flan).
        tie_word_embeddings: whether the head is the embedding itself.
        scale_decoder_outputs: whether hidden states are divided by √d_model before the head (v1.0).
        pad_token_id, eos_token_id: what fills rows up, and what ends a text.
        decoder_start_token_id: what the decoder reads first; published models take pad.
        model_type: the family whose config.json and weight names it is saved by.
    """

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    dropout_rate: float = 0.1
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool = True
    pad_token_id: int = 0
    eos_token_id: int = 1
    decoder_start_token_id: int = 0
    model_type: str = "t5"

    def __post_init__(self) -> None:
        _check_sizes(
            self,
            (
                "vocab_size",
                "d_model",
                "d_kv",
                "d_ff",
                "num_layers",
                "num_decoder_layers",
                "num_heads",
                "relative_attention_max_distance",
            ),
        )
        _check_rates(self, ("dropout_rate",))
        buckets = self.relative_attention_num_buckets
        if buckets < 4 or buckets % 2 or self.relative_attention_max_distance <= buckets // 2:
            raise ValueError(
                f"relative_attention_num_buckets is {buckets} and relative_attention_max_distance "
                f"{self.relative_attention_max_distance}, but an even number of at least 4 buckets "
                "and more than half as large a distance are needed."
            )
        if self.feed_forward_proj not in ACTIVATIONS:
            raise ValueError(
                f"feed_forward_proj is {self.feed_forward_proj!r}, but one of "
                f"{', '.join(ACTIVATIONS)} is needed."
            )

    @property
    def head_dim(self) -> int:
        """Width of a head, under the name that decoders have for it."""
        return self.d_kv

    @property
    def score_bias(self) -> bool:
        """Whether attention adds a bias to its scores: positions are nothing else."""
        return True


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of a RoBERTa (arXiv 1907.11692) with a classification head.

    Attributes:
        vocab_size: rows of the word embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the feed-forward layer.
        num_hidden_layers: depth.
        num_attention_heads: divides `hidden_size`.
        max_position_embeddings: rows of the position embedding: the longest sequence plus
            `pad_token_id + 1`, where positions begin.
        type_vocab_size: rows of the segment embedding, of which RoBERTa uses the first.
        layer_norm_eps: added to the variance before the root.
        pad_token_id: the padding, which has a position of its own.
        hidden_dropout_prob: of embeddings and each layer's halves, in training.
        attention_probs_dropout_prob: of attention, in training.
        classifier_dropout: of the head; None for `hidden_dropout_prob`.
        num_labels: classes; 1 is regression.
        label_names: what the classes are called, if anything; of another number of classes they
            are not saved.
        model_type: the family whose config.json and weight names it is saved by.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 514
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    pad_token_id: int = 1
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    num_labels: int = 2
    label_names: tuple[str, ...] = ()
    model_type: str = "roberta"

    def __post_init__(self) -> None:
        _check_sizes(
            self,
            (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "max_position_embeddings",
                "type_vocab_size",
                "num_labels",
            ),
        )
        own = () if self.classifier_dropout is None else ("classifier_dropout",)
        _check_rates(self, ("hidden_dropout_prob", "attention_probs_dropout_prob", *own))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, which num_attention_heads, "
                f"{self.num_attention_heads}, does not divide."
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens."""
        return self.max_position_embeddings - self.pad_token_id - 1

    @property
    def head_dropout(self) -> float:
        """Dropout of the classification head."""
        given = self.classifier_dropout
        return self.hidden_dropout_prob if given is None else given
