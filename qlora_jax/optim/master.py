"""16-bit parameters that learn in 32 bits: the exact ones rest in the optimizer's state.

A bfloat16 number has eight bits of mantissa, and a small update of it is lost in rounding. Mixed
precision (Micikevicius et al. 2018, arXiv 1710.03740) keeps a float32 *master copy* of each
parameter, updates that, and trains with its rounding. Here the master copy is optimizer state, so
`paged` puts it into host memory beside Adam's moments:

    paged(master_weights(optax.adamw(2e-4)))

What stays on the card, adapters and their gradients, then takes half the room.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, PyTree

from qlora_jax.optim.per_parameter import wrapped


class MasterState(NamedTuple):
    """`inner`'s state for float32 parameters, and those parameters."""

    master: PyTree[Float32[Array, "..."]]
    inner: PyTree


def master_weights(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Run `inner` on float32 copies of the parameters, which may be of 16 bits.

    `optax.apply_updates` then gives each parameter the rounding of its master copy. (Where a
    16-bit parameter falls by more than 16 binary orders at once, it may miss that by one unit in
    its last place until the next update; the master copy does not.)

    Args:
      inner: a transformation that sees gradients and parameters in float32.

    Returns:
      A gradient transformation that needs `params` in `update`.

    Raises:
      TypeError: `inner` is no transformation.
    """
    inner = wrapped(inner, "master_weights")

    def init(params: PyTree) -> MasterState:
        master = _wide(params)
        return MasterState(master, inner.init(master))

    def update(
        updates: PyTree, state: MasterState, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, MasterState]:
        if params is None:
            raise ValueError("master_weights needs the parameters: call update(..., params).")
        updates, inner_state = inner.update(_wide(updates), state.inner, state.master, **extra)
        master = jax.tree.map(lambda m, u: m + u, state.master, updates)
        # In float32, where the difference of two 16-bit numbers of like size is exact.
        steps = jax.tree.map(
            lambda m, p: m.astype(p.dtype).astype(jnp.float32) - p.astype(jnp.float32),
            master,
            params,
        )
        return steps, MasterState(master, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _wide(tree: PyTree) -> PyTree:
    # A copy even where the parameter is float32: a donated array may not be two arguments at once.
    return jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), tree)
