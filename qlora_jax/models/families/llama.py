"""Llama 1 to 3.x and everything published in its format (SmolLM, TinyLlama, Vicuna, ...)."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.family import Family, Slot, read_rope, required, write_rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Llama's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Llama has not.
    """
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(
            f"config.json has hidden_act {activation!r}, but a Llama's gated MLP uses 'silu': "
            "check that the file belongs to the checkpoint."
        )
    heads = required(config, "num_attention_heads")
    hidden = required(config, "hidden_size")
    bias = bool(config.get("attention_bias", False))
    return DecoderConfig(
        vocab_size=required(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=required(config, "intermediate_size"),
        num_hidden_layers=required(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        rope=read_rope(config),
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back.

    Raises:
        ValueError: the decoder has what a Llama's file cannot say.
    """
    if config.qkv_bias != config.o_bias:
        raise ValueError(
            f"qkv_bias is {config.qkv_bias} and o_bias is {config.o_bias}, but a Llama's "
            "config.json has one attention_bias for both: make them equal."
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        **write_rope(config.rope),
    }


def weight_names(config: DecoderConfig) -> dict[str, Slot]:
    """Every tensor of a Llama checkpoint, by its name there."""
    names = {
        "model.embed_tokens.weight": Slot(("embed_tokens", "weight"), None),
        "model.norm.weight": Slot(("norm", "weight"), None),
    }
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = Slot(("lm_head", "weight"), None)
    biased = {
        ("self_attn", "q_proj"): config.qkv_bias,
        ("self_attn", "k_proj"): config.qkv_bias,
        ("self_attn", "v_proj"): config.qkv_bias,
        ("self_attn", "o_proj"): config.o_bias,
        ("mlp", "gate_proj"): config.mlp_bias,
        ("mlp", "up_proj"): config.mlp_bias,
        ("mlp", "down_proj"): config.mlp_bias,
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[f"{prefix}.{norm}.weight"] = Slot(("layers", norm, "weight"), layer)
        for (block, linear), has_bias in biased.items():
            path = ("layers", block, linear)
            names[f"{prefix}.{block}.{linear}.weight"] = Slot((*path, "kernel"), layer)
            if has_bias:
                names[f"{prefix}.{block}.{linear}.bias"] = Slot((*path, "bias"), layer)
    return names


LLAMA = Family("llama", read_config, write_config, weight_names, build=Decoder)
