"""Operations on arrays whose *types* say how they are cut over devices.

An axis of a mesh is of one of three kinds. Along an `Auto` axis XLA decides how arrays are cut
(`_mesh`). Along an `Explicit` axis (`jax.make_mesh` makes these) an array's type says it, and every
operation has to know how its result is cut before anything runs: for a product of two matrices that
are cut, or a look-up in a table, JAX cannot, and asks. `in_auto_axes` answers once for a whole
function: its result is cut by `result`, and all within is XLA's. Along a `Manual` axis, inside
`jax.shard_map`, an array is a device's own, and its type says whether other devices have another
(`vary_alike`).
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array


def in_auto_axes(
    function: Callable[..., Any],
    *arrays: Any,
    result: Callable[..., Any],
) -> Any:
    """function(*arrays), inside which XLA decides how arrays are cut, whatever the mesh's axes are.

    Args:
        function: of arrays.
        *arrays: pytrees of them.
        result: of the arrays' types, how what `function` returns is cut: a PartitionSpec or
            NamedSharding, or a tree of them. Asked only where an array lies on a mesh with Explicit
            axes.
    """
    types = jax.tree.map(jax.typeof, arrays)
    for mesh in (leaf.sharding.mesh for leaf in jax.tree.leaves(types)):
        kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
        explicit = tuple(name for name, kind in kinds if kind == AxisType.Explicit)
        if explicit:
            with jax.sharding.use_abstract_mesh(mesh):
                at = result(*types)
                return jax.sharding.auto_axes(function, axes=explicit, out_sharding=at)(*arrays)
    return function(*arrays)


def product_spec(x: Any, rows: Any = None) -> PartitionSpec:
    """How x · Wᵀ is cut: its rows as those of x, its columns as W's rows, along axes that are left.

    Args:
        x: the type of x.
        rows: what W's rows are cut along, an entry of a PartitionSpec.
    """
    leading = spec_entries(x)[:-1]
    taken = {axis for entry in leading for axis in axes_of(entry)}
    return PartitionSpec(*leading, None if taken & set(axes_of(rows)) else rows)


def rows_as_cut(codes: Any, shape: tuple[int, ...]) -> Any:
    """What the rows of a weight are cut along, an entry of a PartitionSpec; None for flat codes.

    Args:
        codes: the type of its codes, or of the weight itself where it is not packed.
        shape: the weight's.
    """
    return spec_entries(codes)[0] if codes.ndim == len(shape) else None


def spec_entries(array: Any) -> tuple:
    """The entries of the PartitionSpec of an array, or of its type: one for each of its axes."""
    spec = tuple(array.sharding.spec)
    return (*spec, *[None] * (array.ndim - len(spec)))


def axes_of(entry: Any) -> tuple[str, ...]:
    """The axes of the mesh in an entry of a PartitionSpec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def varying_as(arrays: Any) -> jax.sharding.ManualAxisType:
    """The type, inside `jax.shard_map`, of a result that differs along every axis that one of the
    arrays (a pytree) differs along. Pallas does not find it out by itself.

    Raises:
        ValueError: one of them is but a part of a sum over devices.
    """
    kinds = [jax.typeof(array).manual_axis_type for array in jax.tree.leaves(arrays)]
    if any(kind.unreduced for kind in kinds):
        raise ValueError("an operand is a part of a sum over devices: jax.lax.psum it first.")
    return jax.sharding.ManualAxisType(varying=frozenset().union(*(k.varying for k in kinds)))


def vary_alike(*arrays: Any) -> Any:
    """The pytrees of arrays, inside `jax.shard_map` all of the type that `varying_as` gives them.

    What a written-out gradient (`jax.custom_vjp`) needs: one of what is the same on all devices
    would have to be added up over them, and is, where it passes back through here.
    """
    axes = varying_as(arrays).varying

    def vary(array: Array) -> Array:
        missing = axes - jax.typeof(array).manual_axis_type.varying
        return jax.lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return jax.tree.map(vary, arrays)
