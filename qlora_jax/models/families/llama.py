"""Llama 1 to 3.x and everything published in its format (SmolLM, TinyLlama, Vicuna, ...)."""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families.config_json import read_activation, read_decoder, write_decoder
from qlora_jax.models.families.tensor_names import decoder_weights
from qlora_jax.models.family import Family, Slot


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Llama's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Llama has not.
    """
    bias = bool(config.get("attention_bias", False))
    return read_decoder(
        config,
        hidden_act=read_activation(config, "hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
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
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return write_decoder(config, "LlamaForCausalLM") | biases


def weight_names(config: DecoderConfig) -> dict[str, Slot]:
    """Every tensor of a Llama checkpoint, by its name there."""
    return decoder_weights(config)


LLAMA = Family("llama", read_config, write_config, weight_names, build=Decoder)
