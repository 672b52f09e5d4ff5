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
from dataclasses import dataclass
from typing import Any

import numpy as np

from qlora_jax.models.family import read_rope, write_rope
from qlora_jax.models.rope import RopeConfig, attention_factor, inverse_frequencies

Metadata = dict[str, Any]

# config.json → the key after the architecture's name. The order is that of llama.cpp's own files.
_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_OPTIONAL = {
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_WINDOW_BASE = 10000.0
"""`rope_theta` of Gemma 3's windows, for which llama.cpp has no key."""
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which llama.cpp's frequencies are divided: Llama 3's scaling."""


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
        check: raises ValueError where llama.cpp would compute something else.
        extra: what else config.json needs when it is made from a GGUF file.
    """

    name: str
    model_type: str
    class_name: str
    permuted: bool = False
    norm_offset: float = 0.0
    activation: tuple[str, str] = ("hidden_act", "silu")
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
        layers = config.get("layer_types")
        if layers is not None and list(layers) != _windows(config, every):
            raise ValueError(
                f"layer_types is {list(layers)}, but llama.cpp has full attention in the last of "
                f"every {every} layers, and a GGUF file cannot say otherwise: export to "
                "safetensors."
            )

    return check


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
        "rope_local_base_freq": _WINDOW_BASE,
    }


