"""GGUF's architectures: how their hyperparameters and tensors are called on either side.

A GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) says `general.architecture`,
keeps hyperparameters under that name (`llama.block_count`) and tensors under short names
(`blk.0.attn_q.weight`). The short names come from the `gguf` library's own tensor map. Where ggml
computes with other numbers than Hugging Face's model, the difference is a field here:

- `permuted`: the rows of q and k, head by head. ggml's rope for these architectures turns
  neighbouring rows, Hugging Face's turns row i and i + dim/2.
- `norm_offset`: what is added to the norms' weights. Gemma multiplies by 1 + w, ggml by w.

What llama.cpp computes without a key for it (Gemma's score scale, its pattern of windows) is
compared with the config before anything is written, so that no file means something else there.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qlora_jax.checkpoints.gguf.rope import WINDOW_BASE

SLIDING_WINDOW = "attention.sliding_window"
"""The key of a window, after the architecture's name."""
_EPS = "attention.layer_norm_epsilon"
_RMS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
_FACTORS = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_GELU = "gelu_pytorch_tanh"
# What a file cannot say otherwise.
_UNBIASED = {"attention_bias": False}
_OWN_HEAD, _ONE_MATRIX = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}
_QUERY_BIAS, _DOWN_BIAS = "blk.0.attn_q.bias", "blk.0.ffn_down.bias"


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp's, beside one `model_type` of Hugging Face's.

    Attributes:
        name: GGUF's.
        model_type: config.json's.
        class_name: of Hugging Face's model.
        permuted: rows of q and k are interleaved (see the module's prologue).
        norm_offset: added to the weights of norms.
        activation: what config.json says of the MLP.
        fields: what it has beside the fields of all, config.json's name → the key after its own.
        biases: the flags of config.json that a file has no key for → the tensor that tells.
        fixed: fields of config.json that llama.cpp takes to be so always: it refuses a file with
            biases that it does not know, or without a head that it wants.
        llama3: it reads the factors of Llama 3's rope scaling.
        check: raises ValueError where llama.cpp would compute something else.
        extra: what else config.json needs when it is made from a GGUF file.
    """

    name: str
    model_type: str
    class_name: str
    permuted: bool = False
    norm_offset: float = 0.0
    activation: tuple[str, str] = ("hidden_act", "silu")
    fields: Mapping[str, str] = field(default_factory=lambda: _RMS)
    biases: Mapping[str, str] = field(
        default_factory=lambda: {"attention_bias": _QUERY_BIAS, "mlp_bias": _DOWN_BIAS}
    )
    fixed: Mapping[str, Any] = field(default_factory=dict)
    llama3: bool = False
    check: Callable[[Mapping[str, Any]], None] = lambda config: None
    extra: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of a head."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _windows(config: Mapping[str, Any], every: int) -> list[str]:
    """llama.cpp's pattern: every so many layers one that sees everything."""
    return [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
        for layer in range(config["num_hidden_layers"])
    ]


def _gemma_scalar(config: Mapping[str, Any], largest: int) -> int:
    """llama.cpp's `query_pre_attn_scalar`: the head's width, but for the model of 27B weights,
    which it knows by its depth."""
    if config["num_hidden_layers"] == largest:
        return config["hidden_size"] // config["num_attention_heads"]
    return head_dim(config)


def _check_gemma(every: int, largest: int) -> Callable[[Mapping[str, Any]], None]:
    def check(config: Mapping[str, Any]) -> None:
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        if config["model_type"] == "gemma2" and None in map(config.get, caps):
            raise ValueError(
                f"{' and '.join(caps)} are {[config.get(cap) for cap in caps]}, but llama.cpp caps "
                "a Gemma 2's scores and logits always: export to safetensors."
            )
        known = _gemma_scalar(config, largest)
        scale = config.get("query_pre_attn_scalar", known)
        if scale != known:
            raise ValueError(
                f"query_pre_attn_scalar is {scale}, but llama.cpp takes {known} for a model of "
                "this shape, and a GGUF file cannot say otherwise: export to safetensors."
            )
        _check_windows(config, every)

    return check


def _check_windows(config: Mapping[str, Any], every: int) -> None:
    layers = config.get("layer_types")
    if layers is not None and list(layers) != _windows(config, every):
        raise ValueError(
            f"layer_types is {list(layers)}, but llama.cpp has full attention in the last of "
            f"every {every} layers, and a GGUF file cannot say otherwise: export to safetensors."
        )


# Every so many layers one that sees everything; the layers of the model of 27B weights.
_GEMMA2, _GEMMA3 = (2, 46), (6, 62)


def _gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    every, largest = _GEMMA2
    return {
        "query_pre_attn_scalar": _gemma_scalar(config, largest),
        "layer_types": _windows(config, every),
    }


def _gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    every, largest = _GEMMA3
    return {
        "query_pre_attn_scalar": _gemma_scalar(config, largest),
        "layer_types": _windows(config, every),
        "rope_local_base_freq": WINDOW_BASE,
    }


# Every so many layers one that sees everything, or that does not turn.
_OLMO3, _SMOLLM3 = 4, 4


def _check_olmo3(config: Mapping[str, Any]) -> None:
    _check_windows(config, _OLMO3)
    local = config["rope_parameters"]["sliding_attention"]["rope_theta"]
    if local != config["rope_theta"]:
        raise ValueError(
            f"The windows' rope_theta is {local:g}, but llama.cpp turns all layers by "
            f"{config['rope_theta']:g}, the others': export to safetensors."
        )


def _olmo3(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"layer_types": _windows(config, _OLMO3)}


def _check_smollm3(config: Mapping[str, Any]) -> None:
    known = [int((layer + 1) % _SMOLLM3 != 0) for layer in range(config["num_hidden_layers"])]
    if config["no_rope_layers"] != known:
        raise ValueError(
            f"no_rope_layers is {config['no_rope_layers']}, but llama.cpp turns all layers but the "
            f"last of every {_SMOLLM3}, and a GGUF file cannot say otherwise: export to "
            "safetensors."
        )


def _stablelm(config: Mapping[str, Any]) -> dict[str, Any]:
    # Of a file whose heads are turned whole, this is not there yet.
    return {"partial_rotary_factor": config.get("partial_rotary_factor", 1.0)}


ARCHITECTURES = (
    Architecture("llama", "llama", "LlamaForCausalLM", permuted=True, llama3=True),
    Architecture("llama", "mistral", "MistralForCausalLM", permuted=True, llama3=True),
    # Whose queries, keys and values have biases always.
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM", biases={}),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM", fixed=_UNBIASED),
    Architecture("phi3", "phi3", "Phi3ForCausalLM"),
    Architecture(
        "granite",
        "granite",
        "GraniteForCausalLM",
        permuted=True,
        llama3=True,
        fields=_RMS | _FACTORS,
    ),
    Architecture(
        "smollm3",
        "smollm3",
        "SmolLM3ForCausalLM",
        permuted=True,
        fixed=_UNBIASED | {"mlp_bias": False, "use_sliding_window": False},
        check=_check_smollm3,
    ),
    Architecture("olmo2", "olmo2", "Olmo2ForCausalLM", fixed=_UNBIASED | _OWN_HEAD),
    Architecture(
        "olmo2",
        "olmo3",
        "Olmo3ForCausalLM",
        fixed=_UNBIASED | _OWN_HEAD,
        check=_check_olmo3,
        extra=_olmo3,
    ),
    Architecture(
        "starcoder2",
        "starcoder2",
        "Starcoder2ForCausalLM",
        activation=("hidden_act", _GELU),
        fields={"norm_epsilon": _EPS},
        biases={},
        fixed={"use_bias": True, "hidden_act": _GELU},
    ),
    Architecture(
        "stablelm",
        "stablelm",
        "StableLmForCausalLM",
        fields={"layer_norm_eps": _EPS},
        biases={"use_qkv_bias": _QUERY_BIAS},
        fixed=_OWN_HEAD,
        extra=_stablelm,
    ),
    Architecture(
        "gemma",
        "gemma",
        "GemmaForCausalLM",
        norm_offset=1.0,
        activation=("hidden_act", _GELU),
        fixed=_UNBIASED | _ONE_MATRIX,
    ),
    Architecture(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        norm_offset=1.0,
        activation=("hidden_activation", _GELU),
        fixed=_UNBIASED | _ONE_MATRIX,
        check=_check_gemma(*_GEMMA2),
        extra=_gemma2,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        norm_offset=1.0,
        activation=("hidden_activation", _GELU),
        fixed=_UNBIASED,
        check=_check_gemma(*_GEMMA3),
        extra=_gemma3,
    ),
)


