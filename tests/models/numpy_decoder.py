"""A decoder in NumPy float64, from a checkpoint's own tensor names and its config.json.

Written from the papers and from what each `model_type` says of its fields, and sharing nothing
with the model under test but the frequencies of a scaled rope, which `test_rope.py` is for. For
families that keep queries, keys and values apart and have no experts.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_jax.models.family import read_rope
from qlora_jax.models.rope import attention_factor, inverse_frequencies

_LAYER_NORM = ("starcoder2", "stablelm")
_NORMS_BEHIND = ("olmo2", "olmo3")


def logits(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], ids: np.ndarray):
    """Logits [seq, vocab] of one text, token ids [seq]."""
    t = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    kind = config["model_type"]
    eps = config.get("rms_norm_eps") or config.get("norm_epsilon") or config.get("layer_norm_eps")

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        if kind in _LAYER_NORM:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
        weight = t[f"{name}.weight"] + (1 if kind == "gemma" else 0)
        return x * weight + t.get(f"{name}.bias", 0)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ t[f"{name}.weight"].T + t.get(f"{name}.bias", 0)

    def attention(x: np.ndarray, name: str, layer: int) -> np.ndarray:
        query, key, value = (linear(x, f"{name}.{part}_proj") for part in "qkv")
        if kind in _NORMS_BEHIND:
            query, key = norm(query, f"{name}.q_norm"), norm(key, f"{name}.k_norm")
        width = config["head_dim"]
        query, key, value = (y.reshape(len(x), -1, width) for y in (query, key, value))
        if config.get("no_rope_layers", [1] * 99)[layer]:
            query, key = (_turned(y, config, slides(layer)) for y in (query, key))
        scale = config.get("attention_multiplier", width**-0.5)
        distance = np.arange(len(x))[:, None] - np.arange(len(x))
        seen = (distance >= 0) & (distance < (config["sliding_window"] if slides(layer) else 99))
        mixed = np.zeros_like(query)
        for head in range(query.shape[1]):
            shared = head * key.shape[1] // query.shape[1]
            weights = np.exp(np.where(seen, query[:, head] @ key[:, shared].T * scale, -np.inf))
            mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ value[:, shared]
        return linear(mixed.reshape(len(x), -1), f"{name}.o_proj")

    def slides(layer: int) -> bool:
        usual = ["full_attention" if config.get("sliding_window") is None else "sliding_attention"]
        return (config.get("layer_types") or usual * 99)[layer] == "sliding_attention"

    def mlp(x: np.ndarray, name: str) -> np.ndarray:
        if kind == "starcoder2":
            return linear(_tanh_gelu(linear(x, f"{name}.c_fc")), f"{name}.c_proj")
        act = _tanh_gelu if kind == "gemma" else lambda y: y / (1 + np.exp(-y))
        inner = act(linear(x, f"{name}.gate_proj")) * linear(x, f"{name}.up_proj")
        return linear(inner, f"{name}.down_proj")

    embedding, factor = t["model.embed_tokens.weight"], config.get("residual_multiplier", 1)
    usual = math.sqrt(config["hidden_size"]) if kind == "gemma" else 1
    x = embedding[ids] * config.get("embedding_multiplier", usual)
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        if kind in _NORMS_BEHIND:
            mixed = attention(x, f"{name}.self_attn", layer)
            x = x + norm(mixed, f"{name}.post_attention_layernorm")
            x = x + norm(mlp(x, f"{name}.mlp"), f"{name}.post_feedforward_layernorm")
            continue
        mixed = attention(norm(x, f"{name}.input_layernorm"), f"{name}.self_attn", layer)
        x = x + factor * mixed
        x = x + factor * mlp(norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp")
    head = embedding if config["tie_word_embeddings"] else t["lm_head.weight"]
    return norm(x, "model.norm") @ head.T / config.get("logits_scaling", 1)


def _tanh_gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _turned(heads: np.ndarray, config: Mapping[str, Any], slides: bool) -> np.ndarray:
    """Heads [seq, heads, width] turned by their positions; what slides, without a scaling."""
    width = int(config["head_dim"] * config.get("partial_rotary_factor", 1))
    half, scale = width // 2, 1.0
    frequencies = config["rope_theta"] ** -(np.arange(0, width, 2) / width)
    if config["rope_scaling"] and not slides:
        rope = read_rope({**config, "rope_parameters": None})
        frequencies, scale = inverse_frequencies(rope, width), attention_factor(rope)
    angles = np.arange(len(heads))[:, None, None] * frequencies
    cos, sin = np.cos(angles) * scale, np.sin(angles) * scale
    first, second, still = np.split(heads, (half, width), axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, still], axis=-1)
