"""Mixtral 8x7B and 8x22B (arXiv 2401.04088): a Mistral whose MLP is eight, two of them a token.

Experts are named as transformers 4 named them and as checkpoints still do, `w1`, `w3` (gate, up)
and `w2` (down): what `target_modules` of published adapters says. In the tree they are one MLP,
`block_sparse_moe.experts`, whose Variables have a second leading axis.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import DecoderConfig, LayerNames
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families.config_json import (
    read_activation,
    read_decoder,
    refuse,
    write_decoder,
)
from qlora_jax.models.families.tensor_names import decoder_weights
from qlora_jax.models.family import Family

NAMES = LayerNames(mlp="block_sparse_moe", gate="w1", up="w3", down="w2")


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A Mixtral's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Mixtral has not.
    """
    refuse(config, attention_bias=False, mlp_bias=False)
    return read_decoder(
        config,
        context=131072,
        eps=1e-5,
        theta=1e6,
        hidden_act=read_activation(config, "hidden_act", "silu"),
        sliding_window=config.get("sliding_window"),
        num_local_experts=config.get("num_local_experts") or config.get("num_experts") or 8,
        num_experts_per_tok=config.get("num_experts_per_tok") or 2,
        names=NAMES,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    return write_decoder(config, "MixtralForCausalLM") | {
        "sliding_window": config.sliding_window,
        "num_local_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
    }


MIXTRAL = Family(
    "mixtral",
    read_config,
    write_config,
    decoder_weights,
    build=Decoder,
    linears=("*.block_sparse_moe.gate",),
)
