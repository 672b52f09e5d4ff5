"""Arguments of layers and models that would be found out only when they are called."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.dispatch import AVAILABLE


def check_dtype(name: str, dtype: Any) -> None:
    """ValueError where an argument of that name is no dtype to compute in."""
    try:
        given = jnp.dtype(dtype)
        wide = jnp.issubdtype(given, jnp.floating) and given.itemsize >= 2
        # Without x64, JAX would take float32 for float64 and warn at every array.
        known = dtype is not None and wide and jax.dtypes.canonicalize_dtype(given) == given
    except TypeError:
        known = False
    if not known:
        raise ValueError(f"{name} is {dtype!r}, but float32, bfloat16 or float16 is needed.")


def check_matmul(name: str, implementation: str | None) -> None:
    """ValueError where an argument of that name is no implementation of the 4-bit matmul."""
    known = AVAILABLE["nf4_matmul"]
    if implementation is not None and implementation not in known:
        raise ValueError(
            f"{name} is {implementation!r}, but one of {', '.join(known)}, or None, is needed."
        )


def check_rngs(rngs: Any) -> None:
    """TypeError for a seed or a key in the place of Flax's streams of keys."""
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs is {rngs!r}, but Flax's streams are needed: give nnx.Rngs(0).")
