"""Weights that stream: frozen layers rest in pinned host memory and visit the card one by one.

QLoRA's base never changes, so the card needs a layer of it only while that layer computes. The loop
over the layers carries *two* layers' weights: it computes with the one that is here and fetches the
next meanwhile. So the card holds two layers' packed codes instead of all of them, for any depth.

    forward    fetch 0 | layer 0 ∥ fetch 1 | layer 1 ∥ fetch 2 | … | layer L-1
    backward             layer L-1 again, its gradient ∥ fetch L-2 | … | layer 0

Autodiff of such a loop would keep every carried weight for the backward pass, on the card. The rule
is therefore written out (`custom_vjp`): a layer's input is kept, in device or host memory, and the
backward loop fetches weights anew and computes the layer again, as `remat="full"` does. The last
layer's weights are still here when the backward loop begins.

Because it is written out, the backward loop can also carry what is trained and update it layer by
layer (`optim.Learner`), with weights that stream or ones that stay.

Cost: every packed byte crosses PCIe twice a micro-batch (`stream_cost`), which is hidden once a
micro-batch has tokens enough; more micro-batches do not help, more tokens in one do. Losses and
gradients are those of resident weights, bit for bit.

XLA overlaps the copies with the products only if asked: `compiler_options("gpu")` turns on its
scheduler that hides latency and lets it have all copies of a layer in flight at once (without the
second option it has two, and the schedule waits between them). JAX's pinned host memory is capped
at 64 GB: for more, set `XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB` before JAX starts.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, PyTree

from qlora_jax.nn import FrozenParam
from qlora_jax.optim import Learner, is_learner
from qlora_jax.processes import distribute

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device

MIN_STREAM_BYTES = 2**16
"""Smaller parts of a layer (norms, offsets) stay on the card: a transfer costs more than room."""

STREAMED_WEIGHTS = "streamed_weights"
"""The name (`jax.named_scope`) of their copies, for whoever counts or profiles them."""

HOST_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""The environment variable with the size of JAX's pinned host pool on a GPU, in GiB."""

_DEFAULT_HOST_LIMIT = 64


def streams(stack: Any) -> bool:
    """Whether an array (or shape) of stacked layers is large enough to be worth a transfer."""
    depth = stack.shape[0] if stack.ndim else 1
    return bool(depth) and stack.size // depth * stack.dtype.itemsize >= MIN_STREAM_BYTES


def compiler_options(platform: str) -> dict[str, Any]:
    """What `jax.jit(..., compiler_options=)` should be given where weights stream.

    Args:
        platform: of the target, such as "gpu", "cuda" or "cpu"; only XLA:GPU has the options.
    """
    if platform not in ("gpu", "cuda"):
        return {}
    return {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_experimental_parallel_async_compute_limit": 64,
    }


def options_for(model: Any) -> dict[str, Any]:
    """`compiler_options` on the default backend for a program that runs this model; {} where its
    weights do not stream."""
    streamed = getattr(model, "stream_weights", False)
    return compiler_options(jax.default_backend()) if streamed else {}


def to_host(x: Any, sharding: jax.sharding.Sharding | None = None) -> Array:
    """An array in pinned host memory: its own devices', or for NumPy's the default one's; or where
    `sharding` says."""
    if sharding is None and isinstance(x, jax.Array):
        sharding = x.sharding
    elif sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return distribute(x, sharding.with_memory_kind("pinned_host"))


def move_to_host(layers: nnx.Module) -> None:
    """Moves the large frozen leaves of stacked layers to pinned host memory, one by one."""
    for _, node in nnx.iter_graph(layers):
        if isinstance(node, FrozenParam):
            moved = jax.tree.map(lambda x: to_host(x) if streams(x) else x, node.get_value())
            node.set_value(moved)


def host_bytes(layers: nnx.Module) -> int:
    """Bytes of stacked layers' frozen weights that rest on the host where they stream.

    Args:
        layers: concrete, or shapes alone (`nnx.eval_shape`).
    """
    stacks = jax.tree.leaves(nnx.state(layers, FrozenParam))
    return sum(stack.size * stack.dtype.itemsize for stack in stacks if streams(stack))


