"""How does a step run? One jitted function from (state, frozen weights, batch) to (state, metrics).

Three choices make it a QLoRA step:

- The model is split once, `graphdef, lora, frozen = split_adapters(model)`.
  Gradients are taken of the adapters alone; the frozen 4-bit weights are an *argument* of the
  jitted function (never a constant inside it, which XLA would fold and copy).
- The loss is a sum over tokens, and so are the gradients: micro-batches are added up under
  `lax.scan` (`accumulate.py`), and the sum is divided once, by the trained tokens of the whole
  step. Accumulation therefore equals the large batch however tokens are spread over micro-batches
  (a mean of micro-batch means does not: transformers issue 34191).
- Randomness is a function of (seed, step, micro-batch), so a resumed run drops the same units,
  whether the key reaches them by `loss_fn` or by a module's own `nnx.Rngs`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from qlora_jax.evaluate import LossFn, causal_lm_loss
from qlora_jax.optim import resting_shardings
from qlora_jax.optim.per_parameter import to_devices_of
from qlora_jax.train import in_backward
from qlora_jax.train.accumulate import accumulated

# Apart from what a loss function makes of the same key.
_STREAMS = 0x5EED


class TrainState(NamedTuple):
    """All that changes during training, and all that a checkpoint must hold.

    `step` counts finished updates and so is also the position in the data (`Batches.at(step)`).
    `rng` is the run's base key; the key of a step is `fold_in(rng, step)`.
    """

    step: Int[Array, ""]
    lora: PyTree[Float[Array, "..."]]
    opt_state: PyTree
    rng: Key[Array, ""]


def _reseed(model: nnx.Module, key: Key[Array, ""]) -> None:
    """Gives a module's own streams of random keys (`nnx.Rngs`, of `nnx.Dropout` and the like) those
    of this micro-batch: their counts do not outlive a step."""
    streams = (node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream))
    for index, stream in enumerate(streams):
        own = jax.random.fold_in(jax.random.fold_in(key, _STREAMS), index)
        shape = stream.key.shape
        stream.key.set_value(jax.random.split(own, shape) if shape else own)
        stream.count.set_value(jnp.zeros(shape, jnp.uint32))


class StepMetrics(NamedTuple):
    """What one update tells, still on the device: reading a field waits for the step."""

    loss: Float[Array, ""]
    """Mean over the step's trained tokens, in nats, before the update."""
    grad_norm: Float[Array, ""]
    """Global norm of the gradient of that mean, before clipping."""
    learning_rate: Float[Array, ""]
    tokens: Int[Array, ""]
    """Trained tokens (those with a label) of the step."""


def init_state(lora: PyTree, tx: optax.GradientTransformation, *, seed: int) -> TrainState:
    """The state before the first update; it takes over the arrays of `lora`."""
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        lora=lora,
        opt_state=tx.init(lora),
        rng=jax.random.key(seed),
    )
    return committed(state)


