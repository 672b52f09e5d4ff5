"""What a model remembers of the tokens it has read: keys and values, in arrays of fixed shape.

    slots     0 1 2 3 4 5 6 7          a prompt of three tokens, padded on the left to four
    mask      . x x x x . . .          and one token decoded since
    filled              5              the next token's slot, the same for every row
    positions           4              the next token's position: padding does not count

`Decoder.prefill` makes a `Cache`, `Decoder.decode_step` returns it with one more slot filled. Both
compile once for a batch, a prompt length and a `length` of the cache, whatever the prompts say.
Layers with a sliding window keep all slots and mask the old ones.

Keys end in `[length, head_dim]` and values in `[head_dim, length]`, so that the axis which one
query's product sums over is the last: then the products read both where they lie. Left to order the
axes in memory itself, XLA turns the whole cache before the loop over the layers and back after it,
in every step: up to twice the cache's memory, and much of the step's traffic.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import mesh_of_rows

_KEY_SLOTS, _VALUE_SLOTS = 2, 3
"""The axis of a layer's keys, and of its values, along which the slots lie."""

Pair = tuple[Array, Array]
"""Keys and values: as a cache holds them, or of one layer as attention takes them."""


class Cache(NamedTuple):
    """Keys, turned to their positions, and values of the tokens read so far.

    Attributes:
        key: `[layers, batch, groups, length, head_dim]`, in the compute dtype.
        value: `[layers, batch, groups, head_dim, length]`.
        mask: true where a slot holds a real token.
        positions: of the next tokens, int32.
        filled: slots filled so far: where the next tokens go, int32.
    """

    key: Float[Array, "layers batch groups length dim"]
    value: Float[Array, "layers batch groups dim length"]
    mask: Bool[Array, "batch length"]
    positions: Int[Array, " batch"]
    filled: Int[Array, ""]

    @property
    def length(self) -> int:
        """Slots of a row."""
        return self.key.shape[1 + _KEY_SLOTS]


def kept(
    key: Float[Array, "batch seq groups dim"],
    value: Float[Array, "batch seq groups dim"],
    length: int,
) -> tuple[Float[Array, "batch groups length dim"], Float[Array, "batch groups dim length"]]:
    """A layer's keys and values as a cache keeps them: the first of `length` slots, the rest zero.

    Layer by layer, so that what a scan stacks is the cache itself.
    """

    def in_slots(new: Array, axis: int) -> Array:
        spare = [(0, 0)] * new.ndim
        spare[axis] = (0, length - new.shape[1])
        return _in_order(jnp.pad(jnp.moveaxis(new, 1, axis), spare), rows=0)

    return in_slots(key, _KEY_SLOTS), in_slots(value, _VALUE_SLOTS)


def read(
    key: Float[Array, "batch groups length dim"], value: Float[Array, "batch groups dim length"]
) -> tuple[Float[Array, "batch length groups dim"], Float[Array, "batch length groups dim"]]:
    """A layer's keys and values as attention takes them, from what a cache keeps of it."""
    return (
        jnp.moveaxis(_in_order(key, rows=0), _KEY_SLOTS, 1),
        jnp.moveaxis(_in_order(value, rows=0), _VALUE_SLOTS, 1),
    )


def start(
    key: Float[Array, "layers batch groups length dim"],
    value: Float[Array, "layers batch groups dim length"],
    mask: Bool[Array, "batch seq"],
) -> Cache:
    """The cache of a prompt, from every layer's `kept`."""
    spare = key.shape[1 + _KEY_SLOTS] - mask.shape[1]
    return Cache(
        key,
        value,
        jnp.pad(mask, ((0, 0), (0, spare))),
        mask.sum(axis=1, dtype=jnp.int32),
        jnp.int32(mask.shape[1]),
    )


def visible(cache: Cache, window: int | None) -> Bool[Array, "batch 1 1 length"]:
    """The slots that the next tokens see, themselves among them, of the last `window` tokens."""
    seen = _with_next(cache)
    if window is not None:
        # By positions, not slots: a prompt that is padded on the right leaves a gap of slots.
        seen &= cache.positions[:, None] - slot_positions(cache) < window
    return seen[:, None, None, :]


def slot_positions(cache: Cache) -> Int[Array, "batch length"]:
    """The position of each slot's token, the next one's too; of no meaning where there is none."""
    return jnp.cumsum(_with_next(cache), axis=1, dtype=jnp.int32) - 1


def _with_next(cache: Cache) -> Bool[Array, "batch length"]:
    """The slots that hold a real token once the next ones are stored."""
    return cache.mask | (jnp.arange(cache.length) == cache.filled)


def store(whole: Pair, new: Pair, layer: Int[Array, ""], slot: Int[Array, ""]) -> tuple[Pair, Pair]:
    """The cached keys and values with one slot of a layer set, and those of this layer.

    Args:
        whole: of all layers, a `Cache`'s `key` and `value`.
        new: of the token that is read, `[batch, 1, groups, dim]`.
        layer, slot: where they go.

    Returns:
        `whole` with them, and what `read` gives of the layer.
    """

    def put(stack: Array, new: Array, axis: int) -> Array:
        # One slot is written, in place: the stack is a loop's carry.
        place = [layer, *[jnp.int32(0)] * 4]
        place[1 + axis] = slot
        turned = jnp.moveaxis(new, 1, axis)[None].astype(stack.dtype)
        return _in_order(jax.lax.dynamic_update_slice(stack, turned, place), rows=1)

    keys, values = put(whole[0], new[0], _KEY_SLOTS), put(whole[1], new[1], _VALUE_SLOTS)
    key, value = (
        jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in (keys, values)
    )
    return (keys, values), read(key, value)


def advance(
    cache: Cache,
    key: Float[Array, "layers batch groups length dim"],
    value: Float[Array, "layers batch groups dim length"],
) -> Cache:
    """The cache after a step that wrote these keys and values."""
    return Cache(
        key,
        value,
        _with_next(cache),
        cache.positions + 1,
        cache.filled + 1,
    )


def _in_order(x: Array, rows: int) -> Array:
    """x, which the compiler is to keep in memory in the order of its axes.

    Where a batch, x's axis `rows`, is dealt out to several devices, each asks for its own part: XLA
    does not cut the request itself, and would gather the whole cache in every layer of every step.
    """

    def keep(x: Array) -> Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    mesh = mesh_of_rows(x, rows)
    if mesh is None:
        return keep(x)
    spec = jax.P(*[None] * rows, mesh.axis_names[0])
    return jax.shard_map(keep, mesh=mesh, in_specs=spec, out_specs=spec)(x)
