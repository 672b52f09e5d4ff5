"""Of what kind the fields of a config.json are, for all families: one name means one thing in all.

Checked once, before a family reads them, so that a family's code may take a field for what it is.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qlora_jax.data.json_kinds import (
    IDS,
    check_kinds,
    is_flag,
    is_id,
    is_object,
    is_real,
    is_text,
    is_whole,
    listed,
)

# What is needed, the test of it, and the fields.
_KINDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "a positive whole number",
        lambda value: is_whole(value) and value > 0,
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads head_dim "
        "max_position_embeddings original_max_position_embeddings type_vocab_size num_labels "
        "d_model d_kv d_ff num_layers num_heads relative_attention_num_buckets "
        "relative_attention_max_distance ffn_dim word_embed_proj_dim sliding_window_pattern "
        "n_embed n_layer n_head seq_length moe_intermediate_size no_rope_layer_interval",
    ),
    (
        "a whole number, 0 or more",
        lambda value: is_whole(value) and value >= 0,
        "num_key_value_heads num_decoder_layers num_local_experts num_experts num_experts_per_tok "
        "max_window_layers sliding_window",
    ),
    ("a token id", is_id, "pad_token_id decoder_start_token_id"),
    (*IDS, "bos_token_id eos_token_id"),
    (
        "a positive number",
        lambda value: is_real(value) and value > 0,
        "query_pre_attn_scalar rotary_emb_base logits_scaling",
    ),
    (
        "a number",
        is_real,
        "rms_norm_eps layer_norm_eps layer_norm_epsilon rope_theta rope_local_base_freq "
        "partial_rotary_factor rotary_pct attn_logit_softcapping final_logit_softcapping "
        "dropout_rate hidden_dropout_prob attention_probs_dropout_prob classifier_dropout factor "
        "low_freq_factor high_freq_factor beta_fast beta_slow attention_factor mscale "
        "mscale_all_dim norm_epsilon embedding_multiplier attention_multiplier "
        "residual_multiplier",
    ),
    (
        "true or false",
        is_flag,
        "tie_word_embeddings attention_bias mlp_bias use_sliding_window use_parallel_residual "
        "do_layer_norm_before enable_bias layer_norm_elementwise_affine _remove_final_layer_norm "
        "scale_decoder_outputs truncate apply_residual_connection_post_layernorm "
        "norm_topk_prob use_bias use_qkv_bias qk_layernorm",
    ),
    (
        "a text",
        is_text,
        "hidden_act hidden_activation activation_function feed_forward_proj rope_type type "
        "position_embedding_type",
    ),
    ("a list of texts", listed(is_text), "layer_types"),
    ("a list of numbers", listed(is_real), "short_factor long_factor"),
    ("a list of whole numbers", listed(is_whole), "no_rope_layers"),
    (
        "an object",
        is_object,
        "text_config rope_parameters rope_scaling full_attention sliding_attention",
    ),
    (
        "an object of class numbers and names",
        lambda value: is_object(value) and all(k.isdecimal() and is_text(value[k]) for k in value),
        "id2label",
    ),
)
_BY_NAME = {name: (wanted, test) for wanted, test, names in _KINDS for name in names.split()}


def check_config(config: Mapping[str, Any]) -> None:
    """Checks the fields that families read, also those of the objects inside.

    Raises:
        ValueError: one is of another kind.
    """
    check_kinds(config, _BY_NAME, "config.json")
    for name in _BY_NAME.keys() & config.keys():
        if isinstance(config[name], dict):
            check_config(config[name])