def committed(state: TrainState) -> TrainState:
    """The state with every array bound to where it lies (while tracing: as it is).

    A step returns arrays bound to their device and memory, and `jax.jit` compiles anew for the
    difference: unbound arrays in the first step would cost a second compile in the next. What lies
    on other devices than the adapters (counters, the key) goes to theirs, since a program runs on
    one set of devices; it is replicated where they are spread over a mesh.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(state)):
        return state
    moved = to_devices_of(state.lora)

    def bound(leaf: jax.Array) -> jax.Array:
        leaf = moved(leaf)
        return jax.device_put(leaf, leaf.sharding)

    return jax.tree.map(bound, state)


def make_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss_fn: LossFn = causal_lm_loss,
    *,
    learning_rate: optax.Schedule | float = 0.0,
    host_gradients: int | None = None,
    update_in_backward: bool = False,
    state: TrainState | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Callable[[TrainState, PyTree, Any], tuple[TrainState, StepMetrics]]:
    """A jitted training step.

    Args:
      graphdef: of the model, as `evaluate.split_adapters` gives it.
      tx: the optimizer; gradients reach it as the mean over the step's trained tokens.
      loss_fn: (model, micro-batch, dropout key) -> (sum of token losses, token count).
      learning_rate: of the optimizer, for the metrics alone.
      host_gradients: where micro-batches accumulate, sums of at least this many elements rest in
        pinned host memory between them; None keeps all on the device (`accumulate.py`).
      update_in_backward: updates each layer's parameters in the backward pass, as their gradient
        arrives (`in_backward.py`); takes one micro-batch, and an optimizer that treats every number
        alone. The state is the same either way.
      state: a concrete initial state; where its arrays lie in pinned host memory (`paged`), the
        step returns them there. None leaves the memory to the compiler (for planning).
      compiler_options: XLA's, for this program alone, such as `models.streaming.compiler_options`.

    Returns:
      (state, frozen, batch) -> (state, metrics). The state is donated: its arrays are used up.
      Every leaf of `batch` is [accumulation, batch, ...]; a new shape compiles a new program.
    """

    def summed_loss(
        lora: PyTree, frozen: PyTree, batch: Any, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        # Copied: variables that came from outside of the gradient may not change inside it.
        model = nnx.merge(graphdef, lora, frozen, copy=True)
        _reseed(model, key)
        found = loss_fn(model, batch, key)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise TypeError(
                f"loss_fn returned {found!r}, but (sum of losses, their count) is needed, of which "
                "a step takes the mean over its micro-batches: of a batch's mean, (mean * n, n)"
            )
        return jnp.asarray(found[0], jnp.float32), jnp.asarray(found[1], jnp.int32)

    gradient_of_sum = jax.value_and_grad(summed_loss, has_aux=True)

    def metrics(
        state: TrainState, total: Array, count: Int[Array, ""], grad_norm: Array
    ) -> StepMetrics:
        return StepMetrics(
            loss=total / jnp.maximum(count, 1).astype(jnp.float32),
            grad_norm=grad_norm,
            learning_rate=jnp.asarray(
                learning_rate(state.step) if callable(learning_rate) else learning_rate, jnp.float32
            ),
            tokens=count,
        )

    def step(state: TrainState, frozen: PyTree, batch: Any) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(state.rng, state.step)

        def gradient(micro: Any, index: Int[Array, ""]) -> tuple[tuple[Array, Array], PyTree]:
            return gradient_of_sum(state.lora, frozen, micro, jax.random.fold_in(key, index))

        total, count, grads = accumulated(gradient, batch, state.lora, host_from=host_gradients)
        told = metrics(state, total, count, optax.tree.norm(grads))
        updates, opt_state = tx.update(grads, state.opt_state, state.lora)
        lora = optax.apply_updates(state.lora, updates)
        return TrainState(state.step + 1, lora, opt_state, state.rng), told

    def fused(state: TrainState, frozen: PyTree, batch: Any) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.fold_in(state.rng, state.step), 0)
        micro = in_backward.only_micro_batch(batch)

        def both(weights: tuple[PyTree, PyTree], given: Any) -> tuple[Array, Array]:
            return summed_loss(*weights, *given)

        count = in_backward.tokens_of_batch(both, (state.lora, frozen), (micro, key))
        done = in_backward.update_in_backward(
            lambda lora: summed_loss(lora, frozen, micro, key)[0],
            tx,
            state.lora,
            state.opt_state,
            count,
        )
        told = metrics(state, done.total, count, done.grad_norm)
        return TrainState(state.step + 1, done.params, done.opt_state, state.rng), told

    rest = None if state is None else (resting_shardings(state), None)
    options = dict(compiler_options) if compiler_options else None
    program = fused if update_in_backward else step
    return jax.jit(program, donate_argnums=0, out_shardings=rest, compiler_options=options)
