"""Phi-3, Phi-3.5 (dense) and Phi-4 (arXiv 2404.14219, 2412.08905): Llama's layers, linears fused.

One matrix gives queries, keys and values, another gate and up; they stay fused, since blocks of
4-bit codes and published adapters cover them whole. Long contexts come by longrope; Phi-4-mini
turns a part of each head only.
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
from qlora_jax.models.family import Family, read_rope


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Phi-3's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Phi-3 has not.
    """
    refuse(config, attention_bias=False)
    # What transformers measures a longrope from, where the file does not say.
    config = {"original_max_position_embeddings": 4096} | dict(config)
    return read_decoder(
        config,
        context=4096,
        eps=1e-5,
        hidden_act=read_activation(config, "hidden_act", "silu"),
        fused_qkv="blocks",
        fused_gate_up=True,
        rope=read_rope(config, partial=1.0),
        sliding_window=config.get("sliding_window"),
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    return {
        # transformers wants one that fits the factors even where there are none.
        "original_max_position_embeddings": config.max_position_embeddings,
        **write_decoder(config, "Phi3ForCausalLM"),
        "sliding_window": config.sliding_window,
        # Else transformers takes 32000, which a smaller vocabulary does not have.
        "pad_token_id": None,
    }


PHI3 = Family("phi3", read_config, write_config, decoder_weights, build=Decoder)
