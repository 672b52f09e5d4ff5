"""T5's positions: one learned number per head and distance, added to the attention scores.

Distances (key position − query position) fall into buckets (arXiv 1910.10683, section 2.1): the
nearest each in one of their own, farther ones in buckets that widen logarithmically, everything
from `max_distance` on in the last. An encoder spends half of its buckets on keys to the right; a
decoder sees none there. All layers of a stack share the table.
"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from qlora_jax.models.embedding import Embedding


def relative_buckets(
    distances: Int[np.ndarray, " distances"],
    *,
    bidirectional: bool,
    num_buckets: int,
    max_distance: int,
) -> Int32[np.ndarray, " distances"]:
    """The bucket of each distance.

    Args:
        distances: key position − query position.
        bidirectional: whether keys to the right have buckets of their own; else they share
            bucket 0 with the query's own position.
        num_buckets: in all.
        max_distance: from which on all distances share a bucket.
    """
    first = np.zeros(distances.shape, np.int32)
    if bidirectional:
        num_buckets //= 2
        first = np.where(distances > 0, num_buckets, 0).astype(np.int32)
        steps = np.abs(distances)
    else:
        steps = np.maximum(-distances, 0)
    exact = num_buckets // 2
    # float32, as the weights were trained: a bucket's edge may fall on a whole distance.
    ratio = np.log(np.maximum(steps, 1).astype(np.float32) / np.float32(exact))
    wide = ratio / np.float32(np.log(max_distance / exact)) * np.float32(num_buckets - exact)
    far = np.minimum(exact + wide.astype(np.int32), num_buckets - 1)
    return first + np.where(steps < exact, steps, far).astype(np.int32)


class RelativeBias(nnx.Module):
    """The table `[buckets, heads]`, and the biases that it gives to scores."""

    def __init__(
        self,
        num_buckets: int,
        max_distance: int,
        heads: int,
        *,
        bidirectional: bool,
        dtype: object,
        rngs: nnx.Rngs,
    ) -> None:
        self.relative_attention_bias = Embedding(num_buckets, heads, dtype=dtype, rngs=rngs)
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.bidirectional = bidirectional

    def __call__(
        self, queries: Int[Array, " q"], keys: Int[Array, " k"], *, longest: int
    ) -> Float[Array, "1 heads q k"]:
        """Biases in float32.

        Args:
            queries, keys: positions below `longest`.
            longest: fixes the size of the table of buckets, which is computed on the host.
        """
        buckets = relative_buckets(
            np.arange(1 - longest, longest),
            bidirectional=self.bidirectional,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        distances = keys[None, :] - queries[:, None]
        values = self.relative_attention_bias(jnp.asarray(buckets)[distances + longest - 1])
        return values.astype(jnp.float32).transpose(2, 0, 1)[None]
