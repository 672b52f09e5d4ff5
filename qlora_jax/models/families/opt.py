"""OPT 125M to 66B (arXiv 2205.01068): learned positions, LayerNorm, ReLU, biases everywhere.

The 350M model is different: it normalises after each half of a layer instead of before, has no norm
at the end, and an embedding half as wide as its layers.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import DecoderConfig, LayerNames
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families.config_json import (
    read_activation,
    read_decoder,
    refuse,
    write_activation,
)
from qlora_jax.models.families.tensor_names import decoder_weights
from qlora_jax.models.family import Family, Slot, required

NAMES = LayerNames(o="out_proj", up="fc1", down="fc2")


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """An OPT's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what an OPT has not.
    """
    refuse(config, layer_norm_elementwise_affine=True)
    before = bool(config.get("do_layer_norm_before", True))
    bias = bool(config.get("enable_bias", True))
    narrow = config.get("word_embed_proj_dim")
    return read_decoder(
        {**config, "intermediate_size": required(config, "ffn_dim")},
        tied=True,
        norm="layer",
        norm_eps=1e-5,
        final_norm=before and not config.get("_remove_final_layer_norm", False),
        residual="pre" if before else "post",
        hidden_act=read_activation(config, "activation_function", "relu", "gelu", "gelu_new"),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        rope=None,
        position_offset=2,
        word_embed_proj_dim=None if narrow == required(config, "hidden_size") else narrow,
        names=NAMES,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    before = config.residual == "pre"
    return {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_dim": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "word_embed_proj_dim": config.word_embed_proj_dim or config.hidden_size,
        "activation_function": write_activation(config.hidden_act),
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
        "enable_bias": config.mlp_bias,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def weight_names(config: DecoderConfig) -> dict[str, Slot]:
    """Every tensor of an OPT checkpoint, by its name there."""
    renamed = {
        "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
    }
    return decoder_weights(config, root="model.decoder", norm="final_layer_norm", renamed=renamed)


OPT = Family("opt", read_config, write_config, weight_names, build=Decoder)
