"""`QuantDense` for users of Flax Linen, through Flax's own bridge."""

from typing import Any

import flax.linen
from flax import nnx

from qlora_jax.nn.dense import QuantDense


def linen_quant_dense(in_features: int, out_features: int, **options: Any) -> flax.linen.Module:
    """A Linen module that holds a `QuantDense`.

    Its variables come in two collections: `LoRAParam`, the adapters to train, and `FrozenParam`,
    the 4-bit base:

        layer = linen_quant_dense(64, 80, lora=LoraConfig(r=8))
        variables = layer.init(key, x)
        y = layer.apply(variables, x)

    LoRA dropout takes a key of the call, `layer.apply(variables, x, dropout_key=key)`; without one,
    and whatever `rngs` are given, nothing is dropped.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        **options: keyword arguments of `QuantDense` except `rngs`.
    """
    return nnx.bridge.to_linen(QuantDense, in_features, out_features, **options)
