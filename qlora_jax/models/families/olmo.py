"""OLMo 2 (arXiv 2501.00656), OLMo 3 and OLMoE (2409.02060): Llama's linear layers, other norms.

Queries and keys are normalised over all heads together. In OLMo 2 and 3 what attention and MLP give
is normalised before it is added, and nothing is before. In OLMo 3 three layers of four slide, and a
scaled rope (yarn) is that of the others alone. OLMoE has 64 experts in every layer, eight of them a
token, and norms where Llama has them.
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
from qlora_jax.models.family import Family, read_rope, required, write_rope
from qlora_jax.models.rope import RopeConfig

_THETA = 500000.0
"""transformers' base of an OLMo 3 that names none."""


def _read(config: Mapping[str, Any], **fields: Any) -> DecoderConfig:
    bias = bool(config.get("attention_bias", False))
    return read_decoder(
        config,
        eps=1e-5,
        qk_norm="all",
        hidden_act=read_activation(config, "hidden_act", "silu"),
        qkv_bias=bias,
        o_bias=bias,
        **fields,
    )


def _write(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    # Else transformers takes token 1 and 50279, which a smaller vocabulary does not have.
    special = {"pad_token_id": None, "eos_token_id": None}
    return write_decoder(config, architecture) | {"attention_bias": config.qkv_bias} | special


def read_olmo2(config: Mapping[str, Any]) -> DecoderConfig:
    """An OLMo 2's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what an OLMo 2 has not.
    """
    return _read(config, residual="after")


def write_olmo2(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_olmo2` reads back."""
    return _write(config, "Olmo2ForCausalLM")


def read_olmo3(config: Mapping[str, Any]) -> DecoderConfig:
    """An OLMo 3's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what an OLMo 3 has not.
    """
    depth = required(config, "num_hidden_layers")
    usual = ["sliding_attention" if (i + 1) % 4 else "full_attention" for i in range(depth)]
    layers = read_layer_types(config, config.get("sliding_window", 4096), usual)
    # transformers 4 has one rope, whose scaling it leaves out where a layer slides; 5 has two.
    both = config.get("rope_parameters") or {}
    longest = {"max_position_embeddings": config.get("max_position_embeddings") or 2048}
    rope = read_rope(
        {**config, **longest, "rope_parameters": both.get("full_attention")}, theta=_THETA
    )
    local = read_rope(
        {
            **longest,
            "rope_theta": config.get("rope_theta"),
            "rope_parameters": both.get("sliding_attention"),
        },
        theta=_THETA,
    )
    own = None if local == rope or layers["sliding_window"] is None else local
    return _read(config, residual="after", rope=rope, local_rope=own, **layers)


def write_olmo3(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_olmo3` reads back.

    Raises:
        ValueError: its windows have a scaled rope, for which transformers 4's file has no place.
    """
    local = config.local_rope or config.rope
    sliding = config.sliding_layers
    if any(sliding) and local is not None and local.rope_type != "default":
        raise ValueError(
            f"the rope of the windows has rope_type {local.rope_type!r}, but an OLMo 3's "
            "config.json scales the others' alone: make local_rope 'default'."
        )
    return _write(config, "Olmo3ForCausalLM") | {
        "sliding_window": config.sliding_window,
        "layer_types": ["sliding_attention" if on else "full_attention" for on in sliding],
        "rope_parameters": {
            "full_attention": _rope_parameters(config.rope),
            "sliding_attention": _rope_parameters(local),
        },
    }


def read_olmoe(config: Mapping[str, Any]) -> DecoderConfig:
    """An OLMoE's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what an OLMoE has not.
    """
    refuse(config, clip_qkv=None)
    return _read(
        config,
        num_local_experts=config.get("num_experts") or 64,
        num_experts_per_tok=config.get("num_experts_per_tok") or 8,
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
    )


def write_olmoe(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_olmoe` reads back."""
    return _write(config, "OlmoeForCausalLM") | {
        "num_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
    }


def _rope_parameters(rope: RopeConfig | None) -> dict[str, Any]:
    """transformers 5's fields of one rope, by way of transformers 4's."""
    written = write_rope(rope)
    return {"rope_type": "default", **(written.pop("rope_scaling") or {}), **written}


OLMO2 = Family("olmo2", read_olmo2, write_olmo2, decoder_weights, build=Decoder)
OLMO3 = Family("olmo3", read_olmo3, write_olmo3, decoder_weights, build=Decoder)
OLMOE = Family(
    "olmoe", read_olmoe, write_olmoe, decoder_weights, build=Decoder, linears=("*.mlp.gate",)
)
