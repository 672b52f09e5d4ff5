"""StableLM 2 1.6B, Zephyr 3B and their kin (arXiv 2402.17834): Llama's linear layers, LayerNorm.

A quarter of each head is turned, and queries, keys and values may have biases.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families.config_json import (
    read_activation,
    read_decoder,
    refuse,
    write_decoder,
)
from qlora_jax.models.families.tensor_names import decoder_weights
from qlora_jax.models.family import Family, number, read_rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A StableLM's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what is not built: the 12B's norms of every head
            and its parallel halves.
    """
    refuse(config, qk_layernorm=False, use_parallel_residual=False)
    return read_decoder(
        config,
        context=4096,
        norm="layer",
        norm_eps=number(config, "layer_norm_eps", 1e-5),
        hidden_act=read_activation(config, "hidden_act", "silu"),
        qkv_bias=bool(config.get("use_qkv_bias", False)),
        rope=read_rope({"max_position_embeddings": 4096, **config}, partial=0.25),
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    assert config.rope is not None
    fields = write_decoder(config, "StableLmForCausalLM")
    return fields | {
        "layer_norm_eps": fields.pop("rms_norm_eps"),
        "use_qkv_bias": config.qkv_bias,
        "partial_rotary_factor": config.rope.partial_rotary_factor,
    }


STABLELM = Family("stablelm", read_config, write_config, decoder_weights, build=Decoder)
