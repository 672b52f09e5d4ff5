"""A training step's arguments on several cards: which card has which part of them.

The step of `models.spread`: the batch is cut by rows, weights are whole on every card or cut, and
adapters, their gradients and the optimizer's state lie as the weights beside them. Only shapes are
placed here, on cards that are here or are described, and the compiler counts what each of them has.
"""

from contextlib import AbstractContextManager, nullcontext

import jax
import numpy as np
from jaxtyping import PyTree

from pallas_kernels.cards import Card
from pallas_kernels.compile_for import card_mesh, tracing_for
from qlora_jax.optim.per_parameter import by_path
from qlora_jax.train import HostTraffic
from qlora_jax.train.traffic import Crossing

AXIS = "data"


def mesh_of(card: Card | None, count: int) -> jax.sharding.Mesh:
    """So many cards of a machine; None takes those that are here.

    Raises:
        ValueError: there are not so many here.
    """
    if card is not None:
        return card_mesh(card, count)
    here = jax.devices()
    if count > len(here):
        raise ValueError(
            f"devices is {count}, but this process has {len(here)} "
            f"({here[0].device_kind}): plan for so many, or name a card."
        )
    return jax.sharding.Mesh(
        np.asarray(here[:count]), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
    )


def traced_for(card: Card | None, count: int) -> AbstractContextManager[object]:
    """`tracing_for` so many of the card; None is this machine."""
    return nullcontext() if card is None else tracing_for(card, count)


def by_rows(batch: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """A step's batch, leaves [accumulation, batch, ...], cut along its rows."""
    return jax.tree.map(lambda leaf: _at(leaf, mesh, None, AXIS), batch)


def beside(parameters: PyTree, state: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
    """A training state whose leaves lie as the parameters that they belong to; others are whole.

    An optimizer keeps trees like the parameters', so that a moment's path ends as its parameter's.
    """
    places = dict(by_path(parameters))

    def place(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        owner = next((places[end] for end in places if path.endswith(end)), None)
        if owner is None or owner.shape != leaf.shape:
            return _at(leaf, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=owner.sharding)

    leaves = [place(path, leaf) for path, leaf in by_path(state)]
    return jax.tree.unflatten(jax.tree.structure(state), leaves)


def with_cut_weights(traffic: HostTraffic, count: int) -> HostTraffic:
    """What a card moves that has its part of all but the activations, of what it moves with all."""

    def part(name: str, moved: Crossing) -> Crossing:
        return moved if name == "activations" else Crossing(*(-(-size // count) for size in moved))

    return HostTraffic(*(part(name, moved) for name, moved in traffic._asdict().items()))


def _at(
    leaf: jax.ShapeDtypeStruct, mesh: jax.sharding.Mesh, *entries: str | None
) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*entries))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
