"""Tiny decoders of every family, in the variants that the shared vectors do not have."""

from typing import Any

from qlora_jax.models import FAMILIES, DecoderConfig

_BASE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_EXPERTS = {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 3}
_GEMMA = {"sliding_window": 4, "query_pre_attn_scalar": 12}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 2.0, 4.0],
}

# config.json by a name of the variant; the name before the dash is the family.
_FILES: dict[str, dict[str, Any]] = {
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "mistral-window": {"sliding_window": 5},
    "mixtral-window": {"sliding_window": 5, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2-late_window": {
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 2,
    },
    "qwen3-biased": {"attention_bias": True, "head_dim": 16},
    "qwen3_moe-normed": {**_EXPERTS, "norm_topk_prob": True, "attention_bias": True},
    "qwen3_moe-shares": {**_EXPERTS, "use_sliding_window": True, "sliding_window": 4},
    "ministral-mixed": {
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    },
    "granite-scaled": {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 7.0,
    },
    "smollm3-still": {"no_rope_layers": [1, 0, 1]},
    "smollm3-window": {
        "no_rope_layer_interval": 3,
        "use_sliding_window": True,
        "sliding_window": 4,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "olmo2-biased": {"attention_bias": True},
    "olmo3-yarn": {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "sliding_window": 4,
        "rope_theta": 3e5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 8,
        },
    },
    # As deep as an OLMo 3 that has no layer with full attention yet.
    "olmo3-windows": {"sliding_window": 4},
    "olmoe-normed": {"num_experts": 5, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "olmoe-shares": {"num_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
    "starcoder2-window": {"sliding_window": 5},
    "starcoder2-unbiased": {"use_bias": False, "tie_word_embeddings": False},
    "stablelm-biased": {"use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "gemma-first": {"hidden_act": "gelu"},
    "gemma2-plain": {**_GEMMA, "tie_word_embeddings": False},
    "gemma3_text-scaled": {
        **_GEMMA,
        "sliding_window_pattern": 2,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3_text-long": {
        **_GEMMA,
        "sliding_window_pattern": 2,
        "rope_scaling": {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.5, 2.0, 4.0, 4.5],
            "original_max_position_embeddings": 8,
        },
    },
    # As deep as a Gemma 3 that has no layer with full attention yet.
    "gemma3_text-windows": {**_GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
    "phi3-long": {
        "rope_scaling": _LONGROPE,
        "original_max_position_embeddings": 8,
        "partial_rotary_factor": 0.75,
        "sliding_window": 9,
    },
    "phi3-short": {
        "rope_scaling": _LONGROPE,
        "original_max_position_embeddings": 32,
        "partial_rotary_factor": 0.75,
    },
    "gpt_neox-serial": {
        "num_key_value_heads": None,
        "use_parallel_residual": False,
        "hidden_act": "gelu_new",
        "rotary_pct": 0.5,
        "attention_bias": False,
    },
    "gpt_neox-parallel": {"num_key_value_heads": None, "rotary_pct": 0.25},
    "opt-350m": {
        "num_key_value_heads": None,
        "ffn_dim": 48,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 16,
    },
    "bloom-even": {"num_key_value_heads": None, "seq_length": 64},
    # Slopes of a number of heads that is no power of two, and a head of its own.
    "bloom-six": {
        "num_key_value_heads": None,
        "n_embed": 48,
        "n_head": 6,
        "num_attention_heads": None,
        "tie_word_embeddings": False,
    },
    "opt-unbiased": {
        "num_key_value_heads": None,
        "ffn_dim": 48,
        "enable_bias": False,
        "activation_function": "gelu",
    },
}

VARIANTS: dict[str, DecoderConfig] = {
    name: FAMILIES[family].read_config(_BASE | {"model_type": family} | fields)
    for name, fields in _FILES.items()
    for family in (name.partition("-")[0],)
}
