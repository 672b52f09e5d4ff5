"""Mistral 7B and its kin (arXiv 2310.06825): Llama's format, every layer with a sliding window."""

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
from qlora_jax.models.family import Family


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Mistral's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Mistral has not.
    """
    refuse(config, attention_bias=False, mlp_bias=False)
    return read_decoder(
        config,
        context=131072,
        hidden_act=read_activation(config, "hidden_act", "silu"),
        # transformers' default for a file that does not say is 4096, and null is no window.
        sliding_window=config.get("sliding_window", 4096),
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    return write_decoder(config, "MistralForCausalLM") | {"sliding_window": config.sliding_window}


MISTRAL = Family("mistral", read_config, write_config, decoder_weights, build=Decoder)
