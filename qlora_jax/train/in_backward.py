"""A step that updates each layer in the backward pass, as its gradient arrives.

Ordinarily the backward pass leaves the gradients of all layers, and then the optimizer goes over
the parameters. Here the parameters of stacked layers are handed to the model as `optim.Learner`s,
which the backward loop over the layers updates one layer at a time: a layer's gradient lives until
its update, and the stack of gradients (as large as the adapters) is never there. What is trained
outside of the stacks (token rows, heads) takes the ordinary way in the same step.

The update of a layer is the optimizer's own `update`, given one parameter's slice of one layer and
the state that belongs to it. So the optimizer has to treat every number alone. What needs all
gradients first cannot be had: no clipping by the global norm, no accumulation.

The result is that of the ordinary step but for one rounding in Adam's second moment,
nu ← (1 - b2) · g² + b2 · nu. XLA's CPU compiler (LLVM) makes one fused multiply-add of the sum. It
rounds one of the two products and not the other, and which one depends on the code around: replayed
in float64, the ordinary step always rounds b2 · nu, and the backward loop always (1 - b2) · g². All
else has the same bits: gradients, first moments, a first step (where nu is 0), and Lion.

One number has to be known earlier than usual: gradients are divided by the trained tokens of the
step, which therefore must follow from the batch alone. Their count is computed from the traced loss
before the pass begins, by just the equations that it needs.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from qlora_jax.models import is_stacked
from qlora_jax.optim import Learner, Rule
from qlora_jax.optim.dataflow import LazyOutputs, computes, is_elementwise, sources, split_early
from qlora_jax.optim.per_parameter import by_path, only, owners, shapes
from qlora_jax.train.accumulate import mean_gradient

NAME = "update_in_backward"


class Updated(NamedTuple):
    """What a step leaves."""

    total: Float[Array, ""]
    """The loss, as the sum that was differentiated."""
    grad_norm: Float[Array, ""]
    params: PyTree
    opt_state: PyTree


def update_in_backward(
    loss: Callable[[PyTree], Float[Array, ""]],
    tx: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    tokens: Int[Array, ""],
) -> Updated:
    """The parameters after `tx`'s update by the gradient of `loss(params) / tokens`.

    Args:
        loss: a sum over tokens; it runs each stack of layers once, with `remat` "full" or
            "offload".
        tx: an optimizer that treats every number alone, as `optax.adamw(2e-4)`, paged or not.
        params, opt_state: before the step.
        tokens: the number of trained tokens.

    Raises:
        ValueError: no parameter lies in a stack of layers; `tx` does not treat every number alone;
            or a stack is not run exactly once.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in flat]
    inside = [index for index, (path, _) in enumerate(flat) if is_stacked(path)]
    outside = [index for index in range(len(flat)) if index not in inside]
    if not inside:
        raise ValueError(
            f"{NAME} is set, but no trained parameter lies in a stack of layers (a module named "
            "'layers'): leave it out for this model."
        )
    parts = _Parts(tx, params, opt_state)
    parts.refuse_unfit(inside)
    shared, rules = {}, {}
    for index in inside:
        shared[index], rules[index] = parts.learner(index, tokens)

    def total(learning: dict[int, tuple[Any, ...]], others: list[Array]) -> Float[Array, ""]:
        given: list[Any] = list(leaves)
        for index, leaf in zip(outside, others, strict=True):
            given[index] = leaf
        for index, (value, held, squares) in learning.items():
            given[index] = Learner(value, held, squares, shared[index], rules[index])
        return loss(jax.tree.unflatten(treedef, given))

    learning = {i: (leaves[i], parts.resting_state_of(i), jnp.zeros(())) for i in inside}
    summed, (learned, grads) = jax.value_and_grad(total, (0, 1))(
        learning, [leaves[index] for index in outside]
    )
    runs = {(rule.runs, rule.updates > 0) for rule in rules.values()}
    if runs != {(1, True)}:
        raise ValueError(
            f"{NAME} needs a loss whose gradient passes each stack of layers exactly once, but "
            f"the given one runs some {max(r for r, _ in runs)} times or without a gradient: "
            f"leave {NAME} out for this loss."
        )
    means = [mean_gradient(g, tokens, leaves[i].dtype) for i, g in zip(outside, grads, strict=True)]
    new, state = parts.updated(outside, means, [leaves[index] for index in outside])
    for index, (value, held, _) in learned.items():
        new[index] = value
        state |= dict(zip(parts.paths_of(index), held, strict=True))
    squares = sum(part[2] for part in learned.values())
    squares += sum(jnp.sum(jnp.square(mean.astype(jnp.float32))) for mean in means)
    return Updated(
        summed,
        jnp.sqrt(squares),
        jax.tree.unflatten(treedef, [new[index] for index in range(len(leaves))]),
        jax.tree.unflatten(jax.tree.structure(opt_state), [state[path] for path in parts.owner]),
    )


