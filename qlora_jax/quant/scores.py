"""x · Wᵀ in float32 through a frozen matrix of packed rows, which is never decoded whole.

A head has a row for every token, so decoded it would be as large as before. Here a piece of its
rows is decoded, multiplied and dropped, and only scores come out: float32 [..., rows], of which the
loss asks for a chunk of tokens at a time (`models.loss`). The backward pass goes through the same
pieces,

    dx = Σ over pieces  dscores[piece] · decode(W[piece])

with the numbers that the forward pass multiplied, and keeps nothing but the codes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from qlora_jax.quant.rows import piece_of, rows_at_once, slice_rows
from qlora_jax.quant.tensor import QuantizedTensor


def row_scores(
    x: Float[Array, "*batch width"], w: QuantizedTensor
) -> Float32[Array, "*batch rows"]:
    """x · wᵀ, differentiable in x; w is frozen.

    Cost: w is decoded once here and once in the backward pass, a piece at a time.

    Args:
        x: float32, bfloat16 or float16; w is decoded to this dtype.
        w: a matrix [rows, width] as `rows.row_config` says.

    Raises:
        ValueError: w is quantized otherwise, or does not fit x.
    """
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x has shape {x.shape}, but w has rows of {w.shape[-1]} numbers: {w!r}")
    return _scores(x.dtype.name, x, w)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(dtype: str, x: Array, w: QuantizedTensor) -> Array:
    rows, width = w.shape
    size = min(rows, rows_at_once(width))

    def add(piece: Array, scores: Array) -> Array:
        start, _ = piece_of(piece, size, rows)
        part = jnp.einsum(
            "...e,ve->...v", x, _decoded(w, start, size, dtype), preferred_element_type=jnp.float32
        )
        return jax.lax.dynamic_update_slice_in_dim(scores, part, start, axis=-1)

    scores = jnp.zeros((*x.shape[:-1], rows), jnp.float32)
    return jax.lax.fori_loop(0, -(-rows // size), add, scores)


def _forward(dtype: str, x: Array, w: QuantizedTensor) -> tuple[Array, QuantizedTensor]:
    return _scores(dtype, x, w), w


def _backward(dtype: str, w: QuantizedTensor, gradient: Array) -> tuple[Array, None]:
    rows, width = w.shape
    size = min(rows, rows_at_once(width))

    def add(piece: Array, total: Array) -> Array:
        start, fresh = piece_of(piece, size, rows)
        part = jax.lax.dynamic_slice_in_dim(gradient, start, size, axis=-1)
        # As in a dense head, the products' operands are as narrow as x, and only sums are wide.
        narrow = jnp.where(fresh, part, 0).astype(dtype)
        return total + jnp.einsum(
            "...v,ve->...e",
            narrow,
            _decoded(w, start, size, dtype),
            preferred_element_type=jnp.float32,
        )

    total = jnp.zeros((*gradient.shape[:-1], width), jnp.float32)
    return jax.lax.fori_loop(0, -(-rows // size), add, total).astype(dtype), None


_scores.defvjp(_forward, _backward)


def _decoded(w: QuantizedTensor, start: Array, size: int, dtype: str) -> Array:
    return slice_rows(w, start, size).dequantize(dtype, implementation="xla")
