"""x · Wᵀ through a frozen quantized W, with gradients for x alone.

Plain autodiff of `x @ dequantize(w).T` would keep the 16-bit weight as a residual of the backward
pass: the memory that quantization saved. Here the rule is written out instead, and the residual is
the packed codes themselves, which are there anyway:

    y  = x · doubleDequant(w)ᵀ         dx = dy · doubleDequant(w)         (QLoRA, eq. 5)

W takes no gradient: it is frozen, and its codes are integers. An adapter's h · Bᵀ may be added by
the same kernel, where `pallas_kernels`' table says that it pays; its gradients are as ever.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pallas_kernels import (
    LowRank,
    in_auto_axes,
    nf4_matmul,
    nf4_matmul_transposed,
    product_spec,
    rows_as_cut,
    vary_alike,
)
from qlora_jax.quant.low_rank import low_rank_gradients
from qlora_jax.quant.tensor import QuantizedLayer, QuantizedTensor

PRODUCT = "quantized_product"
"""The name (`checkpoint_name`) of what comes out: a policy that keeps products does not see one in
a rule that is written out."""


def quantized_matmul(
    x: Float[Array, "*batch in"],
    w: QuantizedTensor,
    bias: Float[Array, " out"] | None = None,
    lora: LowRank | None = None,
    *,
    implementation: str | None = None,
    fuse_lora: bool | None = None,
) -> Float[Array, "*batch out"]:
    """x · wᵀ (+ bias) (+ h · Bᵀ), differentiable in x, bias, h and B, in reverse, also twice.

    Args:
        x: float32, bfloat16 or float16; the weight is dequantized to this dtype, and products are
            summed in float32.
        w: a single quantized matrix [out, in], or a layer of a stack of them (`at_layer`).
        bias: added to the product, or None.
        lora: (h, B) of an adapter in x's dtype, h [..., r] = s · x · Aᵀ and B [out, r]; or None.
        implementation: which kernel; None lets `pallas_kernels` choose (see its `dispatch`).
        fuse_lora: whether that kernel adds h · Bᵀ itself; None lets `pallas_kernels` choose.

    Returns:
        The product, in x's dtype.

    Raises:
        ValueError: w is not a matrix, is a stack, or does not fit x.
        TypeError: an argument of another kind.
    """
    # Not isinstance: a Variable that holds one is taken, too.
    if not hasattr(w, "stack_shape"):
        raise TypeError(
            f"w is of type {type(w).__name__}; expected a QuantizedTensor, as quantize makes it"
        )
    if not (hasattr(x, "shape") and hasattr(x, "dtype")):
        raise TypeError(
            f"x is of type {type(x).__name__}; expected an array, as jax.numpy.asarray makes one"
        )
    if w.ndim != 2 or w.stack_shape:
        raise ValueError(
            f"w is {w!r}; quantized_matmul takes one matrix: use jax.vmap or jax.lax.scan on stacks"
        )
    if x.shape[-1:] != w.shape[1:]:
        raise ValueError(f"x has shape {x.shape}, but w takes {w.shape[1]} inputs: {w!r}")
    kernel = _Kernel(implementation, fuse_lora)
    product = in_auto_axes(
        partial(_matmul, kernel),
        *vary_alike(x, w, bias, lora),
        result=lambda x, w, *_: product_spec(x, rows_as_cut(w.codes, w.shape)),
    )
    return checkpoint_name(product, PRODUCT)


class _Kernel(NamedTuple):
    """Which kernel, as `nf4_matmul` asks for it."""

    implementation: str | None
    fuse_lora: bool | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(
    kernel: _Kernel, x: jax.Array, w: QuantizedTensor, bias: jax.Array | None, lora: LowRank | None
) -> jax.Array:
    return _forward(kernel, x, w, bias, lora)[0]


def _forward(
    kernel: _Kernel, x: jax.Array, w: QuantizedTensor, bias: jax.Array | None, lora: LowRank | None
) -> tuple[jax.Array, tuple]:
    x, tied = _in_turn(x, w)
    y = _product(kernel, x, tied, bias, lora)
    # What waits for the backward pass is the w that waits for x: a gradient that is there before a
    # layer is computed again (its last product's) does not have w decoded beside those before it.
    # Only if one number is tied: absmax would be kept twice where nothing is computed again.
    return y, (tied if w.double_quant else w, bias, lora)


def _backward(kernel: _Kernel, residuals: tuple, dy: jax.Array) -> tuple:
    w, bias, lora = residuals
    if isinstance(w, QuantizedLayer):
        w = w.taken_out()
    dlora = None if lora is None else low_rank_gradients(lora, dy)
    dy, w = _in_turn(dy, w)
    dx = _transposed(kernel.implementation, dy, w)
    dbias = None
    if bias is not None:
        dbias = jnp.sum(dy, axis=range(dy.ndim - 1), dtype=jnp.float32).astype(bias.dtype)
    return dx, None, dbias, dlora


_matmul.defvjp(_forward, _backward)


# The kernels have no derivatives. A gradient's gradient differentiates the two passes above, whose
# products are therefore functions with rules of their own.


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    kernel: _Kernel, x: jax.Array, w: QuantizedTensor, bias: jax.Array | None, lora: LowRank | None
) -> jax.Array:
    return nf4_matmul(x, **_arguments(w), bias=bias, lora=lora, **kernel._asdict())


_product.defvjp(
    lambda kernel, x, w, bias, lora: (_product(kernel, x, w, bias, lora), (w, bias, lora)),
    _backward,
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _transposed(implementation: str | None, dy: jax.Array, w: QuantizedTensor) -> jax.Array:
    return nf4_matmul_transposed(dy, **_arguments(w), implementation=implementation)


def _transposed_backward(implementation: str | None, w: QuantizedTensor, g: jax.Array) -> tuple:
    return _product(_Kernel(implementation, None), g, w, None, None), None


_transposed.defvjp(
    lambda implementation, dy, w: (_transposed(implementation, dy, w), w), _transposed_backward
)


def _in_turn(x: jax.Array, w: QuantizedTensor) -> tuple[jax.Array, QuantizedTensor]:
    """x and w, of which w cannot be decoded before x is there.

    Where the product is not fused, w is decoded to 16 bits first, and that needs nothing but w: XLA
    is free to decode the next weights while this product runs, and held four of them at once in a
    65B layer. Tying the smallest part of w to x (the offset, one number, or absmax) leaves the
    codes where they are and one decoded weight at a time.
    """
    leaves, treedef = jax.tree.flatten(w)
    x, leaves[-1] = jax.lax.optimization_barrier((x, leaves[-1]))
    return x, jax.tree.unflatten(treedef, leaves)


def _arguments(w: QuantizedTensor) -> dict[str, Any]:
    """A quantized tensor as the arguments that the ops of `pallas_kernels` take."""
    return {
        "codes": w.codes,
        "absmax": w.absmax,
        "nested_absmax": w.nested_absmax,
        "offset": w.offset,
        **({"layer": w.layer} if isinstance(w, QuantizedLayer) else {}),
        "shape": w.shape,
        "quant_type": w.quant_type,
        "blocksize": w.blocksize,
    }
