"""Any user's NNX module becomes a QLoRA one."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qlora_jax as ql


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.query = nnx.Linear(32, 32, rngs=rngs)
        self.value = nnx.Linear(32, 32, use_bias=False, rngs=rngs)
        self.norm = nnx.LayerNorm(32, rngs=rngs)

    def __call__(self, x):
        return x + self.value(nnx.gelu(self.query(self.norm(x))))


class Model(nnx.Module):
    """Linear layers as attributes, in a list, in a dict, and one used twice."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.heads = nnx.Dict(a=nnx.Linear(32, 8, rngs=rngs))
        self.tied = self.heads["a"]

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.heads["a"](x) + self.tied(x)


def test_quantize_module() -> None:
    model, x = Model(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (4, 32))
    before = model(x)
    assert ql.quantize_module(model) is model
    assert isinstance(model.blocks[0].query, ql.QuantDense)
    assert model.tied is model.heads["a"]
    after = model(x)
    assert after.dtype == before.dtype
    assert 0 < float(jnp.abs(after - before).max()) < 1
    assert not nnx.state(model, nnx.LoRAParam)


def test_unquantized_conversion_changes_nothing() -> None:
    model, x = Model(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (4, 32))
    before = model(x)
    np.testing.assert_allclose(ql.quantize_module(model, None)(x), before, rtol=1e-5, atol=1e-5)


def test_skip_by_name() -> None:
    model = ql.quantize_module(Model(nnx.Rngs(0)), skip=("value", "heads.a"))
    assert isinstance(model.blocks[1].value, nnx.Linear)
    assert isinstance(model.heads["a"], nnx.Linear)
    assert isinstance(model.blocks[1].query, ql.QuantDense)


@pytest.mark.parametrize("name", ["head", "norm", "blocks.0"])
def test_a_name_to_skip_that_is_no_linear_layers_is_refused(name: str) -> None:
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match=rf"'{name}'.*it has blocks\.\*\.query.*heads\.a"):
        ql.quantize_module(model, skip=("query", name))
    assert isinstance(model.blocks[0].value, nnx.Linear)


@pytest.mark.parametrize("given", [{"compute_dtype": "bf16"}, {"implementation": "cuda"}])
def test_a_dtype_or_kernel_that_is_not_there_is_refused(given: dict[str, str]) -> None:
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"^\w+ is '\w+', but .* is needed"):
        ql.quantize_module(model, **given)
    assert isinstance(model.blocks[0].query, nnx.Linear)


def test_a_layer_keeps_its_own_dtype_and_takes_the_kernel_that_is_named() -> None:
    model = Model(nnx.Rngs(0))
    model.blocks[0].query.dtype = jnp.bfloat16
    ql.quantize_module(model, implementation="xla")
    query, value = model.blocks[0].query, model.blocks[0].value
    assert (query.compute_dtype, value.compute_dtype) == (jnp.bfloat16, jnp.float32)
    assert (query.implementation, value.implementation) == ("xla", "xla")


def test_add_lora_gives_exactly_the_adapters() -> None:
    model = ql.quantize_module(Model(nnx.Rngs(0)))
    lora = ql.LoraConfig(r=4, target_modules=("query",))
    ql.add_lora(model, lora, rngs=nnx.Rngs(1))
    _, adapters, _ = nnx.split(model, nnx.LoRAParam, ...)
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(adapters)}
    assert paths == {f"blocks.{i}.query.lora_{m}" for i in (0, 1) for m in "AB"}


def test_only_the_adapters_train() -> None:
    model = ql.quantize_module(Model(nnx.Rngs(0)))
    ql.add_lora(model, ql.LoraConfig(r=4), rngs=nnx.Rngs(1))
    x = jax.random.normal(jax.random.key(1), (4, 32))
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def loss(lora):
        return jnp.mean((nnx.merge(graphdef, lora, rest)(x) - 1) ** 2)

    first = loss(lora)
    for _ in range(20):
        lora = jax.tree.map(lambda p, g: p - 0.01 * g, lora, jax.grad(loss)(lora))
    assert float(loss(lora)) < 0.5 * float(first)


