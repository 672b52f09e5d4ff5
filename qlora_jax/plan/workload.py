"""What is to be run: everything that decides the bytes of a training step, and the step itself.

The step is `train.make_train_step`'s, on a model of shapes alone (`nnx.eval_shape`): the very
program that training jits, with nothing materialised. Beside it stand the two other programs that
a model's memory has to hold: one decoding step with its key-value cache, and the write of one
tensor into the model while it loads.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core as jex_core
from jaxtyping import PyTree

from pallas_kernels.cards import Card
from qlora_jax.checkpoints.fill import put
from qlora_jax.data import Batch, PackedBatch, Seq2SeqBatch
from qlora_jax.evaluate import LossFn, loss_for, split_adapters
from qlora_jax.models import (
    FAMILIES,
    LOSS_CHUNK,
    AttentionName,
    Decoder,
    DecoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    is_stacked,
    module_names,
    spread,
)
from qlora_jax.models.streaming import compiler_options, streams
from qlora_jax.nn import FrozenParam, LoraConfig, add_lora, settle_adapters
from qlora_jax.plan.devices import AXIS, beside, by_rows, traced_for
from qlora_jax.quant import QuantConfig, QuantizedTensor
from qlora_jax.train import TrainConfig, init_state, make_train_step

HOST = "pinned_host"


@dataclasses.dataclass(frozen=True)
class Workload:
    """A finetuning step, by what decides its memory; the defaults are the paper's.

    Attributes:
        config: the model's shape (`find_config`).
        sequence: tokens of every example; of an encoder–decoder, of the source.
        target: tokens of an encoder–decoder's target; None for as many as `sequence`.
        train: micro-batch, accumulation, optimizer, paging, clipping.
        lora: the adapters.
        quant: how the layers' weights are stored; None for a 16-bit base.
        compute_dtype: of activations and matmuls.
        param_dtype: of embedding, head and dense weights; None for `compute_dtype`.
        embedding_bits: 8 or 4 where embedding and head are packed; None for `param_dtype`.
        remat: one of `models.REMAT`.
        stream_weights: the layers' weights rest in pinned host memory (`models.streaming`).
        mlp_tile: tokens that an MLP reads at once (`models.tile`); None for all.
        attention: of `models.attend`; None takes the best that the target can run.
        matmul: of `pallas_kernels`; None takes what its dispatch would.
        packed: rows of several examples (`data.PackedBatches`), apart in attention.
        loss_chunk: tokens whose logits are held at once; None holds all.
        devices: cards of one machine that share each micro-batch (`models.spread`).
        cut_weights: whether each of them has its part of the weights, instead of all.
    """

    config: DecoderConfig | EncoderDecoderConfig
    sequence: int = 512
    target: int | None = None
    train: TrainConfig = dataclasses.field(default_factory=lambda: TrainConfig(micro_batch_size=1))
    lora: LoraConfig = LoraConfig()
    quant: QuantConfig | None = QuantConfig()
    compute_dtype: str = "bfloat16"
    param_dtype: str | None = None
    embedding_bits: int | None = None
    remat: str = "full"
    stream_weights: bool = False
    mlp_tile: int | None = None
    attention: AttentionName | None = None
    matmul: str | None = None
    packed: bool = False
    loss_chunk: int | None = LOSS_CHUNK
    devices: int = 1
    cut_weights: bool = False

    def __post_init__(self) -> None:
        rows = self.train.micro_batch_size
        if self.devices < 1 or rows % self.devices:
            raise ValueError(
                f"devices is {self.devices} and micro_batch_size is {rows}, but every device takes "
                "as many rows: give a micro-batch that is a multiple of the devices."
            )
        for name in ("sequence", "target"):
            tokens = getattr(self, name)
            if tokens is not None and tokens < 1:
                raise ValueError(f"{name} is {tokens}, but 1 token or more is needed.")
        decoder_alone = {
            "stream_weights": self.stream_weights,
            "mlp_tile": self.mlp_tile is not None,
            "packed": self.packed,
        }
        seq2seq = isinstance(self.config, EncoderDecoderConfig)
        for name, given in decoder_alone.items():
            if seq2seq and given:
                raise ValueError(f"{name} is set, but an encoder–decoder has no such way to train.")
        if self.target is not None and not seq2seq:
            raise ValueError(
                f"target is {self.target}, but a {type(self.config).__name__} reads one sequence: "
                "leave it out."
            )

    @property
    def target_length(self) -> int | None:
        """Tokens of an encoder–decoder's target; None of a decoder."""
        if not isinstance(self.config, EncoderDecoderConfig):
            return None
        return self.target or self.sequence

    @property
    def of_one_device(self) -> "Workload":
        """One device's rows, on a device that has all weights."""
        rows = self.train.micro_batch_size // self.devices
        alone = dataclasses.replace(self, devices=1, cut_weights=False)
        return alone.at(rows)

    @property
    def tokens(self) -> int:
        """Tokens of one optimizer update, source and target together."""
        return self.train.batch_size * (self.sequence + (self.target_length or 0))

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
    devices: int = 1
    """How many cards it is for."""


