"""Where the arrays of a `QuantDense` lie on several devices.

`models.spread` places whole models by these rules. A layer that gets its adapters later puts them
beside its weight, or a training step would find its arguments on different devices.
"""

from typing import Any

import jax
from jaxtyping import Array

from qlora_jax.processes import distribute
from qlora_jax.quant import QuantizedTensor

ROWS, COLUMNS = -2, -1

CUTS = {"kernel": (ROWS,), "lora_A": (ROWS, COLUMNS), "lora_B": (ROWS,)}
"""By a Variable's name, the axes that its matrices may be cut along: the first that divides."""


def cut_sharding(
    leaf: Any,
    axes: tuple[int, ...],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    over: str | None,
) -> jax.sharding.NamedSharding:
    """An array [..., rows, columns] cut over the devices of a mesh along the first of the `axes`
    that the mesh's axis `over` divides; whole on each of them where none does, or `over` is None.
    """
    parts: list[str | None] = [None] * leaf.ndim
    if over is not None:
        divide = (axis for axis in axes if leaf.shape[axis] % mesh.shape[over] == 0)
        axis = next(divide, None)
        if axis is not None:
            parts[axis] = over
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*parts))


def beside(weight: Array | QuantizedTensor, **fresh: Array) -> tuple[Array, ...]:
    """Fresh adapters, by the names of `CUTS`, on the devices that a layer's weight lies on: cut
    along the axis of an Auto mesh that its rows are cut along, else whole on each."""
    codes = jax.tree.leaves(weight)[0]
    if isinstance(codes, jax.core.Tracer | jax.ShapeDtypeStruct):
        return tuple(fresh.values())
    there = codes.sharding

    def put(name: str, array: Array) -> Array:
        if isinstance(array, jax.core.Tracer) or array.sharding.device_set == there.device_set:
            return array
        if isinstance(there, jax.sharding.NamedSharding):
            over = _axis_of_rows(weight, codes, there)
            return distribute(array, cut_sharding(array, CUTS[name], there.mesh, over))
        return distribute(array, there.with_memory_kind("device"))

    return tuple(put(name, array) for name, array in fresh.items())


def _axis_of_rows(
    weight: Array | QuantizedTensor, codes: Array, at: jax.sharding.NamedSharding
) -> str | None:
    """The one axis of an Auto mesh that the rows of a weight, or a stack of them, are cut along."""
    if isinstance(weight, QuantizedTensor) and codes.ndim - len(weight.stack_shape) != 2:
        return None  # flat codes, of rows of odd length
    entry = (*at.spec, *[None] * (codes.ndim - len(at.spec)))[ROWS]
    if not isinstance(entry, str):
        return None
    kind = dict(zip(at.mesh.axis_names, at.mesh.axis_types, strict=True))[entry]
    return entry if kind == jax.sharding.AxisType.Auto else None
