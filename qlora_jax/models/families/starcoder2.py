"""StarCoder 2 (arXiv 2402.19173): grouped attention and windows as Mistral's, layers as GPT-2's.

LayerNorm, an MLP without a gate, and biases on every linear layer.
"""

from collections.abc import Mapping
from typing import Any

from qlora_jax.models.config import DecoderConfig, LayerNames
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.families.config_json import read_activation, read_decoder, write_decoder
from qlora_jax.models.families.tensor_names import decoder_weights
from qlora_jax.models.family import Family, number

NAMES = LayerNames(up="c_fc", down="c_proj")


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """A StarCoder 2's config.json as a `DecoderConfig`.

    Raises:
        ValueError: a field is missing or asks for what a StarCoder 2 has not.
    """
    bias = bool(config.get("use_bias", True))
    return read_decoder(
        config,
        context=4096,
        tied=True,
        norm="layer",
        norm_eps=number(config, "norm_epsilon", 1e-5),
        hidden_act=read_activation(config, "hidden_act", "gelu_pytorch_tanh", "gelu"),
        gated_mlp=False,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=bias,
        sliding_window=config.get("sliding_window"),
        names=NAMES,
    )


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The config.json that `read_config` reads back."""
    fields = write_decoder(config, "Starcoder2ForCausalLM")
    return fields | {
        "norm_epsilon": fields.pop("rms_norm_eps"),
        "use_bias": config.qkv_bias,
        "sliding_window": config.sliding_window,
        # Else transformers takes 50256, which a smaller vocabulary does not have.
        "bos_token_id": None,
        "eos_token_id": None,
    }


STARCODER2 = Family("starcoder2", read_config, write_config, decoder_weights, build=Decoder)
