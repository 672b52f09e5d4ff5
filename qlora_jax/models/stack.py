"""Stacks of layers: made under one `vmap`, run under one `lax.scan`, recomputed one at a time.

A stack is a layer whose every Variable carries a leading axis, so the program is as long for 24
layers as for 2. All models share this file; what a layer computes is theirs.

A scan hands its body each layer's part of every stack. A kernel reads that part where it lies, or
XLA copies it first; a *loop* in the layer, over its experts, has all of the part copied for it. So
some Variables are no part of what is scanned: they stay whole, and the layer gets its number.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, Key, PyTree

from pallas_kernels import mesh_of_rows
from qlora_jax.models.embedding import Embedding
from qlora_jax.models.remat import check_remat, run_layers
from qlora_jax.models.spread import cut_by_rows, gather_dense
from qlora_jax.nn import FrozenParam, LoraConfig, QuantDense
from qlora_jax.quant import QuantConfig, QuantizedTensor

Keys = Iterator[Key[Array, ""] | None]
"""Dropout keys, drawn one after another; without dropout each of them is None."""


@dataclass(frozen=True)
class Storage:
    """How a model's weights are stored, adapted and multiplied.

    Attributes:
        quant: of the weights; None keeps them dense in `param_dtype`.
        lora: adapters on them; None for none.
        compute_dtype: of activations and products.
        param_dtype: of dense weights, biases and embeddings.
        matmul: implementation of the 4-bit matmul; None lets the op choose.
        embedding_bits: of the embedding and the head, 8 or 4; None keeps them in `param_dtype`.
    """

    quant: QuantConfig | None
    lora: LoraConfig | None
    compute_dtype: Any
    param_dtype: Any
    matmul: str | None
    embedding_bits: int | None = None

    def vocabulary(self, vocab: int, embed: int, rngs: nnx.Rngs) -> Embedding:
        """The embedding, or a head of its own: a matrix [vocab, embed]."""
        return Embedding(vocab, embed, dtype=self.param_dtype, bits=self.embedding_bits, rngs=rngs)

    def dense(self, prefix: str, rngs: nnx.Rngs) -> Callable[..., QuantDense]:
        """(name, inputs, outputs, **options) → the linear layer at `prefix.name`."""

        def make(name: str, inputs: int, outputs: int, **options: Any) -> QuantDense:
            return QuantDense(
                inputs,
                outputs,
                quant=self.quant,
                lora=None if self.lora is None else self.lora.at(f"{prefix}.{name}"),
                compute_dtype=self.compute_dtype,
                param_dtype=self.param_dtype,
                implementation=self.matmul,
                rngs=rngs,
                **options,
            )

        return make


def stack_layers(
    make_layer: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs
) -> nnx.Module:
    """`count` random layers as one module whose Variables carry a leading axis.

    Args:
        make_layer: draws one layer.
        count: how many.
        rngs: stream `params`.
    """
    keys = jax.random.split(rngs.params(), count)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make_layer(nnx.Rngs(keys[0]))))
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make_layer(nnx.Rngs(key))))(keys))


def is_stacked(path: tuple) -> bool:
    """Whether a path of a model's state leads into a stack, whose arrays carry the layers' axis.

    Args:
        path: of `jax.tree_util.tree_flatten_with_path`. Every model calls its stack `layers`.
    """
    return any(getattr(key, "key", getattr(key, "name", None)) == "layers" for key in path)


def scan_layers(
    layers: nnx.Module,
    apply: Callable[[Any, Any, Any], tuple[Any, Any]],
    x: Any,
    per_layer: Any,
    *,
    remat: str,
    stream_weights: bool = False,
    rows: int | None = None,
) -> tuple[Any, Any]:
    """Runs a stack: `apply(layer, x, slice) -> (x, output)`, layer after layer.

    Args:
        layers: as `stack_layers` made it.
        apply: one layer's part.
        x: what goes through; a pytree.
        per_layer: a pytree whose leaves carry the layers' axis (dropout keys, caches), or None.
        remat: a key of `REMAT`: what the backward pass finds saved.
        stream_weights: whether frozen weights come in from host memory layer by layer.
        rows: in decoding, how many tokens a layer takes, by which weights may stay in their stack
            (`_stay`); None where there may be a gradient.

    Returns:
        What came through, and the outputs stacked.
    """
    # Experts whose tokens are cut over devices are gathered as layers (`GathersItself`).
    gathered = isinstance(x, jax.Array) and mesh_of_rows(x) is not None
    stay = set() if stream_weights or gathered else _stay(layers, rows)
    parts: tuple[Any, ...] = nnx.split(layers, lambda path, _: path in stay, FrozenParam, ...)
    graphdef, stacks, frozen, rest = parts
    numbers = jnp.arange(len(jax.tree.leaves(stacks)[0])) if stay else None

    def step(x: Any, frozen: Any, own: tuple[Any, Any, Any]) -> tuple[Any, Any]:
        rest, given, number = own
        layer = nnx.merge(graphdef, _at_layer(stacks, number), frozen, rest)
        # Decoding's x is no single array; its few rows go where the weights lie.
        if isinstance(x, jax.Array):
            x = cut_by_rows(x)
            gather_dense(layer, beside=x)
        return apply(layer, x, given)

    own = rest, per_layer, numbers
    return run_layers(step, x, frozen, own, remat=remat, stream_weights=stream_weights)


def _stay(layers: nnx.Module, rows: int | None) -> set[tuple]:
    """Paths of the Variables that are left in their stacks: those of a stack of stacks (experts),
    and in decoding the weights that so many rows are better multiplied with where they lie.

    Adapters that may be trained (`rows` is None) are sliced all the same: the gradient of one left
    in its stack would be as large as the stack, and be added up in every turn of both loops.
    """
    paths: set[tuple] = set()
    for path, module in nnx.iter_modules(layers):
        if not isinstance(module, QuantDense):
            continue
        if len(module.stack_shape) > 1:
            state = nnx.state(module, FrozenParam if rows is None else ...)
            paths |= {(*path, *name) for name, _ in nnx.to_flat_state(state)}
        elif rows is not None and module.stays_in_stack(rows):
            paths.add((*path, "kernel"))
    return paths


def _at_layer(stacks: PyTree, layer: Any) -> PyTree:
    """One layer's part of what is left in its stacks; `layer` is None where nothing is."""

    def part(stack: Any) -> Any:
        if isinstance(stack, QuantizedTensor) and len(stack.stack_shape) == 1:
            return stack.at_layer(layer)
        return LayerOf(stack, layer)

    return jax.tree.map(part, stacks, is_leaf=_is_tensor)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerOf:
    """A layer's part of a stack of stacks, left where it lies: `[index]` takes one out of it.

    Attributes:
        stack: an array or `QuantizedTensor` of leading axes [layers, of a layer].
        layer: which.
    """

    stack: Any
    layer: Int[Array, ""]

    def __getitem__(self, index: Int[Array, ""]) -> Any:
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.stack)
        number = self.layer * jax.tree.leaves(self.stack)[0].shape[1] + index
        if _is_tensor(flat):
            return flat.at_layer(number)
        return jax.lax.dynamic_index_in_dim(flat, number, keepdims=False)


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedTensor)


def split_key(key: Key[Array, ""] | None, count: int) -> Key[Array, " count"] | None:
    """A key for each layer; None where there is no dropout."""
    return None if key is None else jax.random.split(key, count)


def draw(key: Key[Array, ""] | None, count: int) -> Keys:
    """At most `count` keys out of one, to be taken with `next`."""
    return itertools.repeat(None, count) if key is None else iter(jax.random.split(key, count))


def check_options(
    remat: str, lora: LoraConfig | None, model: nnx.Module, linears: tuple[str, ...]
) -> None:
    """Refuses an unknown remat, and adapters that found no layer.

    Raises:
        ValueError: saying what there is to choose from.
    """
    check_remat(remat)
    if lora is not None and not any(
        isinstance(node, QuantDense) and node.lora is not None for _, node in nnx.iter_graph(model)
    ):
        kind = "–".join(re.findall("[A-Z][a-z]+", type(model).__name__)).lower()
        raise ValueError(
            f"{lora.told_targets}, which names no linear layer of the "
            f"{kind}; it has {', '.join(linears)}."
        )
