"""One weight of a stack, which a kernel reads where it lies.

The layers of a model lie in stacks, and a loop over them takes each layer's part of every stack.
XLA hands that part to a Hopper kernel in place (from jax 0.11 on), if the loop's counter says which
it is. For a Triton-lowered kernel it makes a copy first: where few rows are multiplied, as in
decoding, a copy costs more than the product. So those kernels take the whole stack and the number
of the layer, and add up addresses themselves. So does the Hopper gemv, for weights whose number is
computed (a router's choice of experts) and, before jax 0.11, for all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


class InStack(NamedTuple):
    """An operand of a kernel, [layers, ...], of which the kernel sees one layer."""

    stack: Array


def layer_of(layer: Int[Array, ""], *stacks: Any) -> tuple[Any, ...]:
    """The layer's part of every stack; None stays None.

    Raises:
        ValueError, TypeError: a number that no layer of the first stack has.
    """
    check_layer(layer, len(stacks[0]))
    return tuple(
        None if stack is None else jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
        for stack in stacks
    )


_AXES = {"codes": 2, "absmax": 2, "nested_absmax": 2, "offset": 1}
"""The parts of a weight -> the axes that a stack of them has, at least."""


def layer_types(layer: Any, *stacks: Any) -> tuple[Any, ...]:
    """Shape and dtype of a layer's part of every stack, in `_AXES`' order; None stays None.

    Raises:
        ValueError, TypeError: these are no stacks of as many weights, or `layer` is in none.
    """
    codes = stacks[0]
    for (name, axes), stack in zip(_AXES.items(), stacks, strict=True):
        if stack is not None and (stack.ndim < axes or stack.shape[:1] != codes.shape[:1]):
            raise ValueError(
                f"layer is given, but {name} has shape {stack.shape}; expected a stack, with a "
                f"leading axis as long as that of codes {codes.shape}: leave layer out to "
                "multiply with one weight"
            )
    check_layer(layer, codes.shape[0])
    return tuple(
        None if stack is None else jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype)
        for stack in stacks
    )


def check_layer(layer: Any, layers: int) -> None:
    """Refuse what is not the number of one of so many layers; a traced one is taken at its word."""
    try:
        is_whole = jnp.ndim(layer) == 0 and jnp.issubdtype(jnp.result_type(layer), jnp.integer)
    except TypeError:
        is_whole = False
    if not is_whole:
        raise TypeError(f"layer is {layer!r}; expected a whole number, 0 to {layers - 1}")
    if not isinstance(layer, jax.core.Tracer) and not 0 <= int(layer) < layers:
        raise ValueError(
            f"layer is {layer}; expected 0 to {layers - 1}, one of the {layers} in the stack"
        )


def reading_layer(
    kernel: Callable[..., None], layer: Int[Array, ""], operands: tuple[Any, ...]
) -> tuple[Callable[..., None], tuple[Array, ...]]:
    """A kernel of plain operands for such as are `InStack`: the kernel and operands to run."""
    stacked = [isinstance(operand, InStack) for operand in operands]

    def read(layer_ref: Any, *refs: Any) -> None:
        number = layer_ref[0]
        inputs = [
            _LayerRef(ref, number) if in_stack else ref
            for ref, in_stack in zip(refs, stacked, strict=False)
        ]
        kernel(*inputs, *refs[len(stacked) :])

    plain = (operand.stack if isinstance(operand, InStack) else operand for operand in operands)
    return read, (jnp.reshape(layer, (1,)).astype(jnp.int32), *plain)


class _LayerRef:
    """A reference to one layer of a stack, indexed as one to that layer alone would be."""

    def __init__(self, ref: Any, layer: Array):
        self._ref, self._layer = ref, layer

    @property
    def at(self) -> "_LayerRefAt":
        return _LayerRefAt(self._ref, self._layer)

    def __getitem__(self, index: Any) -> Array:
        return self._ref[self._layer, index]


class _LayerRefAt(NamedTuple):
    ref: Any
    layer: Array

    def __getitem__(self, index: Any) -> Any:
        # All indices are arrays of one rank, as Pallas' lowering takes them.
        return self.ref.at[(jnp.full_like(index[0], self.layer), *index)]
