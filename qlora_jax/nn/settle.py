"""Adapters for writing: what every call would compute again is computed once.

In generation a layer is called for every token, with few rows, while its adapter stays as it is. Of
float32 adapters each call would cast A [r, in] and B [out, r] anew and scale x · Aᵀ, and DoRA's
would take the norms of W + s·B·A anew: r more rows through the 4-bit product (`dora.py`).
"""

from dataclasses import replace
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx

from qlora_jax.nn.dense import QuantDense

Model = TypeVar("Model", bound=nnx.Module)


def settle_adapters(model: Model) -> Model:
    """Settles every `QuantDense` of a model in place, for many calls of few rows; returns it.

    Not of a model whose weights lie in host memory: DoRA's norms need them, a layer at a time.
    """
    if not getattr(model, "stream_weights", False):
        for _, module in nnx.iter_modules(model):
            if isinstance(module, QuantDense):
                settle(module)
    return model


def settle(layer: QuantDense) -> None:
    """Computes, in place, what every call of a layer or stack would compute again.

    A and B of another dtype are cast to `compute_dtype`, A with the scale in it, and DoRA's
    magnitude becomes the factor of its row. The layer gives the same outputs, up to their rounding,
    but can be neither trained nor saved any more.
    """
    if layer.lora is None or layer.lora_A is None or layer.lora_B is None:
        return
    if layer.lora_magnitude_vector is not None:
        layer.lora_magnitude_vector = nnx.LoRAParam(layer.each(lambda one: one.magnification()))
        layer.row_squares = None
    a, b = layer.lora_A[...], layer.lora_B[...]
    if a.dtype == b.dtype == layer.compute_dtype:
        return  # a scaled copy would be as large again, for one launch less
    a = jnp.asarray(layer.scale, jnp.float32)[..., None, None] * a.astype(jnp.float32)
    layer.lora_A = nnx.LoRAParam(a.astype(layer.compute_dtype))
    layer.lora_B = nnx.LoRAParam(b.astype(layer.compute_dtype))
    layer.lora = replace(layer.lora, alpha=layer.lora.r, use_rslora=False)
    layer.lora_scaling = None