def host_limit_for(needed: int) -> int | None:
    """The size in GiB that JAX's pinned host pool has to be given for so many bytes; None where the
    one it has now is enough. It is HOST_LIMIT in the environment, and by default 64."""
    limit = int(os.environ.get(HOST_LIMIT, _DEFAULT_HOST_LIMIT))
    return None if needed <= limit * 2**30 else -(-needed // 2**30) + 8


def check_host_memory_limit(needed: int, platform: str) -> None:
    """Refuses what JAX's pinned host pool would not hold, before anything is loaded.

    Args:
        needed: bytes that are to rest in pinned host memory.
        platform: of the target; only GPUs have such a pool.

    Raises:
        ValueError: naming the environment variable and a value that is enough.
    """
    enough = host_limit_for(needed)
    if platform in ("gpu", "cuda") and enough is not None:
        raise ValueError(
            f"{needed / 2**30:.1f} GiB are to rest in pinned host memory, more than JAX's pool "
            f"holds: set {HOST_LIMIT}={enough} in the environment before JAX starts."
        )


class _Loop(NamedTuple):
    """What is fixed when the loop is traced."""

    step: Callable[..., tuple[Any, Any]]
    treedef: Any
    """Of (frozen, own)."""
    roles: tuple[int, ...]
    """What each of its leaves does: one of the three below."""
    depth: int
    offload: bool

    def layer(
        self, here: Sequence[Array], staying: Sequence[Array], learning: Sequence[Array]
    ) -> tuple[Any, Any]:
        """(frozen, own) of one layer, from its leaves that stream, those that stay, and those that
        learn."""
        by_role = (iter(here), iter(staying), iter(learning))
        return jax.tree.unflatten(self.treedef, [next(by_role[role]) for role in self.roles])


_STREAMS, _STAYS, _LEARNS = range(3)


def stream_layers(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    x: PyTree,
    frozen: PyTree,
    own: PyTree,
    *,
    offload: bool = False,
    stay: bool = False,
) -> tuple[Any, Any]:
    """`jax.lax.scan(step, x, (frozen, own))` with the large leaves of `frozen` on the host.

    An `optim.Learner` in `own` gives its value to the layers, and is updated layer by layer by the
    backward loop: its "gradient" is itself after that.

    Args:
        step: (x, a layer's frozen weights, what else is its own) -> (x, output). It may close over
            arrays; gradients reach those that are differentiated.
        x: what goes through the layers, an array or several.
        frozen: every leaf carries the layers' axis; those that `streams` takes lie in host memory
            or are put there. No gradient is taken of any of those.
        own: everything else with that axis, differentiated where asked.
        offload: keeps the layers' inputs in host memory too, for the backward pass.
        stay: leaves `frozen` where it is, on the device.

    Returns:
        What came through, and the outputs stacked.
    """
    nodes, treedef = jax.tree.flatten((frozen, own), is_leaf=is_learner)
    count = 0 if stay else len(jax.tree.leaves(frozen))

    def role(index: int, node: Any) -> int:
        if is_learner(node):
            return _LEARNS
        return _STREAMS if index < count and streams(node) else _STAYS

    roles = tuple(role(index, node) for index, node in enumerate(nodes))
    leaves = [node.value if is_learner(node) else node for node in nodes]

    def shape(leaf: Any, axes: int) -> jax.ShapeDtypeStruct:
        # With the mesh of the program, which `step` may ask for.
        at = jax.sharding.NamedSharding(
            jax.typeof(leaf).sharding.mesh, jax.sharding.PartitionSpec()
        )
        return jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype, sharding=at)

    closed, closure = jax.closure_convert(
        lambda x, layer: step(x, *layer),
        jax.tree.map(lambda leaf: shape(leaf, 0), x),
        jax.tree.unflatten(treedef, [shape(leaf, 1) for leaf in leaves]),
    )
    loop = _Loop(closed, treedef, roles, leaves[0].shape[0], offload)
    moving, staying, learning = (
        [node for node, role in zip(nodes, roles, strict=True) if role == wanted]
        for wanted in (_STREAMS, _STAYS, _LEARNS)
    )
    for learner in learning:
        learner.rule.runs += 1
    return _stream(loop, x, moving, staying, learning, closure)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stream(
    loop: _Loop,
    x: PyTree,
    moving: list[Array],
    staying: list[Array],
    learning: list[Learner],
    closure: list[Array],
) -> tuple[Any, Any]:
    y, _, _, outputs = _run(loop, x, moving, staying, learning, closure, keep=False)
    return y, outputs


def _fetch(stacks: list[Array], index: Array) -> list[Array]:
    """One layer of each stack, from host memory to the card."""
    return [
        jax.device_put(jax.lax.dynamic_index_in_dim(stack, index, keepdims=False), _DEVICE)
        for stack in stacks
    ]


def _fetch_weights(stacks: list[Array], index: Array) -> list[Array]:
    with jax.named_scope(STREAMED_WEIGHTS):
        return _fetch(stacks, index)


def _await_after(computed: PyTree, following: list[Array]) -> tuple[PyTree, list[Array]]:
    """Both as they are, and what is fetched is awaited once all the rest is computed: from jax 0.11
    on, XLA would await it before a layer's last products, where room for it is free already."""
    return jax.lax.optimization_barrier((computed, following)) if following else (computed, [])


def _on_host(stacks: list[Array]) -> list[Array]:
    return [jax.device_put(stack, _HOST) for stack in stacks]


