"""A kernel without a batching rule under `jax.vmap`: a loop, with the numbers of a batched op."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._batching import in_turn


def test_a_mapped_call_is_a_loop():
    """Mapped over some of its arguments, over others, and twice."""

    def product(x, w, b):
        return x @ w + b

    x, w, b = jnp.arange(12.0).reshape(3, 4), jnp.arange(24.0).reshape(3, 4, 2), jnp.ones(2)
    looped = in_turn(product)
    np.testing.assert_array_equal(looped(x[0], w[0], b), product(x[0], w[0], b))
    for axes in ((0, 0, None), (0, None, None), (None, 0, None)):
        arrays = [a if axis == 0 else a[0] for a, axis in zip((x, w), axes[:2], strict=True)]
        np.testing.assert_array_equal(
            jax.vmap(looped, axes)(*arrays, b), jax.vmap(product, axes)(*arrays, b)
        )
        assert "while" in jax.jit(jax.vmap(looped, axes)).lower(*arrays, b).as_text()
    twice = [jax.vmap(jax.vmap(f, (None, 0, None)), (0, None, None)) for f in (looped, product)]
    np.testing.assert_array_equal(*(f(x, w, b) for f in twice))