def test_adapters_are_not_replaced_by_others() -> None:
    model = ql.quantize_module(Model(nnx.Rngs(0)))
    ql.add_lora(model, ql.LoraConfig(r=4, target_modules=("query",)), rngs=nnx.Rngs(1))
    before = nnx.state(model, nnx.LoRAParam)
    with pytest.raises(ValueError, match=r"^blocks\.0\.query has adapters already"):
        ql.add_lora(model, ql.LoraConfig(r=2), rngs=nnx.Rngs(2))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.LoRAParam), before)
    # Other layers may get others.
    others = ql.LoraConfig(r=2, exclude_modules=("query",))
    ql.add_lora(model, others, rngs=nnx.Rngs(2))
    assert {model.blocks[0].query.lora.r, model.blocks[0].value.lora.r} == {4, 2}


def test_add_lora_freezes_a_plain_linear() -> None:
    model = ql.add_lora(Model(nnx.Rngs(0)), ql.LoraConfig(r=4), rngs=nnx.Rngs(1))
    kernel = model.blocks[0].query.kernel
    assert isinstance(kernel, ql.FrozenParam)
    assert kernel.get_value().shape == (32, 32)


def test_adapters_on_a_weight_that_was_to_be_quantized_are_refused() -> None:
    """Its codes would be others than the weight that they adapt; nothing is converted."""
    model = Model(nnx.Rngs(0))
    ql.add_lora(model, ql.LoraConfig(r=4, target_modules=("query",)), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"^blocks\.0\.query has adapters .* before add_lora"):
        ql.quantize_module(model, skip=("blocks.1.query",))
    assert isinstance(model.blocks[0].value, nnx.Linear)
    ql.quantize_module(model, skip=("query",))
    assert isinstance(model.blocks[0].value.kernel[...], ql.QuantizedTensor)
    assert isinstance(model.blocks[0].query.kernel[...], jax.Array)


