"""Qwen 2 and 2.5 (arXiv 2407.10671, 2412.15115) and Qwen 3 (2505.09388): Llama's format.

Qwen 2 has biases on queries, keys and values; Qwen 3 has none, but normalises every query and key
head. Either may let its last layers slide, `max_window_layers` and `use_sliding_window`. Some of
Qwen 3 (30B-A3B, 235B-A22B) have 128 narrow experts in every layer, eight of them a token; of these
all layers slide or none.
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


def _read(config: Mapping[str, Any], **fields: Any) -> DecoderConfig:
    depth = required(config, "num_hidden_layers")
    before = config.get("max_window_layers")
    full = min(28 if before is None else before, depth)
    usual = ("full_attention",) * full + ("sliding_attention",) * (depth - full)
    return _read_all(config, **read_layer_types(config, _window(config), usual), **fields)


def _read_all(config: Mapping[str, Any], **fields: Any) -> DecoderConfig:
    activation = read_activation(config, "hidden_act", "silu")
    return read_decoder(config, context=32768, hidden_act=activation, **fields)


def _window(config: Mapping[str, Any]) -> int | None:
    return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None


def _write(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    sliding = config.sliding_layers
    types = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    return write_decoder(config, architecture) | {
        "use_sliding_window": any(sliding),
        "sliding_window": config.sliding_window,
        "max_window_layers": (*sliding, True).index(True),
        "layer_types": types,
    }


def read_qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    """A Qwen 2's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Qwen 2 has not.
    """
    return _read(config, qkv_bias=True)


def write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_qwen2` reads back."""
    return _write(config, "Qwen2ForCausalLM")


def read_qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    """A Qwen 3's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Qwen 3 has not.
    """
    bias = bool(config.get("attention_bias", False))
    return _read({"head_dim": 128} | dict(config), qk_norm="head", qkv_bias=bias, o_bias=bias)


def write_qwen3(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_qwen3` reads back."""
    return _write(config, "Qwen3ForCausalLM") | {"attention_bias": config.qkv_bias}


def read_qwen3_moe(config: Mapping[str, Any]) -> DecoderConfig:
    """A Qwen 3's config.json with experts as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what such a Qwen 3 has not.
    """
    # Dense layers among those with experts.
    refuse(config, decoder_sparse_step=1, mlp_only_layers=[])
    experts = config.get("num_experts", config.get("num_local_experts", 128))
    if not experts:
        raise ValueError(
            f"config.json has num_experts {experts}, but a 'qwen3_moe' has some: of a dense Qwen 3 "
            "the model_type is 'qwen3'."
        )
    bias = bool(config.get("attention_bias", False))
    return _read_all(
        config,
        sliding_window=_window(config),
        intermediate_size=config.get("moe_intermediate_size") or 768,
        qk_norm="head",
        qkv_bias=bias,
        o_bias=bias,
        num_local_experts=experts,
        num_experts_per_tok=config.get("num_experts_per_tok") or 8,
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
    )


def write_qwen3_moe(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_qwen3_moe` reads back."""
    return write_decoder(config, "Qwen3MoeForCausalLM") | {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "attention_bias": config.qkv_bias,
        "moe_intermediate_size": config.intermediate_size,
        "num_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


QWEN2 = Family("qwen2", read_qwen2, write_qwen2, decoder_weights, build=Decoder)
QWEN3 = Family("qwen3", read_qwen3, write_qwen3, decoder_weights, build=Decoder)
QWEN3_MOE = Family(
    "qwen3_moe",
    read_qwen3_moe,
    write_qwen3_moe,
    decoder_weights,
    build=Decoder,
    linears=("*.mlp.gate",),
)
