"""What does the step really take? The planned program, run on the card of this machine.

Weights are random and made packed, so no checkpoint is needed and none is ever held in 16 bits;
the bytes are those of the real run. The allocator's peak is the other opinion on a plan.
"""

import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from qlora_jax.data import IGNORE
from qlora_jax.evaluate import loss_for, split_adapters
from qlora_jax.models import is_stacked
from qlora_jax.models.streaming import compiler_options, streams, to_host
from qlora_jax.plan.workload import Workload, batch_shapes, model_shapes
from qlora_jax.train import host_traffic, init_state, make_train_step


class Measured(NamedTuple):
    """What running the step showed."""

    device: str
    peak: int | None
    """Bytes in use at most, as the device's allocator counted; None where it does not count."""
    seconds: float
    """Median of the steps after the first two."""
    tokens_per_second: float
    host_bytes: int
    """Between device and pinned host memory in a step, both ways."""
    first_loss: float
    last_loss: float


def measure(work: Workload, *, steps: int = 4) -> Measured:
    """Run the training step with random weights on this process's default device.

    The peak is the process's, which never falls: measure in a process of its own.
    """
    model = model_shapes(work)
    graphdef, lora, frozen = split_adapters(model)
    lora, frozen = random_weights(lora), random_weights(frozen)
    options = None
    if work.stream_weights:
        frozen = jax.tree_util.tree_map_with_path(_on_host, frozen)
        options = compiler_options(jax.default_backend())
    tx = work.train.optimizer()
    state = init_state(lora, tx, seed=0)
    step = make_train_step(
        graphdef,
        tx,
        loss_for(model, loss_chunk=work.loss_chunk),
        host_gradients=work.train.host_gradients,
        update_in_backward=work.train.update_in_backward,
        state=state,
        compiler_options=options,
    )
    batch = jax.device_put(random_batch(work))
    traffic = host_traffic(step, state, frozen, batch)
    losses, times = [], []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics.loss))
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[2:])
    stats = jax.devices()[0].memory_stats() or {}
    return Measured(
        device=jax.devices()[0].device_kind,
        peak=stats.get("peak_bytes_in_use"),
        seconds=seconds,
        tokens_per_second=work.tokens / seconds,
        host_bytes=traffic.total,
        first_loss=losses[0],
        last_loss=losses[-1],
    )


def _on_host(path: tuple, leaf: jax.Array) -> jax.Array:
    streamed = is_stacked(path) and streams(leaf)
    return to_host(leaf) if streamed else leaf


def random_weights(tree: PyTree) -> PyTree:
    """Plausible random values for a tree of shapes, leaf by leaf; the same for the same names."""
    return jax.tree_util.tree_map_with_path(_random_leaf, tree)


def random_batch(work: Workload, seed: int = 0) -> Any:
    """Random tokens, every one of them trained on; packed rows hold one example."""
    draw = np.random.default_rng(seed)

    def fill(name: str, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if name in ("segments", "attention_mask"):
            return np.ones(shape.shape, shape.dtype)
        if name == "positions":
            return np.broadcast_to(np.arange(shape.shape[-1], dtype=np.int32), shape.shape)
        return draw.integers(0, work.config.vocab_size, shape.shape).astype(np.int32)

    shapes = batch_shapes(work)
    batch = type(shapes)(*(fill(n, s) for n, s in zip(shapes._fields, shapes, strict=True)))
    if work.target_length is not None:
        return batch
    labels = batch.input_ids.copy()
    labels[..., 0] = IGNORE
    return batch._replace(labels=labels)


def _random_leaf(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    """Told by its name what it is."""
    name = jax.tree_util.keystr(path)
    seed = sum(map(ord, name))
    if leaf.dtype == jnp.uint8:
        # On the host: JAX draws bytes as words, four times the memory, and would set the peak.
        codes = np.random.default_rng(seed).integers(0, 256, leaf.shape, np.uint8)
        return jnp.asarray(codes)
    if "nested_absmax" in name:
        return jnp.full(leaf.shape, 0.01, leaf.dtype)
    if name.endswith("offset"):
        return jnp.full(leaf.shape, 0.03, leaf.dtype)
    if "lora_B" in name:
        return jnp.zeros(leaf.shape, leaf.dtype)
    if "norm" in name:
        return jnp.ones(leaf.shape, leaf.dtype)
    return 0.02 * jax.random.normal(jax.random.key(seed), leaf.shape, leaf.dtype)