def _run(
    loop: _Loop,
    x: PyTree,
    moving: list[Array],
    staying: list[Array],
    learning: list[Learner],
    closure: list[Array],
    *,
    keep: bool,
) -> tuple[Any, list[Array], Any, Any]:
    """What came through, the last layer's weights, every layer's input, every layer's output."""
    moving = _on_host(moving)

    def step(carry: tuple[Any, list[Array]], layer: tuple[Array, Any, Any]) -> tuple[Any, Any]:
        x, here = carry
        index, stays, learns = layer
        # The last layer is fetched once more, for want of a next one.
        following = _fetch_weights(moving, jnp.minimum(index + 1, loop.depth - 1))
        y, output = loop.step(x, loop.layer(here, stays, learns), *closure)
        y, following = _await_after(y, following)
        kept = None
        if keep:
            kept = jax.device_put(x, _HOST) if loop.offload else x
        return (y, following), (kept, output)

    start = (x, _fetch_weights(moving, jnp.int32(0)))
    values = [learner.value for learner in learning]
    layers = (jnp.arange(loop.depth, dtype=jnp.int32), staying, values)
    (y, last), (kept, outputs) = jax.lax.scan(step, start, layers)
    return y, last, kept, outputs


@jax.tree_util.register_static
class _Indices(tuple[int, ...]):
    """Which leaves are differentiated: not an array, though it travels with residuals."""


def _values(arguments: PyTree) -> PyTree:
    """With `symbolic_zeros` every argument comes with a flag: is it differentiated at all?"""
    return jax.tree.map(
        lambda leaf: leaf.value, arguments, is_leaf=lambda leaf: hasattr(leaf, "perturbed")
    )


def _differentiated(arguments: list[Any]) -> tuple[_Indices, list[Array]]:
    """Which of them are, and their values."""
    indices = _Indices(i for i, each in enumerate(arguments) if each.perturbed)
    return indices, _values(arguments)


def _forward(
    loop: _Loop,
    x: Any,
    moving: list[Any],
    staying: list[Any],
    learning: list[Any],
    closure: list[Any],
) -> tuple[tuple[Any, Any], tuple]:
    stacks, learning = _values(moving), _values(learning)
    trained, stays = _differentiated(staying)
    outside, around = _differentiated(closure)
    y, last, kept, outputs = _run(loop, _values(x), stacks, stays, learning, around, keep=True)
    return (y, outputs), (stacks, stays, learning, around, trained, outside, last, kept)


def _replaced(values: Sequence[Array], indices: _Indices, new: Sequence[Array]) -> list[Array]:
    result = list(values)
    for index, value in zip(indices, new, strict=True):
        result[index] = value
    return result


def _spread(indices: _Indices, values: Iterator[Array], count: int) -> list[Array | None]:
    """The gradients at their places, None (no gradient) everywhere else."""
    return [next(values) if index in indices else None for index in range(count)]


def _backward(loop: _Loop, residuals: tuple, gradients: tuple[Any, Any]) -> tuple:
    moving, staying, learning, closure, trained, outside, last, kept = residuals
    inputs, structure = jax.tree.flatten(kept)
    stacks = _on_host([*moving, *inputs] if loop.offload else moving)
    to_y, to_outputs = gradients

    def step(carry: tuple[Any, ...], layer: tuple[Any, ...]) -> tuple[Any, list[Array]]:
        to_y, here, learning, sums = carry
        index, stays, kept, to_output = layer
        before = jnp.maximum(index - 1, 0)
        following = _fetch_weights(stacks[: len(moving)], before)
        following += _fetch(stacks[len(moving) :], before)
        here = here if loop.offload else [*here, *kept]
        weights, x = here[: len(moving)], jax.tree.unflatten(structure, here[len(moving) :])

        def again(x: Any, mine: list[Array], learns: list[Array], around: list[Array]) -> Any:
            own = loop.layer(weights, _replaced(stays, trained, mine), learns)
            return loop.step(x, own, *_replaced(closure, outside, around))

        mine, around = [stays[i] for i in trained], [closure[i] for i in outside]
        learns = [learner.at(index) for learner in learning]
        _, pull = jax.vjp(again, x, mine, learns, around)
        pulled, following = _await_after(pull((to_y, to_output)), following)
        to_x, to_mine, to_learns, to_around = pulled
        learning = [a.updated(index, b) for a, b in zip(learning, to_learns, strict=True)]
        sums = [a + b.astype(a.dtype) for a, b in zip(sums, to_around, strict=True)]
        return (to_x, following, learning, sums), to_mine

    # The last layer's weights are on the card still; its input, if offloaded, is not.
    here = [*last, *_fetch(stacks[len(last) :], jnp.int32(loop.depth - 1))]
    zeros = [jnp.zeros(closure[i].shape, jnp.float32) for i in outside]
    layers = (
        jnp.arange(loop.depth, dtype=jnp.int32),
        staying,
        None if loop.offload else inputs,
        to_outputs,
    )
    (to_x, _, learning, sums), to_mine = jax.lax.scan(
        step, (to_y, here, learning, zeros), layers, reverse=True
    )
    to_around = (s.astype(closure[i].dtype) for i, s in zip(outside, sums, strict=True))
    return (
        to_x,
        [None] * len(moving),
        _spread(trained, iter(to_mine), len(staying)),
        [dataclasses.replace(each, shared=(None,) * len(each.shared)) for each in learning],
        _spread(outside, to_around, len(closure)),
    )


_stream.defvjp(_forward, _backward, symbolic_zeros=True)
