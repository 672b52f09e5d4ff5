"""`QuantDense`: a linear layer whose weight is frozen in 4 bits and whose adapters are trained.

    y = x · doubleDequant(W)ᵀ + b + s · dropout(x) · Aᵀ · Bᵀ                        (QLoRA, eq. 5)

The weight lives in a `FrozenParam` as a `QuantizedTensor` (or as a plain array, for 16-bit LoRA),
the adapters in `nnx.LoRAParam`. The product through W is a `custom_vjp` that keeps nothing but the
packed codes for the backward pass (`qlora_jax.quant.matmul`).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from qlora_jax.nn.lora import LoraConfig, dropout, init_lora_a, lora_product
from qlora_jax.nn.variables import FrozenParam
from qlora_jax.quant import QuantConfig, QuantizedTensor, quantize, quantized_matmul

# As nnx.Linear, for a weight [out, in].
_KERNEL_INIT = nnx.initializers.lecun_normal(in_axis=1, out_axis=0)


class QuantDense(nnx.Module):
    """A drop-in linear layer: 4-bit frozen weight, optional bias, optional LoRA.

    Attributes:
        kernel: `FrozenParam` of a `QuantizedTensor` [out, in], or of an array [out, in] where
            `quant` is None.
        bias: `FrozenParam` [out], or None.
        lora_A: `nnx.LoRAParam` [r, in], or None.
        lora_B: `nnx.LoRAParam` [out, r], or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        quant: QuantConfig | None = QuantConfig(),
        lora: LoraConfig | None = LoraConfig(),
        compute_dtype: Any = jnp.bfloat16,
        param_dtype: Any = jnp.float32,
        implementation: str | None = None,
        kernel_init: Callable[..., Any] = _KERNEL_INIT,
        bias_init: Callable[..., Any] = nnx.initializers.zeros_init(),
        rngs: nnx.Rngs,
        dropout_rngs: nnx.Rngs | None = None,
    ) -> None:
        """A layer with a fresh random weight; `from_weight` makes one around an existing weight.

        Args:
            in_features: size of the input's last dimension.
            out_features: size of the output's last dimension.
            use_bias: add a frozen bias.
            quant: how the weight is stored; None keeps it as an array of `param_dtype`.
            lora: the adapters; None for a frozen layer.
            compute_dtype: of the products and of the output.
            param_dtype: of the weight before quantization, and of the bias.
            implementation: which kernel multiplies; None lets `pallas_kernels` choose.
            kernel_init: (key, (out, in), dtype) -> the weight, or a `QuantizedTensor` of it.
            bias_init: (key, (out,), dtype) -> the bias.
            rngs: draws the weight and A from its `params` stream.
            dropout_rngs: where LoRA dropout draws a key when a call brings none and the layer is
                in training mode (`module.train()`); with None, only an explicit `dropout_key`
                drops anything.
        """
        weight = kernel_init(rngs.params(), (out_features, in_features), param_dtype)
        if quant is not None and not isinstance(weight, QuantizedTensor):
            weight = quantize(weight, quant)
        self.in_features, self.out_features = in_features, out_features
        self.kernel = FrozenParam(weight)
        bias = bias_init(rngs.params(), (out_features,), param_dtype) if use_bias else None
        self.bias = nnx.data(None if bias is None else FrozenParam(bias))
        self.compute_dtype = compute_dtype
        self.implementation = implementation
        self._adapt(lora, rngs, dropout_rngs)

    @classmethod
    def from_weight(
        cls,
        weight: Float[Array, "out in"] | QuantizedTensor,
        bias: Float[Array, " out"] | None = None,
        *,
        quant: QuantConfig | None = QuantConfig(),
        lora: LoraConfig | None = LoraConfig(),
        compute_dtype: Any = jnp.bfloat16,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        dropout_rngs: nnx.Rngs | None = None,
    ) -> "QuantDense":
        """A layer around an existing weight [out, in]; a `QuantizedTensor` is taken as it is."""
        out_features, in_features = weight.shape
        return cls(
            in_features,
            out_features,
            use_bias=bias is not None,
            quant=quant,
            lora=lora,
            compute_dtype=compute_dtype,
            implementation=implementation,
            kernel_init=lambda *_: weight,
            bias_init=lambda *_: bias,
            rngs=rngs,
            dropout_rngs=dropout_rngs,
        )

    def _adapt(
        self, lora: LoraConfig | None, rngs: nnx.Rngs, dropout_rngs: nnx.Rngs | None
    ) -> None:
        """Attaches fresh adapters, or none."""
        self.lora = lora
        self.deterministic = False
        self.lora_A, self.lora_B = nnx.data(None), nnx.data(None)
        self.dropout_rngs = nnx.data(None)
        if lora is None:
            return
        a = init_lora_a(rngs.params(), lora.r, self.in_features, lora.dtype)
        self.lora_A = nnx.LoRAParam(a)
        self.lora_B = nnx.LoRAParam(jnp.zeros((self.out_features, lora.r), lora.dtype))
        if lora.lora_dropout:
            self.dropout_rngs = nnx.data(dropout_rngs)

    def __call__(
        self, x: Float[Array, "*batch in"], *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "*batch out"]:
        """The layer's output in `compute_dtype`.

        Args:
            x: any leading shape; cast to `compute_dtype`.
            dropout_key: key of this call's LoRA dropout; None draws one from `dropout_rngs` in
                training mode, or drops nothing where the layer has none.
        """
        x = x.astype(self.compute_dtype)
        y = self._base(x)
        if self.lora is None or self.lora_A is None or self.lora_B is None:
            return y
        if dropout_key is None and self.dropout_rngs is not None and not self.deterministic:
            dropout_key = self.dropout_rngs.dropout()
        x = dropout(x, self.lora.lora_dropout, dropout_key)
        return y + lora_product(x, self.lora_A[...], self.lora_B[...], self.lora.scaling)

    def _base(self, x: jax.Array) -> jax.Array:
        weight = self.kernel.get_value()
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        if isinstance(weight, QuantizedTensor):
            return quantized_matmul(x, weight, bias, implementation=self.implementation)
        y = jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))
        return y if bias is None else y + bias
