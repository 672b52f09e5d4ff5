"""A mixture of experts in place of an MLP (Mixtral, arXiv 2401.04088): few of many for each token.

A router scores all experts; a token goes through the best `num_experts_per_tok` of them, and their
outputs are added up in the proportions of the scores. The experts are one `MLP` whose Variables
carry a leading axis, so a quantized expert is a slice of stacked codes: of one layer's, or of all
layers' (`stack.LayerOf`), because for a loop over a layer's part of them XLA copies that part.

    tokens × k pairs, sorted by expert:  e0 e0 e0 e0 e0 | e1 | e2 e2 | e3 e3 e3 e3
    blocks of 3, each of one expert:     e0 e0 e0 | e0 e0 . | e1 . . | e2 e2 . | e3 e3 e3 | e3 . .

One `lax.scan` runs over the blocks and decodes one expert's weight at a time; nothing is dropped,
whatever the router says, and every shape is static. With b rows to a block there are at most
tokens · k / b + experts blocks, so no more than experts · b rows are padding (all experts on all
tokens would be tokens · experts rows). The backward pass runs a block's forward again: otherwise
the scan would keep a copy of the expert's weights for every block.

Of a batch that is cut over devices, each device routes its own rows: sorted together, all tokens
would be computed on every device. In a step of decoding the few rows go where the experts lie.

The router stays dense and is not adapted, as in transformers 5, where it is no linear layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from pallas_kernels import mesh_of_rows
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.mlp import MLP
from qlora_jax.models.spread import GathersItself, shardings_of
from qlora_jax.models.stack import LayerOf, Storage, split_key, stack_layers
from qlora_jax.nn import FrozenParam

BLOCK = 512
"""Most rows of a block: more would be padding, fewer would decode each weight more often."""


class MixtureOfExperts(GathersItself):
    """Σ over a token's experts of router weight · expert(x).

    Attributes:
        gate: the router, `[experts, embed]`.
        experts: one `MLP`, stacked.
    """

    def __init__(self, config: DecoderConfig, storage: Storage, path: str, rngs: nnx.Rngs) -> None:
        """`path` leads the names of the linear layers."""
        shape = (config.num_local_experts, config.hidden_size)
        gate = jax.random.normal(rngs.params(), shape, jnp.float32) * 0.02
        self.gate = FrozenParam(gate.astype(storage.param_dtype))
        self.experts = stack_layers(
            lambda rngs: MLP(config, storage.dense(f"{path}.experts", rngs)),
            config.num_local_experts,
            rngs,
        )
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        *,
        dropout_keys: Mapping[str, Key[Array, ""] | None],
    ) -> Float[Array, "batch seq embed"]:
        """The same shape and dtype as x; one dropout key a projection, by its name."""
        mesh = mesh_of_rows(x)
        if mesh is not None and x.shape[1] > 1:
            return self._on_each_device(x, dropout_keys, mesh)
        graphdef, stacked = nnx.split(self.experts)

        def expert_at(index: Array) -> Any:
            one = jax.tree.map(lambda leaf: leaf[index], stacked, is_leaf=_is_layer)
            return nnx.merge(graphdef, one)

        return self._route(x, self.gate[...], expert_at, dropout_keys)

    def _on_each_device(
        self,
        x: Float[Array, "batch seq embed"],
        dropout_keys: Mapping[str, Key[Array, ""] | None],
        mesh: jax.sharding.AbstractMesh,
    ) -> Float[Array, "batch seq embed"]:
        """`_route` for a device's own rows, with all experts beside them and dropout of its own."""
        (axis,) = mesh.axis_names
        graphdef, stacked = nnx.split(self.experts)
        leaves, treedef = jax.tree.flatten(stacked)
        places = shardings_of(self.experts, mesh, over=self.over)
        paths = [path for path, _ in nnx.to_flat_state(stacked)]
        specs = [at.spec for path in paths for at in jax.tree.leaves(places[path])]
        # Of each leaf the axis that is cut, or None.
        cuts = [spec.index(axis) if axis in spec else None for spec in specs]

        def on_one(x: Array, gate: Array, leaves: list[Array], keys: Mapping[str, Any]) -> Array:
            whole = [
                leaf if cut is None else jax.lax.all_gather(leaf, axis)
                for leaf, cut in zip(leaves, cuts, strict=True)
            ]

            def expert_at(index: Array) -> Any:
                picked = [
                    leaf[index] if cut is None else _join(leaf[:, index], cut - 1)
                    for leaf, cut in zip(whole, cuts, strict=True)
                ]
                return nnx.merge(graphdef, jax.tree.unflatten(treedef, picked))

            device = jax.lax.axis_index(axis)
            keys = jax.tree.map(lambda key: jax.random.fold_in(key, device), keys)
            return self._route(x, gate, expert_at, keys)

        by_rows, everywhere = jax.P(axis), jax.P()
        run = jax.shard_map(
            on_one,
            mesh=mesh,
            in_specs=(by_rows, everywhere, specs, everywhere),
            out_specs=by_rows,
        )
        return run(x, self.gate[...], leaves, dropout_keys)

    def _route(
        self,
        x: Float[Array, "batch seq embed"],
        gate: Float[Array, "experts embed"],
        expert_at: Callable[[Array], Any],
        dropout_keys: Mapping[str, Key[Array, ""] | None],
    ) -> Float[Array, "batch seq embed"]:
        experts, chosen = self.config.num_local_experts, self.config.num_experts_per_tok
        tokens = x.reshape(-1, x.shape[-1])
        scores = jnp.einsum("te,xe->tx", tokens, gate.astype(x.dtype))
        share, expert = jax.lax.top_k(jax.nn.softmax(scores.astype(jnp.float32)), chosen)
        if self.config.norm_topk_prob:
            share /= share.sum(axis=-1, keepdims=True)

        size = min(-(-expert.size // experts), BLOCK)
        count = (expert.size + experts * (size - 1)) // size
        slots, owners = _blocks(expert.reshape(-1), experts, size, count)
        # Slots that no token has read past the end: zeros.
        rows = (
            jnp.full((count * size,), len(tokens)).at[slots].set(jnp.arange(expert.size) // chosen)
        )

        def step(_: None, block: tuple[Array, Array, Any]) -> tuple[None, Array]:
            owner, rows, keys = block
            given = tokens.at[rows].get(mode="fill", fill_value=0)
            return None, expert_at(owner)(given, dropout_keys=keys)

        step = jax.checkpoint(
            step, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False
        )
        keys = {name: split_key(dropout_keys[name], count) for name in self.config.mlp_linears}
        _, blocks = jax.lax.scan(step, None, (owners, rows.reshape(count, size), keys))
        outputs = blocks.reshape(count * size, -1)[slots].reshape(*expert.shape, -1)
        return (outputs * share[..., None]).sum(axis=1).astype(x.dtype).reshape(x.shape)


def _is_layer(leaf: Any) -> bool:
    return isinstance(leaf, LayerOf)


def _join(parts: Array, axis: int) -> Array:
    """Parts [parts, ...] of an array, one after another along an axis of it."""
    parts = jnp.moveaxis(parts, 0, axis)
    return parts.reshape(*parts.shape[:axis], -1, *parts.shape[axis + 2 :])


def _blocks(
    expert: Int[Array, " pairs"], experts: int, size: int, count: int
) -> tuple[Int[Array, " pairs"], Int[Array, " blocks"]]:
    """Every pair's slot among `count` blocks of `size`, and every block's expert."""
    order = jnp.argsort(expert, stable=True)
    pairs = jnp.bincount(expert, length=experts)
    blocks = -(-pairs // size)
    ends = jnp.cumsum(blocks)
    sorted_expert = expert[order]
    rank = jnp.arange(expert.size) - (jnp.cumsum(pairs) - pairs)[sorted_expert]
    slots = (ends - blocks)[sorted_expert] * size + rank
    owners = jnp.searchsorted(ends, jnp.arange(count), side="right")
    # Blocks that are left over are empty; whose they are does not matter.
    return jnp.zeros_like(slots).at[order].set(slots), jnp.minimum(owners, experts - 1)
