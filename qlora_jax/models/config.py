"""What shape is a decoder? Differences between families are fields here, not copied models.

| field | Llama | others |
|---|---|---|
| residual | pre | post (OPT-350M), after (OLMo), parallel (GPT-NeoX), sandwich (Gemma 2, 3) |
| norm | rms | layer (GPT-NeoX, OPT, BLOOM, StarCoder 2, StableLM) |
| fused_qkv | none | blocks (Phi-3), heads (GPT-NeoX, BLOOM) |
| rope, alibi | rotary | None: learned positions (OPT), ALiBi (BLOOM) |
| rope_layers | every layer turns | SmolLM3 |
| embedding_norm | no | BLOOM |
| sliding_window, layer_types | every layer sees everything | Mistral, Phi-3, Gemma, Qwen, OLMo 3 |
| qk_norm | None | head (Gemma 3, Qwen 3), all (OLMo) |
| attention_scale | None | Gemma, Granite |
| embedding_multiplier, residual_multiplier, logits_scaling | 1 | Granite |
| soft caps, norm_offset, embedding_scale | none | Gemma |
| num_local_experts | 0 | Mixtral, Qwen3 |
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from qlora_jax.models.rope import RopeConfig

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
LayerType = Literal["sliding_attention", "full_attention"]
Norm = Literal["rms", "layer"]
Residual = Literal["pre", "post", "after", "sandwich", "parallel"]
Fused = Literal["blocks", "heads"]
Normalised = Literal["head", "all"]

_KNOWN: dict[str, tuple[str | None, ...]] = {
    "norm": get_args(Norm),
    "residual": get_args(Residual),
    "hidden_act": get_args(Activation),
    "fused_qkv": (None, *get_args(Fused)),
    "qk_norm": (None, *get_args(Normalised)),
}


class Linear(NamedTuple):
    """The shape of one linear layer."""

    inputs: int
    outputs: int
    bias: bool


@dataclass(frozen=True)
class LayerNames:
    """What a family calls the parts of a layer: our attributes, and PEFT's `target_modules`."""

    attention: str = "self_attn"
    q: str = "q_proj"
    k: str = "k_proj"
    v: str = "v_proj"
    qkv: str = "qkv_proj"
    o: str = "o_proj"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; fields are named as in a Hugging Face `config.json` where it has them.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_hidden_layers: depth.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads; divides `num_attention_heads`.
        head_dim: width of a head, even; not always `hidden_size / num_attention_heads`.
        max_position_embeddings: longest sequence that the model was made for, in tokens; with
            learned positions, the longest that there is.
        tie_word_embeddings: whether the head is the embedding itself.
        norm: "rms" (a weight) or "layer" (a weight and a bias).
        norm_eps: added to the mean square, or to the variance, before the root.
        norm_offset: added to every RMSNorm weight (1 in Gemma, whose weights are kept around 0).
        final_norm: whether the last layer's output is normalised before the head.
        residual: where the norms of a layer stand, with n for a norm, a for attention, m for MLP:
            "pre" x + a(n(x)), then x + m(n(x)); "post" n(x + a(x)), then n(x + m(x));
            "after" x + n(a(x)), then x + n(m(x)); "sandwich" x + n(a(n(x))), then x + n(m(n(x)));
            "parallel" x + a(n(x)) + m(n'(x)).
        residual_multiplier: what attention and MLP give is multiplied by it before it is added.
        hidden_act: the MLP's activation; "gelu" is exact, "gelu_tanh" its approximation.
        gated_mlp: down(act(gate(x)) · up(x)) rather than down(act(up(x))).
        qkv_bias, o_bias, mlp_bias: which linear layers carry a bias.
        fused_qkv: None, or one projection for all three: "blocks" (all queries, all keys, all
            values) or "heads" (query, key and value of one head after another).
        fused_gate_up: one projection: all gates, then all ups.
        qk_norm: RMSNorm over queries and keys before the rotation: over each "head" by itself or
            over "all" heads together; None for none.
        rope: rotary frequencies and their scaling; None for learned positions or `alibi`.
        rope_layers: which layers turn their queries and keys by it; None for all. The others tell
            positions by causality alone.
        alibi: positions as biases on the scores (`alibi.py`); needs rope to be None.
        local_rope: of the layers with a sliding window, where they have their own.
        position_offset: unused rows in front of the learned positions (2 in OPT).
        sliding_window: how many tokens a token of a sliding layer sees, itself among them.
        layer_types: which layers slide, where only some do; None where all are alike.
        attention_scale: scores are multiplied by it; None for 1 / √head_dim.
        attn_logit_softcapping, final_logit_softcapping: c in c · tanh(x / c) over the scores and
            the logits; None for none.
        logits_scaling: logits are divided by it.
        embedding_scale: embeddings are multiplied by it, rounded to their dtype.
        embedding_multiplier: they are multiplied by it as it is, NEFTune's noise with them.
        embedding_norm: embeddings are normalised before the first layer.
        word_embed_proj_dim: width of the embedding, where linear maps `project_in` and
            `project_out` lie between it and the layers; None where it is `hidden_size`.
        num_local_experts: MLPs of a layer among which a router chooses; 0 for one MLP and none.
        num_experts_per_tok: how many of them a token passes through.
        norm_topk_prob: whether the proportions of those add up to 1; else to their share of all.
        names: what the family calls the parts of a layer.
        model_type: the family (`families/`) whose config.json and weight names it is saved by.
        sees: whether it was read as the text part of a model that also sees: its adapters are saved
            for that one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    norm: Norm = "rms"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    final_norm: bool = True
    residual: Residual = "pre"
    residual_multiplier: float = 1.0
    hidden_act: Activation = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused_qkv: Fused | None = None
    fused_gate_up: bool = False
    qk_norm: Normalised | None = None
    rope: RopeConfig | None = field(default_factory=RopeConfig)
    rope_layers: tuple[bool, ...] | None = None
    alibi: bool = False
    local_rope: RopeConfig | None = None
    position_offset: int = 0
    sliding_window: int | None = None
    layer_types: tuple[LayerType, ...] | None = None
    attention_scale: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    logits_scaling: float = 1.0
    embedding_scale: float = 1.0
    embedding_multiplier: float = 1.0
    embedding_norm: bool = False
    word_embed_proj_dim: int | None = None
    num_local_experts: int = 0
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    names: LayerNames = LayerNames()
    model_type: str = "llama"
    sees: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, but a positive integer is needed.")
        for name, known in _KNOWN.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}, but one of {known} is needed.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, which num_key_value_heads, "
                f"{self.num_key_value_heads}, does not divide: every key head serves equally many "
                "query heads."
            )
        if self.rope is not None and self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, but rotary positions need an even one.")
        if self.alibi and self.rope is not None:
            raise ValueError(
                "alibi is set beside a rope: give rope=None, or leave alibi out, for positions are "
                "told in one way."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(
                f"sliding_window is {self.sliding_window}, but a token sees at least itself: give "
                "a positive number, or None for no window."
            )
        for name in ("layer_types", "rope_layers"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != self.num_hidden_layers:
                raise ValueError(
                    f"{name} has {len(entries)} entries, but there are {self.num_hidden_layers} "
                    "layers: give one for each."
                )
        if self.sliding_window is None and any(self.sliding_layers):
            raise ValueError(
                "layer_types has 'sliding_attention', but sliding_window is None: say how many "
                "tokens such a layer sees, or leave layer_types out."
            )
        if self.num_local_experts and not 1 <= self.num_experts_per_tok <= self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but there are "
                f"{self.num_local_experts} experts to choose from."
            )

    @property
    def learned_positions(self) -> bool:
        """Whether positions are rows of a table, which ends."""
        return self.rope is None and not self.alibi

    @property
    def sliding_layers(self) -> tuple[bool, ...]:
        """Which layers see `sliding_window` tokens only."""
        if self.layer_types is None:
            return (self.sliding_window is not None,) * self.num_hidden_layers
        return tuple(kind == "sliding_attention" for kind in self.layer_types)

    @property
    def turned_layers(self) -> tuple[bool, ...]:
        """Which layers turn their queries and keys."""
        return self.rope_layers or (self.rope is not None,) * self.num_hidden_layers

    @property
    def attention_linears(self) -> dict[str, Linear]:
        """The linear layers of attention by their names."""
        queries = self.num_attention_heads * self.head_dim
        keys = self.num_key_value_heads * self.head_dim
        names, embed, bias = self.names, self.hidden_size, self.qkv_bias
        if self.fused_qkv:
            inner = {names.qkv: Linear(embed, queries + 2 * keys, bias)}
        else:
            inner = {
                names.q: Linear(embed, queries, bias),
                names.k: Linear(embed, keys, bias),
                names.v: Linear(embed, keys, bias),
            }
        return {**inner, names.o: Linear(queries, embed, self.o_bias)}

    @property
    def mlp_linears(self) -> dict[str, Linear]:
        """The linear layers of the MLP, or of one expert, by their names."""
        outer, inner, bias = self.hidden_size, self.intermediate_size, self.mlp_bias
        names = self.names
        if not self.gated_mlp:
            into = {names.up: Linear(outer, inner, bias)}
        elif self.fused_gate_up:
            into = {names.gate_up: Linear(outer, 2 * inner, bias)}
        else:
            into = {
                names.gate: Linear(outer, inner, bias),
                names.up: Linear(outer, inner, bias),
            }
        return {**into, names.down: Linear(inner, outer, bias)}

    @property
    def outer_linears(self) -> dict[str, Linear]:
        """The linear layers between the embedding and the layers, by their names."""
        narrow, embed = self.word_embed_proj_dim, self.hidden_size
        if narrow is None:
            return {}
        return {
            "project_in": Linear(narrow, embed, False),
            "project_out": Linear(embed, narrow, False),
        }

    @property
    def layer_norms(self) -> tuple[str, ...]:
        """The norms of a layer over the residual stream, by their names."""
        norms = ("input_layernorm", "post_attention_layernorm")
        around_mlp = ("pre_feedforward_layernorm", "post_feedforward_layernorm")
        if self.residual == "after":
            return norms[1:] + around_mlp[1:]
        return norms + around_mlp if self.residual == "sandwich" else norms
