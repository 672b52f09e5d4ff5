"""A checkpoint's tensors into the places of an abstract model, one after another.

A tensor is quantized on the device and written into its layer's slice of a stack that is donated
and updated in place, so that neither the host nor the device ever holds more than the result and a
few tensors: no full-precision copy of the model exists.

On several devices the stacks are made where `models.spread` would put them, and a tensor's parts go
to the devices that hold those of its stack. What is still to be quantized passes through the first
device, one tensor at a time, and so has the same codes on any number of them.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from qlora_jax.checkpoints.checkpoint import Checkpoint, dense
from qlora_jax.checkpoints.matching import is_vocabulary, node_at
from qlora_jax.models import Slot, streaming
from qlora_jax.processes import distribute
from qlora_jax.quant import QuantConfig, QuantizedTensor, put_rows, quantize, rows_at_once


def fill(
    model: nnx.Module,
    checkpoint: Checkpoint,
    slots: dict[str, Slot],
    quant: QuantConfig | None,
    prepare: Callable[[str, tuple[str, ...], Any], Any],
    progress: bool,
    stream_weights: bool,
    places: Mapping[tuple, Any],
) -> None:
    """Reads every tensor into its place; the abstract Variables become arrays on the device.

    Args:
        model: abstract where `slots` lead.
        checkpoint: what is read.
        slots: by the name of each of its tensors, the place in the model.
        quant: how dense tensors of the file are quantized; None where they are packed already.
        prepare: (name, path, tensor) -> what to store of it; sees all but a vocabulary to pack.
        progress: shows a bar on standard error, if that is a terminal.
        stream_weights: the large leaves of stacks become arrays in pinned host memory.
        places: where on several devices the arrays of each path lie (`models.shardings_of`).

    Raises:
        ValueError: a damaged file; NaN or infinities in what the model holds as codes.
    """
    filled: dict[tuple[str, ...], Any] = {}
    finite: dict[str, Array] = {}
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("loading"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[tensor]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (progress and console.is_terminal),
    )
    with bar:
        sizes = {name: math.prod(checkpoint.tensors[name].shape) for name in slots}
        task = bar.add_task("loading", total=sum(sizes.values()), tensor="")
        largest, waiting = max(sizes.values()), 0
        for name, slot in slots.items():
            bar.update(task, tensor=name)
            path = slot.path
            struct = node_at(model, path).get_value()
            if path not in filled:
                hosted = stream_weights and bool(slot.stack_index)
                filled[path] = _empty(struct, hosted, places.get(path))
            if isinstance(struct, QuantizedTensor) and is_vocabulary(model, slot):
                filled[path] = _put_vocabulary(filled[path], dense(checkpoint.read(name)))
                finite[name] = _is_finite(filled[path])
                bar.advance(task, sizes[name])
                continue
            if waiting + sizes[name] > largest:
                # Or the reader runs ahead, and tensors pile up in front of the device.
                jax.block_until_ready((filled, finite))
                waiting = 0
            tensor = _brought(
                prepare(name, path, checkpoint.read(name)),
                filled[path],
                len(slot.stack_index),
                quant,
            )
            if isinstance(struct, QuantizedTensor):
                finite[name] = _is_finite(tensor)
            index = tuple(map(np.int32, slot.stack_index))
            filled[path] = put(filled[path], tensor, index, quant)
            del tensor  # or it would outlive its turn and lie beside the next one
            waiting += sizes[name]
            bar.advance(task, sizes[name])
    spoilt = [name for name, is_finite in jax.device_get(finite).items() if not is_finite]
    if spoilt:
        raise ValueError(
            f"{len(spoilt)} tensor(s) of {checkpoint.source} hold NaN or infinities, which would "
            f"spread through their blocks of codes, {spoilt[0]} first: the file is damaged, or "
            "training broke down before it was written."
        )
    for path, value in filled.items():
        node_at(model, path).set_value(value)


@jax.jit
def _is_finite(tensor: Any) -> Bool[Array, ""]:
    """Whether all floating point numbers of a tensor, dense or packed, are finite."""
    leaves = (leaf for leaf in jax.tree.leaves(tensor) if jnp.issubdtype(leaf.dtype, jnp.floating))
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _empty(struct: Any, hosted: bool, place: Any) -> Any:
    """Zeros of these shapes, in the memory where `streaming` looks for them, and where `place` says
    on several devices (None: on the default one)."""

    def zeros(leaf: Any, sharding: Any) -> Array:
        if hosted and streaming.streams(leaf):
            # Made on the host: zeros from the device would need room for the whole stack there.
            return streaming.to_host(np.zeros(leaf.shape, leaf.dtype), sharding)
        return jnp.zeros(leaf.shape, leaf.dtype, device=sharding)

    if place is None:
        return jax.tree.map(lambda leaf: zeros(leaf, None), struct)
    return jax.tree.map(zeros, struct, place)


def _brought(tensor: Any, stack: Any, axes: int, quant: QuantConfig | None) -> Any:
    """A file's tensor on the device; or, of a stack on several, its parts beside the stack's.

    Args:
        tensor: dense, or packed.
        stack: as `put` takes it.
        axes: how many leading axes the stack has that the tensor has not.
        quant: as `put` takes it.
    """
    if not isinstance(jax.tree.leaves(stack)[0].sharding, jax.sharding.NamedSharding):
        return jax.tree.map(jnp.asarray, tensor)
    if isinstance(tensor, QuantizedTensor) != isinstance(stack, QuantizedTensor):
        tensor = _in_form(jax.tree.map(jnp.asarray, tensor), stack, quant)

    leaves, treedef = jax.tree.flatten(tensor)
    places: list[Any] = [whole.sharding for whole in jax.tree.leaves(stack)]
    parts = []
    for leaf, place in zip(leaves, places, strict=True):
        # In the device's own memory, also where the stack rests on the host: `put` goes on.
        spec = jax.sharding.PartitionSpec(*place.spec[axes:])
        parts.append(distribute(leaf, jax.sharding.NamedSharding(place.mesh, spec)))
    return jax.tree.unflatten(treedef, parts)


def _put_vocabulary(codes: QuantizedTensor, matrix: np.ndarray) -> QuantizedTensor:
    """The packed matrix, which is used up, filled from a dense one on the host, a piece of its rows
    on the device at a time."""
    config = QuantConfig(codes.quant_type, codes.blocksize, codes.double_quant)
    size = rows_at_once(codes.shape[1])
    for start in range(0, codes.shape[0], size):
        piece = quantize(jnp.asarray(matrix[start : start + size]), config)
        codes = put_piece(codes, _brought(piece, codes, 0, None), jnp.int32(start))
        jax.block_until_ready(codes)
    return codes


@functools.partial(jax.jit, donate_argnums=0)
def put_piece(codes: QuantizedTensor, rows: QuantizedTensor, start: Array) -> QuantizedTensor:
    """The packed matrix, which is used up, with rows from `start` on in their place."""
    # The tree's static part is the matrix's: its dtype is what the model computes in.
    return put_rows(codes, start + jnp.arange(rows.shape[0]), rows)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def put(stack: Any, tensor: Any, index: tuple[Array, ...], quant: QuantConfig | None) -> Any:
    """The stack, which is used up, with one tensor in its place.

    Args:
        stack: arrays, or a `QuantizedTensor`, with leading axes for layers (and experts); in
            device memory, or in pinned host memory, where they are updated in place too.
        tensor: one of them, from a file: dense, or packed. What the file packs and the model does
            not (a router, a classifier's head) is dequantized.
        index: where, along the leading axes.
        quant: how a dense tensor is quantized, from the file's own numbers; None where it is not.
    """
    tensor = _in_form(tensor, stack, quant)
    wholes, treedef = jax.tree.flatten(stack)
    # The tree's static part is the stack's: its dtype is what the model computes in.
    filled = []
    for whole, part in zip(wholes, jax.tree.leaves(tensor), strict=True):
        # One more axis for each that the stack has, and to where the stack rests: a slice of it.
        part = part.astype(whole.dtype).reshape((1,) * len(index) + part.shape)
        part = jax.device_put(part, jax.typeof(whole).memory_space)
        start = (*index, *[jnp.int32(0)] * (whole.ndim - len(index)))
        filled.append(jax.lax.dynamic_update_slice(whole, part, start))
    return jax.tree.unflatten(treedef, filled)


def _in_form(tensor: Any, stack: Any, quant: QuantConfig | None) -> Any:
    """A tensor quantized or dequantized, where its stack is in the other form."""
    packed = isinstance(tensor, QuantizedTensor)
    if isinstance(stack, QuantizedTensor):
        return tensor if packed or quant is None else quantize(tensor, quant)
    return tensor.dequantize(stack.dtype) if packed else tensor
