"""One layer of a decoder: attention and an MLP, each added to what flows past."""

from typing import Any

import jax
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
        self.input_layernorm = norm_for(config, config.hidden_size)
        self.post_attention_layernorm = norm_for(config, config.hidden_size)
        if config.residual == "sandwich":
            self.pre_feedforward_layernorm = norm_for(config, config.hidden_size)
            self.post_feedforward_layernorm = norm_for(config, config.hidden_size)
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
            return getattr(self, config.names.attention)(x, turns, mix, dropout_keys=keys)

        def mlp(x: Array) -> Array:
            module = getattr(self, config.names.mlp)
            check_mlp_tile(mlp_tile, experts=config.num_local_experts)
            if mlp_tile is None:
                return module(x, dropout_keys=keys)
            own = {name: keys[name] for name in config.mlp_linears}
            return by_tile(module, x, dropout_keys=own, tile=mlp_tile)

        first, second = self.input_layernorm, self.post_attention_layernorm
        if config.residual == "parallel":
            mixed, kept = attention(first(x))
            return x + mixed + mlp(second(x)), kept
        if config.residual == "post":
            mixed, kept = attention(x)
            x = first(x + mixed)
            return second(x + mlp(x)), kept
        mixed, kept = attention(first(x))
        if config.residual == "sandwich":
            x = x + second(mixed)
            return x + self.post_feedforward_layernorm(mlp(self.pre_feedforward_layernorm(x))), kept
        x = x + mixed
        return x + mlp(second(x)), kept
