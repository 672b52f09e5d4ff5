"""A model on several devices: every device has all of it, or each has its part.

XLA cuts a step's work up by where its arguments lie (GSPMD, arXiv 2105.04663), so a model is spread
by placing its weights, before the training state is made, and a batch by placing its rows:

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread(model, mesh)                    # data parallel: all weights on every device
    spread(model, mesh, over="data")       # fully sharded: an eighth of them on each
    spread_rows(batch, model_state)        # each device its rows; `fit` and `evaluate` do it

A model that is too large for one device is placed as it is read: `load_model(..., mesh=, over=)`.
Adapters are cut as the weights beside them, and the optimizer's state follows the adapters, paged
or not. Where weights are cut:

| weight | along | because |
|---|---|---|
| W [out, in], its codes and absmax | rows | packed columns share bytes; rows are whole blocks |
| LoRA's A [r, in], B [out, r] | rows; A's columns if r does not divide | rows lie in one piece |
| vocabulary [tokens, embed] | columns | of a table cut by rows, every device would get all |

To gather a stack's columns layer by layer, XLA first lays all of it out anew. A text looks up rows,
and a packed head decodes some rows at a time: XLA brings a table that is cut by rows to every
device for either. What does not divide evenly stays whole, and so does what is small (norms,
biases, offsets, a packed vocabulary's absmax, 1/17 of it in 8 bits).

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
from qlora_jax.nn.placing import COLUMNS, CUTS, ROWS, cut_sharding
from qlora_jax.processes import distribute
from qlora_jax.quant import QuantizedTensor

_Mesh = jax.sharding.Mesh | jax.sharding.AbstractMesh


class GathersItself(nnx.Module):
    """A module that gathers its weights on its own, and so has to know how they lie.

    Attributes:
        over: the axis of the mesh that they are cut along, set by `spread`; None: not cut.
    """

    over: str | None = None


def spread(model: nnx.Module, mesh: jax.sharding.Mesh, *, over: str | None = None) -> None:
    """Places a model's weights and adapters on the devices of a mesh, in place.

    Args:
        model: its arrays are moved, what lies in pinned host memory to host memory; of shapes
            (`nnx.eval_shape`) it is noted where they would lie.
        mesh, over: as `shardings_of` takes them.

    Raises:
        ValueError: as `shardings_of`.
    """
    shardings = shardings_of(model, mesh, over=over)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, GathersItself | Embedding):
            node.over = over

    def put(leaf: Any, sharding: jax.sharding.NamedSharding) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return distribute(leaf, sharding.with_memory_kind(leaf.sharding.memory_kind))

    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Variable):
            node.set_value(jax.tree.map(put, node.get_value(), shardings[path]))


def shardings_of(model: nnx.Module, mesh: _Mesh, *, over: str | None = None) -> dict[tuple, PyTree]:
    """Where a model's weights and adapters go, by the path of their Variable: a NamedSharding for
    each array, in the device's own memory.

    Args:
        model: concrete, or shapes alone (`nnx.eval_shape`).
        mesh: its axes are of type Auto.
        over: the mesh's axis that weights are cut along; None gives every device all of them.

    Raises:
        ValueError: an axis that the mesh does not have, or that is not of type Auto.
        TypeError: mesh is no mesh.
    """
    check_mesh(mesh)
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
    # The axes of matrices to be cut along, the first of them that divides.
    cuts: dict[int, tuple[int, ...]] = {}
    for _, node in nnx.iter_graph(model):
        if isinstance(node, QuantDense):
            cuts |= {id(getattr(node, name)): axes for name, axes in CUTS.items()}
        elif isinstance(node, Embedding):
            cuts[id(node.weight)] = (COLUMNS,)
    return {
        path: _shardings(node.get_value(), cuts.get(id(node), ()), mesh, over)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    }


def check_mesh(mesh: Any) -> None:
    """TypeError for a number of devices, or a list of them, in the place of a mesh."""
    if not isinstance(mesh, _Mesh):
        raise TypeError(
            f"mesh is {mesh!r}, but a jax.sharding.Mesh is needed: make one of 8 devices with "
            'jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)).'
        )


def _shardings(value: PyTree, axes: tuple[int, ...], mesh: _Mesh, over: str | None) -> Any:
    """Of a Variable's value: its matrices [..., rows, columns] are cut along the first axis of
    `axes` that divides."""

    def cut(leaf: Any, axes: tuple[int, ...]) -> jax.sharding.NamedSharding:
        return cut_sharding(leaf, axes, mesh, over)

    if not isinstance(value, QuantizedTensor):
        return jax.tree.map(lambda leaf: cut(leaf, axes), value)
    # Codes that are flat (rows of odd length) have no rows to cut.
    matrix = value.codes.ndim - len(value.stack_shape) == 2
    axes = axes if matrix else ()
    leaves, treedef = jax.tree.flatten(value)
    # codes | absmax, row after row | what double quantization adds
    each = [axes, (-1,) if axes == (ROWS,) else (), *[()] * (len(leaves) - 2)]
    return jax.tree.unflatten(treedef, [cut(leaf, a) for leaf, a in zip(leaves, each, strict=True)])


def spread_rows(batch: PyTree, weights: PyTree, *, axis: int = 0) -> PyTree:
    """A batch, its rows dealt out evenly to the devices that a model is spread over.

    Args:
        batch: NumPy's arrays, or JAX's: such as lie on several devices already stay there.
        weights: the model's arrays, or some of them; they say which mesh, and rows are cut along
            its first axis. Where they lie on one device, the batch is returned as it is.
        axis: of the rows in every array of the batch; one whose rows do not divide stays whole, and
            every device computes all of it.
    """
    meshes = (
        leaf.sharding.mesh
        for leaf in jax.tree.leaves(weights)
        if isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding)
    )
    mesh = next(meshes, None)
    if mesh is None or mesh.size == 1:
        return batch
    along = mesh.axis_names[0]

    def put(leaf: Any) -> Any:
        placed = isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1
        divides = leaf.ndim > axis and leaf.shape[axis] % mesh.shape[along] == 0
        # Across processes JAX has to be told where a whole array lies, too.
        if placed or not (divides or mesh.is_multi_process):
            return leaf
        spec = jax.sharding.PartitionSpec(*[None] * axis, along) if divides else jax.P()
        return distribute(leaf, jax.sharding.NamedSharding(mesh, spec))

    return jax.tree.map(put, batch)


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


def scores_of(x: Float[Array, "*batch embed"], head: Embedding) -> Float[Array, "*batch vocab"]:
    """`head.attend(x)`, x and the scores whole on every device if the head is cut and is more to
    gather than they are: in decoding."""
    mesh, rows = mesh_of_rows(x), x.size // x.shape[-1]
    vocab, embed = head.shape
    if mesh is None or head.over is None or rows * (vocab + embed) >= vocab * embed:
        return head.attend(x)
    everywhere = jax.sharding.NamedSharding(mesh, jax.P())
    # Of the scores, too: cut by rows they would have the head gathered all the same.
    scores = head.attend(jax.lax.with_sharding_constraint(x, everywhere))
    return jax.lax.with_sharding_constraint(scores, everywhere)


def gather_dense(layer: nnx.Module, *, beside: Float[Array, "batch ..."]) -> None:
    """Has a layer's adapters and dense weights whole, in place, if the rows that it takes are cut.

    Left cut they would cut their products by columns, and activations would be exchanged. Packed
    weights are left as they lie: their products gather them, or the rows where these are less.
    """
    gathered_elsewhere = {
        id(variable)
        for _, node in nnx.iter_graph(layer)
        if isinstance(node, GathersItself)
        for _, variable in nnx.iter_graph(node)
    }
    for _, node in nnx.iter_graph(layer):
        if not isinstance(node, nnx.Variable) or id(node) in gathered_elsewhere:
            continue
        if not isinstance(node.get_value(), QuantizedTensor):
            node.set_value(whole_beside(beside, node.get_value()))
