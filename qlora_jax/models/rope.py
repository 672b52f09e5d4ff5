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
| longrope | each frequency / a factor of its own, another in long texts | arXiv 2402.13753 |

Names and defaults are those of a `config.json` (`rope_scaling`, or `rope_parameters` since
transformers 5).
"""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


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
        attention_factor: yarn's and longrope's multiplier of cos and sin; None takes the paper's
            formula.
        mscale, mscale_all_dim: DeepSeek's variants of that formula.
        truncate: whether yarn's ramp begins and ends at whole coordinates.
        short_factor, long_factor: longrope's factor of every pair, for texts up to the original
            context and beyond it.
        partial_rotary_factor: share of a head's coordinates that are turned, the first ones.
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
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(
                f"rope_type is {self.rope_type!r}, but only {', '.join(ROPE_TYPES)} are known: "
                "choose a model with one of these."
            )
        if self.rope_type == "longrope" and not (self.short_factor and self.long_factor):
            raise ValueError("rope_type is 'longrope', which needs short_factor and long_factor.")

    @property
    def plain_length(self) -> int | None:
        """The longest text that is turned as short ones are; None where length makes no difference
        to a text's turns."""
        grows = self.rope_type in ("dynamic", "longrope")
        return self.original_max_position_embeddings if grows else None

    def turned(self, head_dim: int) -> int:
        """How many coordinates of a head are turned."""
        return int(head_dim * self.partial_rotary_factor)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Float[np.ndarray, " half"]:
    """Radians per position of each coordinate pair, float32, of a text within the original context.

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
    elif config.rope_type == "longrope":
        frequencies = frequencies / np.asarray(config.short_factor)
    return frequencies.astype(np.float32)


def _yarn_ramp(config: RopeConfig, head_dim: int) -> Float[np.ndarray, " half"]:
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
    """What cos and sin are multiplied by: 1, except for yarn (its section 3.4) and longrope."""
    if config.rope_type not in ("yarn", "longrope"):
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.rope_type == "longrope":
        original = np.log(config.original_max_position_embeddings)
        return float(np.sqrt(1 + np.log(config.factor) / original)) if config.factor > 1 else 1.0

    def sharpening(mscale: float) -> float:
        return 0.1 * mscale * float(np.log(config.factor)) + 1.0 if config.factor > 1 else 1.0

    if config.mscale and config.mscale_all_dim:
        return sharpening(config.mscale) / sharpening(config.mscale_all_dim)
    return sharpening(1.0)


def rotations(
    positions: Int[Array, "batch seq"],
    config: RopeConfig,
    head_dim: int,
    length: int | None = None,
) -> tuple[Float[Array, "batch seq half"], Float[Array, "batch seq half"]]:
    """Cosine and sine of every position's angles, float32.

    Args:
        positions: int32, counted from 0 at the first real token.
        config: which series and which scaling.
        head_dim: coordinates of a head; `half` of those that are turned come back.
        length: of the text, for scalings that depend on it; None takes the batch's last position.
    """
    turned = config.turned(head_dim)
    reach = positions.max() + 1 if length is None else length
    original = config.original_max_position_embeddings
    inverse = jnp.asarray(inverse_frequencies(config, turned))
    if config.rope_type == "dynamic":
        # The base grows once the batch reads further than the model was trained for.
        stretch = config.factor * jnp.maximum(reach, original) / original
        base = config.rope_theta * (stretch - (config.factor - 1)) ** (turned / (turned - 2))
        inverse = base ** -jnp.asarray(np.arange(0, turned, 2) / turned, jnp.float32)
    elif config.rope_type == "longrope":
        slow = dataclasses.replace(config, short_factor=config.long_factor)
        inverse = jnp.where(reach > original, inverse_frequencies(slow, turned), inverse)
    angles = positions[..., None].astype(jnp.float32) * inverse
    scale = attention_factor(config)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "batch seq heads dim"],
    cos: Float[Array, "batch seq half"],
    sin: Float[Array, "batch seq half"],
) -> Float[Array, "batch seq heads dim"]:
    """Turns each pair (i, i + half) of every head by its angle, in float32, back in x's dtype.

    Coordinates from 2 · half on stay as they are.
    """
    half = cos.shape[-1]
    first, second, still = jnp.split(x, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), still], axis=-1)
