"""Where does Adam live? In host memory, one leaf at a time on the card.

QLoRA (arXiv 2305.14314, section 3, "Paged Optimizers") keeps Adam's moments in CUDA unified
memory, so that a spike of activation memory pushes them to the host and an optimizer update
pulls them back. XLA knows every buffer of a step before it runs, so nothing needs to be
guessed: `paged` keeps the moments in *pinned host memory* always, and the jitted update brings
one leaf in, updates it, and sends it back before the next but one comes.

The mental model: an optax state is a tree in which some leaves belong to one parameter (the
moments) and some to none (the step count). The wrapped `update` is traced as it stands, for all
parameters, and its equations are then carried out parameter by parameter: fetch this parameter's
state, compute what its update needs, return the state. The arithmetic is therefore the unpaged
one, equation by equation; what is shared, such as Adam's bias corrections, is computed once. The
fetch of a leaf is tied to the return of the one before last, so that the compiler may fetch one
leaf while another computes, but never more than that. Small ones come first, since every gradient
that is used up leaves room, and one that is much larger than the others comes alone.

This needs a transformation that treats every parameter alone: Adam, AdamW, Lion, SGD, schedules,
weight decay with masks. One that looks across parameters, such as clipping by the global norm,
belongs outside: `optax.chain(optax.clip_by_global_norm(0.3), paged(optax.adamw(2e-4)))`. `paged`
reads the data flow of the traced update and refuses what mixes parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from qlora_jax.optim.dataflow import LazyOutputs, sources
from qlora_jax.optim.per_parameter import by_path, only, owners, shapes, to_devices_of, wrapped

_HOST = jax.memory.Space.Host
_DEVICE = jax.memory.Space.Device

# 32 MiB of a float32 moment: as much as 32 matrices A of rank 64 and 4096 inputs.
_GROUP = 2**23

PAGED_STATE = "paged_state"
"""The name (`jax.named_scope`) of the copies, for whoever counts or profiles them."""


def paged(
    inner: optax.GradientTransformation, *, min_size: int = 100_000
) -> optax.GradientTransformationExtraArgs:
    """Keep the per-parameter state of `inner` in pinned host memory between updates.

    The state has the structure of `inner`'s own state and, under `jax.jit`, the same bits: only
    the memory it rests in differs, so a checkpoint moves between paged and unpaged runs. Step
    counters and other state that belongs to no single parameter stay on the device.

    Args:
      inner: a transformation that treats every parameter alone, as `optax.adamw(2e-4)`.
      min_size: state leaves with fewer elements than this stay on the device, since a transfer
        costs more than the room they take. The default is bitsandbytes'; 0 pages everything.

    Returns:
      A gradient transformation. A jitted step that returns its state should pass
      `out_shardings=resting_shardings(state)`, so that the moments rest on the host, and donate
      parameters and state, so that they are updated in place: both, and in the order in which it
      returns them. XLA pairs donated arrays with results by their size, and one in host memory
      paired with a result on the device ends the process ("memory kind does not match", or
      "Aborted"; jax 0.10 to 0.12).

      State on the host is bound to its device, and then so is all that a step returns. Bind what
      goes into the first step, too, or the second compiles the program again:
      `tree = jax.device_put(tree, jax.tree.map(lambda leaf: leaf.sharding, tree))`.

      What chooses between the state before an update and after it (`optax.MultiSteps`,
      `optax.apply_if_finite`) gives the same numbers, but on a card it chooses on the host, or
      brings all of the state in at once. Sum gradients over micro-batches inside of the step
      instead, as `train.make_train_step` does.

    Raises:
      TypeError: `inner` is no transformation.
      ValueError: at `init` or `update`, if `inner` mixes parameters.
    """
    if min_size < 0:
        raise ValueError(f"min_size must be 0 or more elements, but is {min_size}.")
    inner = wrapped(inner, "paged")

    def moved(leaf: jax.Array, space: jax.memory.Space) -> jax.Array:
        with jax.named_scope(PAGED_STATE):
            return jax.device_put(leaf, space) if leaf.size >= min_size else leaf

    def init(params: PyTree) -> PyTree:
        whole = jax.eval_shape(inner.init, params)
        owner = owners(inner, params, whole, needed_by="paged")
        shared = jax.tree.map(to_devices_of(params), inner.init(only(params, ())))
        parts = [dict(by_path(shared))]
        # Group by group, so that the card never holds the whole state.
        for group in _groups([leaf.size for leaf in jax.tree.leaves(params)], _GROUP):
            part = dict(by_path(inner.init(only(params, group))))
            parts.append(
                {p: moved(jnp.asarray(v), _HOST) for p, v in part.items() if owner[p] in group}
            )
        leaves = {path: leaf for part in parts for path, leaf in part.items()}
        return jax.tree.unflatten(jax.tree.structure(whole), [leaves[p] for p in owner])

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        gradients, treedef = jax.tree.flatten(updates)
        stored, state_treedef = jax.tree.flatten(state)
        owner = list(owners(inner, updates, state, needed_by="paged").values())
        count = len(gradients)

        def flat(updates: PyTree, state: PyTree, params: PyTree | None) -> list[Any]:
            return jax.tree.leaves(inner.update(updates, state, params, **extra))

        traced = jax.make_jaxpr(flat)(shapes(updates), shapes(state), shapes(params))
        owner_out = [*range(count), *owner]
        owner_in = [*owner_out, *(range(count) if params is not None else ())]
        _refuse_mixing(sources(traced.jaxpr), owner_in, owner_out)

        lazy = LazyOutputs(traced, [*gradients, *stored, *jax.tree.leaves(params)])
        results: list[Any] = [None] * len(owner_out)
        for index, back_by_now in _turns([gradient.size for gradient in gradients]):
            mine = [count + i for i, who in enumerate(owner) if who == index]
            held = [stored[i - count] for i in mine]
            if back_by_now:
                # A barrier on the state alone: one on the update would keep XLA from fusing it with
                # the parameter's addition, which gives other last bits.
                done = [count + i for i, who in enumerate(owner) if who in back_by_now]
                held, back = jax.lax.optimization_barrier((held, [results[i] for i in done]))
                for i, leaf in zip(done, back, strict=True):
                    results[i] = leaf
            for i, leaf in zip(mine, held, strict=True):
                lazy.inputs[i] = moved(leaf, _DEVICE)
            results[index] = lazy.output(index)
            for i in mine:
                results[i] = moved(lazy.output(i), _HOST)
        for i, who in enumerate(owner_out):
            if who is None:
                results[i] = lazy.output(i)
        return (
            jax.tree.unflatten(treedef, results[:count]),
            jax.tree.unflatten(state_treedef, results[count:]),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def resting_shardings(tree: PyTree) -> PyTree:
    """`out_shardings` that let every array of `tree` rest where it rests now.

    An array in pinned host memory, or spread over several devices, gives its own sharding, memory
    kind included; one in the memory of one device gives None. Without this, a jitted step may
    return paged state on the device (JAX decides by version and platform), and over several
    devices XLA may pair a donated array with an output of the other memory kind and fail
    ("Memory kind mismatch"): give the shardings of all donated arrays, parameters too.

    Args:
      tree: concrete arrays, such as a training state just initialised.

    Returns:
      A tree of the same structure for `jax.jit(..., out_shardings=...)`.
    """

    def rest(leaf: Any) -> jax.sharding.Sharding | None:
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            return None
        elsewhere = sharding.memory_kind == "pinned_host" or len(sharding.device_set) > 1
        return sharding if elsewhere else None

    return jax.tree.map(rest, tree)


def _groups(sizes: list[int], room: int) -> list[range]:
    """Parameters that are initialised together: as many in a row as `room` elements hold."""
    groups, start, held = [], 0, 0
    for index, size in enumerate(sizes):
        if index > start and held + size > room:
            groups.append(range(start, index))
            start, held = index, 0
        held += size
    return [*groups, range(start, len(sizes))] if sizes else []


def _turns(sizes: list[int]) -> list[tuple[int, list[int]]]:
    """The order of updates, smallest parameter first: (parameter, those that it waits for).

    The state of a parameter is fetched when that of the one before last, and of all before it, is
    back on the host; or that of the last as well, where the two together would be more than the
    largest parameter, or than two of middling size. Each is waited for once.

    A Llama's largest matrices are near three times the others, and XLA holds what came in and what
    goes out beside each other: two at once would set the peak of a 65B step.
    """
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    ascending = [sizes[index] for index in order]
    room = max(ascending[-1], 2 * ascending[len(sizes) // 2]) if sizes else 0
    turns, awaited = [], 0
    for turn, index in enumerate(order):
        alone = turn > 0 and ascending[turn] + ascending[turn - 1] > room
        returned = max(turn if alone else turn - 1, 0)
        turns.append((index, order[awaited:returned]))
        awaited = returned
    return turns


def _refuse_mixing(
    depends: list[frozenset[int]], owner_in: list[int | None], owner_out: list[int | None]
) -> None:
    """Raise unless each parameter's update and state depend on that parameter alone."""
    for owner, inputs in zip(owner_out, depends, strict=True):
        if {owner_in[i] for i in inputs} - {None, owner}:
            raise ValueError(
                "paged updates one parameter at a time, but the given transformation mixes "
                "parameters, as clipping by the global norm and optax.MultiSteps do: put paged "
                "around the part that keeps the moments alone, as "
                "optax.chain(optax.clip_by_global_norm(0.3), paged(optax.adamw(2e-4))), and sum "
                "the gradients of several batches inside of the step, as make_train_step does."
            )
