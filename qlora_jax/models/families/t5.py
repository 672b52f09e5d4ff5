"""T5 v1.0, v1.1, LM-adapted and Flan-T5: one format, `model_type` "t5".

Whether the head is scaled and whether it is tied was one field of config.json for transformers 4
(`tie_word_embeddings`); transformers 5 writes `scale_decoder_outputs` for the first and decides the
second by what the checkpoint holds, which `for_weights` does here.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from qlora_jax.models.encoder_config import EncoderDecoderConfig
from qlora_jax.models.encoder_decoder import EncoderDecoder
from qlora_jax.models.families.config_json import refuse
from qlora_jax.models.family import Family, Slot, number, required
from qlora_jax.nn import LoraConfig

_HEAD = "lm_head.weight"


def read_config(config: Mapping[str, Any]) -> EncoderDecoderConfig:
    """A T5's config.json as an `EncoderDecoderConfig`.

    Raises:
        ValueError: a field is missing, or none that a T5 can have.
    """
    forward = config.get("feed_forward_proj") or "relu"
    # transformers writes what follows from it besides, and believes that.
    activation = "gelu_new" if forward == "gated-gelu" else forward.removeprefix("gated-")
    gated = forward.startswith("gated-")
    refuse(config, is_causal=True, dense_act_fn=activation, is_gated_act=gated)
    depth = required(config, "num_layers")
    tied = bool(config.get("tie_word_embeddings", True))
    pad = config.get("pad_token_id")
    start = config.get("decoder_start_token_id")
    return EncoderDecoderConfig(
        vocab_size=required(config, "vocab_size"),
        d_model=required(config, "d_model"),
        d_kv=required(config, "d_kv"),
        d_ff=required(config, "d_ff"),
        num_layers=depth,
        num_decoder_layers=config.get("num_decoder_layers") or depth,
        num_heads=required(config, "num_heads"),
        relative_attention_num_buckets=config.get("relative_attention_num_buckets") or 32,
        relative_attention_max_distance=config.get("relative_attention_max_distance") or 128,
        layer_norm_epsilon=number(config, "layer_norm_epsilon", 1e-6),
        dropout_rate=number(config, "dropout_rate", 0.1),
        feed_forward_proj=forward,
        tie_word_embeddings=tied,
        scale_decoder_outputs=bool(config.get("scale_decoder_outputs", tied)),
        pad_token_id=0 if pad is None else pad,
        eos_token_id=config.get("eos_token_id", 1),
        decoder_start_token_id=start if start is not None else 0 if pad is None else pad,
    )


def for_weights(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """The config with a head of its own exactly where the checkpoint has one; a scaled head that is
    tied is the embedding, of which older files hold a copy."""
    scaled = config.scale_decoder_outputs and config.tie_word_embeddings
    tied = scaled or _HEAD not in names
    return dataclasses.replace(config, tie_word_embeddings=tied)


def write_config(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.d_model,
        "d_kv": config.d_kv,
        "d_ff": config.d_ff,
        "num_layers": config.num_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.relative_attention_num_buckets,
        "relative_attention_max_distance": config.relative_attention_max_distance,
        "layer_norm_epsilon": config.layer_norm_epsilon,
        "dropout_rate": config.dropout_rate,
        "feed_forward_proj": config.feed_forward_proj,
        "tie_word_embeddings": config.tie_word_embeddings,
        "scale_decoder_outputs": config.scale_decoder_outputs,
        "pad_token_id": config.pad_token_id,
        "eos_token_id": config.eos_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
    }


def weight_names(config: EncoderDecoderConfig) -> dict[str, Slot]:
    """Every tensor of a T5 checkpoint, by its name there."""
    names = {"shared.weight": Slot(("shared", "weight"), None)}
    if not config.tie_word_embeddings:
        names[_HEAD] = Slot(("lm_head", "weight"), None)
    inner = ("wi_0", "wi_1") if config.feed_forward_proj.startswith("gated-") else ("wi",)
    projections = ("q", "k", "v", "o")
    encoder = (("SelfAttention", projections), ("DenseReluDense", (*inner, "wo")))
    decoder = (encoder[0], ("EncDecAttention", projections), encoder[1])
    for side, depth, blocks in (
        ("encoder", config.num_layers, encoder),
        ("decoder", config.num_decoder_layers, decoder),
    ):
        table = "relative_attention_bias"
        names[f"{side}.block.0.layer.0.SelfAttention.{table}.weight"] = Slot(
            (side, "bias", table, "weight"), None
        )
        names[f"{side}.final_layer_norm.weight"] = Slot((side, "final_layer_norm", "weight"), None)
        for layer in range(depth):
            for index, (block, linears) in enumerate(blocks):
                prefix = f"{side}.block.{layer}.layer.{index}"
                norm = (side, "layers", f"layer_norm_{index}", "weight")
                names[f"{prefix}.layer_norm.weight"] = Slot(norm, layer)
                for linear in linears:
                    path = (side, "layers", block, linear, "kernel")
                    names[f"{prefix}.{block}.{linear}.weight"] = Slot(path, layer)
    return names


def t5_lora(config: EncoderDecoderConfig) -> LoraConfig:
    """The adapters that the QLoRA paper gives a T5 (arXiv 2305.14314, appendix B): alpha 64, rank
    16 from small to large (80M to 780M weights) and 64 for xl and xxl (3B, 11B)."""
    attention = 4 * config.d_model * config.num_heads * config.d_kv
    matrices = 3 if config.feed_forward_proj.startswith("gated-") else 2
    forward = matrices * config.d_model * config.d_ff
    encoder = config.num_layers * (attention + forward)
    weights = encoder + config.num_decoder_layers * (2 * attention + forward)
    return LoraConfig(r=16 if weights < 1_500_000_000 else 64, alpha=64)


T5 = Family(
    "t5",
    read_config,
    write_config,
    weight_names,
    EncoderDecoder,
    ignored=(
        # Copies of the embedding, and a table that T5's first release saved but never used.
        _HEAD,
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
    ),
    for_weights=for_weights,
    root="",
    # transformers' `_keep_in_fp32_modules`.
    kept_dense=("*.DenseReluDense.wo",),
)
