"""GPT-NeoX 20B and Pythia (arXiv 2204.06745, 2304.01373).

Attention and MLP read the same stream side by side, norms have biases, a quarter of each head is
turned, and one matrix gives query, key and value of one head after another. Published files carry
causal masks as tensors, which are left out.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import DecoderConfig, LayerNames
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families.config_json import (
    read_activation,
    read_decoder,
    write_activation,
)
from qlora_jax.models.families.tensor_names import decoder_weights
from qlora_jax.models.family import Family, Slot, number, read_rope, write_rope

NAMES = LayerNames(
    attention="attention",
    qkv="query_key_value",
    o="dense",
    up="dense_h_to_4h",
    down="dense_4h_to_h",
)


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A GPT-NeoX's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a GPT-NeoX has not.
    """
    bias = bool(config.get("attention_bias", True))
    base, share = config.get("rotary_emb_base", 10000.0), config.get("rotary_pct", 0.25)
    # Fields of other families, which transformers 4 saved besides and neither version reads.
    others = {"rope_theta": None, "partial_rotary_factor": None}
    return read_decoder(
        config,
        norm="layer",
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        residual="parallel" if config.get("use_parallel_residual", True) else "pre",
        hidden_act=read_activation(
            config, "hidden_act", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu"
        ),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=True,
        fused_qkv="heads",
        rope=read_rope({**config, **others}, theta=base, partial=share),
        names=NAMES,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    assert config.rope is not None
    rope = write_rope(config.rope)
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "hidden_act": write_activation(config.hidden_act),
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_parallel_residual": config.residual == "parallel",
        "attention_bias": config.qkv_bias,
        "rotary_emb_base": config.rope.rope_theta,
        "rotary_pct": config.rope.partial_rotary_factor,
        "rope_scaling": rope["rope_scaling"],
    }


def weight_names(config: DecoderConfig) -> dict[str, Slot]:
    """Every tensor of a GPT-NeoX checkpoint, by its name there."""
    return decoder_weights(
        config,
        root="gpt_neox",
        embedding="embed_in",
        norm="final_layer_norm",
        head="embed_out",
    )


GPT_NEOX = Family(
    "gpt_neox",
    read_config,
    write_config,
    weight_names,
    build=Decoder,
    ignored=(
        "*.attention.bias",
        "*.attention.masked_bias",
        "*.rotary_emb.inv_freq",
        "embed_out.weight",
    ),
    root="gpt_neox",
    output="embed_out",
)
