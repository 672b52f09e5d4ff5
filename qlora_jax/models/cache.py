"""What a model remembers of the tokens it has read: keys and values, in arrays of fixed shape.

    slots     0 1 2 3 4 5 6 7          a prompt of three tokens, padded on the left to four
    mask      . x x x x . . .          and one token decoded since
    filled              5              the next token's slot, the same for every row
    positions           4              the next token's position: padding does not count

`Decoder.prefill` makes a `Cache`, `Decoder.decode_step` returns it with one more slot filled. Both
compile once for a batch, a prompt length and a `length` of the cache, whatever the prompts say.
Layers with a sliding window keep all slots and mask the old ones.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Cache(NamedTuple):
    """Keys, turned to their positions, and values of the tokens read so far.

    Attributes:
        key, value: `[layers, batch, length, groups, head_dim]`, in the compute dtype.
        mask: true where a slot holds a real token.
        positions: of the next tokens, int32.
        filled: slots filled so far: where the next tokens go, int32.
    """

    key: Float[Array, "layers batch length groups dim"]
    value: Float[Array, "layers batch length groups dim"]
    mask: Bool[Array, "batch length"]
    positions: Int[Array, " batch"]
    filled: Int[Array, ""]

    @property
    def length(self) -> int:
        """Slots of a row."""
        return self.key.shape[2]


def start(
    key: Float[Array, "layers batch seq groups dim"],
    value: Float[Array, "layers batch seq groups dim"],
    mask: Bool[Array, "batch seq"],
    length: int,
) -> Cache:
    """A cache of `length` slots whose first ones are filled."""
    spare = length - mask.shape[1]
    room = ((0, 0), (0, 0), (0, spare), (0, 0), (0, 0))
    return Cache(
        jnp.pad(key, room),
        jnp.pad(value, room),
        jnp.pad(mask, ((0, 0), (0, spare))),
        mask.sum(axis=1, dtype=jnp.int32),
        jnp.int32(mask.shape[1]),
    )


def visible(cache: Cache, window: int | None) -> Bool[Array, "batch 1 1 length"]:
    """The slots that the next tokens see, themselves among them, of the last `window` tokens."""
    seen = cache.mask | (jnp.arange(cache.length) == cache.filled)
    if window is not None:
        # By positions, not slots: a prompt that is padded on the right leaves a gap of slots.
        slots = jnp.cumsum(seen, axis=1, dtype=jnp.int32) - 1
        seen &= cache.positions[:, None] - slots < window
    return seen[:, None, None, :]


def store(
    whole: Float[Array, "layers batch length groups dim"],
    new: Float[Array, "batch 1 groups dim"],
    layer: Int[Array, ""],
    slot: Int[Array, ""],
) -> tuple[Float[Array, "layers batch length groups dim"], Float[Array, "batch length groups dim"]]:
    """The keys or values of all layers with one slot of a layer set, and that layer's."""
    # One slot is written, in place: the whole is a loop's carry.
    zero = jnp.int32(0)
    whole = jax.lax.dynamic_update_slice(
        whole, new[None].astype(whole.dtype), (layer, zero, slot, zero, zero)
    )
    return whole, jax.lax.dynamic_index_in_dim(whole, layer, keepdims=False)


def advance(
    cache: Cache,
    key: Float[Array, "layers batch length groups dim"],
    value: Float[Array, "layers batch length groups dim"],
) -> Cache:
    """The cache after a step that wrote these keys and values."""
    return Cache(
        key,
        value,
        cache.mask | (jnp.arange(cache.length) == cache.filled),
        cache.positions + 1,
        cache.filled + 1,
    )
