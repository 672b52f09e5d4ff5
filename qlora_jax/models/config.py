"""What shape is a decoder? Differences between families are fields here, not copied models."""

from dataclasses import dataclass, field

from qlora_jax.models.rope import RopeConfig


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; fields are named as in a Hugging Face `config.json`.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_hidden_layers: depth.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides `num_attention_heads`.
        head_dim: width of a head, even; not always `hidden_size / num_attention_heads`.
        max_position_embeddings: longest sequence that the model was made for, in tokens.
        rms_norm_eps: added to the mean square before the root.
        tie_word_embeddings: whether the head is the embedding itself.
        qkv_bias, o_bias, mlp_bias: which linear layers carry a bias.
        rope: rotary frequencies and their scaling.
        model_type: the family (`families.py`) whose config.json and weight names it is saved by.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    model_type: str = "llama"

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, but a positive integer is needed.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which num_key_value_heads, "
                f"{self.num_key_value_heads}, does not divide: every key head serves equally many "
                "query heads."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but rotary positions need an even one.")
