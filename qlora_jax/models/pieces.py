"""Sequences in pieces: what reads each token by itself need not see all of them at once.

    x [batch, seq, …] → cut → [pieces, batch, width, …] → one piece after another → joined

Sequences are cut and not batches, so that a batch that is spread over devices stays so.
"""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def cut(
    x: Shaped[Array, "batch seq *rest"], tokens: int, filler: int = 0
) -> Shaped[Array, "pieces batch width *rest"]:
    """The pieces, of equal width, with as few tokens of padding as can be.

    Args:
        x: anything with a value for each token.
        tokens: of a piece, in all rows together; rounded up to whole columns of the batch.
        filler: what the padding holds.
    """
    batch, length = x.shape[:2]
    pieces = -(-length // -(-tokens // batch))
    width = -(-length // pieces)
    spare = [(0, 0)] * x.ndim
    spare[1] = (0, pieces * width - length)
    padded = jnp.pad(x, spare, constant_values=filler)
    return jnp.moveaxis(padded.reshape(batch, pieces, width, *x.shape[2:]), 1, 0)


def joined(
    pieces: Shaped[Array, "pieces batch width *rest"], length: int
) -> Shaped[Array, "batch seq *rest"]:
    """The sequences again, without the padding behind `length`."""
    batch, rest = pieces.shape[1], pieces.shape[3:]
    return jnp.moveaxis(pieces, 0, 1).reshape(batch, -1, *rest)[:, :length]
