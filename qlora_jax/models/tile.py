"""Tiles of tokens: an MLP reads each token by itself, so it need not see all of them at once.

A layer's MLP is several times as wide as the layer. On the way back its gate, its up-projection,
their product, the gradients of all three and the masks of dropout are there together, each of them
0.9 GiB at 32k tokens of Llama 3 8B. Cut into tiles under one `lax.scan`, each computed again in its
own backward pass, they are as large as a tile, for any sequence (Arctic Long Sequence Training,
arXiv 2506.13996, calls this TiledMLP).

    x [32,768 tokens] → 8 tiles of 4,096: gate, up, down → joined

Cost: under `remat` "full" or "offload" no product where nothing but a sum follows the MLP (Llama,
Mistral, Qwen, GPT-NeoX): what a tile computes again, the layer would have computed again. Where a
norm follows it (Gemma, OPT-350M), the products before the down-projection once more. A weight that
is decoded before its product is decoded once a tile, and DoRA's A · Wᵀ is computed once a tile.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from qlora_jax.models.pieces import cut, joined

MLP_TILE = 4096
"""Tokens of a tile that keep products efficient, and decodes few: a good value to set."""

Keys = Mapping[str, Key[Array, ""] | None]


def check_mlp_tile(tile: int | None, *, experts: int | None = None) -> None:
    """Refuses tiles of nothing, and tiles of a mixture of experts.

    Args:
        tile: tokens, or None for no tiles.
        experts: how many the MLPs have; None for one.

    Raises:
        ValueError: saying what to give instead.
    """
    if tile is not None and tile < 1:
        raise ValueError(
            f"mlp_tile is {tile}, but at least 1 token is needed: {MLP_TILE} is usual, and None "
            "for no tiles."
        )
    if tile is not None and experts:
        raise ValueError(
            f"mlp_tile is {tile}, but a mixture of experts reads its tokens in blocks of its own: "
            "leave it out."
        )


def by_tile(
    module: nnx.Module,
    x: Float[Array, "batch seq embed"],
    *,
    dropout_keys: Keys,
    tile: int,
) -> Float[Array, "batch seq embed"]:
    """`module(x, dropout_keys=...)` in tiles, equal to rounding where nothing is dropped out.

    Args:
        module: works on every token by itself. Gradients of its adapters are summed over the tiles
            in float32.
        x: what it reads.
        dropout_keys: each tile draws from keys of its own, so with LoRA dropout other units fall
            out than without tiles.
        tile: tokens of a tile (`pieces.cut`).

    Raises:
        ValueError: tile is not positive.
    """
    check_mlp_tile(tile)
    tiles = cut(x, tile)
    if len(tiles) == 1:
        return module(x, dropout_keys=dropout_keys)
    parts: tuple[Any, ...] = nnx.split(module, nnx.LoRAParam, ...)
    graphdef, trained, frozen = parts
    # The values stay those of a narrower dtype; their gradients are summed as they are.
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), trained)

    @partial(jax.checkpoint, prevent_cse=False)
    def one(index: Array, part: Array) -> Array:
        own = {
            name: None if key is None else jax.random.fold_in(key, index)
            for name, key in dropout_keys.items()
        }
        return nnx.merge(graphdef, wide, frozen)(part, dropout_keys=own)

    def step(_: None, given: tuple[Array, Array]) -> tuple[None, Array]:
        return None, one(*given)

    _, done = jax.lax.scan(step, None, (jnp.arange(len(tiles)), tiles))
    return joined(done, x.shape[1])
