"""Adapters on stacks whose layers differ, and weights of the base that are trained whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qlora_jax as ql
from qlora_jax.nn import FrozenParam, TrainedParam

LAYERS = 4
NAMES = {"layers": [f"model.layers.{i}.q_proj" for i in range(LAYERS)]}


class Stack(nnx.Module):
    """Four layers under one scan, and a head."""

    def __init__(self, seed: int = 0) -> None:
        def make(key):
            options = {"use_bias": True, "compute_dtype": jnp.float32, "lora": None}
            return ql.QuantDense(32, 32, rngs=nnx.Rngs(key), **options)

        self.layers = nnx.vmap(make)(jax.random.split(jax.random.key(seed), LAYERS))
        self.head = ql.QuantDense(
            32, 8, quant=None, lora=None, compute_dtype=jnp.float32, rngs=nnx.Rngs(seed)
        )

    def __call__(self, x):
        graphdef, state = nnx.split(self.layers)
        step = lambda x, s: (x + nnx.merge(graphdef, s)(x), None)  # noqa: E731
        return self.head(jax.lax.scan(step, x, state)[0])


def adapted(lora: ql.LoraConfig) -> Stack:
    return ql.add_lora(Stack(), lora, rngs=nnx.Rngs(1), names=NAMES)


def trained(model: Stack, steps: int = 3) -> Stack:
    """A few steps of plain gradient descent on random targets."""
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)
    x = jax.random.normal(jax.random.key(5), (6, 32))
    target = jax.random.normal(jax.random.key(6), (6, 8))

    @jax.jit
    def gradient(lora):
        loss = lambda lora: jnp.mean((nnx.merge(graphdef, lora, rest)(x) - target) ** 2)  # noqa: E731
        return jax.grad(loss)(lora)

    for _ in range(steps):
        lora = jax.tree.map(lambda p, g: p - 0.1 * g, lora, gradient(lora))
    return nnx.merge(graphdef, lora, rest)


MIXED = ql.LoraConfig(
    r=4,
    alpha=8,
    target_modules=("q_proj",),
    layers_to_transform=(0, 1, 3),
    rank_pattern={r"layers\.1\.q_proj": 2},
)


@pytest.mark.parametrize("dora", [False, True])
def test_smaller_ranks_and_absent_adapters_are_exact_in_training(dora: bool) -> None:
    """What fills them up stays zero, and a layer left out stays the base, step after step."""
    from dataclasses import replace

    model = trained(adapted(replace(MIXED, use_dora=dora)))
    a, b = np.asarray(model.layers.lora_A[...]), np.asarray(model.layers.lora_B[...])
    assert a.shape == (LAYERS, 4, 32)
    assert not a[1, 2:].any()
    assert not b[1, :, 2:].any()
    assert not a[2].any()
    assert not b[2].any()
    for layer in (0, 1, 3):
        assert b[layer].any()
    np.testing.assert_array_equal(model.layers.lora_scaling[...], [2, 4, 0, 2])
    if dora:
        start = np.sqrt(np.asarray(model.layers.row_squares[...]))
        moved = np.abs(np.asarray(model.layers.lora_magnitude_vector[...]) - start).max(-1)
        assert moved[2] < 1e-6 < 1e-5 < moved[[0, 1, 3]].min()
    base = Stack().layers
    x = jax.random.normal(jax.random.key(7), (3, 32))
    third = lambda m: nnx.merge(*_layer(m, 2))(x)  # noqa: E731
    np.testing.assert_array_equal(third(model.layers), third(base))


def _layer(stack: nnx.Module, index: int):
    graphdef, state = nnx.split(stack)
    return graphdef, jax.tree.map(lambda leaf: leaf[index], state)


def test_alphas_alone_are_scales_of_their_own() -> None:
    config = ql.LoraConfig(
        r=2, alpha=4, target_modules=("q_proj",), alpha_pattern={"layers.1.q_proj": 16}
    )
    scales = adapted(config).layers.lora_scaling
    np.testing.assert_array_equal(scales[...], [2, 8, 2, 2])


def test_a_uniform_stack_needs_no_scales() -> None:
    model = adapted(ql.LoraConfig(r=2, target_modules=("q_proj",)))
    assert model.layers.lora_scaling is None
    a = np.asarray(model.layers.lora_A[...])
    assert (a[0] != a[1]).any(), "every layer draws its own"


def test_a_stack_has_no_stream_for_dropout() -> None:
    """Its layers are called with keys: one stream would not be taken apart with them."""
    lora = ql.LoraConfig(r=2, target_modules=("layers", "head"), lora_dropout=0.5)
    model = ql.add_lora(Stack(), lora, rngs=nnx.Rngs(1))
    assert model.layers.dropout_rngs is None
    assert model.head.dropout_rngs is not None
    # Nor has a layer that goes by another name: `Decoder` hands out keys itself.
    named = ql.add_lora(Stack(), lora, rngs=nnx.Rngs(1), names={"head": ["head"]})
    assert named.head.dropout_rngs is None
    with pytest.raises(ValueError, match="layers is a stack of 4 layers, but has 1 names"):
        ql.add_lora(Stack(), lora, rngs=nnx.Rngs(1), names={"layers": ["q_proj"]})


def test_gaussian_start_has_each_layers_own_deviation() -> None:
    lora = ql.LoraConfig(
        r=8,
        target_modules=("q_proj",),
        init_lora_weights="gaussian",
        rank_pattern={r"layers\.0\.q_proj": 2},
    )
    a = np.asarray(adapted(lora).layers.lora_A[...])
    assert abs(a[0, :2].std() - 1 / 2) < 0.15
    assert abs(a[1].std() - 1 / 8) < 0.02


@pytest.mark.parametrize(("bias", "head"), [("lora_only", False), ("all", True)])
def test_biases(bias: str, head: bool) -> None:
    model = Stack()
    model.head = ql.QuantDense(32, 8, use_bias=True, quant=None, lora=None, rngs=nnx.Rngs(0))
    ql.add_lora(
        model,
        ql.LoraConfig(r=2, target_modules=("q_proj",), bias=bias),
        rngs=nnx.Rngs(1),
        names=NAMES,
    )
    assert isinstance(model.layers.bias, TrainedParam)
    assert isinstance(model.head.bias, TrainedParam) is head
    after = trained(model, steps=1)
    assert (after.layers.bias[...] != Stack().layers.bias[...]).any()


def test_modules_to_save() -> None:
    model = adapted(ql.LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("head",)))
    _, lora, _ = nnx.split(model, nnx.LoRAParam, ...)
    assert set(lora["head"]) == {"kernel"}
    assert isinstance(model.head.kernel, TrainedParam)
    assert "kernel" in nnx.state(model, FrozenParam)["layers"]
    after = trained(model, steps=1)
    assert (after.head.kernel[...] != Stack().head.kernel[...]).any()


def test_a_layer_of_flax_own_is_saved_whole_as_well() -> None:
    model = Stack()
    model.head = nnx.Linear(32, 8, rngs=nnx.Rngs(0))
    lora = ql.LoraConfig(r=2, target_modules=("layers",), modules_to_save=("head",))
    ql.add_lora(model, lora, rngs=nnx.Rngs(1))
    assert set(nnx.state(model, TrainedParam)["head"]) == {"kernel", "bias"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules_to_save": ("classifier",)}, "names no module of Stack; it has head, model"),
        ({"modules_to_save": ("model.layers.1",)}, "names some layers of the stack layers but not"),
        ({"modules_to_save": ("layers.0", "layers.1", "layers.2", "layers.3")}, "names no linear"),
        ({"target_modules": ("head",), "modules_to_save": ("q_proj",)}, "kernel is quantized"),
        ({"bias": "lora_only", "layers_to_transform": (1,)}, "only some layers of the stack"),
        ({"init_lora_weights": "loftq"}, "starts from the original weight"),
    ],
)
def test_what_cannot_be_trained_is_refused(options: dict, words: str) -> None:
    lora = ql.LoraConfig(**{"r": 2, "target_modules": ("q_proj",)} | options)
    with pytest.raises(ValueError, match=words):
        adapted(lora)
    # Without values, too: that is how a plan builds a model.
    with pytest.raises(ValueError, match=words):
        nnx.eval_shape(lambda: adapted(lora))


@pytest.mark.parametrize(
    ("options", "rngs", "words"),
    [
        ({"modules_to_save": ("hed",)}, nnx.Rngs(1), "names no module"),
        ({"target_modules": ("head",), "modules_to_save": ("q_proj",)}, nnx.Rngs(1), "quantized"),
        ({}, nnx.Rngs(dropout=1), "'params'"),
        ({}, 0, r"^rngs is 0, but Flax's streams are needed: give nnx.Rngs\(0\)"),
    ],
    ids=["no_module", "quantized", "no_params_stream", "a_seed"],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_a_call_that_was_refused_may_be_mended_and_made_again(
    options: dict, rngs, words: str
) -> None:
    model, mended = Stack(), ql.LoraConfig(r=2, target_modules=("q_proj", "head"))
    refused = ql.LoraConfig(**{"r": 2, "target_modules": ("q_proj", "head")} | options)
    with pytest.raises((TypeError, ValueError, AttributeError), match=words):
        ql.add_lora(model, refused, rngs=rngs, names=NAMES)
    ql.add_lora(model, mended, rngs=nnx.Rngs(1), names=NAMES)
    assert nnx.graphdef(model) == nnx.graphdef(adapted(mended))
