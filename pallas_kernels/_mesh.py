"""An op on the devices of a mesh: each runs the kernel on its own part.

XLA cuts a program up over devices by itself (GSPMD, arXiv 2105.04663), but a kernel is one piece to
it: it would bring all of x and W to every device and have each compute all of y. So an op says how
it may be cut (`jax.experimental.custom_partitioning`), and is called once more on the arrays of one
device, for which `dispatch` chooses anew. Where the arrays lie decides:

| rows of x | rows of W | what a device computes of y = x · Wᵀ |
|---|---|---|
| cut | whole | its rows: data parallel |
| cut | cut along the same axis of the mesh | its rows, having gathered W, packed: fully sharded |
| whole, or cut along another axis | cut | its columns: tensor parallel |
| few, cut | cut along the same axis | its columns of all rows: x is less to gather than W |

dy · W sums over W's rows: where they stay cut, each device has a part of every sum, and the parts
are added. Columns of x and W are never cut: they are gathered first.

On one device, and inside `jax.shard_map`, nothing of this is in the program. `jax.vmap` over x
alone is the same op with more rows; over weights, it takes this away: stacks of them belong under
`jax.lax.scan`.

All this is about meshes that XLA decides on; for those whose axes are `Explicit` see
`_sharding_types`.

XLA cuts its own implementation up by itself, but badly in one point: a fully sharded weight is
gathered decoded, in 16 bits. `gather_packed` has the codes gathered. (It cannot be cut as the
kernels are, because XLA for TPUs knows nothing of `custom_partitioning`: jax issue 38196.)
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from pallas_kernels._arguments import Layout
from pallas_kernels._batching import in_turn
from pallas_kernels._sharding_types import (
    axes_of,
    in_auto_axes,
    product_spec,
    rows_as_cut,
    spec_entries,
)
from pallas_kernels._stack import layer_of
from pallas_kernels._triton_config import stack_is_addressable
from pallas_kernels.codebooks import NESTED_BLOCKSIZE

Op = Literal["forward", "transposed", "dequantize"]
"""x · Wᵀ, dy · W, or W itself."""


class Parts(NamedTuple):
    """An op's arrays in the order of its arguments, or what belongs to each; None: not given."""

    x: Any
    codes: Any
    absmax: Any
    nested_absmax: Any
    offset: Any
    bias: Any = None
    lora: Any = None
    layer: Any = None

    def of_layer(self) -> "Parts":
        """With the weight taken out of its stack, if it lies in one."""
        if self.layer is None:
            return self
        weight = layer_of(self.layer, *self[_WEIGHT])
        return self._replace(**dict(zip(self._fields[_WEIGHT], weight, strict=True)), layer=None)


_WEIGHT = slice(1, 5)

_TAKES: dict[Op, slice] = {
    "forward": slice(0, 7),
    "transposed": slice(0, 5),
    "dequantize": _WEIGHT,
}
"""op -> its arguments among `Parts`, without a `layer`."""


def _arguments(op: Op, parts: Parts) -> tuple[Any, ...]:
    return (*parts[_TAKES[op]], *(() if parts.layer is None else (parts.layer,)))


class Call:
    """A function with keyword arguments, equal to another of the same: a key for `jax.jit`."""

    def __init__(self, function: Callable[..., Array], **options: Any) -> None:
        self._function, self._options = function, tuple(sorted(options.items()))

    def __call__(self, *arrays: Any, **more: Any) -> Array:
        return self._function(*arrays, **dict(self._options), **more)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Call) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple:
        return self._function, self._options


def over_devices(
    parts: Parts,
    *,
    op: Op,
    layout: Layout,
    whole: Call,
    part: Call | None,
    wider: Call | None = None,
) -> Array:
    """Run an op on one device or several.

    Args:
        parts: its arrays.
        op: which one.
        layout: of the weight.
        whole: the kernel for these arrays, where one device has them all.
        part: the op for a device's part of them: takes `shape`, the part's of the weight. None for
            what XLA cuts up by itself.
        wider: the op for more rows of x, likewise; None where the same kernel has to run.

    Returns:
        What `whole` returns.
    """

    def run(parts: Parts) -> Array:
        if part is None:
            return whole(*_arguments(op, parts))
        return _by_parts(parts, op=op, layout=layout, whole=whole, part=part, wider=wider)

    def result(types: Parts) -> PartitionSpec:
        rows = rows_as_cut(types.codes, layout.shape)
        if op == "dequantize":
            return PartitionSpec(rows, *[None] * (len(layout.shape) - 1))
        return product_spec(types.x, None if op == "transposed" else rows)

    return in_auto_axes(run, parts, result=result)


