"""`QuantDense`: a linear layer whose weight is frozen in 4 bits and whose adapters are trained.

    y = x · doubleDequant(W)ᵀ + b + s · dropout(x) · Aᵀ · Bᵀ                        (QLoRA, eq. 5)

The weight lives in a `FrozenParam` as a `QuantizedTensor` (or as a plain array, for 16-bit LoRA),
the adapters in `nnx.LoRAParam`. The product through W is a `custom_vjp` that keeps nothing but the
packed codes for the backward pass (`qlora_jax.quant.matmul`).

A layer may be a stack (the layers of a model, every Variable with leading axes) that a scan takes
apart before it calls them. The layers of one stack share one program, so where their ranks differ
all get the largest, filled up with zeros: a row of A and a column of B that are both zero have zero
gradients, so this is exact in training too.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from pallas_kernels import LowRank, in_auto_axes, product_spec, reads_layers, rows_as_cut
from qlora_jax.nn.checks import check_dtype, check_matmul, check_rngs
from qlora_jax.nn.dora import adapted_squares, magnification, magnify, row_squares
from qlora_jax.nn.lora import LoraConfig, dropout, lora_hidden
from qlora_jax.nn.placing import beside
from qlora_jax.nn.stacks import drawn_a, stacked
from qlora_jax.nn.variables import FrozenParam
from qlora_jax.quant import (
    QuantConfig,
    QuantizedTensor,
    low_rank_product,
    quantize,
    quantized_matmul,
)

# As nnx.Linear, for a weight [out, in].
_KERNEL_INIT = nnx.initializers.lecun_normal(in_axis=1, out_axis=0)

Factors = tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]
"""A layer's A and B."""


