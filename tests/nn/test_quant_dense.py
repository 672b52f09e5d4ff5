"""`QuantDense` in anyone's NNX or Linen model: splitting, gradients, dropout, dtypes, residuals."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import qlora_jax as ql
from qlora_jax.nn import FrozenParam, linen_quant_dense
from qlora_jax.nn.lora import dropout

SMALL = ql.LoraConfig(r=4, alpha=8)


def with_adapter(layer: ql.QuantDense, seed: int = 0) -> ql.QuantDense:
    """B is zero at first; random, so that the adapter takes part."""
    layer.lora_B[...] = jax.random.normal(jax.random.key(seed), layer.lora_B.shape)
    return layer


def layer_and_x(**options) -> tuple[ql.QuantDense, jax.Array]:
    options = {"lora": SMALL, "compute_dtype": jnp.float32} | options
    layer = with_adapter(ql.QuantDense(64, 48, rngs=nnx.Rngs(0), **options))
    return layer, jax.random.normal(jax.random.key(1), (2, 5, 64))


def test_output_is_the_formula() -> None:
    layer, x = layer_and_x(use_bias=True, bias_init=nnx.initializers.ones_init())
    weight = layer.kernel.get_value().dequantize()
    expected = x @ weight.T + 1 + 2.0 * (x @ layer.lora_A[...].T) @ layer.lora_B[...].T
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_split_gives_exactly_the_adapters() -> None:
    layer, _ = layer_and_x(use_bias=True)
    _, lora, rest = nnx.split(layer, nnx.LoRAParam, ...)
    assert set(lora) == {"lora_A", "lora_B"}
    assert set(nnx.state(layer, FrozenParam)) == {"kernel", "bias"} == set(rest)
    assert not nnx.state(layer, nnx.Param) or set(nnx.state(layer, nnx.Param)) == set(lora)


def test_initialised_as_peft_does() -> None:
    layer = ql.QuantDense(1024, 32, lora=ql.LoraConfig(r=64), rngs=nnx.Rngs(0))
    a = np.asarray(layer.lora_A[...])
    bound = 1024**-0.5
    assert np.abs(a).max() <= bound
    assert abs(a.std() - bound / 3**0.5) < 0.02 * bound
    assert not np.asarray(layer.lora_B[...]).any()
    # The base as nnx.Linear's, by its inputs.
    dense = ql.QuantDense(1024, 32, quant=None, lora=None, rngs=nnx.Rngs(0))
    assert float(jnp.std(dense.kernel[...])) == pytest.approx(1024**-0.5, rel=0.03)
    assert layer.lora.scaling == 0.25
    assert ql.LoraConfig(r=64, alpha=16, use_rslora=True).scaling == 2


@pytest.mark.parametrize("quant", [ql.QuantConfig(), ql.QuantConfig("fp4"), None])
def test_gradients_by_finite_differences(quant: ql.QuantConfig | None) -> None:
    layer, x = layer_and_x(quant=quant)
    graphdef, lora, rest = nnx.split(layer, nnx.LoRAParam, ...)

    def f(lora, x):
        return nnx.merge(graphdef, lora, rest)(x)

    check_grads(jax.jit(f), (lora, x[0]), order=1, modes=["rev"], rtol=1e-2, atol=1e-2)


def test_the_backward_pass_keeps_codes_only() -> None:
    """No residual of the size of the dequantized weight."""
    layer = ql.QuantDense(512, 512, lora=SMALL, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 512), jnp.bfloat16)
    _, pullback = jax.vjp(lambda x: layer(x), x)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "nbytes"))
    assert largest == 512 * 256


def test_compute_dtype() -> None:
    layer, x = layer_and_x(compute_dtype=jnp.bfloat16)
    assert layer(x).dtype == jnp.bfloat16
    assert layer.lora_A[...].dtype == jnp.float32


def test_dropout_only_with_a_key() -> None:
    layer, x = layer_and_x(lora=ql.LoraConfig(r=4, lora_dropout=0.5))
    np.testing.assert_array_equal(layer(x), layer(x))
    key = jax.random.key(3)
    dropped = layer(x, dropout_key=key)
    np.testing.assert_array_equal(dropped, layer(x, dropout_key=key))
    assert (dropped != layer(x)).any()
    keys = jax.random.split(key, 400)
    mean = jax.vmap(lambda k: layer(x, dropout_key=k))(keys).mean(0)
    assert float(jnp.abs(mean - layer(x)).max()) < 0.5 * float(jnp.abs(dropped - layer(x)).max())


def test_dropout_drops_its_rate_and_scales_the_rest() -> None:
    """At a rate that is not as good the other way round."""
    x = jnp.ones((100, 100), jnp.float32)
    y, pull = jax.vjp(lambda x: dropout(x, 0.1, jax.random.key(0)), x)
    assert abs(float(jnp.mean(y == 0)) - 0.1) < 0.01
    np.testing.assert_allclose(y[y != 0], 1 / 0.9, rtol=1e-6)
    np.testing.assert_array_equal(pull(x)[0], y)


def test_dropout_from_a_stream_follows_train_eval_and_view() -> None:
    layer, x = layer_and_x(
        lora=ql.LoraConfig(r=4, lora_dropout=0.5), dropout_rngs=nnx.Rngs(dropout=0)
    )
    layer.train()
    assert (layer(x) != layer(x)).any()
    still = nnx.view(layer, deterministic=True)
    np.testing.assert_array_equal(still(x), still(x))
    assert (layer(x) != layer(x)).any()
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_view_without_adapters_is_the_base_and_shares_its_arrays(use_dora: bool) -> None:
    layer, x = layer_and_x(use_bias=True, lora=replace(SMALL, use_dora=use_dora))
    adapted = layer(x)
    base = nnx.view(layer, adapters=False)
    np.testing.assert_array_equal(base(x), base._product(x))
    assert base.kernel[...].codes is layer.kernel[...].codes
    np.testing.assert_array_equal(layer(x), adapted)
    np.testing.assert_array_equal(nnx.view(base, adapters=True)(x), adapted)
    assert (base(x) != adapted).any()


def test_layers_stacked_by_flax_drop_under_scan_each_by_its_own_stream() -> None:
    dropped = ql.LoraConfig(r=4, lora_dropout=0.5)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> ql.QuantDense:
        return ql.QuantDense(
            32, 32, lora=dropped, compute_dtype=jnp.float32, rngs=rngs, dropout_rngs=rngs
        )

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x: jax.Array, layer: ql.QuantDense) -> jax.Array:
        return layer(x)

    stack, x = make(nnx.Rngs(params=0, dropout=1)), jnp.ones((2, 32))
    stack.lora_B[...] = jnp.ones_like(stack.lora_B[...])
    stack.train()
    assert (run(x, stack) != run(x, stack)).any()
    keys = jax.random.key_data(stack.dropout_rngs.dropout.key[...])
    assert len(np.unique(keys, axis=0)) == 3
    stack.eval()
    np.testing.assert_array_equal(run(x, stack), run(x, stack))


def test_from_weight_takes_a_quantized_tensor_as_it_is() -> None:
    tensor = ql.quantize(jax.random.normal(jax.random.key(0), (48, 64)))
    layer = ql.QuantDense.from_weight(tensor, lora=None, rngs=nnx.Rngs(0))
    assert layer.kernel.get_value().codes is tensor.codes


def test_under_jit_and_scan() -> None:
    """A stack of layers: leaves with a leading axis, sliced by scan and merged inside."""
    make = nnx.vmap(
        lambda key: ql.QuantDense(32, 32, lora=SMALL, compute_dtype=jnp.float32, rngs=nnx.Rngs(key))
    )
    stacked = make(jax.random.split(jax.random.key(0), 3))
    graphdef, state = nnx.split(stacked)
    x = jax.random.normal(jax.random.key(1), (4, 32))

    @jax.jit
    def run(state, x):
        return jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, state)[0]

    expected = x
    for i in range(3):
        expected = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state))(expected)
    np.testing.assert_allclose(run(state, x), expected, rtol=1e-5, atol=1e-5)


def test_linen_wrapper() -> None:
    layer = linen_quant_dense(64, 48, lora=SMALL, compute_dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 64))
    variables = layer.init(jax.random.key(0), x)
    assert {"LoRAParam", "FrozenParam"} <= set(variables)
    y = layer.apply(variables, x)
    assert y.shape == (2, 48)

    def loss(lora):
        return jnp.sum(layer.apply({**variables, "LoRAParam": lora}, x) ** 2)

    gradient = jax.grad(loss)(variables["LoRAParam"])
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_linen_drops_by_the_key_of_a_call_alone() -> None:
    layer = linen_quant_dense(64, 48, lora=replace(SMALL, lora_dropout=0.5))
    x, key = jax.random.normal(jax.random.key(1), (2, 64)), jax.random.key(2)
    variables = layer.init(jax.random.key(0), x)
    lora = jax.tree.map(jnp.ones_like, variables["LoRAParam"])
    variables = {**variables, "LoRAParam": lora}
    whole = layer.apply(variables, x)
    np.testing.assert_array_equal(layer.apply(variables, x, rngs={"dropout": key}), whole)
    assert (layer.apply(variables, x, dropout_key=key) != whole).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"r": 0}, "from 1 to"), ({"r": 10**40}, "from 1 to"), ({"lora_dropout": 1.0}, r"\[0, 1\)")],
)
def test_bad_lora_config(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ql.LoraConfig(**options)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0), (-1, 4)])
def test_a_layer_without_inputs_or_outputs(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"in_features is {sizes[0]} and out_features {sizes[1]}"):
        ql.QuantDense(*sizes, rngs=nnx.Rngs(0))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rngs": 0}, r"^rngs is 0, but Flax's streams are needed: give nnx.Rngs\(0\)"),
        ({"rngs": jax.random.key(0)}, "^rngs is Array"),
        ({"compute_dtype": "bf16"}, "^compute_dtype is 'bf16', but float32, bfloat16 or float16"),
        ({"compute_dtype": None}, "^compute_dtype is None, but"),
        ({"implementation": "cuda"}, "^implementation is 'cuda', but one of xla, triton, "),
        ({"implementation": "jax_triton"}, "^implementation is 'jax_triton', but one of"),
    ],
)
def test_arguments_of_no_use_are_refused(options: dict, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        ql.QuantDense(8, 4, **{"rngs": nnx.Rngs(0)} | options)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_list_is_no_array() -> None:
    with pytest.raises(TypeError, match=r"^x is a list, but an array is needed: jnp.asarray\(x\)"):
        ql.QuantDense(2, 4, rngs=nnx.Rngs(0))([1.0, 2.0])


@pytest.mark.parametrize("lora", [None, ql.LoraConfig(r=2)])
@pytest.mark.parametrize("quant", [None, ql.QuantConfig()])
def test_inputs_of_another_width_and_stacks(
    quant: ql.QuantConfig | None, lora: ql.LoraConfig | None
):
    layer = ql.QuantDense(8, 4, quant=quant, lora=lora, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x has shape \(2, 7\), but the layer takes 8 inputs"):
        layer(jnp.ones((2, 7)))
    stack = nnx.vmap(lambda key: ql.QuantDense(8, 4, quant=quant, lora=lora, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 3)
    )
    with pytest.raises(ValueError, match=r"a stack of \[3\]; call its layers one at a time"):
        stack(jnp.ones((3, 8)))
