"""Merging adapters into the model that is at hand: W' = W + s · B · A, and no adapter any more.

    merge_lora(model)                   # dense weights: PEFT's merge_and_unload
    merge_lora(model, QuantConfig())    # packed again, which loses deltas smaller than half a step

The weights are those that training saw, the numbers that the codes stand for. docs/merging.md says
what each way costs; of a checkpoint, `checkpoints.merge` needs one tensor in memory at a time.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qlora_jax.nn.dense import QuantDense
from qlora_jax.nn.variables import FrozenParam
from qlora_jax.quant import QuantConfig, QuantizedTensor, quantize

Model = TypeVar("Model", bound=nnx.Module)


def merge_lora(model: Model, quant: QuantConfig | None = None) -> Model:
    """Adds the adapters of every `QuantDense` in a model to its weight, in place, layer by layer of
    a stack; weights without an adapter, and what was trained whole, stay as they are. On a mesh
    with Explicit axes, merged weights are whole on every device.

    Args:
        model: with adapters on some of its layers.
        quant: how merged weights are stored; None keeps them dense, in the dtype that they had
            before they were quantized.

    Returns:
        The same model, whose layers can be given new adapters (`add_lora`).

    Raises:
        ValueError: there are no adapters, or the weights lie in host memory.
    """
    adapted = [
        layer
        for _, layer in nnx.iter_modules(model)
        if isinstance(layer, QuantDense) and layer.lora is not None
    ]
    if not adapted:
        raise ValueError(f"{type(model).__name__} has no adapters to merge")
    if getattr(model, "stream_weights", False):
        raise ValueError(
            f"the weights of this {type(model).__name__} lie in host memory (stream_weights): "
            "save the adapter, and merge it into the checkpoint (qlora-jax merge)"
        )
    for layer in adapted:
        layer.kernel = FrozenParam(layer.each(lambda one: _merged(one, quant)))
        layer.adapt([None], nnx.Rngs(0))
    return model


def _merged(
    layer: QuantDense, quant: QuantConfig | None
) -> QuantizedTensor | Float[Array, "out in"]:
    """The weight of one layer with its adapter, summed in float32 and rounded once."""
    assert layer.lora_A is not None
    assert layer.lora_B is not None
    weight = layer.kernel.get_value()
    wide = weight.dequantize(jnp.float32) if isinstance(weight, QuantizedTensor) else weight
    a, b = (x[...].astype(jnp.float32) for x in (layer.lora_A, layer.lora_B))
    delta = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    merged = wide.astype(jnp.float32) + layer.scale * delta
    if layer.lora_magnitude_vector is not None:
        merged = layer.magnification()[:, None] * merged
    if quant is None:
        return merged.astype(weight.dtype)
    packed = quantize(merged, quant)
    packed.dtype = weight.dtype
    return packed
