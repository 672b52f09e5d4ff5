"""The quantized product's derivatives where a kernel runs it, interpreted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import qlora_jax as ql
from pallas_kernels import nf4_matmul, nf4_matmul_transposed
from qlora_jax.quant import matmul


def test_a_gradient_s_gradient_through_a_kernel(monkeypatch):
    """Through both passes: each kernel's rule runs the other, of the implementation asked for."""
    asked = set()

    def interpreted(op):
        def run(*arguments, implementation, **options):
            asked.add((op.__name__, implementation))
            return op(*arguments, implementation=implementation, interpret=True, **options)

        return run

    for op in (nf4_matmul, nf4_matmul_transposed):
        monkeypatch.setattr(matmul, op.__name__, interpreted(op))
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
    assert asked == {("nf4_matmul", "triton"), ("nf4_matmul_transposed", "triton")}
    exact = penalty(lambda x, bias, lora: x @ dense.T + bias + lora[0] @ lora[1].T)
    for got, want in zip(by_kernel, exact, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-4 * float(jnp.abs(want).max()))


def test_a_layer_of_a_stack_has_the_gradients_of_its_weight():
    dense = jax.random.normal(jax.random.key(0), (3, 32, 64))
    stack = jax.vmap(ql.quantize)(dense)
    x, bias = jax.random.normal(jax.random.key(1), (5, 64)), jnp.arange(32.0)

    def loss(x, bias, w):
        return jnp.sum(ql.quantized_matmul(x, w, bias) ** 2)

    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    for layer in (0, 2):
        alone = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack)
        there = stack.at_layer(jnp.int32(layer))
        assert there.stack_shape == ()
        assert there.shape == alone.shape
        assert there.nbytes == alone.nbytes
        np.testing.assert_array_equal(there.dequantize(), alone.dequantize())
        jax.tree.map(
            np.testing.assert_array_equal, gradients(x, bias, there), gradients(x, bias, alone)
        )


@pytest.mark.parametrize("double_quant", [True, False])
def test_w_is_decoded_in_turn(double_quant):
    """In both passes behind their activations; backward also behind x, if one number ties it."""
    w = ql.quantize(jnp.ones((24, 64)), ql.QuantConfig(double_quant=double_quant))
    gradient = jax.grad(lambda x: jnp.sum(ql.quantized_matmul(x, w) ** 2))
    equations = jax.make_jaxpr(gradient)(jnp.ones((3, 64))).jaxpr.eqns
    forward, backward = (e for e in equations if e.primitive.name == "optimization_barrier")
    assert [v.aval.shape for v in forward.invars] == [(3, 64), () if double_quant else (24,)]
    assert [v.aval.shape for v in backward.invars] == [(3, 24), () if double_quant else (24,)]
    assert (backward.invars[1] is forward.outvars[1]) == double_quant


def test_a_symbolic_number_of_rows_can_be_exported():
    """Whether they are few is not known then: one program for both."""
    w = ql.quantize(jax.random.normal(jax.random.key(0), (32, 64)))

    def product(x):
        return ql.quantized_matmul(x, w)

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(product(x) ** 2))(x)

    shape = export.symbolic_shape("2, rows, 64")
    for function in (product, gradient):
        exported = export.export(jax.jit(function), platforms=["cpu", "cuda", "tpu"])(
            jax.ShapeDtypeStruct(shape, jnp.float32)
        )
        for rows in (1, 20):
            x = jax.random.normal(jax.random.key(1), (2, rows, 64))
            np.testing.assert_allclose(exported.call(x), function(x), rtol=1e-5, atol=1e-4)
