"""A trained stack that is updated layer by layer, while the backward pass goes through the layers.

Ordinarily all gradients of all layers are there before the first parameter moves. An optimizer that
treats every number alone (AdamW, Lion) does not need that: a layer can be updated as soon as its
own gradient is known, and the gradient be forgotten. This is LOMO's fused update (Lv et al. 2023,
arXiv 2306.09782) with an optimizer that has state.

A `Learner` stands in the place of a trained array of stacked layers, in the model itself, and
brings along what its update needs. The loop over the layers (`models.streaming`) takes its value
layer by layer; where it is differentiated, the backward loop carries the learner and calls
`updated` for each layer. What then comes out as a learner's "gradient" is the learner after the
step: value and state with the layers' updates, and the sum of squares of the gradient that is gone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from qlora_jax.optim.paged import PAGED_STATE

_DEVICE = jax.memory.Space.Device

Update = Callable[
    [Array, Array, tuple[Array, ...], tuple[Array, ...]],
    tuple[Array, tuple[Array, ...], Array],
]
"""(gradient, value, state, shared) of one layer -> (value, state, sum of the gradient's squares)"""


class Rule:
    """How one parameter is updated, and a record of what became of it while a loss was traced.

    Attributes:
        update: of a layer's slice.
        runs: how many loops over layers took the parameter.
        updates: how many backward loops updated it.
    """

    def __init__(self, update: Update) -> None:
        self.update = update
        self.runs = self.updates = 0


@dataclasses.dataclass(frozen=True)
class Learner:
    """A trained parameter of stacked layers, and what its update needs.

    Attributes:
        value: the parameter, [layers, ...].
        state: a tuple of the optimizer's state arrays that belong to it, each of its shape, in any
            memory.
        squares: a float32 scalar, zero before a step; after it, the sum of squares of the
            parameter's gradient.
        shared: a tuple of what is the same for all layers: what the rule computed before the pass
            from step counts and the number of tokens.
        rule: the update.
    """

    # Any, since JAX's transformations put markers and None in the place of arrays.
    value: Any
    state: Any
    squares: Any
    shared: Any
    rule: Rule

    def at(self, index: Int[Array, ""]) -> Array:
        """One layer's value."""
        return _at(self.value, index)

    def updated(self, index: Int[Array, ""], gradient: Array) -> "Learner":
        """The learner after the update of one layer, in place where XLA can."""
        self.rule.updates += 1
        with jax.named_scope(PAGED_STATE):
            old = tuple(jax.device_put(_at(stack, index), _DEVICE) for stack in self.state)
            value, new, squares = self.rule.update(gradient, self.at(index), old, self.shared)
            state = zip(self.state, new, strict=True)
            return dataclasses.replace(
                self,
                value=_put(self.value, value, index),
                state=tuple(_put(stack, layer, index) for stack, layer in state),
                squares=self.squares + squares,
            )


jax.tree_util.register_dataclass(Learner, ["value", "state", "squares", "shared"], ["rule"])


def is_learner(node: Any) -> bool:
    """Whether a node of a tree is a `Learner`."""
    return isinstance(node, Learner)


def learners(tree: PyTree) -> list[Learner]:
    """Those of a tree, in order."""
    return [node for node in jax.tree.leaves(tree, is_leaf=is_learner) if is_learner(node)]


def _at(stack: Array, index: Int[Array, ""]) -> Array:
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


def _put(stack: Array, layer: Array, index: Int[Array, ""]) -> Array:
    """The stack with one layer replaced, in the memory where the stack lies."""
    space = jax.typeof(stack).memory_space
    layer = jax.device_put(jnp.asarray(layer, stack.dtype), space)
    return jax.lax.dynamic_update_index_in_dim(stack, layer, index, 0)
