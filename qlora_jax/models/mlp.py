"""The feed-forward half of a layer."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from qlora_jax.models.config import DecoderConfig
from qlora_jax.nn import QuantDense


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) · up(x)), SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, dense: Callable[..., QuantDense]) -> None:
        outer, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = dense("mlp.gate_proj", outer, inner, bias)
        self.up_proj = dense("mlp.up_proj", outer, inner, bias)
        self.down_proj = dense("mlp.down_proj", inner, outer, bias)

    def __call__(
        self, x: Float[Array, "batch seq embed"], *, dropout_keys: list[Key[Array, ""] | None]
    ) -> Float[Array, "batch seq embed"]:
        """The same shape and dtype as x; one dropout key a projection."""
        gate = self.gate_proj(x, dropout_key=dropout_keys[0])
        # One decoded weight at a time, on the way back too: `up` waits for `gate`.
        x, gate = jax.lax.optimization_barrier((x, gate))
        up = self.up_proj(x, dropout_key=dropout_keys[1])
        return self.down_proj(jax.nn.silu(gate) * up, dropout_key=dropout_keys[2])
