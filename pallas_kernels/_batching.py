"""`jax.vmap` over a kernel that has no batching rule."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array


def in_turn(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function`, which under `jax.vmap` runs once for each element of the mapped axis.

    Args:
        function: of any number of arrays, tuples of arrays, or None; returns an array.

    Returns:
        A function that does the same; mapped, it is a loop, and so it is when mapped twice.
    """

    @jax.custom_batching.custom_vmap
    def call(*arguments: Any) -> Array:
        return function(*arguments)

    @call.def_vmap
    def _loop(_size: int, is_stack: list[Any], *arguments: Any) -> tuple[Array, bool]:
        arrays, tree = jax.tree.flatten(arguments)
        marked = list(zip(arrays, jax.tree.leaves(is_stack), strict=True))

        def one(stacked: list[Array]) -> Array:
            own = iter(stacked)
            leaves = [next(own) if stack else array for array, stack in marked]
            return call(*jax.tree.unflatten(tree, leaves))

        return jax.lax.map(one, [a for a, stack in marked if stack]), True

    return call
