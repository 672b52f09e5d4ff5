"""Adam's moments in 8 bits: a quarter of the memory, and of the traffic where they are paged.

Dettmers et al. 2022 (arXiv 2110.02861), as `bitsandbytes.optim.AdamW8bit` and its paged kin do it:
between updates a moment is kept as 8-bit codes with one scale per 256 numbers; an update reads it
back to float32, goes on as ever, and quantizes the result. The parameter's own update uses the
moments before they are rounded.

`eight_bit` wraps any per-parameter optax transformation, and `paged` wraps it in turn:

    paged(eight_bit(optax.adamw(2e-4)))          bitsandbytes' PagedAdamW8bit
    paged(eight_bit(optax.lion(1e-4)))           its PagedLion8bit

The rule is CUDA's (an exact nearest search, which bitsandbytes' CPU library replaces by a table of
65,536 bins). Its one exception is not followed: a first moment that rounds to zero keeps its sign
there, as the smallest number of the map.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, PyTree, UInt8

from qlora_jax.optim.per_parameter import wrapped
from qlora_jax.quant import dequantize_dynamic, quantize_dynamic

BLOCKSIZE = 256


class SignedState(NamedTuple):
    """A state array that takes either sign, in 8 bits: codes in its shape, one absmax per block."""

    codes: UInt8[Array, "..."]
    absmax: Float32[Array, " blocks"]


class UnsignedState(NamedTuple):
    """A state array that is never negative, in 8 bits."""

    codes: UInt8[Array, "..."]
    absmax: Float32[Array, " blocks"]


def eight_bit(
    inner: optax.GradientTransformation, *, min_size: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """Keep the large float32 state arrays of `inner` as 8-bit codes between updates.

    Optax names second moments `nu`; they are never negative and take the unsigned map, all others
    the signed one.

    Args:
      inner: a transformation with float32 state of the parameters' shapes, as `optax.adamw(2e-4)`.
      min_size: arrays of fewer elements stay in 32 bits (bitsandbytes' `min_8bit_size`).

    Returns:
      A gradient transformation whose state has `inner`'s structure, with a `SignedState` or an
      `UnsignedState` in the place of each array in 8 bits.

    Raises:
      TypeError: `inner` is no transformation.
      ValueError: `min_size` is negative; at `init`, `inner` is `paged`.
    """
    if min_size < 0:
        raise ValueError(f"min_size must be 0 or more elements, but is {min_size}.")
    inner = wrapped(inner, "eight_bit")

    def packed(path: tuple, leaf: Any) -> Any:
        if leaf.dtype != jnp.float32 or leaf.size < max(min_size, 1) or leaf.ndim == 0:
            return leaf
        if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
            raise ValueError(
                "eight_bit reads its state on the device, but that of the given transformation "
                "rests on the host: put paged outside, paged(eight_bit(optax.adamw(2e-4)))."
            )
        kind = UnsignedState if _is_second_moment(path) else SignedState
        return kind(*quantize_dynamic(leaf, signed=kind is SignedState, blocksize=BLOCKSIZE))

    def init(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(packed, inner.init(params))

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        state = jax.tree.map(unpacked, state, is_leaf=_is_packed)
        updates, state = inner.update(updates, state, params, **extra)
        return updates, jax.tree_util.tree_map_with_path(packed, state)

    return optax.GradientTransformationExtraArgs(init, update)


def unpacked(leaf: Any) -> Any:
    """The float32 array of a `SignedState` or `UnsignedState`; anything else as it is."""
    if not _is_packed(leaf):
        return leaf
    return dequantize_dynamic(*leaf, signed=isinstance(leaf, SignedState), blocksize=BLOCKSIZE)


def _is_packed(node: Any) -> bool:
    return isinstance(node, SignedState | UnsignedState)


def _is_second_moment(path: tuple) -> bool:
    return any(getattr(entry, "name", None) == "nu" for entry in path)
