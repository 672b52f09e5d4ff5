"""GGUF's hyperparameters: a config.json as a file's metadata, and the way back."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_jax.checkpoints.gguf.architecture import (
    SLIDING_WINDOW,
    Architecture,
    by_metadata,
    by_model_type,
    head_dim,
)
from qlora_jax.checkpoints.gguf.rope import rope_fields, rope_metadata

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
}
_OPTIONAL = {
    "sliding_window": SLIDING_WINDOW,
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def to_metadata(config: Mapping[str, Any]) -> tuple[Metadata, dict[str, np.ndarray]]:
    """A config.json as GGUF hyperparameters, and the tensors that carry some of them.

    Args:
        config: as the family's `write_config` gives it: whole, and in one style.

    Raises:
        ValueError: an architecture or a setting that a GGUF file cannot hold.
    """
    architecture = by_model_type(config)
    _check_fixed(config, architecture)
    architecture.check(config)
    dim = head_dim(config)
    needed = _FIELDS | dict(architecture.fields)
    metadata: Metadata = {key: config[name] for name, key in needed.items()}
    metadata |= {
        key: config[name] for name, key in _OPTIONAL.items() if config.get(name) is not None
    }
    rope, tensors = rope_metadata(config, dim)
    if tensors and not architecture.llama3:
        raise ValueError(
            f"rope_type is 'llama3', whose factors llama.cpp reads of no {architecture.name!r}: "
            "export to safetensors."
        )
    metadata |= {"attention.key_length": dim, "attention.value_length": dim, **rope}
    return {f"{architecture.name}.{key}": value for key, value in metadata.items()}, tensors


def _check_fixed(config: Mapping[str, Any], architecture: Architecture) -> None:
    for name, known in architecture.fixed.items():
        if config.get(name, known) != known:
            raise ValueError(
                f"{name} is {config[name]}, but llama.cpp reads a {architecture.name!r} with "
                f"{known} alone: export to safetensors."
            )


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
        **{name: value(key) for name, key in (_FIELDS | dict(architecture.fields)).items()},
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    for name, key in _OPTIONAL.items():
        if f"{architecture.name}.{key}" in metadata:
            config[name] = value(key)
    if f"{architecture.name}.attention.key_length" in metadata:
        config["head_dim"] = value("attention.key_length")
    elif f"{architecture.name}.rope.dimension_count" in metadata:
        config["head_dim"] = value("rope.dimension_count")
    config |= {name: tensor in tensors for name, tensor in architecture.biases.items()}
    config |= rope_fields(metadata, architecture.name, head_dim(config), config, factors)
    for role in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if token is not None:
            config[f"{role}_token_id"] = token
    return config | architecture.extra(config)