def by_model_type(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a config.json is written as.

    Raises:
        ValueError: none.
    """
    for architecture in ARCHITECTURES:
        if architecture.model_type == config.get("model_type"):
            return architecture
    raise ValueError(
        f"model_type is {config.get('model_type')!r}, but GGUF files are written for "
        f"{', '.join(a.model_type for a in ARCHITECTURES)}: export to safetensors."
    )


def by_metadata(metadata: Mapping[str, Any]) -> Architecture:
    """The architecture that a GGUF file is read as.

    Raises:
        ValueError: one that is not read.
    """
    name = metadata.get("general.architecture")
    matching = [a for a in ARCHITECTURES if a.name == name]
    if not matching:
        known = dict.fromkeys(a.name for a in ARCHITECTURES)
        raise ValueError(
            f"The file's architecture is {name!r}, but of GGUF files {', '.join(known)} are read: "
            "take the checkpoint in safetensors."
        )
    # Mistral is written as a llama, and an OLMo 3 as an OLMo 2; only their windows tell.
    return matching[-1] if f"{name}.{SLIDING_WINDOW}" in metadata else matching[0]


def swap_rows(weight: np.ndarray, heads: int, *, to_gguf: bool) -> np.ndarray:
    """Rows of q or k [heads · dim, ...] (or its bias) in the order of the other side."""
    shape = weight.shape
    halves = (2, shape[0] // heads // 2) if to_gguf else (shape[0] // heads // 2, 2)
    return weight.reshape(heads, *halves, *shape[1:]).swapaxes(1, 2).reshape(shape)