_GELU = ("hidden_activation", "gelu_pytorch_tanh")
ARCHITECTURES = (
    Architecture("llama", "llama", "LlamaForCausalLM", permuted=True),
    Architecture("llama", "mistral", "MistralForCausalLM", permuted=True),
    Architecture("qwen2", "qwen2", "Qwen2ForCausalLM"),
    Architecture("qwen3", "qwen3", "Qwen3ForCausalLM"),
    Architecture("phi3", "phi3", "Phi3ForCausalLM"),
    Architecture(
        "gemma2",
        "gemma2",
        "Gemma2ForCausalLM",
        norm_offset=1.0,
        activation=_GELU,
        check=_check_gemma(*_GEMMA2),
        extra=_gemma2,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        "Gemma3ForCausalLM",
        norm_offset=1.0,
        activation=_GELU,
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
    # Mistral is written as a llama; only its window tells.
    return matching[-1] if f"{name}.{_OPTIONAL['sliding_window']}" in metadata else matching[0]


def to_metadata(config: Mapping[str, Any]) -> tuple[Metadata, dict[str, np.ndarray]]:
    """A config.json as GGUF hyperparameters, and the tensors that carry some of them.

    Args:
        config: as the family's `write_config` gives it: whole, and in one style.

    Raises:
        ValueError: an architecture or a setting that a GGUF file cannot hold.
    """
    architecture = by_model_type(config)
    architecture.check(config)
    dim = head_dim(config)
    metadata: Metadata = {key: config[name] for name, key in _FIELDS.items()}
    metadata |= {
        key: config[name] for name, key in _OPTIONAL.items() if config.get(name) is not None
    }
    rope = _rope(config)
    metadata |= {
        "attention.key_length": dim,
        "attention.value_length": dim,
        "rope.dimension_count": rope.turned(dim),
        "rope.freq_base": rope.rope_theta,
    }
    tensors = {}
    if rope.rope_type in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": rope.factor}
    if rope.rope_type == "yarn":
        _check_yarn(rope, dim)
        metadata["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
    elif rope.rope_type == "llama3":
        tensors[ROPE_FACTORS] = _rope_factors(rope, dim)
    elif rope.rope_type not in ("default", "linear"):
        raise ValueError(
            f"rope_type is {rope.rope_type!r}, but GGUF files are written for default, linear, "
            "llama3 and yarn: export to safetensors."
        )
    return {f"{architecture.name}.{key}": value for key, value in metadata.items()}, tensors


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    """Rotary frequencies."""
    base = config.get("rope_local_base_freq")
    if base not in (None, _WINDOW_BASE):
        raise ValueError(
            f"The windows' rope_theta is {base:g}, but llama.cpp turns them by {_WINDOW_BASE:g}: "
            "export to safetensors."
        )
    # Whether its family turns a part of a head, the config's own reader has asked.
    return read_rope(config, partial=1.0)


def _check_yarn(rope: RopeConfig, dim: int) -> None:
    """llama.cpp has the paper's ramp and multiplier, and no key that all its versions read."""
    plain = RopeConfig(
        rope_theta=rope.rope_theta,
        rope_type="yarn",
        factor=rope.factor,
        original_max_position_embeddings=rope.original_max_position_embeddings,
    )
    turned = rope.turned(dim)
    same = np.array_equal(inverse_frequencies(rope, turned), inverse_frequencies(plain, turned))
    if not same or not np.isclose(attention_factor(rope), attention_factor(plain), rtol=1e-6):
        raise ValueError(
            "The rope's yarn has beta_fast, beta_slow, truncate, attention_factor or mscale of its "
            "own, but llama.cpp computes with the paper's: export to safetensors."
        )


def _rope_factors(rope: RopeConfig, dim: int) -> np.ndarray:
    plain = inverse_frequencies(RopeConfig(rope_theta=rope.rope_theta), dim)
    return plain / inverse_frequencies(rope, dim)


def to_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], factors: np.ndarray | None
) -> dict[str, Any]:
    """GGUF hyperparameters as a config.json.

    Args:
        metadata: the file's.
        tensors: its tensors' shapes: they tell about biases and a head of its own.
        factors: its `ROPE_FACTORS`, where it has them.

    Raises:
        ValueError: a key is missing, or says what is not known here.
    """
    architecture = by_metadata(metadata)
    rows = tensors.get("token_embd.weight", (0,))[0]
    own = {f"{architecture.name}.vocab_size": rows} | dict(metadata)

    def value(key: str) -> Any:
        name = f"{architecture.name}.{key}"
        if name not in own:
            raise ValueError(f"The file has no {name!r}, which its architecture needs.")
        found = own[name]
        # A float32: the shortest decimal that stands for it is what was meant.
        return float(str(np.float32(found))) if isinstance(found, float) else found

    config: dict[str, Any] = {
        "architectures": [architecture.class_name],
        "model_type": architecture.model_type,
        architecture.activation[0]: architecture.activation[1],
        **{name: value(key) for name, key in _FIELDS.items()},
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    for name, key in _OPTIONAL.items():
        if f"{architecture.name}.{key}" in metadata:
            config[name] = value(key)
    if f"{architecture.name}.attention.key_length" in metadata:
        config["head_dim"] = value("attention.key_length")
    elif f"{architecture.name}.rope.dimension_count" in metadata:
        config["head_dim"] = value("rope.dimension_count")
    if architecture.model_type != "qwen2":  # which always has them, and no such field
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in tensors
    config |= _read_rope(metadata, architecture, head_dim(config), config, factors)
    for role in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if token is not None:
            config[f"{role}_token_id"] = token
    return config | architecture.extra(config)


def _read_rope(
    metadata: Mapping[str, Any],
    architecture: Architecture,
    dim: int,
    config: Mapping[str, Any],
    factors: np.ndarray | None,
) -> dict[str, Any]:
    def value(key: str, default: Any) -> Any:
        return metadata.get(f"{architecture.name}.rope.{key}", default)

    theta = float(value("freq_base", 10000.0))
    kind = value("scaling.type", "none")
    turned = value("dimension_count", dim)
    partial = {} if turned == dim else {"partial_rotary_factor": turned / dim}
    if factors is not None:
        return _read_llama3(theta, dim, config, factors)
    if kind == "none":
        return write_rope(RopeConfig(rope_theta=theta)) | partial
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"The file scales its rope by {kind!r}, which is not read: take the checkpoint in "
            "safetensors."
        )
    original = value("scaling.original_context_length", config["max_position_embeddings"])
    rope = RopeConfig(
        rope_theta=theta,
        rope_type=kind,
        factor=float(value("scaling.factor", 1.0)),
        original_max_position_embeddings=original,
    )
    return write_rope(rope) | partial


def _read_llama3(
    theta: float, dim: int, config: Mapping[str, Any], factors: np.ndarray
) -> dict[str, Any]:
    """The file has only the results of Llama 3's formula (`models.rope`). All releases have a ramp
    from 1 to 4 turns; then one frequency on the ramp tells the original length."""
    factor = float(np.round(factors.max(), 4))
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor) if factor > 1 else np.ones_like(factors)
    original = 8192
    ramp = np.flatnonzero((kept > 0.01) & (kept < 0.99))
    if ramp.size and ramp[0] < dim // 2:
        turns = 1.0 + 3.0 * kept[ramp[0]]
        frequency = theta ** -(2 * ramp[0] / dim)
        original = round(float(turns * 2 * np.pi / frequency))
    rope = RopeConfig(
        rope_theta=theta,
        rope_type="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=original,
    )
    if factors.shape != (dim // 2,) or not np.allclose(
        _rope_factors(rope, dim), factors, rtol=1e-4
    ):
        raise ValueError(
            f"The file's {ROPE_FACTORS!r} follow no release of Llama 3: put the checkpoint's "
            "config.json beside the file, in a folder of its own, and give the folder."
        )
    return write_rope(rope)


def swap_rows(weight: np.ndarray, heads: int, *, to_gguf: bool) -> np.ndarray:
    """Rows of q or k [heads · dim, ...] (or its bias) in the order of the other side."""
    shape = weight.shape
    halves = (2, shape[0] // heads // 2) if to_gguf else (shape[0] // heads // 2, 2)
    return weight.reshape(heads, *halves, *shape[1:]).swapaxes(1, 2).reshape(shape)