@functools.partial(jax.jit, static_argnames=("op", "layout", "whole", "part", "wider"))
def _by_parts(
    parts: Parts, *, op: Op, layout: Layout, whole: Call, part: Call, wider: Call | None
) -> Array:
    """A kernel on all of an op's arrays or, where they are cut, `part` on each device's."""

    @custom_partitioning
    def cut(parts: Parts) -> Array:
        # Jitted, because the kernels' tables are constants, which only an inner jit may hold.
        return jax.jit(lambda parts: whole(*_arguments(op, parts)))(parts)

    def partition(mesh: Mesh, shapes: tuple[Parts], _result: Any) -> tuple:
        places = _places(op, layout, mesh, shapes[0])

        def on_one_device(parts: Parts) -> Array:
            shape = (layout.shape[0] // _ways(mesh, places.rows), *layout.shape[1:])
            # `dispatch` and Pallas ask the mesh for the card.
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                result = part(*_arguments(op, parts), shape=shape)
            return jax.lax.psum(result, places.added) if places.added else result

        return mesh, on_one_device, places.result, (places.parts,)

    cut.def_partition(partition, sharding_rule=_sharding_rule(op, layout, parts))

    @jax.custom_batching.custom_vmap
    def one(parts: Parts) -> Array:
        return cut(parts)

    @one.def_vmap
    def many(size: int, is_stack: list[Parts], parts: Parts) -> tuple[Array, bool]:
        stacked = is_stack[0]
        if wider is not None and _is_of_rows(stacked):
            if parts.lora is not None and not stacked.lora[0]:
                xa, b = parts.lora
                parts = parts._replace(lora=(jnp.broadcast_to(xa, (size, *xa.shape)), b))
            return wider(*_arguments(op, parts), shape=layout.shape), True
        each = _over_weights(lambda parts: whole(*_arguments(op, parts)))
        return jax.vmap(each, in_axes=(_axes(stacked),))(parts), True

    return one(parts)


def _is_of_rows(stacked: Parts) -> bool:
    """Whether `jax.vmap` maps x, and nothing that all of its rows share."""
    b = None if stacked.lora is None else stacked.lora[1]
    return bool(stacked.x) and not any((*stacked[_WEIGHT], stacked.bias, b, stacked.layer))


def _axes(stacked: Parts) -> Any:
    return jax.tree.map(lambda stack: 0 if stack else None, stacked)


def _over_weights(kernel: Callable[[Parts], Array]) -> Callable[[Parts], Array]:
    """A kernel under `jax.vmap`, however often: batched by Pallas, or one after another where all
    the codes together are too many for that."""

    @jax.custom_batching.custom_vmap
    def one(parts: Parts) -> Array:
        return kernel(parts)

    @one.def_vmap
    def many(_size: int, is_stack: list[Parts], parts: Parts) -> tuple[Array, bool]:
        batched = kernel if stack_is_addressable(parts.codes.size) else in_turn(kernel)
        each = jax.vmap(batched, in_axes=(_axes(is_stack[0]),))
        return _over_weights(each)(parts), True

    return one


class _Places(NamedTuple):
    """Where a device's part of an op lies in the whole."""

    parts: Parts
    result: NamedSharding
    rows: Any
    """What W's rows are cut along: an entry of a PartitionSpec."""
    added: tuple[str, ...]
    """Axes of the mesh along which results are parts of a sum."""


def _places(op: Op, layout: Layout, mesh: Mesh, parts: Parts) -> _Places:
    """The cut of an op whose arrays lie as `parts` (shapes with shardings) do."""
    x = () if parts.x is None else _leading(mesh, parts.x)
    # Whatever layer of a stack it is, a device needs the same part of it.
    stack = () if parts.layer is None else (None,)
    rows = _rows_of_weight(layout, mesh, parts.codes, stack)
    both = {axis for entry in x for axis in axes_of(entry)} & set(axes_of(rows))
    if both and _is_less_to_send(layout, parts.x):
        x = tuple(tuple(axis for axis in axes_of(entry) if axis not in both) for entry in x)
    elif both:
        rows = None

    def at(*entries: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*entries))

    places = Parts(
        x=None if parts.x is None else at(*x, rows if op == "transposed" else None),
        codes=at(*stack, rows, *[None] * (parts.codes.ndim - len(stack) - 1)),
        absmax=at(*stack, rows),
        nested_absmax=None if parts.nested_absmax is None else at(*stack, rows),
        offset=None if parts.offset is None else at(*stack),
        bias=None if parts.bias is None else at(rows),
        lora=None if parts.lora is None else (at(*x, None), at(rows, None)),
        layer=None if parts.layer is None else at(),
    )
    if op == "dequantize":
        return _Places(places, at(rows, *[None] * (len(layout.shape) - 1)), rows, ())
    if op == "transposed":
        return _Places(places, at(*x, None), rows, axes_of(rows))
    return _Places(places, at(*x, rows), rows, ())


