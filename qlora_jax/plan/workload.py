"""What is to be run: everything that decides the bytes of a training step, and the step itself.

The step is `train.make_train_step`'s, on a model of shapes alone (`nnx.eval_shape`): the very
program that training jits, with nothing materialised. Beside it stand the two other programs that
a model's memory has to hold: one decoding step with its key-value cache, and the write of one
tensor into the model while it loads.
"""

import dataclasses
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core as jex_core
from jaxtyping import PyTree

from qlora_jax.checkpoints.load import put
from qlora_jax.data.batches import Batch
from qlora_jax.evaluate import causal_lm_loss, split_adapters
from qlora_jax.models import AttentionName, Decoder, DecoderConfig, is_stacked
from qlora_jax.models.streaming import compiler_options, streams
from qlora_jax.nn import FrozenParam, LoraConfig
from qlora_jax.quant import QuantConfig, QuantizedTensor
from qlora_jax.train import TrainConfig, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Workload:
    """A finetuning step, by what decides its memory; the defaults are the paper's.

    Attributes:
        config: the model's shape (`find_config`).
        sequence: tokens of every example.
        train: micro-batch, accumulation, optimizer, paging, clipping.
        lora: the adapters.
        quant: how the layers' weights are stored; None for a 16-bit base.
        compute_dtype: of activations and matmuls, and of embedding and head.
        remat: one of `models.REMAT`.
        stream_weights: the layers' weights rest in pinned host memory (`models.streaming`).
        attention: of `models.attend`; None takes the best that the target can run.
        matmul: of `pallas_kernels`; None takes what its dispatch would.
    """

    config: DecoderConfig
    sequence: int = 512
    train: TrainConfig = dataclasses.field(default_factory=lambda: TrainConfig(micro_batch_size=1))
    lora: LoraConfig = LoraConfig()
    quant: QuantConfig | None = QuantConfig()
    compute_dtype: str = "bfloat16"
    remat: str = "full"
    stream_weights: bool = False
    attention: AttentionName | None = None
    matmul: str | None = None

    def __post_init__(self) -> None:
        if self.sequence < 1:
            raise ValueError(f"sequence is {self.sequence}, but 1 token or more is needed.")

    def at(self, batch: int, sequence: int | None = None) -> "Workload":
        """The same with another micro-batch (and sequence)."""
        train = dataclasses.replace(self.train, micro_batch_size=batch)
        return dataclasses.replace(self, train=train, sequence=sequence or self.sequence)


class Program(NamedTuple):
    """A function to compile, and shapes of its arguments."""

    fn: Any
    args: tuple[Any, ...]
    kinds: Any = None
    """Memory kinds of arguments and results, as `with_memory_kinds` takes them; None leaves it to
    the compiler, which finds paged state by itself (its results lie on the host)."""
    options: tuple[tuple[str, Any], ...] = ()
    """Compiler options that the program runs with on a GPU."""


class Step(NamedTuple):
    """A training step and the shapes that it works on."""

    program: Program
    lora: PyTree
    frozen: PyTree
    opt_state: PyTree
    saved: int
    """Bytes on the device that the forward pass keeps for the backward pass."""


def model_shapes(work: Workload) -> Decoder:
    """The model as training builds it, its Variables holding shapes."""
    return nnx.eval_shape(
        lambda: Decoder(
            work.config,
            quant=work.quant,
            lora=work.lora,
            compute_dtype=jnp.dtype(work.compute_dtype),
            remat=work.remat,
            stream_weights=work.stream_weights,
            attention=work.attention or "xla",
            matmul=work.matmul,
            rngs=nnx.Rngs(0),
        )
    )


def training_step(work: Workload) -> Step:
    """The training step of the workload, traced for shapes."""
    graphdef, lora, frozen = split_adapters(model_shapes(work))
    tx = work.train.optimizer()
    state = jax.eval_shape(lambda lora: init_state(lora, tx, seed=0), lora)
    step = make_train_step(
        graphdef,
        tx,
        causal_lm_loss,
        host_gradients=work.train.host_gradients,
        update_in_backward=work.train.update_in_backward,
    )
    shape = (work.train.gradient_accumulation_steps, work.train.micro_batch_size, work.sequence)
    dtypes: tuple[Any, ...] = (jnp.int32, jnp.int32, jnp.bool_)
    batch = Batch(*(cast(Any, jax.ShapeDtypeStruct(shape, dtype)) for dtype in dtypes))
    micro = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    saved = _saved_bytes(graphdef, lora, frozen, micro)
    program = Program(step, (state, frozen, batch))
    if work.stream_weights or work.train.update_in_backward:
        program = program._replace(kinds=_kinds(work, state, frozen))
    if work.stream_weights:
        program = program._replace(options=tuple(compiler_options("gpu").items()))
    return Step(program, lora, frozen, state.opt_state, saved)


