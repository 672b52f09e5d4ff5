"""The feed-forward half of a layer."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from qlora_jax.models.config import DecoderConfig
from qlora_jax.nn import QuantDense

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class MLP(nnx.Module):
    """down(act(gate(x)) · up(x)) (arXiv 2002.05202), or down(act(up(x))) without a gate."""

    def __init__(self, config: DecoderConfig, dense: Callable[..., QuantDense]) -> None:
        """`dense` makes a linear layer (`Storage.dense`)."""
        for name, linear in config.mlp_linears.items():
            made = dense(name, linear.inputs, linear.outputs, use_bias=linear.bias)
            setattr(self, name, made)
        self.config = config

    def __call__(
        self,
        x: Float[Array, "*batch embed"],
        *,
        dropout_keys: Mapping[str, Key[Array, ""] | None],
    ) -> Float[Array, "*batch embed"]:
        """The same shape and dtype as x; one dropout key a projection, by its name."""
        names, act = self.config.names, ACTIVATIONS[self.config.hidden_act]

        def project(name: str, x: Array) -> Array:
            return getattr(self, name)(x, dropout_key=dropout_keys[name])

        if not self.config.gated_mlp:
            inner = act(project(names.up, x))
        elif self.config.fused_gate_up:
            gate, up = jnp.split(project(names.gate_up, x), 2, axis=-1)
            inner = act(gate) * up
        else:
            gate = project(names.gate, x)
            if x.shape[-2:-1] != (1,):
                # One decoded weight at a time, on the way back too: `up` waits for `gate`. A step
                # of decoding, whose kernels decode no weight as a whole, has fewer launches so.
                x, gate = jax.lax.optimization_barrier((x, gate))
            inner = act(gate) * project(names.up, x)
        return project(names.down, inner)
