"""One layer of a decoder: attention and an MLP, each added to what flows past."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from qlora_jax.models.attention import Attention, Mix
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.mlp import MLP
from qlora_jax.models.moe import MixtureOfExperts
from qlora_jax.models.norm import norm_for
from qlora_jax.models.stack import Storage
from qlora_jax.models.tile import by_tile, check_mlp_tile


class DecoderLayer(nnx.Module):
    """Attention and MLP around one residual stream, in the order of `DecoderConfig.residual`."""

    def __init__(self, config: DecoderConfig, storage: Storage, rngs: nnx.Rngs) -> None:
        """Base weights are drawn from the stream `params`."""
        names = config.names
        for name in config.layer_norms:
            setattr(self, name, norm_for(config, config.hidden_size))
        attention = storage.dense(f"layers.{names.attention}", rngs)
        setattr(self, names.attention, Attention(config, attention))
        path = f"layers.{names.mlp}"
        if config.num_local_experts:
            setattr(self, names.mlp, MixtureOfExperts(config, storage, path, rngs))
        else:
            setattr(self, names.mlp, MLP(config, storage.dense(path, rngs)))
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq embed"],
        turns: tuple[Array, Array] | None,
        mix: Mix,
        *,
        dropout_key: Key[Array, ""] | None,
        mlp_tile: int | None = None,
    ) -> tuple[Float[Array, "batch seq embed"], Any]:
        """The same shape and dtype as x, and what `mix` kept.

        Args:
            x: what flows past.
            turns, mix: as `Attention` takes them.
            dropout_key: this layer's own.
            mlp_tile: tokens that the MLP reads at once (`tile.py`); None for all. Experts read
                theirs in blocks of their own.
        """
        config = self.config
        linears = (*config.attention_linears, *config.mlp_linears)
        keys: dict[str, Array | None] = dict.fromkeys(linears)
        if dropout_key is not None:
            split = jax.random.split(dropout_key, len(linears))
            keys = dict(zip(linears, split, strict=True))

        def attention(x: Array) -> tuple[Array, Any]:
            module = getattr(self, config.names.attention)
            mixed, kept = module(x, turns, mix, dropout_keys=keys)
            return times(mixed, config.residual_multiplier), kept

        def mlp(x: Array) -> Array:
            module = getattr(self, config.names.mlp)
            check_mlp_tile(mlp_tile, experts=config.num_local_experts)
            if mlp_tile is None:
                y = module(x, dropout_keys=keys)
            else:
                own = {name: keys[name] for name in config.mlp_linears}
                y = by_tile(module, x, dropout_keys=own, tile=mlp_tile)
            return times(y, config.residual_multiplier)

        first, second, *more = (getattr(self, name) for name in config.layer_norms)
        if config.residual == "parallel":
            mixed, kept = attention(first(x))
            return x + mixed + mlp(second(x)), kept
        if config.residual in ("post", "after"):
            mixed, kept = attention(x)
            if config.residual == "post":
                x = first(x + mixed)
                return second(x + mlp(x)), kept
            x = x + first(mixed)
            return x + second(mlp(x)), kept
        mixed, kept = attention(first(x))
        if config.residual == "sandwich":
            third, fourth = more
            x = x + second(mixed)
            return x + fourth(mlp(third(x))), kept
        x = x + mixed
        return x + mlp(second(x)), kept


def times(x: Float[Array, "*shape"], factor: float) -> Float[Array, "*shape"]:
    """x · factor in x's dtype, by way of float32: in bfloat16 the factor would be rounded."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)
