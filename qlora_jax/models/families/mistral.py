"""Mistral 7B and its kin (arXiv 2310.06825): Llama's format, every layer with a sliding window.

A file with `layer_types` may let some layers see everything, as Ministral's does, whose own
`model_type` stands for nothing else.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families.config_json import (
    read_activation,
    read_decoder,
    read_layer_types,
    refuse,
    write_decoder,
)
from qlora_jax.models.families.tensor_names import decoder_weights
from qlora_jax.models.family import Family, required

_ARCHITECTURES = {"mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM"}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Mistral's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Mistral has not.
    """
    refuse(config, attention_bias=False, mlp_bias=False)
    usual = ("sliding_attention",) * required(config, "num_hidden_layers")
    return read_decoder(
        config,
        context=131072,
        hidden_act=read_activation(config, "hidden_act", "silu"),
        # transformers' default for a file that does not say is 4096, and null is no window.
        **read_layer_types(config, config.get("sliding_window", 4096), usual),
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    fields = write_decoder(config, _ARCHITECTURES[config.model_type])
    fields["sliding_window"] = config.sliding_window
    return fields | ({"layer_types": list(config.layer_types)} if config.layer_types else {})


MISTRAL = Family("mistral", read_config, write_config, decoder_weights, build=Decoder)
MINISTRAL = Family("ministral", read_config, write_config, decoder_weights, build=Decoder)
