"""SmolLM3: Llama's format, with every fourth layer that does not turn queries and keys.

Such a layer (NoPE, arXiv 2501.18795) tells positions by causality alone; `no_rope_layers` has a 0
for it. With `use_sliding_window` it is also the one that has a window, unless `layer_types` says
otherwise.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families.config_json import (
    read_activation,
    read_decoder,
    read_layer_types,
    write_decoder,
)
from qlora_jax.models.families.tensor_names import decoder_weights
from qlora_jax.models.family import Family, required


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A SmolLM3's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a SmolLM3 has not.
    """
    depth = required(config, "num_hidden_layers")
    every = config.get("no_rope_layer_interval") or 4
    turned = config.get("no_rope_layers") or [(i + 1) % every != 0 for i in range(depth)]
    turned = tuple(bool(turns) for turns in turned[:depth])
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    usual = ["full_attention" if turns else "sliding_attention" for turns in turned]
    bias = bool(config.get("attention_bias", False))
    return read_decoder(
        config,
        context=32768,
        tied=True,
        theta=2e6,
        hidden_act=read_activation(config, "hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        rope_layers=None if all(turned) else turned,
        **read_layer_types(config, window, usual),
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    sliding = config.sliding_layers
    return write_decoder(config, "SmolLM3ForCausalLM") | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(turns) for turns in config.turned_layers],
        "use_sliding_window": any(sliding),
        "sliding_window": config.sliding_window,
        "layer_types": ["sliding_attention" if on else "full_attention" for on in sliding],
        # Else transformers takes 128004, which a smaller vocabulary does not have.
        "pad_token_id": None,
    }


SMOLLM3 = Family("smollm3", read_config, write_config, decoder_weights, build=Decoder)
