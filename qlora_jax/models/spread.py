"""A model on several devices: every device has all of it, or each has its part.

XLA cuts a step's work up by where its arguments lie (GSPMD, arXiv 2105.04663), so a model is spread
by placing its weights, before the training state is made, and a batch by placing its rows:

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread(model, mesh)                    # data parallel: all weights on every device
    spread(model, mesh, over="data")       # fully sharded: an eighth of them on each
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    batch = jax.device_put(batch, rows)    # leaves are [accumulation, batch, ...]

Adapters are cut as the weights beside them, and the optimizer's state follows the adapters, paged
or not. Where weights are cut:

| weight | along | because |
|---|---|---|
| W [out, in], its codes and absmax | rows | packed columns share bytes; rows are whole blocks |
| LoRA's A [r, in], B [out, r] | in, out | r is small |
| vocabulary [words, embed] | columns | of a table cut by rows, every device would get all |

A text looks up rows, and a packed head decodes some rows at a time: XLA brings a table that is cut
by rows to every device for either. What does not divide evenly stays whole, and so does what is
small (norms, biases, offsets, a packed vocabulary's absmax, 1/17 of it in 8 bits).

What enters a layer is kept cut by rows of the batch (`cut_by_rows`). Left to itself, XLA cuts it as
the vocabulary is cut, by columns, and every device computes for all rows.
"""

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, PyTree

from pallas_kernels import mesh_of_rows
from qlora_jax.models.embedding import Embedding
from qlora_jax.nn import QuantDense
from qlora_jax.quant import QuantizedTensor

_ROWS, _COLUMNS = -2, -1


def spread(model: nnx.Module, mesh: jax.sharding.Mesh, *, over: str | None = None) -> None:
    """Places a model's weights and adapters on the devices of a mesh, in place.

    Args:
        model: its arrays are moved, what lies in pinned host memory to host memory; of shapes
            (`nnx.eval_shape`) it is noted where they would lie.
        mesh: its axes are of type Auto.
        over: the mesh's axis that weights are cut along; None gives every device all of them.

    Raises:
        ValueError: an axis that the mesh does not have, or that is not of type Auto.
    """
    if over is not None and over not in mesh.axis_names:
        raise ValueError(
            f"over is {over!r}, but the mesh has the axes {', '.join(map(repr, mesh.axis_names))}: "
            "name one of them, or None for all weights on every device."
        )
    if any(kind != jax.sharding.AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"the mesh's axes are of types {mesh.axis_types}, but XLA is to cut the work up by "
            "itself: make it with axis_types=(jax.sharding.AxisType.Auto,) for each axis."
        )
    cuts: dict[int, int] = {}
    for _, node in nnx.iter_graph(model):
        if isinstance(node, QuantDense):
            cuts |= {id(node.kernel): _ROWS, id(node.lora_A): _COLUMNS, id(node.lora_B): _ROWS}
        elif isinstance(node, Embedding):
            cuts[id(node.weight)] = _COLUMNS
    for _, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            axis = None if over is None else cuts.get(id(node))
            node.set_value(_spread(node.get_value(), axis, mesh, over))


def devices_of_rows(x: Float[Array, "batch ..."]) -> int:
    """How many devices `cut_by_rows` cuts x over."""
    mesh = mesh_of_rows(x)
    return 1 if mesh is None else mesh.size


def cut_by_rows(x: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    """x, whose rows lie on the devices of its mesh one after another, where they divide evenly."""
    mesh = mesh_of_rows(x)
    if mesh is None:
        return x
    free = [jax.sharding.PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names[0], *free))
    return jax.lax.with_sharding_constraint(x, at)


def whole_beside(x: Float[Array, "batch ..."], weights: PyTree) -> PyTree:
    """The weights, gathered here and not where they are used, if x is cut by rows."""
    mesh = mesh_of_rows(x)
    if mesh is None:
        return weights
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.lax.with_sharding_constraint(weights, everywhere)


def _spread(value: PyTree, axis: int | None, mesh: jax.sharding.Mesh, over: str | None) -> PyTree:
    """A Variable's value with its matrices [..., rows, columns] cut along one of the two axes."""

    def put(leaf: Any, axis: int | None) -> Any:
        parts: list[str | None] = [None] * leaf.ndim
        if axis is not None and over is not None and leaf.shape[axis] % mesh.shape[over] == 0:
            parts[axis] = over
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*parts))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return jax.device_put(leaf, sharding.with_memory_kind(leaf.sharding.memory_kind))

    if not isinstance(value, QuantizedTensor):
        return jax.tree.map(lambda leaf: put(leaf, axis), value)
    # Codes that are flat (rows of odd length) have no rows to cut.
    matrix = value.codes.ndim - len(value.stack_shape) == 2
    axis = axis if matrix else None
    leaves, treedef = jax.tree.flatten(value)
    # codes | absmax, row after row | what double quantization adds
    axes = [axis, -1 if axis == _ROWS else None, *[None] * (len(leaves) - 2)]
    return jax.tree.unflatten(treedef, [put(leaf, a) for leaf, a in zip(leaves, axes, strict=True)])
