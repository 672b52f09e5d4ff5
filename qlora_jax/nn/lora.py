"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): what is trained instead of the weight.

    y = x · Wᵀ + s · dropout(x) · Aᵀ · Bᵀ        A [r, in] is random, B [out, r] zero at first

The scale s is α / r, or α / √r with rank stabilisation (Kalajdzievski 2023, arXiv 2312.03732).
Names, orientation, initialisation and the rules by which a layer is chosen (`targets.py`) are
PEFT's, so that adapters travel both ways unchanged. `dora.py` adds a trained magnitude, `loftq.py`
starts from the error of quantization.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any

import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jaxtyping import Array, Bool, Float, Key

from pallas_kernels import vary_alike
from qlora_jax.fields import as_tuple, check_numbers
from qlora_jax.nn import targets

ALL_LINEAR = targets.ALL_LINEAR
SEEDS = range(2**32)
"""What may seed the adapters and their dropout: JAX's keys hold 32 bits."""

_INITS = (True, "gaussian", "loftq", "pissa")


@dataclass(frozen=True)
class LoraConfig:
    """Which layers get adapters, and how large; names and meanings are PEFT's.

    Attributes:
        r: rank.
        alpha: the scale's numerator (PEFT's `lora_alpha`).
        lora_dropout: probability of zeroing an element of the adapter's input in training.
        target_modules: names of the layers to adapt: a layer whose path ends in ".name" or is
            "name"; "all-linear" for every linear layer of the base but the head; any other text is
            a regular expression that matches the whole path.
        exclude_modules: names (or one regular expression) of layers that get none all the same.
        use_rslora: scale by α / √r instead of α / r.
        use_dora: train each row's magnitude apart from its direction (`dora.py`).
        rank_pattern: ranks of some layers, by the end of their path (a regular expression).
        alpha_pattern: alphas of some layers, likewise.
        layers_to_transform: adapt these layers of the stack alone; None for all. It does not count
            for layers that `target_modules` has by their whole path.
        layers_pattern: the name of the list that `layers_to_transform` counts in, such as "layers";
            None for the first number of a path.
        modules_to_save: modules of the base that are trained whole and saved with the adapters,
            such as "embed_tokens", "lm_head" or "classifier".
        bias: which biases of the base are trained: "none", "lora_only" (of adapted layers), "all".
        init_lora_weights: where A and B start: True (A random, B zero), "gaussian" (A normal with
            deviation 1/r), "loftq" (the error of quantization) or "pissa" (the weight's largest
            singular vectors); the last two need the 16-bit weight, so they are done while loading.
        loftq_iter: rounds of LoftQ. With one, the base is what plain quantization gives; with
            more its codes change, and the adapter belongs to that base alone.
        dtype: of A and B. The products run in the layer's compute dtype.
    """

    r: int = 64
    alpha: int | float = 16
    lora_dropout: int | float = 0.0
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    exclude_modules: tuple[str, ...] | str | None = None
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenDict)
    alpha_pattern: Mapping[str, int | float] = field(default_factory=FrozenDict)
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] | str | None = None
    bias: str = "none"
    init_lora_weights: bool | str = True
    loftq_iter: int = 1
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        self._settle()
        self._check_numbers()
        if self.bias not in ("none", "lora_only", "all"):
            raise ValueError(f"bias is {self.bias!r}; choose one of none, lora_only, all")
        if self.init_lora_weights not in _INITS:
            raise ValueError(
                f"init_lora_weights is {self.init_lora_weights!r}; choose one of "
                f"{', '.join(map(repr, _INITS))}"
            )
        if not _is_float(self.dtype):
            raise ValueError(f"dtype is {self.dtype}; give a float, such as float32 or bfloat16")
        self._check_expressions()
        self._check_layers()

    def _settle(self) -> None:
        """Fields in one form: part of a module's static structure, so everything has to hash."""

        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("rank_pattern", "alpha_pattern"):
            put(name, FrozenDict(getattr(self, name) or {}))
        if self.layers_to_transform is not None:
            layers = as_tuple(self, "layers_to_transform", Integral, "numbers of layers")
            put("layers_to_transform", layers or None)
        for name in ("modules_to_save", "layers_pattern"):
            if getattr(self, name) is not None:
                put(name, as_tuple(self, name, str, "names") or None)
        for name in ("target_modules", "exclude_modules"):
            if not isinstance(getattr(self, name), str | None):
                put(name, as_tuple(self, name, str, "names"))

    def _check_numbers(self) -> None:
        """Refuses ranks, alphas and so on that there cannot be."""
        for rank in (self.r, *self.rank_pattern.values()):
            if not isinstance(rank, Integral) or not 1 <= rank < 2**31:
                raise ValueError(
                    f"r is {rank!r}; the rank of an adapter is a whole number from 1 to 2³¹ - 1"
                )
        from_weight = self.init_lora_weights in ("loftq", "pissa")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, Real) or not math.isfinite(alpha):
                raise ValueError(f"alpha is {alpha!r}; give a finite number")
            if from_weight and alpha <= 0:
                raise ValueError(
                    f"alpha is {alpha}, but init_lora_weights={self.init_lora_weights!r} divides "
                    "the start by the scale; give a number above 0"
                )
        check_numbers(self)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; give a probability in [0, 1)")
        if self.loftq_iter < 1:
            raise ValueError(f"loftq_iter is {self.loftq_iter}; LoftQ takes at least one round")

    def _check_layers(self) -> None:
        """Refuses choices of layers that would mean nothing."""
        chosen_by_text = isinstance(self.target_modules, str)
        if self.layers_to_transform and chosen_by_text and self.target_modules != ALL_LINEAR:
            raise ValueError(
                f"layers_to_transform is set, but target_modules is the expression "
                f"{self.target_modules!r}: name the layers' numbers in the expression, or give "
                "target_modules as a list of names"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern is {self.layers_pattern!r}, but layers_to_transform is not set: "
                "say which layers of that list"
            )

    def _check_expressions(self) -> None:
        """Refuses what is to be matched with paths but is no regular expression."""
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                targets.check_expression(name, value)
        for name in ("rank_pattern", "alpha_pattern", "layers_pattern"):
            for text in getattr(self, name) or ():
                targets.check_expression(name, text, part=True)

    @property
    def scaling(self) -> float:
        """What the low-rank product is multiplied by."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)

    @property
    def changes_base(self) -> bool:
        """Whether the start of A and B leaves other base weights than plain quantization does."""
        rounds = self.init_lora_weights == "loftq" and self.loftq_iter > 1
        return rounds or self.init_lora_weights == "pissa"

    @property
    def told_targets(self) -> str:
        """What `target_modules` is, for a message: of a text also that it is no name."""
        text = isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR
        kind = ", a regular expression for whole paths (give names as a list)" if text else ""
        return f"target_modules is {self.target_modules!r}{kind}"

    def saves(self, path: str) -> bool:
        """Whether the module at a dotted path lies in one of `modules_to_save`."""
        return self.modules_to_save is not None and targets.saved(self.modules_to_save, path)

    def targets(self, path: str) -> bool:
        """Whether the layer at a dotted path ("layers.0.self_attn.q_proj") gets an adapter."""
        if self.exclude_modules is not None and targets.named(self.exclude_modules, path):
            return False
        if self.modules_to_save is not None and targets.inside(self.modules_to_save, path):
            return False
        return targets.targeted(
            self.target_modules, path, self.layers_to_transform, self.layers_pattern
        )

    def idle(self, paths: Iterable[str]) -> list[str]:
        """The names and patterns that mean none of a model's modules, which have these paths, as
        "rank_pattern: q_proj". PEFT lets them stand, so that one configuration serves several
        models."""
        paths = tuple(paths)
        means: dict[str, Callable[[str, str], bool]] = {
            "target_modules": lambda name, path: targets.named((name,), path),
            "exclude_modules": lambda name, path: targets.named((name,), path),
            "rank_pattern": lambda key, path: targets.by_pattern({key: 1}, path, 0) == 1,
            "alpha_pattern": lambda key, path: targets.by_pattern({key: 1}, path, 0) == 1,
        }
        return [
            f"{field}: {name}"
            for field, meant in means.items()
            if not isinstance(getattr(self, field), str)
            for name in getattr(self, field) or ()
            if not any(meant(name, path) for path in paths)
        ]

    def at(self, path: str) -> "LoraConfig | None":
        """The configuration of the layer at a dotted path, its own rank and alpha in place of the
        patterns; None where it gets no adapter."""
        if not self.targets(path):
            return None
        return replace(
            self,
            r=targets.by_pattern(self.rank_pattern, path, self.r),
            alpha=targets.by_pattern(self.alpha_pattern, path, self.alpha),
            rank_pattern=FrozenDict(),
            alpha_pattern=FrozenDict(),
        )


def _is_float(dtype: Any) -> bool:
    """Whether A and B can have it. 8-bit floats do not mix with others."""
    if dtype is None:  # NumPy's float64
        return False
    try:
        return jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize >= 2
    except TypeError:
        return False


def init_lora_a(
    key: Key[Array, ""], r: int, in_features: int, dtype: Any, init: bool | str = True
) -> Float[Array, "r in"]:
    """Uniform in ±1/√in: torch's Kaiming initialisation with a = √5, as PEFT draws A; or normal
    with deviation 1/r where `init` is "gaussian"."""
    if init == "gaussian":
        return jax.random.normal(key, (r, in_features), dtype) / r
    bound = in_features**-0.5
    return jax.random.uniform(key, (r, in_features), dtype, -bound, bound)


def lora_hidden(
    x: Float[Array, "*batch in"],
    a: Float[Array, "r in"],
    scaling: int | float | Float[Array, ""],
) -> Float[Array, "*batch r"]:
    """s · x · Aᵀ in x's dtype; x is the (dropped-out) input of the layer."""
    down = jnp.einsum("...i,ri->...r", x, a.astype(x.dtype))
    if isinstance(scaling, jax.Array):
        scaling = scaling.astype(x.dtype)
    return down * scaling


def dropout(
    x: Float[Array, "*shape"], rate: int | float, key: Key[Array, ""] | None
) -> Float[Array, "*shape"]:
    """Zeroes elements with probability `rate` and scales the rest by 1 / (1 − rate); no key: x."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return _only(*vary_alike(x / (1 - rate), kept)).astype(x.dtype)


@jax.custom_vjp
def _only(x: Float[Array, "*shape"], kept: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    # Not a `where`: its zeros, which no layer changes, would be made once for all layers and kept,
    # as large as x. The rule keeps the mask in bytes, where autodiff would keep it in x's dtype.
    return x * kept


def _only_forward(x: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _only(x, kept), kept


def _only_backward(kept: jax.Array, dy: jax.Array) -> tuple[jax.Array, None]:
    return dy * kept, None


_only.defvjp(_only_forward, _only_backward)
