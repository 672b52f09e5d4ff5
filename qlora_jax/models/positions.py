"""Where a token stands in its text, and how long that is, whatever the padding and packing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def positions_of(
    ids: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"] | None,
    segments: Int[Array, "batch seq"] | None,
) -> Int[Array, "batch seq"]:
    """Positions of the real tokens, counted from 0, in each segment anew."""
    if mask is not None and segments is None:
        return jnp.maximum(jnp.cumsum(mask, axis=-1, dtype=jnp.int32) - 1, 0)
    index = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    if segments is None:
        return index
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def positions_to(last: Int[Array, " batch"], seq: int) -> Int[Array, "batch seq"]:
    """Positions in rows of `seq` tokens that are padded on the right, behind their token `last`."""
    index = jnp.arange(seq, dtype=jnp.int32)
    return jnp.minimum(index, last[:, None])


def text_lengths(positions: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """How many tokens each token's text has: its last one's position, and one more."""
    index = jnp.arange(positions.shape[1], dtype=jnp.int32)
    goes_on = jnp.pad(positions[:, 1:] == positions[:, :-1] + 1, ((0, 0), (0, 1)))
    last = jax.lax.cummin(jnp.where(goes_on, index.size, index), axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1
