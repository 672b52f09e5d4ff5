"""DoRA against the paper's formulas in float64 NumPy, values and gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qlora_jax as ql
from qlora_jax.nn import FrozenParam
from qlora_jax.nn.dora import magnify

DORA = ql.LoraConfig(r=4, alpha=8, use_dora=True)


def dora_layer(**options) -> ql.QuantDense:
    options = {"lora": DORA, "compute_dtype": jnp.float32, "use_bias": True} | options
    layer = ql.QuantDense(
        64, 48, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0), **options
    )
    layer.lora_B[...] = 0.1 * jax.random.normal(jax.random.key(1), layer.lora_B.shape)
    factor = jax.random.uniform(jax.random.key(2), (48,), minval=0.5, maxval=1.5)
    layer.lora_magnitude_vector[...] = layer.lora_magnitude_vector[...] * factor
    return layer


def in_float64(layer: ql.QuantDense) -> dict[str, np.ndarray]:
    weight = layer.kernel.get_value()
    dense = weight.dequantize(jnp.float32) if isinstance(weight, ql.QuantizedTensor) else weight
    parts = {"w": dense, "b": layer.bias[...], "A": layer.lora_A[...], "B": layer.lora_B[...]}
    parts["m"] = layer.lora_magnitude_vector[...]
    return {name: np.asarray(value, np.float64) for name, value in parts.items()}


@pytest.mark.parametrize("quant", [ql.QuantConfig(), None])
def test_value_and_gradients(quant: ql.QuantConfig | None) -> None:
    layer = dora_layer(quant=quant)
    x = jax.random.normal(jax.random.key(3), (5, 64))
    dy = np.asarray(jax.random.normal(jax.random.key(4), (5, 48)), np.float64)
    graphdef, lora, rest = nnx.split(layer, nnx.LoRAParam, ...)

    def loss(lora, x):
        return jnp.sum(nnx.merge(graphdef, lora, rest)(x) * dy.astype(np.float32))

    dlora, dx = jax.grad(loss, argnums=(0, 1))(lora, x)
    p, x64 = in_float64(layer), np.asarray(x, np.float64)
    norm = np.linalg.norm(p["w"] + 2 * p["B"] @ p["A"], axis=1)
    factor = p["m"] / norm  # the norm is a constant of the backward pass
    v = x64 @ p["w"].T + 2 * x64 @ p["A"].T @ p["B"].T
    expected = {
        "lora_magnitude_vector": (dy * v / norm).sum(0),
        "lora_B": (dy * factor).T @ (2 * x64 @ p["A"].T),
        "lora_A": 2 * (dy * factor @ p["B"]).T @ x64,
    }
    close = {"rtol": 2e-5, "atol": 2e-5}
    np.testing.assert_allclose(layer(x), factor * v + p["b"], **close)
    np.testing.assert_allclose(dx, (dy * factor) @ (p["w"] + 2 * p["B"] @ p["A"]), **close)
    assert set(dlora) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(dlora[name].get_value(), value, err_msg=name, **close)


def test_starts_as_the_base() -> None:
    plain = ql.QuantDense(64, 48, lora=None, compute_dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer = ql.QuantDense(64, 48, lora=DORA, compute_dtype=jnp.float32, rngs=nnx.Rngs(0))
    weight = np.asarray(layer.kernel.get_value().dequantize(jnp.float32), np.float64)
    narrow = ql.QuantDense(64, 48, lora=replace(DORA, dtype=jnp.bfloat16), rngs=nnx.Rngs(0))
    assert narrow.lora_magnitude_vector.dtype == narrow.lora_A.dtype == jnp.bfloat16
    magnitude = layer.lora_magnitude_vector[...]
    np.testing.assert_allclose(magnitude, np.linalg.norm(weight, axis=1), rtol=1e-6)
    x = jax.random.normal(jax.random.key(3), (5, 64))
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-5, atol=1e-6)


def test_rows_of_zeros_stay_zero() -> None:
    weight = jnp.zeros((4, 8)).at[0].set(1.0)
    layer = ql.QuantDense.from_weight(
        weight, quant=None, lora=DORA, compute_dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    np.testing.assert_array_equal(layer(jnp.ones(8)), [8, 0, 0, 0])


def test_the_backward_pass_keeps_codes_only() -> None:
    """No residual of the size of W, nor of W + s·B·A."""
    layer = ql.QuantDense(512, 512, lora=DORA, rngs=nnx.Rngs(0))
    graphdef, lora, rest = nnx.split(layer, nnx.LoRAParam, ...)
    x = jnp.ones((2, 512), jnp.bfloat16)
    _, pullback = jax.vjp(lambda lora, x: nnx.merge(graphdef, lora, rest)(x), lora, x)
    leaves = [leaf for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "nbytes")]
    assert max(leaf.nbytes for leaf in leaves) == 512 * 256


def test_bfloat16_is_scaled_in_float32() -> None:
    layer = dora_layer(compute_dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(3), (5, 64), jnp.bfloat16)
    y = layer(x)
    assert y.dtype == jnp.bfloat16
    layer.compute_dtype = jnp.float32
    exact = layer(x.astype(jnp.float32))
    assert float(jnp.abs(y - exact).max()) < 0.02 * float(jnp.abs(exact).max())
    factor = jnp.linspace(0.99, 1.01, y.shape[-1])
    rounded = (y.astype(jnp.float32) * factor).astype(jnp.bfloat16)
    np.testing.assert_array_equal(magnify(y, factor), rounded)
    assert (rounded != y * factor.astype(jnp.bfloat16)).any()


class Pair(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


def test_in_anyones_module() -> None:
    model = ql.add_lora(
        ql.quantize_module(Pair(nnx.Rngs(0))), ql.LoraConfig(r=2, use_dora=True), rngs=nnx.Rngs(1)
    )
    _, lora, _ = nnx.split(model, nnx.LoRAParam, ...)
    assert set(lora["up"]) == {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert set(nnx.state(model, FrozenParam)["up"]) == {"kernel", "bias", "row_squares"}
    assert model(jnp.ones((1, 16))).shape == (1, 16)
