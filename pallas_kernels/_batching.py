"""`jax.vmap` over a kernel that has no batching rule."""

from collections.abc import Callable

import jax
from jaxtyping import Array


def in_turn(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` of arrays, which under `jax.vmap` runs once for each element of the mapped axis.

    Args:
        function: of any number of arrays; returns one.

    Returns:
        A function that does the same; mapped, it is a loop, and so it is when mapped twice.
    """

    @jax.custom_batching.custom_vmap
    def call(*arrays: Array) -> Array:
        return function(*arrays)

    @call.def_vmap
    def _loop(_size: int, is_stack: list[bool], *arrays: Array) -> tuple[Array, bool]:
        def one(stacked: list[Array]) -> Array:
            own = iter(stacked)
            return call(*(next(own) if s else a for a, s in zip(arrays, is_stack, strict=True)))

        stacks = [a for a, s in zip(arrays, is_stack, strict=True) if s]
        return jax.lax.map(one, stacks), True

    return call