class Step(NamedTuple):
    """A training step and the shapes that it works on."""

    program: Program
    placed: tuple[Any, ...]
    """The step's arguments, those on the host saying so by a sharding of the present device."""
    lora: PyTree
    frozen: PyTree
    opt_state: PyTree
    kinds: tuple[Any, Any]
    """Memory kinds of (state, frozen): "device", or HOST."""
    saved: int
    """Bytes on the device that the forward pass keeps for the backward pass."""


def model_shapes(work: Workload, mesh: jax.sharding.Mesh | None = None) -> Decoder | EncoderDecoder:
    """The model as training builds it (`checkpoints.load_model`), its Variables holding shapes,
    which lie on the devices of the mesh, if one is given."""
    options: dict[str, Any] = {
        "quant": work.quant,
        "compute_dtype": jnp.dtype(work.compute_dtype),
        "param_dtype": jnp.dtype(work.param_dtype or work.compute_dtype),
        "embedding_bits": work.embedding_bits,
        "remat": work.remat,
        "attention": work.attention or "xla",
        "matmul": work.matmul,
    }
    config = work.config
    family = FAMILIES[config.model_type]
    if isinstance(config, DecoderConfig):
        options |= {"stream_weights": work.stream_weights, "mlp_tile": work.mlp_tile}
    names = module_names(family.weight_names(config))
    # Where adapters start from decides their values, and never their shapes.
    lora = dataclasses.replace(work.lora, init_lora_weights=True)

    def build() -> Any:
        model = family.build(config, **options, rngs=nnx.Rngs(0))
        if isinstance(model, Decoder):
            model.neftune_noise_alpha = work.train.neftune_noise_alpha
        return add_lora(model, lora, rngs=nnx.Rngs(0), names=names)

    model = nnx.eval_shape(build)
    if mesh is not None:
        spread(model, mesh, over=AXIS if work.cut_weights else None)
    return model


