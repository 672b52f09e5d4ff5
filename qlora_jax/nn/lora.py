"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): what is trained instead of the weight.

    y = x · Wᵀ + s · dropout(x) · Aᵀ · Bᵀ        A [r, in] is random, B [out, r] zero at first

The scale s is α / r, or α / √r with rank stabilisation (Kalajdzievski 2023, arXiv 2312.03732).
Names, orientation and initialisation are PEFT's, so that adapters travel both ways unchanged.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get adapters, and how large.

    Attributes:
        r: rank.
        alpha: the scale's numerator (PEFT's `lora_alpha`).
        lora_dropout: probability of zeroing an element of the adapter's input in training.
        target_modules: names of the layers to adapt, matched as PEFT does: a layer whose path ends
            in ".name" or is "name"; "all-linear" for every linear layer of the base but the head.
        use_rslora: scale by α / √r instead of α / r.
        dtype: of A and B. The products run in the layer's compute dtype.
    """

    r: int = 64
    alpha: int | float = 16
    lora_dropout: int | float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    use_rslora: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"r is {self.r}; the rank of an adapter is at least 1")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; give a probability in [0, 1)")
        if isinstance(self.target_modules, str):
            if self.target_modules != ALL_LINEAR:
                object.__setattr__(self, "target_modules", (self.target_modules,))
        else:
            object.__setattr__(self, "target_modules", tuple(self.target_modules))

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    def targets(self, path: str) -> bool:
        """Whether the layer at a dotted path ("layers.0.self_attn.q_proj") gets an adapter."""
        if self.target_modules == ALL_LINEAR:
            return path.rpartition(".")[2] != "lm_head"
        return any(path == name or path.endswith(f".{name}") for name in self.target_modules)


def init_lora_a(key: Key[Array, ""], r: int, in_features: int, dtype: Any) -> Float[Array, "r in"]:
    """Uniform in ±1/√in: torch's Kaiming initialisation with a = √5, as PEFT draws A."""
    bound = in_features**-0.5
    return jax.random.uniform(key, (r, in_features), dtype, -bound, bound)


def lora_product(
    x: Float[Array, "*batch in"],
    a: Float[Array, "r in"],
    b: Float[Array, "out r"],
    scaling: int | float,
) -> Float[Array, "*batch out"]:
    """s · (x · Aᵀ) · Bᵀ in x's dtype; x is the (dropped-out) input of the layer."""
    down = jnp.einsum("...i,ri->...r", x, a.astype(x.dtype))
    return _up(down * scaling, b.astype(x.dtype))


@jax.custom_vjp
def _up(hidden: Float[Array, "*batch r"], b: Float[Array, "out r"]) -> Float[Array, "*batch out"]:
    return jnp.einsum("...r,or->...o", hidden, b)


def _up_forward(hidden: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple]:
    return _up(hidden, b), (hidden, b)


def _up_backward(residuals: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    # dB as (hᵀ·dy)ᵀ: autodiff's dyᵀ·h makes XLA:CPU transpose the whole output gradient.
    hidden, b = residuals
    tokens, outputs = hidden.reshape(-1, hidden.shape[-1]), dy.reshape(-1, dy.shape[-1])
    return jnp.einsum("...o,or->...r", dy, b), jnp.einsum("tr,to->ro", tokens, outputs).T


_up.defvjp(_up_forward, _up_backward)


def dropout(
    x: Float[Array, "*shape"], rate: int | float, key: Key[Array, ""] | None
) -> Float[Array, "*shape"]:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 − rate); no key: x."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