def _kinds(work: Workload, state: Any, frozen: PyTree) -> tuple[Any, Any]:
    """Memory kinds of a step's arguments and results."""

    def weight(path: tuple, leaf: Any) -> str:
        streamed = work.stream_weights and is_stacked(path) and streams(leaf)
        return "pinned_host" if streamed else "device"

    def moment(leaf: Any) -> str:
        paged = work.train.paged and leaf.size >= work.train.page_min_size
        return "pinned_host" if paged else "device"

    kept = jax.tree.map(lambda _: "device", state)._replace(
        opt_state=jax.tree.map(moment, state.opt_state)
    )
    weights = jax.tree_util.tree_map_with_path(weight, frozen)
    return (kept, weights, "device"), (kept, "device")


def decoding_step(work: Workload, *, batch: int, length: int) -> Program:
    """One token more for `batch` texts, with a key-value cache of `length` slots a text.

    The cache is donated; adapters are applied beside the frozen weights, as after training.
    """
    graphdef, lora, frozen = split_adapters(model_shapes(work))

    def first(lora: PyTree, frozen: PyTree, prompt: jax.Array) -> Any:
        return nnx.merge(graphdef, lora, frozen).prefill(prompt, cache_length=length)[1]

    def step(lora: PyTree, frozen: PyTree, tokens: jax.Array, cache: Any) -> Any:
        return nnx.merge(graphdef, lora, frozen).decode_step(tokens, cache)

    prompt = jax.ShapeDtypeStruct((batch, 1), jnp.int32)
    cache = jax.eval_shape(first, lora, frozen, prompt)
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return Program(jax.jit(step, donate_argnums=3), (lora, frozen, tokens, cache))


def largest_load(work: Workload) -> Program:
    """The write of the largest weight into its stack, as `checkpoints.load_model` does it."""
    frozen = nnx.state(model_shapes(work).layers, FrozenParam)
    is_tensor = lambda leaf: isinstance(leaf, QuantizedTensor)  # noqa: E731
    stacks = jax.tree.leaves(nnx.to_pure_dict(frozen), is_leaf=is_tensor)
    stack = max(stacks, key=tree_bytes)
    shape = stack.shape if is_tensor(stack) else stack.shape[1:]
    axes = len(stack.stack_shape) if is_tensor(stack) else 1
    tensor = jax.ShapeDtypeStruct(shape, jnp.dtype(work.compute_dtype))
    index = tuple(jax.ShapeDtypeStruct((), jnp.int32) for _ in range(axes))

    def write(stack: Any, tensor: jax.Array, index: tuple[jax.Array, ...]) -> Any:
        return put(stack, tensor, index, work.quant)

    return Program(jax.jit(write, donate_argnums=0), (stack, tensor, index))


def _saved_bytes(graphdef: nnx.GraphDef, lora: PyTree, frozen: PyTree, batch: Any) -> int:
    """Bytes that the forward pass of a micro-batch leaves on the device for the backward pass.

    They are the leaves of the pullback that `jax.vjp` returns, less those that are arguments.
    """

    def residuals(lora: PyTree, frozen: PyTree, batch: Any, key: jax.Array) -> list[Any]:
        def loss(lora: PyTree) -> jax.Array:
            return causal_lm_loss(nnx.merge(graphdef, lora, frozen), batch, key)[0]

        return jax.tree.leaves(jax.vjp(loss, lora)[1])

    jaxpr = jax.make_jaxpr(residuals)(lora, frozen, batch, jax.random.key(0)).jaxpr
    kept = {var for var in jaxpr.outvars if not isinstance(var, jex_core.Literal)}
    return sum(
        tree_bytes(var.aval)
        for var in kept - set(jaxpr.invars)
        if getattr(var.aval, "memory_space", None) != jax.memory.Space.Host
    )


def paged_bytes(work: Workload, opt_state: PyTree) -> int:
    """Bytes of optimizer state that rest in pinned host memory."""
    if not work.train.paged:
        return 0
    least = work.train.page_min_size
    return tree_bytes([leaf for leaf in jax.tree.leaves(opt_state) if leaf.size >= least])


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all leaves, arrays or shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
