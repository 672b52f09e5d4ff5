"""The quantized product's derivatives where a kernel runs it, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import qlora_jax as ql
from pallas_kernels import nf4_matmul, nf4_matmul_transposed
from qlora_jax.quant import matmul


def test_a_gradient_s_gradient_through_a_kernel(monkeypatch):
    """Through both passes: each kernel's rule runs the other."""
    for op in (nf4_matmul, nf4_matmul_transposed):
        monkeypatch.setattr(matmul, op.__name__, functools.partial(op, interpret=True))
    keys = jax.random.split(jax.random.key(0), 4)
    w = ql.quantize(jax.random.normal(keys[0], (24, 64)))
    shapes = ((3, 64), (24,), (3, 2))
    x, bias, xa = (jax.random.normal(k, s) for k, s in zip(keys[1:], shapes, strict=True))
    dense, b = w.dequantize(jnp.float32), jnp.ones((24, 2))

    def penalty(product):
        def loss(arguments):
            x, bias, xa, b = arguments
            return jnp.sum(product(x, bias, (xa, b)) ** 3)

        def norm(arguments):
            return sum(jnp.sum(g**2) for g in jax.grad(loss)(arguments))

        return jax.grad(norm)((x, bias, xa, b))

    by_kernel = penalty(
        lambda x, bias, lora: ql.quantized_matmul(
            x, w, bias, lora, implementation="triton", fuse_lora=True
        )
    )
    exact = penalty(lambda x, bias, lora: x @ dense.T + bias + lora[0] @ lora[1].T)
    for got, want in zip(by_kernel, exact, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-4 * float(jnp.abs(want).max()))