def test_errors_name_what_there_is() -> None:
    model = ql.quantize_module(Model(nnx.Rngs(0)), skip=("value",))
    for there in ("query", "value"):
        with pytest.raises(ValueError, match=rf"q_proj.*blocks\.\*\.{there}"):
            ql.add_lora(model, ql.LoraConfig(target_modules=("q_proj",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'query', a regular expression .*give names as a list"):
        ql.add_lora(model, ql.LoraConfig(target_modules="query"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"no nnx\.Linear"):
        ql.quantize_module(nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"^Linear holds .* QuantDense\.from_weight makes"):
        ql.quantize_module(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"a QuantDense already \(quantized, adapted"):
        ql.quantize_module(ql.quantize_module(Model(nnx.Rngs(0))))


class _Both(NamedTuple):
    first: nnx.Module
    second: nnx.Module


def test_layers_in_tuples_are_replaced_and_stay_shared() -> None:
    class InTuples(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            inner = nnx.Linear(64, 64, rngs=rngs)
            self.blocks = nnx.data((inner, (nnx.Linear(64, 64, rngs=rngs), nnx.relu)))
            self.both = nnx.data(_Both(inner, nnx.LayerNorm(64, rngs=rngs)))

        def __call__(self, x: jax.Array) -> jax.Array:
            first, (second, activation) = self.blocks
            return self.both.second(activation(second(first(x))))

    model = InTuples(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (3, 64))
    before = model(x)
    ql.quantize_module(model, None)
    assert isinstance(model.both, _Both)
    assert model.both.first is model.blocks[0]
    np.testing.assert_allclose(model(x), before, atol=1e-5)

    ql.add_lora(model, ql.LoraConfig(r=4, target_modules=("first", "0")), rngs=nnx.Rngs(0))
    _, lora, _ = nnx.split(model, nnx.LoRAParam, ...)
    assert len(jax.tree.leaves(lora)) == 4


def test_layers_in_many_tuples_are_all_replaced() -> None:
    """Also if the list that stands for a tuple is given the id of an earlier one."""

    class InTuples(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            for number in range(6):
                pair = nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)
                setattr(self, f"pair{number}", nnx.data(pair))

    model = ql.quantize_module(InTuples(nnx.Rngs(0)))
    for number in range(6):
        assert {type(layer) for layer in getattr(model, f"pair{number}")} == {ql.QuantDense}


@pytest.mark.parametrize("quant", [ql.QuantConfig(), None])
def test_layers_that_share_a_kernel_share_it_frozen(quant: ql.QuantConfig | None) -> None:
    class Tied(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(64, 64, rngs=rngs)
            self.second = nnx.Linear(64, 64, rngs=rngs)
            self.second.kernel = self.first.kernel
            self.apart = nnx.Linear(64, 64, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(nnx.relu(self.first(x))) + self.apart(x)

    model, x = Tied(nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (3, 64))
    ql.quantize_module(model, quant)
    assert model.second.kernel is model.first.kernel
    assert model.second.bias is not model.first.bias
    assert model.apart.kernel is not model.first.kernel
    ql.add_lora(model, ql.LoraConfig(r=4), rngs=nnx.Rngs(2))
    expected = model(x)
    # Split and merged, there is one kernel still.
    merged = nnx.merge(*nnx.split(model))
    assert merged.second.kernel is merged.first.kernel
    np.testing.assert_array_equal(merged(x), expected)


def test_a_linear_that_computes_something_else_is_refused_by_name() -> None:
    model = nnx.Dict(
        plain=nnx.Linear(64, 64, rngs=nnx.Rngs(0)),
        other=nnx.LoRALinear(64, 64, lora_rank=4, rngs=nnx.Rngs(0)),
    )
    with pytest.raises(ValueError, match=r"other is a LoRALinear.*skip"):
        ql.add_lora(model, ql.LoraConfig(target_modules=("other",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"other is a LoRALinear.*skip"):
        ql.quantize_module(model)
    ql.quantize_module(model, skip="other")
    assert isinstance(model["other"], nnx.LoRALinear)


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        (nnx.Linear, {"dot_general": partial(jax.lax.dot_general)}),
        (nnx.Linear, {"precision": "highest"}),
        (nnx.Linear, {"preferred_element_type": jnp.float32}),
        (nnx.Linear, {"promote_dtype": lambda arrays, **_: arrays}),
        (nnx.LinearGeneral, {"dot_general": partial(jax.lax.dot_general)}),
        (nnx.LinearGeneral, {"dot_general_cls": lambda: jax.lax.dot_general}),
        (nnx.LinearGeneral, {"precision": jax.lax.Precision.HIGHEST}),
    ],
)
def test_a_product_of_its_own_is_refused_by_name_and_nothing_is_replaced(
    kind: type, option: dict[str, Any]
) -> None:
    model = nnx.Dict(
        plain=nnx.Linear(64, 64, rngs=nnx.Rngs(0)),
        other=kind(64, 64, **option, rngs=nnx.Rngs(0)),
    )
    match = rf"^other has {next(iter(option))}=.*name other in skip .*target_modules.* set"
    with pytest.raises(ValueError, match=match):
        ql.add_lora(model, ql.LoraConfig(target_modules=("other",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=match):
        ql.quantize_module(model)
    assert isinstance(model["plain"], nnx.Linear)
    ql.quantize_module(model, skip="other")
    assert isinstance(model["plain"], ql.QuantDense)
    assert isinstance(model["other"], kind)


def test_a_linear_that_only_begins_otherwise_is_replaced() -> None:
    class Square(nnx.Linear):
        def __init__(self, features: int, rngs: nnx.Rngs) -> None:
            super().__init__(features, features, rngs=rngs)

    model = nnx.Dict(square=Square(64, nnx.Rngs(0)))
    ql.quantize_module(model)
    assert isinstance(model["square"], ql.QuantDense)
