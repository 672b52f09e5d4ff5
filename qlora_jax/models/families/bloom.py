"""BLOOM 560M to 176B and BLOOMZ (arXiv 2211.05100, 2211.01786): ALiBi, a norm over the embedding.

As in GPT-NeoX one matrix gives query, key and value of one head after another, and norms have
biases. The published files name their tensors as a model without a head does (`h.0.…`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families import gpt_neox
from qlora_jax.models.families.config_json import read_decoder, refuse
from qlora_jax.models.families.tensor_names import decoder_weights
from qlora_jax.models.family import Family, Slot, number, required

NAMES = replace(gpt_neox.NAMES, attention="self_attention")


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A BLOOM's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a BLOOM has not.
    """
    refuse(config, apply_residual_connection_post_layernorm=False)
    hidden = config.get("n_embed") or required(config, "hidden_size")
    shape = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": config.get("num_hidden_layers") or config.get("n_layer"),
        "num_attention_heads": config.get("num_attention_heads") or config.get("n_head"),
        "max_position_embeddings": config.get("seq_length"),
    }
    return read_decoder(
        # Fields of other families, which a BLOOM of transformers has not.
        {**config, "num_key_value_heads": None, "head_dim": None, **shape},
        tied=True,
        norm="layer",
        norm_eps=number(config, "layer_norm_epsilon", 1e-5),
        hidden_act="gelu_tanh",
        gated_mlp=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        fused_qkv="heads",
        rope=None,
        alibi=True,
        embedding_norm=True,
        names=NAMES,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "seq_length": config.max_position_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def weight_names(config: DecoderConfig) -> dict[str, Slot]:
    """Every tensor of a BLOOM checkpoint, by its name there."""
    return decoder_weights(
        config, root="transformer", embedding="word_embeddings", layers="h", norm="ln_f"
    )


BLOOM = Family("bloom", read_config, write_config, weight_names, build=Decoder, root="transformer")
