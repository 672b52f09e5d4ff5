"""GGUF's rope: the keys and the one tensor that carry a `RopeConfig`, both ways.

llama.cpp computes yarn as the paper does and has no key for anything else; of Llama 3's scaling a
file has the results alone, a factor for each frequency.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qlora_jax.models.family import read_rope, write_rope
from qlora_jax.models.rope import RopeConfig, attention_factor, inverse_frequencies

WINDOW_BASE = 10000.0
"""`rope_theta` of Gemma 3's windows, for which llama.cpp has no key."""
ROPE_FACTORS = "rope_freqs.weight"
"""The tensor by which llama.cpp's frequencies are divided: Llama 3's scaling."""


def rope_metadata(
    config: Mapping[str, Any], dim: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The keys of a config.json's rope, without the architecture's name, and its tensors.

    Args:
        config: in transformers 4's style, as `write_config` gives it.
        dim: width of a head.

    Raises:
        ValueError: a scaling that a GGUF file cannot hold.
    """
    rope = _rope(config)
    metadata: dict[str, Any] = {
        "rope.dimension_count": rope.turned(dim),
        "rope.freq_base": rope.rope_theta,
    }
    if rope.rope_type in ("linear", "yarn"):
        metadata |= {"rope.scaling.type": rope.rope_type, "rope.scaling.factor": rope.factor}
    if rope.rope_type == "yarn":
        _check_yarn(rope, dim)
        metadata["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
    elif rope.rope_type == "llama3":
        return metadata, {ROPE_FACTORS: _rope_factors(rope, dim)}
    elif rope.rope_type not in ("default", "linear"):
        raise ValueError(
            f"rope_type is {rope.rope_type!r}, but GGUF files are written for default, linear, "
            "llama3 and yarn: export to safetensors."
        )
    return metadata, {}


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    """Rotary frequencies."""
    base = config.get("rope_local_base_freq")
    if base not in (None, WINDOW_BASE):
        raise ValueError(
            f"The windows' rope_theta is {base:g}, but llama.cpp turns them by {WINDOW_BASE:g}: "
            "export to safetensors."
        )
    # Whether its family turns a part of a head, the config's own reader has asked.
    if "full_attention" in (config.get("rope_parameters") or {}):
        # An OLMo 3's, which says the same a second time.
        config = {**config, "rope_parameters": None}
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


def rope_fields(
    metadata: Mapping[str, Any],
    architecture: str,
    dim: int,
    config: Mapping[str, Any],
    factors: np.ndarray | None,
) -> dict[str, Any]:
    """What a config.json says of a file's rope.

    Args:
        metadata: the file's.
        architecture: its name.
        dim: width of a head.
        config: the rest of the config.json.
        factors: the file's `ROPE_FACTORS`, where it has them.

    Raises:
        ValueError: a scaling that is not read.
    """

    def value(key: str, default: Any) -> Any:
        return metadata.get(f"{architecture}.rope.{key}", default)

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
