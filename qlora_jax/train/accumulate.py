"""How are the gradients of many micro-batches added up, and where do the sums lie?

The sums are float32 whatever the adapters' dtype, and they are there from the first micro-batch to
the last: for a 65B model with r = 64 that is 3 GiB beside the gradients of the micro-batch at hand.
On the host instead (`host_from`), each sum visits the device once per micro-batch, one leaf after
another, so that accumulation needs no more of the card than a single micro-batch does.

Cost of the host: 4 bytes per trained parameter cross the bus in each direction per micro-batch
(3 GiB for 65B: a quarter of a second at 25 GB/s each way, beside seconds of computing). The sums
are the same bits either way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device

GRADIENT_SUMS = "gradient_sums"
"""The name (`jax.named_scope`) of their copies, for whoever counts or profiles them."""

Gradient = Callable[[Any, Int[Array, ""]], tuple[tuple[Array, Array], PyTree]]
"""(micro-batch, its number) -> ((sum of losses, trained tokens), gradients of the sum)."""


def accumulated(
    gradient: Gradient, batch: Any, like: PyTree, *, host_from: int | None = None
) -> tuple[Float[Array, ""], Int[Array, ""], PyTree]:
    """The mean gradient over all micro-batches' trained tokens.

    Args:
        gradient: of one micro-batch.
        batch: every leaf is [accumulation, ...].
        like: the trained parameters: structure and dtypes of the result.
        host_from: sums of at least this many elements rest in pinned host memory; None: none do.

    Returns:
        (sum of losses, trained tokens, gradients in the parameters' dtypes). A step without any
        trained token has zero gradients, not NaN.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    if count == 1:
        only = jax.tree.map(lambda leaf: leaf[0], batch)
        (total, tokens), grads = gradient(only, jnp.int32(0))
        mean = jax.tree.map(lambda p, g: mean_gradient(g, tokens, p.dtype), like, grads)
        return total, tokens, mean

    parameters, treedef = jax.tree.flatten(like)
    moves = [host_from is not None and leaf.size >= host_from for leaf in parameters]

    def add(carry: Any, xs: tuple[Int[Array, ""], Any]) -> tuple[Any, None]:
        index, micro = xs
        (total, tokens), grads = gradient(micro, index)
        sums = _in_turn(
            lambda i, acc: acc + jax.tree.leaves(grads)[i].astype(acc.dtype), carry[2], moves
        )
        return (carry[0] + total, carry[1] + tokens, sums), None

    zeros = [
        _copied(zero, _HOST) if moved else zero
        for zero, moved in zip(
            (jnp.zeros(leaf.shape, jnp.float32) for leaf in parameters), moves, strict=True
        )
    ]
    start = (jnp.float32(0), jnp.int32(0), zeros)
    (total, tokens, sums), _ = jax.lax.scan(add, start, (jnp.arange(count), batch))
    means = _in_turn(
        lambda i, acc: mean_gradient(acc, tokens, parameters[i].dtype),
        sums,
        moves,
        return_to_host=False,
    )
    return total, tokens, jax.tree.unflatten(treedef, means)


def mean_gradient(total: Array, tokens: Int[Array, ""], dtype: Any) -> Array:
    """A summed gradient over the trained tokens, of which there may be none."""
    return (total / jnp.maximum(tokens, 1).astype(jnp.float32)).astype(dtype)


def _in_turn(
    function: Callable[[int, Array], Array],
    leaves: list[Array],
    moves: list[bool],
    *,
    return_to_host: bool = True,
) -> list[Array]:
    """`function(i, leaf)` of every leaf; those on the host are fetched one after another.

    A leaf is fetched once the one before last is done with, so that one transfer may overlap with
    another's addition and never more than two leaves visit the device.
    """
    results: list[Array] = []
    before: list[int] = []
    for index, (leaf, moved) in enumerate(zip(leaves, moves, strict=True)):
        if moved:
            if len(before) >= 2:
                last = before[-2]
                leaf, results[last] = jax.lax.optimization_barrier((leaf, results[last]))
            leaf = _copied(leaf, _DEVICE)
            before.append(index)
        result = function(index, leaf)
        results.append(_copied(result, _HOST) if moved and return_to_host else result)
    return results


def _copied(leaf: Array, space: jax.memory.Space) -> Array:
    with jax.named_scope(GRADIENT_SUMS):
        return jax.device_put(leaf, space)