def only_micro_batch(batch: PyTree) -> PyTree:
    """The one micro-batch of a step's batch, whose leaves are [1, ...].

    Raises:
        ValueError: there are more, so that no layer's gradient is whole until the last is done.
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    if count != 1:
        raise ValueError(
            f"{NAME} is set and updates each layer in the one backward pass, but the batch has "
            f"{count} micro-batches: set gradient_accumulation_steps to 1, or leave {NAME} out."
        )
    return jax.tree.map(lambda leaf: leaf[0], batch)


def tokens_of_batch(
    loss: Callable[[PyTree, Any], tuple[Array, Int[Array, ""]]], model: PyTree, batch: PyTree
) -> Int[Array, ""]:
    """The token count that `loss(model, batch)` returns beside its sum, without the loss.

    Raises:
        ValueError: the count depends on the model's weights.
    """
    inputs = [*jax.tree.leaves(model), *jax.tree.leaves(batch)]
    traced = jax.make_jaxpr(lambda model, batch: loss(model, batch)[1])(model, batch)
    if any(index < len(jax.tree.leaves(model)) for index in sources(traced.jaxpr)[0]):
        raise ValueError(
            f"{NAME} needs the number of trained tokens before the pass, but the loss computes it "
            f"from the model: count them from the batch alone, or leave {NAME} out."
        )
    return LazyOutputs(traced, inputs).output(0)


class _Parts:
    """An optimizer and its state, taken apart by parameter. `None` is what belongs to none."""

    def __init__(self, tx: optax.GradientTransformation, params: PyTree, state: PyTree) -> None:
        self.tx, self.params, self.state = tx, params, state
        self.treedef = jax.tree.structure(params)
        self.owner = owners(tx, params, state, needed_by=NAME)
        self.held = dict(by_path(state))
        # Where `tx` lets its state rest, whatever memory the arguments are said to lie in.
        resting = jax.make_jaxpr(tx.init)(shapes(params)).out_avals
        self.space = {
            path: aval.memory_space for path, aval in zip(self.owner, resting, strict=True)
        }

    def paths_of(self, index: int | None) -> list[str]:
        """Of the state that belongs to a parameter."""
        return [path for path, who in self.owner.items() if who == index]

    def state_of(self, index: int | None) -> tuple[Array, ...]:
        return tuple(self.held[path] for path in self.paths_of(index))

    def resting_state_of(self, index: int) -> tuple[Array, ...]:
        """The same where it rests: in host memory, if `tx` pages it."""
        return tuple(
            jax.device_put(self.held[path], self.space[path]) for path in self.paths_of(index)
        )

    def refuse_unfit(self, inside: Collection[int]) -> None:
        """Raise unless the update of a layer's slice is the slice of the update."""
        leaves = jax.tree.leaves(self.params)
        for index in inside:
            for path in self.paths_of(index):
                leaf = self.held[path]
                alike = leaf.shape == leaves[index].shape
                if not (alike and jnp.issubdtype(leaf.dtype, jnp.floating)):
                    raise ValueError(
                        f"{NAME} needs an optimizer whose state has the parameters' shapes in "
                        f"floating point, but its state{path} is {leaf.dtype}{list(leaf.shape)} "
                        f"for a parameter of {list(leaves[index].shape)}: take AdamW or Lion in 32 "
                        "bits."
                    )
            if not self._is_elementwise(index):
                raise ValueError(
                    f"{NAME} needs an optimizer that treats every number alone, but the given one "
                    "computes with whole arrays (as clipping by a norm or a trust ratio does): "
                    "take AdamW or Lion without clipping."
                )

    def _is_elementwise(self, index: int) -> bool:
        """Whether the update of one parameter is one of its numbers, each alone, and the same for a
        layer's slice: a decay that goes by the number of axes is another one there."""
        alone = only(shapes(self.params), [index])
        whole, watched = self._traced(alone)
        layer, _ = self._traced(jax.tree.map(_slice_of, alone))
        return is_elementwise(whole, watched) and computes(whole) == computes(layer)

    def _traced(self, alone: PyTree) -> tuple[Any, list[bool]]:
        """The update of what is not left out, and which of its inputs belong to a parameter."""
        state = jax.eval_shape(self.tx.init, alone)
        traced = jax.make_jaxpr(self.tx.update)(alone, state, alone)
        mine = [self.owner[path] is not None for path, _ in by_path(state)]
        return traced.jaxpr, [True, *mine, True]

    def learner(self, index: int, tokens: Int[Array, ""]) -> tuple[tuple[Array, ...], Rule]:
        """(shared values, rule) of one parameter's `Learner`.

        The rule is `tx`'s own update, given a layer's slice of this parameter alone. What it
        computes from step counts and the number of tokens, such as Adam's bias corrections, is the
        same for all layers and is computed here, before the pass.
        """
        mine, common = self.paths_of(index), self.paths_of(None)

        def update(gradient: Array, value: Array, state: Any, shared: Any) -> Any:
            tokens, *counters = shared
            mean = mean_gradient(gradient, tokens, value.dtype)
            held = dict(zip(mine, state, strict=True)) | dict(zip(common, counters, strict=True))
            new, after = self.updated([index], [mean], [value], held)
            squares = jnp.sum(jnp.square(mean.astype(jnp.float32)))
            return new[index], tuple(after[path] for path in mine), squares

        value = _slice_of(jax.tree.leaves(self.params)[index])
        state = tuple(map(_slice_of, self.state_of(index)))
        shared = (tokens, *self.state_of(None))
        traced, out = jax.make_jaxpr(update, return_shape=True)(value, value, state, shapes(shared))
        before, after = split_early(traced, [False] * (2 + len(state)) + [True] * len(shared))

        def rest(gradient: Array, value: Array, state: Any, shared: Any) -> Any:
            found = after(list(shared), [gradient, value, *state])
            return jax.tree.unflatten(jax.tree.structure(out), found)

        return tuple(before(list(shared))), Rule(rest)

    def updated(
        self,
        indices: list[int],
        grads: list[Array],
        values: list[Array],
        held: dict[str, Array] | None = None,
    ) -> tuple[dict[int, Array], dict[str, Array]]:
        """`tx`'s update of these parameters alone: (parameters by index, state by path)."""
        held = self.held if held is None else held

        def placed(leaves: list[Array]) -> PyTree:
            at = dict(zip(indices, leaves, strict=True))
            count = len(jax.tree.leaves(self.params))
            every = [at.get(i, optax.MaskedNode()) for i in range(count)]
            return jax.tree.unflatten(self.treedef, every)

        alone = jax.eval_shape(self.tx.init, only(shapes(self.params), indices))
        state = jax.tree.unflatten(
            jax.tree.structure(alone), [held[path] for path, _ in by_path(alone)]
        )
        updates, after = self.tx.update(placed(grads), state, placed(values))
        new = optax.apply_updates(placed(values), updates)
        return dict(zip(indices, jax.tree.leaves(new), strict=True)), dict(by_path(after))


def _slice_of(stack: Any) -> jax.ShapeDtypeStruct:
    """One layer of a stack, as a shape."""
    return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype)
