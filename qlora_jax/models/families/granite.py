"""Granite 3 and 4, dense (arXiv 2405.04324): Llama's format with four factors.

They scale embeddings, scores, what every half of a layer adds, and logits (µP's way to keep one
learning rate for all widths, arXiv 2203.03466).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families import llama
from qlora_jax.models.families.tensor_names import decoder_weights
from qlora_jax.models.family import Family, number


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Granite's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Granite has not.
    """
    return replace(
        llama.read_config(config),
        embedding_multiplier=number(config, "embedding_multiplier", 1.0),
        attention_scale=number(config, "attention_multiplier", 1.0),
        residual_multiplier=number(config, "residual_multiplier", 1.0),
        logits_scaling=number(config, "logits_scaling", 1.0),
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back.

    Raises:
        ValueError: the decoder has what a Granite's file cannot say.
    """
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    return llama.write_config(config) | {
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": config.embedding_multiplier,
        "attention_multiplier": scale,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling,
    }


GRANITE = Family("granite", read_config, write_config, decoder_weights, build=Decoder)