def _is_less_to_send(layout: Layout, x: Any) -> bool:
    """Whether rows of activations and their results are less than a packed weight: in decoding."""
    rows = x.size // x.shape[-1]
    return rows * sum(layout.shape) * x.dtype.itemsize < layout.nbytes


def _leading(mesh: Mesh, x: Any) -> tuple:
    """What the axes of x but the last are cut along; None for one that does not divide evenly."""
    cuts = zip(_spec(x)[:-1], x.shape[:-1], strict=True)
    return tuple(entry if size % _ways(mesh, entry) == 0 else None for entry, size in cuts)


def _rows_of_weight(layout: Layout, mesh: Mesh, codes: Any, stack: tuple) -> Any:
    """What W's rows are cut along, if its parts are weights again; else None.

    A part needs its own rows of codes, whole blocks of them, and whole nested blocks of those.
    `stack` has an entry for each axis before those of W.
    """
    if codes.ndim - len(stack) != len(layout.shape) or not layout.rows_are_whole_blocks:
        return None
    rows = _spec(codes)[len(stack)]
    ways = _ways(mesh, rows)
    divides = NESTED_BLOCKSIZE * ways if layout.double_quant else ways
    return rows if layout.shape[0] % ways == 0 and layout.blocks % divides == 0 else None


def _spec(array: Any) -> tuple:
    """The entries of an array's PartitionSpec, one for each of its axes."""
    if not isinstance(array.sharding, NamedSharding):
        raise ValueError(
            f"an array of shape {array.shape} lies on devices that are no mesh ({array.sharding}); "
            "expected a jax.sharding.NamedSharding: place the program's arguments with one"
        )
    return spec_entries(array)


def _ways(mesh: Mesh, entry: Any) -> int:
    """Into how many parts an entry of a PartitionSpec cuts."""
    return math.prod(mesh.shape[axis] for axis in axes_of(entry))


def _sharding_rule(op: Op, layout: Layout, parts: Parts) -> str:
    """Which axes of the arrays are one, for XLA's decision where the result lies (Shardy).

    Rows of x are rows of y. That rows of W are columns of y is not said: XLA would cut y by columns
    wherever weights are cut, and bring it back to rows again.
    """
    names = {"x": "... x", "absmax": "a", "nested_absmax": "b", "offset": "", "bias": "c"}
    stack = 0 if parts.layer is None else 1
    names["codes"] = " ".join(f"w{axis}" for axis in range(parts.codes.ndim - stack))
    if stack:
        names |= {name: f"l {names[name]}" for name in Parts._fields[_WEIGHT]}
    names |= {"lora": "... d, e f", "layer": ""}
    given = [names[name] for name, part in parts._asdict().items() if part is not None]
    result = "... y"
    if op == "dequantize":
        first = "w0" if parts.codes.ndim == len(layout.shape) else "y0"
        result = " ".join([first, *(f"y{axis}" for axis in range(1, len(layout.shape)))])
    return f"{', '.join(given)} -> {result}"


def mesh_of_rows(x: Array, axis: int = 0) -> AbstractMesh | None:
    """The mesh of a traced array's program, if it can cut the array's rows, else None.

    It can where it has several devices, one axis that XLA cuts things along by itself, and divides
    the array's `axis` evenly. Whether XLA does cut the array so is not known while a program is
    traced.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.axis_types != (AxisType.Auto,) or mesh.size == 1 or x.shape[axis] % mesh.size:
        return None
    return mesh


def gather_packed(x: Array, codes: Array, absmax: Array, *, layout: Layout) -> tuple[Array, Array]:
    """codes and absmax, wanted whole on every device where x's rows are cut and are many.

    They are many where they and their results would be more to send than a packed weight.
    """
    mesh = mesh_of_rows(x)
    if mesh is None or _is_less_to_send(layout, x):
        return codes, absmax
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint((codes, absmax), everywhere)
