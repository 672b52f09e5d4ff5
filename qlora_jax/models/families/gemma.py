"""Gemma (arXiv 2403.08295), Gemma 2 (2408.00118) and Gemma 3 (2503.19786), text.

All keep the norms' weights around 0 and scale the embedding by √hidden_size; else the first has
Llama's layers. The others normalise before and after each half of a layer and let some layers see a
window only. Gemma 2 caps scores and logits and alternates the layers; Gemma 3 normalises queries
and keys, slides in five layers of six, and turns those by a base of their own.

`gemma3` is the format of the models that also see (4B and up): their text part is read, what
belongs to the eye is left out, and what is saved is a `gemma3_text`.
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
    write_activation,
    write_decoder,
)
from qlora_jax.models.families.tensor_names import decoder_weights
from qlora_jax.models.family import Family, Slot, number, read_rope, required

_TANH = "gelu_pytorch_tanh"
# transformers' values of fields that published files leave out.
_GEMMA2 = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}


def _read(config: Mapping[str, Any], period: int, **fields: Any) -> DecoderConfig:
    """What the later two have; every `period`-th layer sees everything."""
    depth = required(config, "num_hidden_layers")
    usual = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(depth)]
    cap, final_cap = (
        None if config.get(name) is None else number(config, name, 0.0)
        for name in ("attn_logit_softcapping", "final_logit_softcapping")
    )
    return _read_all(
        config,
        residual="sandwich",
        hidden_act=read_activation(config, "hidden_activation", _TANH),
        attention_scale=required(config, "query_pre_attn_scalar") ** -0.5,
        attn_logit_softcapping=cap,
        final_logit_softcapping=final_cap,
        **read_layer_types(config, config["sliding_window"], usual),
        **fields,
    )


def _read_all(config: Mapping[str, Any], **fields: Any) -> DecoderConfig:
    """What all three have."""
    refuse(config, use_bidirectional_attention=False)
    bias = bool(config.get("attention_bias", False))
    return read_decoder(
        config,
        tied=True,
        norm_offset=1.0,
        qkv_bias=bias,
        o_bias=bias,
        embedding_scale=required(config, "hidden_size") ** 0.5,
        **fields,
    )


def _write(config: DecoderConfig, architecture: str) -> dict[str, Any]:
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    sliding = config.sliding_layers
    fields = {
        "hidden_activation": write_activation(config.hidden_act),
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        # transformers wants one even where no layer slides.
        "sliding_window": config.sliding_window or _GEMMA2["sliding_window"],
        "layer_types": ["sliding_attention" if on else "full_attention" for on in sliding],
    }
    return write_decoder(config, architecture) | fields


def read_gemma(config: Mapping[str, Any]) -> DecoderConfig:
    """A first Gemma's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Gemma has not.
    """
    # Published files say "gelu", of which transformers makes what the weights were trained with.
    for key in ("hidden_act", "hidden_activation"):
        read_activation(config, key, _TANH, "gelu")
    usual = {"head_dim": 256, "max_position_embeddings": 8192}
    return _read_all(usual | dict(config), hidden_act="gelu_tanh")


def write_gemma(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_gemma` reads back."""
    return write_decoder(config, "GemmaForCausalLM") | {
        "hidden_activation": write_activation(config.hidden_act),
        "attention_bias": config.qkv_bias,
    }


def read_gemma2(config: Mapping[str, Any]) -> DecoderConfig:
    """A Gemma 2's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Gemma 2 has not.
    """
    return _read(_GEMMA2 | dict(config), 2)


def write_gemma2(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_gemma2` reads back."""
    return _write(config, "Gemma2ForCausalLM")


def read_gemma3(config: Mapping[str, Any]) -> DecoderConfig:
    """A Gemma 3's config.json, or the text part of one that also sees, as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a Gemma 3 has not.
    """
    text = config.get("text_config") or config
    given: dict[str, Any] = {**_GEMMA3, **text, "model_type": "gemma3_text"}
    if text is not config:
        # Of a model that sees, the whole has the word, not its text part.
        given["tie_word_embeddings"] = config.get("tie_word_embeddings", True)
        given["final_logit_softcapping"] = None
    # transformers has the field and computes without it, and without the other where it sees.
    given["attn_logit_softcapping"] = None
    # transformers 4 has fields of their own for the layers that slide, transformers 5 two of all.
    both = given.get("rope_parameters") or {}
    whole = {
        **given,
        "rope_parameters": both.get("full_attention"),
        # transformers reads it inside of the rope's own fields alone.
        "original_max_position_embeddings": None,
    }
    local = {
        "max_position_embeddings": given["max_position_embeddings"],
        "rope_parameters": both.get("sliding_attention"),
        "rope_theta": given.get("rope_local_base_freq"),
    }
    return _read(
        given,
        required(given, "sliding_window_pattern"),
        qk_norm="head",
        rope=read_rope(whole, theta=1e6),
        local_rope=read_rope(local),
        sees=text is not config,
    )


def write_gemma3(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_gemma3` reads back, of a model of text alone.

    Raises:
        ValueError: its windows have a scaled rope, for which the file has no place.
    """
    local = config.local_rope
    if local is not None and local.rope_type != "default":
        raise ValueError(
            f"local_rope has rope_type {local.rope_type!r}, but a Gemma 3's config.json names its "
            "base alone: make it 'default'."
        )
    sliding = config.sliding_layers
    fields = _write(config, "Gemma3ForCausalLM") | {
        "rope_local_base_freq": None if local is None else local.rope_theta,
    }
    if config.rope is not None and config.rope.rope_type == "longrope":
        # Under the names that a Gemma 3's are read by, and inside.
        scaling = fields["rope_scaling"]
        scaling["rope_type"] = scaling.pop("type")
        before = "original_max_position_embeddings"
        scaling[before] = fields.pop(before)
    # What transformers read before `layer_types`: the distance of layers that see everything.
    period = sliding.index(False) + 1 if False in sliding else len(sliding) + 1
    return fields | {"sliding_window_pattern": period}


def seeing_weights(config: DecoderConfig) -> dict[str, Slot]:
    """The tensors of a Gemma 3 that also sees, as its published checkpoints name them."""
    return decoder_weights(config, root="language_model.model", head="language_model.lm_head")


GEMMA = Family("gemma", read_gemma, write_gemma, decoder_weights, build=Decoder)
GEMMA2 = Family("gemma2", read_gemma2, write_gemma2, decoder_weights, build=Decoder)
GEMMA3 = Family(
    "gemma3",
    read_gemma3,
    write_gemma3,
    seeing_weights,
    build=Decoder,
    ignored=("vision_tower.*", "multi_modal_projector.*", "language_model.lm_head.weight"),
    root="",
    output="language_model.lm_head",
    linears=("vision_tower.*", "multi_modal_projector.*"),
)
GEMMA3_TEXT = Family("gemma3_text", read_gemma3, write_gemma3, decoder_weights, build=Decoder)
