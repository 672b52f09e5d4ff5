"""An optimizer's state as one part per parameter: what lets an update run for some of them alone.

An optax state is a tree in which some leaves belong to one parameter (its moments) and some to none
(the step count). Which is which is found by asking `init` for subsets of the parameters: what it
makes for none at all is shared, and what it makes beyond that belongs to the one parameter that is
in every subset for which it is made. A parameter is left out by an empty tree in its place
(`optax.MaskedNode`), so that the paths of all others, which masks go by, stay what they are.
"""

import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from qlora_jax.processes import distribute


def wrapped(inner: Any, wrapper: str) -> optax.GradientTransformationExtraArgs:
    """`inner`, which `wrapper` was given, as a transformation that takes further arguments.

    Raises:
        TypeError: it is no transformation, such as `optax.adamw` itself.
    """
    if not (hasattr(inner, "init") and hasattr(inner, "update")):
        raise TypeError(
            f"{wrapper} wraps an optax.GradientTransformation, such as optax.adamw(2e-4), but was "
            f"given {inner!r}"
        )
    return optax.with_extra_args_support(inner)


def names_of(path: tuple) -> list[str]:
    """The names on a leaf's path."""
    return [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]


def by_path(tree: PyTree) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of every leaf."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield jax.tree_util.keystr(path), leaf


def only(tree: PyTree, kept: Collection[int]) -> PyTree:
    """`tree` with an empty tree in the place of every leaf whose index is not in `kept`."""
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [leaf if i in kept else optax.MaskedNode() for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(treedef, chosen)


def shapes(tree: PyTree) -> PyTree:
    """Shapes and dtypes alone: tracing must not see that a leaf lies in host memory."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        aval = jax.typeof(leaf)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type)

    return jax.tree.map(shape, tree)


def to_devices_of(params: PyTree) -> Callable[[Any], Any]:
    """A function that moves an array to the devices that the parameters lie on, if it is not there:
    whole on each of them where they are spread over a mesh. While tracing it moves nothing.

    Counters are made on JAX's default device, and a program runs on one set of devices.
    """
    placed = [leaf.sharding for leaf in jax.tree.leaves(params) if _lies_somewhere(leaf)]
    meshes = (at.mesh for at in placed if isinstance(at, jax.sharding.NamedSharding))
    mesh = next(meshes, None)

    def put(leaf: Any) -> Any:
        if not placed or not _lies_somewhere(leaf):
            return leaf
        there = placed[0] if mesh is None else jax.sharding.NamedSharding(mesh, jax.P())
        at = leaf.sharding
        if at.device_set == there.device_set:
            return leaf
        return distribute(leaf, there.with_memory_kind(at.memory_kind))

    return put


def _lies_somewhere(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def owners(
    inner: optax.GradientTransformation, params: PyTree, state: PyTree, *, needed_by: str
) -> dict[str, int | None]:
    """Path of every state leaf -> the parameter it belongs to (None: to no single one).

    Raises:
        ValueError: the state is not one part per parameter; names `needed_by` as who needs that.
    """

    numbers = range(len(jax.tree.leaves(params)))

    def paths(kept: Collection[int]) -> set[str]:
        return {path for path, _ in by_path(jax.eval_shape(inner.init, only(params, kept)))}

    shared, whole = paths(()), [path for path, _ in by_path(state)]
    side = math.isqrt(len(numbers)) + 1

    def by_line(line_of: Callable[[int], int]) -> list[tuple[str, int]]:
        kept = [{number for number in numbers if line_of(number) == line} for line in range(side)]
        return [(path, line) for line in range(side) for path in paths(kept[line]) - shared]

    # As if in a square: 448 parameters are asked for in 22 rows and 22 columns, not one by one.
    rows, columns = by_line(lambda number: number // side), by_line(lambda number: number % side)
    for line in (rows, columns):
        if sorted([*shared, *(path for path, _ in line)]) != sorted(whole):
            raise ValueError(
                f"{needed_by} needs a transformation whose state is one part per parameter, but "
                "the state of the given one cannot be split so; put it outside: "
                "optax.chain(it, paged(...))."
            )
    column_of = dict(columns)
    found: dict[str, int | None] = {path: row * side + column_of[path] for path, row in rows}
    return {path: found.get(path) for path in whole}