def batch_shapes(work: Workload) -> Any:
    """What the step reads: a `Batch`, a `PackedBatch` or a `Seq2SeqBatch` of shapes."""
    rows = (work.train.gradient_accumulation_steps, work.train.micro_batch_size)

    def tokens(length: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct((*rows, length), dtype)

    ids = tokens(work.sequence)
    mask = tokens(work.sequence, jnp.bool_)
    if work.target_length is not None:
        return Seq2SeqBatch(ids, mask, tokens(work.target_length))
    return PackedBatch(ids, ids, ids, ids) if work.packed else Batch(ids, ids, mask)


def training_step(
    work: Workload,
    card: Card | None = None,
    *,
    present: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> Step:
    """The training step of the workload, traced for shapes.

    Args:
        work: what is trained.
        card: what it is for, where that is not here; needed where `work.matmul` names a kernel.
        present: for this process's default device, whose memories JAX can name; else for a card
            that is only described (`pallas_kernels.compile_for`).
        mesh: the devices, present or described, where there are several (`devices.mesh_of`).
    """
    model = model_shapes(work, mesh)
    graphdef, lora, frozen = split_adapters(model)
    loss = loss_for(model, loss_chunk=work.loss_chunk)
    tx = work.train.optimizer()
    state = jax.eval_shape(lambda lora: init_state(lora, tx, seed=0), lora)
    batch = batch_shapes(work)
    if mesh is not None:
        state, batch = beside(lora, state, mesh), by_rows(batch, mesh)
    kinds = _resting_kinds(work, state, frozen)
    placed = (*jax.tree.map(_placed, (state, frozen), kinds), batch)
    micro = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
    options = compiler_options(jax.default_backend() if present else "gpu")
    step = make_train_step(
        graphdef,
        tx,
        loss,
        learning_rate=work.train.learning_rates(),
        host_gradients=work.train.host_gradients,
        update_in_backward=work.train.update_in_backward,
        state=placed[0] if present else None,
        compiler_options=options if present and work.stream_weights else None,
    )
    program = Program(step, placed if present else (state, frozen, batch), devices=work.devices)
    if not present:
        program = program._replace(kinds=((*kinds, "device"), (kinds[0], "device")))
        if work.stream_weights:
            program = program._replace(options=tuple(options.items()))
    with traced_for(card, work.devices):
        saved = _saved_bytes(graphdef, loss, lora, frozen, micro) // work.devices
    return Step(program, placed, lora, frozen, state.opt_state, kinds, saved)


def _resting_kinds(work: Workload, state: Any, frozen: PyTree) -> tuple[Any, Any]:
    """The memory that every leaf of (state, frozen weights) rests in between steps."""

    def weight(path: tuple, leaf: Any) -> str:
        streamed = work.stream_weights and is_stacked(path) and streams(leaf)
        return HOST if streamed else "device"

    def moment(leaf: Any) -> str:
        # Step counters belong to no parameter and stay on the device.
        paged = work.train.paged and leaf.ndim and leaf.size >= work.train.page_min_size
        return HOST if paged else "device"

    kept = jax.tree.map(lambda _: "device", state)._replace(
        opt_state=jax.tree.map(moment, state.opt_state)
    )
    return kept, jax.tree_util.tree_map_with_path(weight, frozen)


def _placed(leaf: Any, kind: str) -> Any:
    """The shape, saying that it rests on the host where it does: by a sharding that names a mesh,
    since from no other does the memory kind reach the types of a traced program."""
    if kind == "device":
        return leaf
    sharding = leaf.sharding
    if sharding is None:
        mesh = jax.sharding.Mesh(np.asarray(jax.local_devices()[:1]), ("device",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.with_memory_kind(kind))


def decoding_step(
    work: Workload,
    card: Card | None = None,
    *,
    batch: int,
    length: int,
    mesh: jax.sharding.Mesh | None = None,
) -> Program:
    """One token more for `batch` texts, with a key-value cache of `length` slots a text.

    The cache is donated; adapters are applied beside the frozen weights, as after training, and
    float32 ones are there in the compute dtype as well, as in `qlora_jax.generate`. An
    encoder–decoder keeps `work.sequence` keys and values of the source beside them.
    """
    graphdef, lora, frozen = split_adapters(model_shapes(work, mesh))

    def first(lora: PyTree, frozen: PyTree, prompt: jax.Array) -> Any:
        return nnx.merge(graphdef, lora, frozen).prefill(prompt, cache_length=length)[1]

    def step(lora: PyTree, frozen: PyTree, tokens: jax.Array, cache: Any) -> Any:
        return settle_adapters(nnx.merge(graphdef, lora, frozen)).decode_step(tokens, cache)

    read = 1 if work.target_length is None else work.sequence
    prompt = jax.ShapeDtypeStruct((batch, read), jnp.int32)
    with traced_for(card, work.devices):
        cache = jax.eval_shape(first, lora, frozen, prompt)
    tokens = jax.ShapeDtypeStruct((batch,), jnp.int32)
    step = jax.jit(step, donate_argnums=3)
    return Program(step, (lora, frozen, tokens, cache), devices=work.devices)


def largest_load(work: Workload, mesh: jax.sharding.Mesh | None = None) -> Program:
    """The write of the largest weight into its stack, as `checkpoints.load_model` does it."""
    model = model_shapes(work, mesh)
    sides = [model] if isinstance(model, Decoder) else [model.encoder, model.decoder]
    frozen = [nnx.to_pure_dict(nnx.state(side.layers, FrozenParam)) for side in sides]
    is_tensor = lambda leaf: isinstance(leaf, QuantizedTensor)  # noqa: E731
    stack = max(jax.tree.leaves(frozen, is_leaf=is_tensor), key=tree_bytes)
    shape = stack.shape if is_tensor(stack) else stack.shape[1:]
    axes = len(stack.stack_shape) if is_tensor(stack) else 1
    tensor = jax.ShapeDtypeStruct(shape, jnp.dtype(work.compute_dtype))
    index = tuple(jax.ShapeDtypeStruct((), jnp.int32) for _ in range(axes))

    def write(stack: Any, tensor: jax.Array, index: tuple[jax.Array, ...]) -> Any:
        return put(stack, tensor, index, work.quant)

    write_one = jax.jit(write, donate_argnums=0)
    return Program(write_one, (stack, tensor, index), devices=work.devices)


def largest_dense(work: Workload, mesh: jax.sharding.Mesh | None = None) -> int:
    """Bytes of the largest tensor outside of the stacks that is loaded as it is: a vocabulary
    matrix lies beside its place while it is put there. 0 where none is dense."""
    state = nnx.to_pure_dict(nnx.state(model_shapes(work, mesh), FrozenParam))
    flat = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor)
    )[0]
    sizes = (
        tree_bytes(leaf)
        for path, leaf in flat
        if not is_stacked(path) and not isinstance(leaf, QuantizedTensor)
    )
    return max(sizes, default=0)


def _saved_bytes(
    graphdef: nnx.GraphDef, loss_fn: LossFn, lora: PyTree, frozen: PyTree, batch: Any
) -> int:
    """Bytes that the forward pass of a micro-batch leaves on the device for the backward pass.

    They are the leaves of the pullback that `jax.vjp` returns, less those that are arguments.
    """

    def residuals(lora: PyTree, frozen: PyTree, batch: Any, key: jax.Array) -> list[Any]:
        def loss(lora: PyTree) -> jax.Array:
            return loss_fn(nnx.merge(graphdef, lora, frozen), batch, key)[0]

        return jax.tree.leaves(jax.vjp(loss, lora)[1])

    jaxpr = jax.make_jaxpr(residuals)(lora, frozen, batch, jax.random.key(0)).jaxpr
    kept = {var for var in jaxpr.outvars if not isinstance(var, jex_core.Literal)}
    return sum(
        tree_bytes(var.aval)
        for var in kept - set(jaxpr.invars)
        if getattr(var.aval, "memory_space", None) != jax.memory.Space.Host
    )


def host_bytes(tree: PyTree, kinds: PyTree) -> int:
    """Bytes of the leaves that rest in pinned host memory, by `Step.kinds`."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(kinds), strict=True)
    return tree_bytes([leaf for leaf, kind in leaves if kind == HOST])


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all leaves, arrays or shapes, on one of the devices that they lie on."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))
