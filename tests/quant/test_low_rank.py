"""An adapter's product beside a quantized weight's: values and gradients, added inside or after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from qlora_jax.quant import QuantConfig, low_rank_product, quantize, quantized_matmul


def problem(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    x, hidden = (
        jax.random.normal(k, (2, 3, n), dtype) for k, n in zip(keys, (64, 4), strict=False)
    )
    weight, b = (
        jax.random.normal(k, (24, n), dtype) for k, n in zip(keys[2:], (64, 4), strict=False)
    )
    return x, quantize(weight, QuantConfig()), jax.random.normal(keys[4], (24,), dtype), hidden, b


@pytest.mark.parametrize("fuse", [True, False, None])
def test_gradients_by_finite_differences(fuse):
    x, w, bias, hidden, b = problem()

    @jax.jit
    def f(x, bias, hidden, b):
        return quantized_matmul(x, w, bias, (hidden, b), fuse_lora=fuse)

    dense = x @ w.dequantize().T + bias + hidden @ b.T
    np.testing.assert_allclose(f(x, bias, hidden, b), dense, rtol=1e-5, atol=1e-5)
    check_grads(f, (x, bias, hidden, b), order=1, modes=["rev"], rtol=2e-2, atol=2e-2)


def test_apart_is_the_sum_of_both_products():
    """Unless a kernel adds it, an adapter is what it is on a dense base, bit for bit."""
    x, w, bias, hidden, b = problem(jnp.bfloat16)
    apart = quantized_matmul(x, w, bias, (hidden, b), fuse_lora=False)
    by_hand = quantized_matmul(x, w, bias) + low_rank_product(hidden, b)
    np.testing.assert_array_equal(apart, by_hand)
    fused = quantized_matmul(x, w, bias, (hidden, b), fuse_lora=True)
    assert (fused != apart).any()


def test_gradients_are_of_their_operands_kinds():
    """Those of 16 bits in 16; a wide bias' is a sum of 257 ones, which bfloat16 does not hold."""
    x, w, bias, hidden, b = problem(jnp.bfloat16)

    def total(x, bias, hidden, b):
        return jnp.sum(quantized_matmul(x, w, bias, (hidden, b)), dtype=jnp.float32)

    operands = (x, bias, hidden, b)
    gradients = jax.eval_shape(jax.grad(total, argnums=range(4)), *operands)
    assert [(g.shape, g.dtype) for g in gradients] == [(o.shape, o.dtype) for o in operands]
    rows, wide = jnp.ones((257, 64), x.dtype), bias.astype(jnp.float32)
    ones = jnp.ones((257, 24), x.dtype)
    (gradient,) = jax.vjp(lambda bias: quantized_matmul(rows, w, bias), wide)[1](ones)
    np.testing.assert_array_equal(gradient, np.full(24, 257, np.float32))