class QuantDense(nnx.Module):
    """A linear layer with a frozen 4-bit weight, an optional bias, and LoRA.

    It stands where an `nnx.Linear` does, with other defaults (adapters, no bias, results in
    bfloat16) and the weight the other way round, [out, in], for `kernel_init` and its names, too.

    Attributes:
        kernel: `FrozenParam` of a `QuantizedTensor` [out, in], or of an array [out, in] where
            `quant` is None.
        bias: `FrozenParam` [out], or None.
        lora_A: `nnx.LoRAParam` [r, in], or None.
        lora_B: `nnx.LoRAParam` [out, r], or None.
        lora_magnitude_vector: DoRA's `nnx.LoRAParam` [out], or None.
        row_squares: `FrozenParam` [out] of the weight's squared row lengths, for DoRA; or None.
        lora_scaling: `FrozenParam` scalar where the layers of one stack are scaled differently (0
            for a layer without an adapter); else None, and `lora.scaling` holds.
        lora: the adapters' configuration, or None.
        adapters: whether a call adds them; `nnx.view(model, adapters=False)` is the base alone.
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
            kernel_init: (key, (out, in), dtype) -> the weight, or a `QuantizedTensor` of it. Flax's
                initializers that scale by the inputs need in_axis=1 and out_axis=0.
            bias_init: (key, (out,), dtype) -> the bias.
            rngs: draws the weight and A from its `params` stream.
            dropout_rngs: seeds, from its `dropout` stream, the layer's own stream of keys for LoRA
                dropout, which serves calls that bring none in training mode (`module.train()`);
                with None, only an explicit `dropout_key` drops anything.

        Raises:
            ValueError: a layer without inputs or outputs, or no such dtype or implementation.
            TypeError: rngs is no nnx.Rngs.
        """
        check_dtype("compute_dtype", compute_dtype)
        check_matmul("implementation", implementation)
        check_rngs(rngs)
        if min(in_features, out_features) < 1:
            raise ValueError(
                f"in_features is {in_features} and out_features {out_features}; a layer has at "
                "least one of each"
            )
        # A Variable takes what nnx.with_partitioning's initializers return, and cuts it so.
        kernel = FrozenParam(kernel_init(rngs.params(), (out_features, in_features), param_dtype))
        weight = kernel.get_value()
        if quant is not None and not isinstance(weight, QuantizedTensor):
            kernel = FrozenParam(quantize(weight, quant))
        self.in_features, self.out_features = in_features, out_features
        self.kernel = kernel
        bias = bias_init(rngs.params(), (out_features,), param_dtype) if use_bias else None
        self.bias = nnx.data(None if bias is None else FrozenParam(bias))
        self.compute_dtype = compute_dtype
        self.implementation = implementation
        self.adapters = True
        self.adapt([lora], rngs, dropout_rngs)

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

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Leading axes of a stack of layers; () for a single layer."""
        weight = self.kernel.get_value()
        if isinstance(weight, QuantizedTensor):
            return weight.stack_shape
        return tuple(weight.shape[:-2])

    def adapt(
        self,
        loras: Sequence[LoraConfig | None],
        rngs: nnx.Rngs,
        dropout_rngs: nnx.Rngs | None = None,
        start: Sequence[Factors | None] | None = None,
    ) -> None:
        """Attaches fresh adapters, or none, in place, on the devices that the weight lies on.

        Args:
            loras: the configuration of each layer of the stack, its leading axes flattened (of a
                single layer, one); None for a layer without an adapter.
            rngs: draws A from its `params` stream.
            dropout_rngs: as at construction; a stack has to be called with explicit keys instead.
            start: A and B of each layer to start from instead, as `loftq.start_from_weight` gives
                them.
        """
        self.lora = None
        self.deterministic = False
        self.lora_A: nnx.LoRAParam | None = nnx.data(None)
        self.lora_B: nnx.LoRAParam | None = nnx.data(None)
        self.lora_magnitude_vector: nnx.LoRAParam | None = nnx.data(None)
        self.row_squares: FrozenParam | None = nnx.data(None)
        self.lora_scaling: FrozenParam | None = nnx.data(None)
        self.dropout_rngs = nnx.data(None)
        adapted = [lora for lora in loras if lora is not None]
        if not adapted:
            return
        r, stack, dtype = max(lora.r for lora in adapted), self.stack_shape, adapted[0].dtype
        uniform = len(adapted) == len(loras) and len({(x.r, x.scaling) for x in adapted}) == 1
        own = adapted[0] if uniform else replace(adapted[0], r=r)
        if own.lora_dropout and not stack and dropout_rngs is not None:
            # A stream of its own, as nnx.Dropout's: flax stacks and splits it with the layer, where
            # one that is shared with its caller is given back to that whole.
            self.dropout_rngs = nnx.data(nnx.Rngs(dropout=dropout_rngs.dropout()))

        if start is None:
            ranks = tuple(0 if lora is None else lora.r for lora in loras)
            a = drawn_a(rngs.params(), ranks, stack, self.in_features, dtype, own.init_lora_weights)
            b = jnp.zeros((*stack, self.out_features, r), dtype)
        else:
            own_a, own_b = ([None if x is None else x[i] for x in start] for i in (0, 1))
            a = stacked(own_a, stack, (r, self.in_features), dtype)
            b = stacked(own_b, stack, (self.out_features, r), dtype)
        a, b = beside(self.kernel.get_value(), lora_A=a, lora_B=b)
        self.lora, self.lora_A, self.lora_B = own, nnx.LoRAParam(a), nnx.LoRAParam(b)
        if not uniform:
            scales = [0 if lora is None else lora.scaling for lora in loras]
            self.lora_scaling = FrozenParam(jnp.asarray(scales, jnp.float32).reshape(stack))
        if own.use_dora:
            self.row_squares = FrozenParam(row_squares(self.kernel.get_value()))
            self.reset_magnitude()

    def reset_magnitude(self) -> None:
        """DoRA's start, in place: m is the length of each row of W + s·B·A as it is now."""
        assert self.lora is not None
        lengths = self.each(lambda layer: jnp.sqrt(layer._adapted_squares()))
        self.lora_magnitude_vector = nnx.LoRAParam(lengths.astype(self.lora.dtype))

    def each(self, function: Callable[["QuantDense"], PyTree]) -> PyTree:
        """The function of the layer, or [*stack, …] of each layer in a stack, one at a time."""
        graphdef, state = nnx.split(self)

        def of_state(state: Any) -> PyTree:
            return function(nnx.merge(graphdef, state))

        each: Callable[..., PyTree] = of_state
        for _ in self.stack_shape:
            each = partial(jax.lax.map, each)
        return in_auto_axes(each, state, result=lambda _: jax.P())

    def __call__(
        self,
        x: Float[Array, "*batch in"],
        out_sharding: jax.sharding.NamedSharding | jax.P | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*batch out"]:
        """The layer's output in `compute_dtype`.

        Args:
            x: any leading shape; cast to `compute_dtype`.
            out_sharding: how the output is to be cut on a mesh with Explicit axes, as of
                `nnx.Linear`; None cuts it as x and the weight are.
            dropout_key: key of this call's LoRA dropout; None draws one from `dropout_rngs` in
                training mode, or drops nothing where the layer has none.

        Raises:
            ValueError: x has another last dimension than `in_features`, or the layer is a stack.
            TypeError: x is no array.
        """
        return self._call(x, out_sharding, dropout_key)

    def _call(self, x: jax.Array, out_sharding: Any, dropout_key: jax.Array | None) -> jax.Array:
        if self.stack_shape:
            raise ValueError(
                f"the layer is a stack of {list(self.stack_shape)}; call its layers one at a time, "
                "under nnx.scan or nnx.vmap"
            )
        if not hasattr(x, "shape"):
            raise TypeError(f"x is a {type(x).__name__}, but an array is needed: jnp.asarray(x).")
        self._check_input(x)
        if dropout_key is None and self.dropout_rngs is not None and not self.deterministic:
            dropout_key = self.dropout_rngs.dropout()
        # As a function of all its arrays: see `in_auto_axes`.
        graphdef, state = nnx.split(self)

        def output(x: jax.Array, state: Any, dropout_key: jax.Array | None) -> jax.Array:
            return nnx.merge(graphdef, state)._output(x, dropout_key)

        def result(x: Any, state: Any, _key: Any) -> Any:
            if out_sharding is not None:
                return out_sharding
            return self._cut(x, state["kernel"].get_value())

        return in_auto_axes(output, x, state, dropout_key, result=result)

    def stays_in_stack(self, rows: int) -> bool:
        """Whether a stack of layers, multiplied with so many rows, had better stay where it lies
        than be sliced for each layer (`QuantizedTensor.at_layer`)."""
        weight = self.kernel.get_value()
        if not isinstance(weight, QuantizedTensor) or len(weight.stack_shape) != 1:
            return False
        return reads_layers(
            rows,
            weight.layout,
            weight.stack_shape[0],
            implementation=self.implementation,
            dtype=self.compute_dtype,
        )

    def _check_input(self, x: Array) -> None:
        if x.shape[-1:] != (self.in_features,):
            inputs = self.in_features
            raise ValueError(f"x has shape {x.shape}, but the layer takes {inputs} inputs")

    def _cut(self, x: Any, weight: Any) -> jax.P:
        """How the output is cut, from the types of x and of the weight."""
        codes = weight.codes if isinstance(weight, QuantizedTensor) else weight
        return product_spec(x, rows_as_cut(codes, weight.shape))

    def _output(
        self, x: Float[Array, "*batch in"], dropout_key: Key[Array, ""] | None
    ) -> Float[Array, "*batch out"]:
        x = x.astype(self.compute_dtype)
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        if not self.adapters or self.lora is None or self.lora_A is None or self.lora_B is None:
            return self._product(x, bias)
        dropped = dropout(x, self.lora.lora_dropout, dropout_key)
        hidden = lora_hidden(dropped, self.lora_A[...], self.scale)
        lora = (hidden, self.lora_B[...].astype(x.dtype))
        if self.lora_magnitude_vector is None:
            return self._product(x, bias, lora)
        y = magnify(self._product(x, lora=lora), self.magnification())
        return y if bias is None else y + bias

    def set_view(self, deterministic: bool | None = None, adapters: bool | None = None) -> None:
        """What `nnx.view(model, deterministic=True, adapters=False)` asks of its modules.

        Args:
            deterministic: if True, disables LoRA dropout from `dropout_rngs`.
            adapters: if False, calls leave the adapters out, and give what the base does.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        if adapters is not None:
            self.adapters = adapters

    @property
    def scale(self) -> float | jax.Array:
        """The adapter's s, or [*stack] where the layers of a stack are scaled differently."""
        assert self.lora is not None
        return self.lora.scaling if self.lora_scaling is None else self.lora_scaling[...]

    def magnification(self) -> Float[Array, " out"]:
        """What DoRA multiplies the rows of W + s·B·A with, float32."""
        assert self.lora_magnitude_vector is not None
        magnitude = self.lora_magnitude_vector[...]
        if self.row_squares is None:  # settled
            return magnitude
        return magnification(magnitude, self._adapted_squares(), self.scale)

    def _adapted_squares(self) -> Float[Array, " out"]:
        """‖W + s·B·A‖² of every row; a constant of the backward pass."""
        assert self.lora_A is not None
        assert self.lora_B is not None
        assert self.row_squares is not None
        a, b = (jax.lax.stop_gradient(x[...]) for x in (self.lora_A, self.lora_B))
        cross = self._product(a.astype(self.compute_dtype))
        return adapted_squares(self.row_squares[...], cross, a, b, self.scale)

    def _product(
        self,
        x: jax.Array,
        bias: jax.Array | None = None,
        lora: LowRank | None = None,
    ) -> jax.Array:
        """x · Wᵀ (+ b) through the frozen weight, and the adapter's `low_rank_product`."""
        weight = self.kernel.get_value()
        if isinstance(weight, QuantizedTensor):
            return quantized_matmul(x, weight, bias, lora, implementation=self.implementation)
        y = jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))
        if bias is not None:
            y = y + bias
        return y if lora is None else y + low_rank_product(*lora)
