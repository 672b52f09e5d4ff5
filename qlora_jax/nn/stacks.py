"""A and B of a stack of layers, whose ranks may differ: filled up with zeros to the largest.

A row of A and a column of B that are both zero have zero gradients, so they stay zero in training.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from qlora_jax.nn.lora import init_lora_a


@partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def drawn_a(
    key: Key[Array, ""],
    ranks: tuple[int, ...],
    stack: tuple[int, ...],
    in_features: int,
    dtype: Any,
    init: bool | str,
) -> Float[Array, "*stack r in"]:
    """Fresh A of each layer of a stack; zeros below each one's own rank."""
    if not stack:
        return init_lora_a(key, ranks[0], in_features, dtype, init)
    r, own = max(ranks), jnp.asarray(ranks)[:, None, None]
    keys = jax.random.split(key, len(ranks))
    a = jax.vmap(lambda key: init_lora_a(key, r, in_features, dtype, init))(keys)
    if init == "gaussian":
        # The deviation is 1 / the layer's own rank.
        a = a * (r / jnp.maximum(own, 1)).astype(dtype)
    a = jnp.where(jnp.arange(r)[:, None] < own, a, 0)
    return a.reshape(*stack, r, in_features)


def stacked(
    parts: Sequence[jax.Array | np.ndarray | None],
    stack: tuple[int, ...],
    shape: tuple[int, int],
    dtype: Any,
) -> jax.Array:
    """The layers' own A or B as one array of a stack, filled up with zeros."""
    whole = np.zeros((len(parts), *shape), dtype)
    for index, part in enumerate(parts):
        if part is not None:
            whole[index, : part.shape[0], : part.shape[1]] = part
    return jnp.asarray(whole.reshape(*stack, *shape))
