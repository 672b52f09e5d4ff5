"""Rotary position embeddings and the scalings that stretch them to longer contexts.

RoPE (arXiv 2104.09864) turns each pair of a head's coordinates by an angle `position · frequency`,
so that the product of a query and a key depends on their distance alone. Half the coordinates are
the pairs' first members and half their second ones (Hugging Face's layout: i goes with
i + head_dim/2).

A model trained on short texts reads longer ones when its frequencies are slowed down:

| rope_type | rule | source |
|---|---|---|
| linear | every frequency / factor | arXiv 2306.15595 |
| dynamic | a larger base, growing with the length that is read | "NTK-aware", u/emozilla 2023 |
| yarn | slow frequencies / factor, fast ones kept, a ramp between | arXiv 2309.00071 |
| llama3 | as yarn's ramp, by wavelength | Llama 3.1's model card |

Names and defaults are those of a `config.json` (`rope_scaling`, or `rope_parameters` since
transformers 5).
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Frequencies of the rotation; the fields are named as in a `config.json`.

    Attributes:
        rope_theta: base of the geometric series of frequencies.
        rope_type: one of `ROPE_TYPES`.
        factor: how many times longer than trained the context becomes.
        original_max_position_embeddings: context length of the pretraining, in tokens.
        low_freq_factor, high_freq_factor: llama3's ramp, in wavelengths per original context.
        beta_fast, beta_slow: yarn's ramp, in turns per original context.
        attention_factor: yarn's multiplier of cos and sin; None takes the paper's formula.
        mscale, mscale_all_dim: DeepSeek's variants of that formula.
        truncate: whether yarn's ramp begins and ends at whole coordinates.
    """

    rope_theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 2048
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type is {self.rope_type!r}, but only {', '.join(ROPE_TYPES)} are known: "
                "choose a model with one of these."
            )


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Float[np.ndarray, "half"]:
    """Radians per position of each coordinate pair, float32, for every type but "dynamic"'s growth.

    Args:
        config: which series and which scaling.
        head_dim: coordinates that are turned (even).

    Returns:
        `[head_dim // 2]`, fastest first. Computed in float64, rounded once.
    """
    exponents = np.arange(0, head_dim, 2) / head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_type == "linear":
        frequencies = frequencies / config.factor
    elif config.rope_type == "llama3":
        turns = config.original_max_position_embeddings * frequencies / (2 * np.pi)
        span = config.high_freq_factor - config.low_freq_factor
        kept = np.clip((turns - config.low_freq_factor) / span, 0.0, 1.0)
        frequencies = frequencies * (kept + (1 - kept) / config.factor)
    elif config.rope_type == "yarn":
        kept = 1.0 - _yarn_ramp(config, head_dim)
        frequencies = frequencies * (kept + (1 - kept) / config.factor)
    return frequencies.astype(np.float32)


def _yarn_ramp(config: RopeConfig, head_dim: int) -> Float[np.ndarray, "half"]:
    """0 where a pair turns often enough to be kept, 1 where it is slowed down."""

    def pair_turning(turns: float) -> float:
        wavelength = config.original_max_position_embeddings / (turns * 2 * np.pi)
        return head_dim * np.log(wavelength) / (2 * np.log(config.rope_theta))

    first, last = pair_turning(config.beta_fast), pair_turning(config.beta_slow)
    if config.truncate:
        first, last = np.floor(first), np.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return np.clip((np.arange(head_dim // 2) - first) / (last - first or 1e-3), 0.0, 1.0)


def attention_factor(config: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1, except for yarn (its section 3.4)."""
    if config.rope_type != "yarn":
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor

    def sharpening(mscale: float) -> float:
        return 0.1 * mscale * float(np.log(config.factor)) + 1.0 if config.factor > 1 else 1.0

    if config.mscale and config.mscale_all_dim:
        return sharpening(config.mscale) / sharpening(config.mscale_all_dim)
    return sharpening(1.0)


def rotations(
    positions: Int[Array, "batch seq"], config: RopeConfig, head_dim: int
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """Cosine and sine of every position's angles, float32.

    Args:
        positions: int32, counted from 0 at the first real token.
        config: which series and which scaling.
        head_dim: coordinates that are turned.
    """
    if config.rope_type == "dynamic":
        # The base grows once the batch reads further than the model was trained for.
        reach = jnp.maximum(positions.max() + 1, config.original_max_position_embeddings)
        stretch = config.factor * reach / config.original_max_position_embeddings
        base = config.rope_theta * (stretch - (config.factor - 1)) ** (head_dim / (head_dim - 2))
        inverse = base ** -jnp.asarray(np.arange(0, head_dim, 2) / head_dim, jnp.float32)
    else:
        inverse = jnp.asarray(inverse_frequencies(config, head_dim))
    angles = positions[..., None].astype(jnp.float32) * inverse
    scale = attention_factor(config)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "batch seq heads dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
) -> Float[Array, "batch seq heads dim"]:
    """Turns each pair (i, i + dim/2) of every head by its angle, in float32, back in x's dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
