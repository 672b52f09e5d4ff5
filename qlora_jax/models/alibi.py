"""ALiBi (arXiv 2108.12409): positions as a penalty on scores that grows with distance.

A head subtracts slope · distance from the score of a query and an earlier key; slopes fall
geometrically from head to head. The softmax of a query does not change with what all of its scores
have in common, so slope · (the key's position) does the same and needs no axis of queries: the
bias is linear in memory. Nothing is learned, and no sequence is too long.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int


def alibi_slopes(heads: int) -> Float32[np.ndarray, " heads"]:
    """The slope of each head: 2⁻⁸ᐟⁿ, 2⁻¹⁶ᐟⁿ, … for n heads, a power of two.

    Of another number, those of the power of two below, then every other one of twice that power.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2.0 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]
    return np.array(slopes, np.float32)


def alibi_bias(
    positions: Int[Array, "batch keys"], heads: int
) -> Float[Array, "batch {heads} 1 keys"]:
    """What is added to the scores of all queries, in float32; `positions` are the keys'."""
    slopes = jnp.asarray(alibi_slopes(heads))
    return slopes[:, None, None] * positions[:, None, None, :].astype(jnp.float32)
