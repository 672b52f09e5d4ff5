import dataclasses
import functools
from collections.abc import Iterator
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qlora_jax.models import (
    Decoder,
    DecoderConfig,
    attend,
    attention_for,
    capability_here,
    next_token_loss,
    stack,
    unfreeze,
)
from qlora_jax.models import decoder as decoder_module
from qlora_jax.models.neftune import with_noise
from qlora_jax.nn import FrozenParam, LoraConfig, dense, lora
from qlora_jax.quant import QuantConfig
from tests.models.variants import VARIANTS
from tests.random_decoder import random_decoder

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 6)), jnp.int32)


@functools.cache
def _parts(config: DecoderConfig, **options) -> tuple:
    return nnx.split(random_decoder(config, **options))


def decoder(config: DecoderConfig = CONFIG, **options) -> Decoder:
    """A fresh copy of a random model."""
    options = {"quant": None, "lora": LoraConfig(r=4)} | options
    return nnx.merge(*_parts(config, **options))


@jax.jit
def logits(model: Decoder, ids, mask=None, positions=None, key=None):
    return model(ids, mask, positions, dropout_key=key)


def randomised(model: Decoder) -> Decoder:
    """With a B that is not zero, so that A takes a gradient."""
    state = nnx.state(model, nnx.LoRAParam)
    rng = np.random.default_rng(1)
    drawn = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), state)
    nnx.update(model, jax.tree.map(jnp.asarray, drawn))
    return model


def mean_loss(model: Decoder, **options):
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    def function(lora, rest):
        return next_token_loss(nnx.merge(graphdef, lora, rest), IDS, IDS, **options).mean

    return function, lora, rest


def equations(jaxpr) -> Iterator:
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_the_program_is_as_long_for_many_layers_as_for_few():
    def length(depth: int) -> int:
        config = dataclasses.replace(CONFIG, num_hidden_layers=depth)
        abstract = nnx.eval_shape(
            lambda: Decoder(config, quant=QuantConfig(), lora=LoraConfig(), rngs=nnx.Rngs(0))
        )
        function, lora, rest = mean_loss(abstract)
        return sum(1 for _ in equations(jax.make_jaxpr(jax.grad(function))(lora, rest).jaxpr))

    assert length(2) == length(40)


@pytest.mark.parametrize("remat", ["full", "dots", "none"])
def test_no_weight_is_a_residual(remat):
    # Three tokens: every activation of a layer is smaller than the smallest weight.
    ids = IDS[:1, :3]
    model = decoder(quant=QuantConfig())
    model.remat = remat
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    def function(lora, rest):
        return next_token_loss(nnx.merge(graphdef, lora, rest), ids, ids).mean

    jaxpr = jax.make_jaxpr(jax.grad(function))(lora, rest).jaxpr
    smallest = CONFIG.hidden_size * CONFIG.num_key_value_heads * CONFIG.head_dim
    scans = [e for e in equations(jaxpr) if e.primitive.name == "scan"]
    scans = [e for e in scans if e.params["length"] == CONFIG.num_hidden_layers]
    assert len(scans) == 2, "forward and backward"
    for scan in scans:
        for variable in (*scan.invars, *scan.outvars):
            aval = variable.aval
            if jnp.issubdtype(aval.dtype, jnp.floating):
                layers = 3 if aval.shape[:1] == (3,) else 1
                assert np.prod(aval.shape) // layers < smallest, aval


def test_remat_does_not_change_loss_or_gradients():
    results = []
    for remat in ("full", "none"):
        model = randomised(decoder(quant=QuantConfig()))
        model.remat = remat
        function, lora, rest = mean_loss(model)
        results.append(jax.jit(jax.value_and_grad(function))(lora, rest))
    (loss, gradient), *others = results
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    for other_loss, other_gradient in others:
        np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
        jax.tree.map(
            # Recomputed in another fusion: float32 rounding of gradients up to 0.1.
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            gradient,
            other_gradient,
        )


def test_gradient_of_adapters_by_finite_differences():
    model = randomised(decoder())
    function, lora, rest = mean_loss(model)
    function = jax.jit(function)
    gradient = jax.jit(jax.grad(function))(lora, rest)
    slope = float(optax.tree.norm(gradient))
    step = 4e-4 / slope

    def moved(sign: int):
        return jax.tree.map(
            lambda x, g: np.asarray(x) + sign * step * np.asarray(g), lora, gradient
        )

    measured = float(function(moved(1), rest) - function(moved(-1), rest)) / (2 * step)
    # Along the gradient the loss rises by its squared norm. A float32 loss near 4 is known to 5e-7.
    assert measured == pytest.approx(slope**2, rel=5e-3)


def test_padding_on_either_side_and_given_positions():
    model = decoder()
    plain = logits(model, IDS)
    for before in (0, 3):
        pads = ((0, 0), (before, 3 - before))
        ids = jnp.pad(IDS, pads, constant_values=7)
        mask = jnp.pad(jnp.ones_like(IDS), pads)
        padded = logits(model, ids, mask)
        real = padded[:, before : before + IDS.shape[1]]
        np.testing.assert_allclose(real, plain, atol=2e-5)
        assert np.isfinite(padded).all()
    # Rotations depend on distances alone.
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    shifted = logits(model, IDS, None, positions + 11)
    np.testing.assert_allclose(shifted, plain, atol=1e-4)
    stretched = logits(model, IDS, None, 2 * positions)
    assert float(jnp.abs(stretched - plain).max()) > 1e-3


def test_dropout_key():
    model = randomised(decoder(lora=LoraConfig(r=4, lora_dropout=0.5)))

    def run(model, key):
        return logits(model, IDS, key=key)

    still, one, two = (run(model, key) for key in (None, jax.random.key(0), jax.random.key(1)))
    np.testing.assert_array_equal(one, run(model, jax.random.key(0)))
    assert float(jnp.abs(one - two).max()) > 1e-3
    assert float(jnp.abs(one - still).max()) > 1e-3
    undropped = randomised(decoder())
    np.testing.assert_array_equal(run(undropped, jax.random.key(0)), run(undropped, None))


@pytest.mark.parametrize("variant", ["llama-biased", "opt-350m"])
def test_layers_and_modules_drop_different_inputs(variant, monkeypatch):
    """No key is used twice: not for two masks, nor for a mask, for noise or to be split."""
    used = []

    def spied(keys):
        data = jax.random.key_data(keys).reshape(-1, 2)
        jax.debug.callback(lambda data: used.extend(map(tuple, data.tolist())), data)
        return keys

    def split_key(key, count):
        return spied(stack.split_key(key, count))

    def dropout(x, rate, key):
        return lora.dropout(x, rate, spied(key))

    def noise(x, positions, alpha, key):
        return with_noise(x, positions, alpha, spied(key))

    monkeypatch.setattr(decoder_module, "split_key", split_key)
    monkeypatch.setattr(decoder_module, "with_noise", noise)
    monkeypatch.setattr(dense, "dropout", dropout)
    config = VARIANTS[variant]
    adapters = LoraConfig(r=2, lora_dropout=0.5)
    model = random_decoder(config, lora=adapters, remat="none")
    model.neftune_noise_alpha = 5.0
    jax.block_until_ready(logits(model, IDS, key=jax.random.key(0)))
    jax.effects_barrier()
    of_layer = len(config.attention_linears) + len(config.mlp_linears)
    outside = len(config.outer_linears) + 1
    assert len(used) == config.num_hidden_layers * (1 + of_layer) + outside
    assert len(set(used)) == len(used)


def test_hidden_and_head_are_the_two_halves():
    model = decoder()
    halves = jax.jit(lambda model: model.head(model.hidden(IDS)))(model)
    np.testing.assert_array_equal(halves, logits(model, IDS))
    tied = decoder(dataclasses.replace(CONFIG, tie_word_embeddings=True))
    assert tied.lm_head is None
    assert logits(tied, IDS).shape == (2, 6, 32)


def test_split_tells_adapters_from_the_base():
    model = decoder(lora=LoraConfig(r=4, target_modules=("q_proj", "v_proj")))
    state = nnx.state(model, nnx.LoRAParam)
    assert set(state["layers"]["self_attn"]) == {"q_proj", "v_proj"}
    assert "mlp" not in state["layers"]
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(state)
    with pytest.raises(ValueError, match="which names no linear layer of the decoder"):
        decoder(lora=LoraConfig(target_modules=("query",)))


def test_unfreeze_trains_every_dense_weight():
    model = decoder(lora=None)
    unfreeze(model)
    assert not jax.tree.leaves(nnx.state(model, FrozenParam))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def function(params):
        return next_token_loss(nnx.merge(graphdef, params, rest), IDS, IDS).mean

    gradient = jax.jit(jax.grad(function))(params)
    assert len(jax.tree.leaves(gradient)) == 3 + 9
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    with pytest.raises(ValueError, match="kernel is quantized, and codes cannot be trained"):
        unfreeze(decoder(quant=QuantConfig()))


def test_16_bit_compute_keeps_logits_in_float32():
    model = decoder(compute_dtype=jnp.bfloat16, param_dtype=jnp.float32)
    assert jax.eval_shape(lambda model: model.hidden(IDS), model).dtype == jnp.bfloat16
    assert jax.eval_shape(logits, model, IDS).dtype == jnp.float32
    function, lora, rest = mean_loss(model)
    gradient = jax.eval_shape(jax.grad(function), lora, rest)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}


def test_what_the_device_says_of_itself(monkeypatch):
    for told, capability in (
        ("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", None), ("9.4.2", None), (None, None),
    ):  # fmt: skip
        device = SimpleNamespace(compute_capability=told)
        monkeypatch.setattr(jax, "devices", lambda device=device: [device])
        assert capability_here() == capability


def test_attention_is_chosen_for_the_target():
    assert attention_for("cuda", jnp.bfloat16, 128) == "cudnn"
    assert attention_for("gpu", jnp.float16, 64) == "cudnn"
    assert attention_for("cuda", jnp.bfloat16, 128, compute_capability=(8, 0)) == "cudnn"
    assert attention_for("cpu", jnp.bfloat16, 128) == "xla"
    assert attention_for("cuda", jnp.bfloat16, 128, bias=True) == "xla"
    # It has the product that "xla" asks for in bfloat16, but not in float16.
    assert attention_for("cpu", jnp.float16, 128, bias=True) == "chunked"
    # A T4 has neither cuDNN's nor the product that "xla" asks for.
    assert attention_for("cuda", jnp.bfloat16, 128, compute_capability=(7, 5)) == "chunked"


@pytest.mark.parametrize(
    "untaken",
    [
        {"compute_dtype": jnp.float32},
        {"head_dim": 256},
        {"head_dim": 100},
        {"softcap": 50.0},
        {"alibi": True},
        {"packed": True},
        {"platform": "tpu"},
    ],
)
def test_what_cudnn_does_not_take_is_linear_in_memory_where_it_may_be_long(untaken):
    case = {"platform": "cuda", "compute_dtype": jnp.bfloat16, "head_dim": 128} | untaken
    lengths = (1024, 1025, None)
    chosen = [attention_for(**case, longest=longest) for longest in lengths]
    assert chosen == ["xla", "chunked", "chunked"]
    # A bias of all pairs is quadratic itself; a CPU of which nothing is known is left alone.
    assert attention_for(**case, bias=True, longest=8192) == "xla"
    assert attention_for(**case | {"platform": "cpu"}) == "xla"


def test_attention_that_is_not_there():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="window is 2 without causal=True"):
        attend(x, x, x, causal=False, window=2, implementation="xla")
    for tokens in (4, 1025):
        x, mask = jnp.zeros((1, tokens, 2, 8)), jnp.ones((1, 1, 1, tokens), bool)
        with pytest.raises(ValueError, match="'cudnn', which has no soft cap"):
            attend(x, x, x, mask=mask, causal=True, softcap=5.0, implementation="cudnn")


@pytest.mark.parametrize("masked", ["mask", "segments"])
def test_cudnn_makes_no_mask_of_all_pairs(masked):
    x = jax.ShapeDtypeStruct((1, 2048, 2, 8), jnp.bfloat16)
    real = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def mixed(x, real):
        told = (
            {"mask": (real > 0)[:, None, None]} if masked == "mask" else {"segments": (real,) * 2}
        )
        return attend(x, x, x, causal=True, implementation="cudnn", **told)

    jaxpr = jax.make_jaxpr(mixed)(x, real)
    sizes = [var.aval.size for equation in jaxpr.eqns for var in equation.outvars]
    assert max(sizes) < 2048**2


def test_unknown_remat():
    with pytest.raises(ValueError, match=r"remat is 'some', but one of full, .*dots, none"):
        decoder(remat="some")


@pytest.mark.parametrize("groups", [8, 4, 2, 1])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_one_query_on_a_gpu(groups, softcap, monkeypatch):
    """Whichever way the heads' products are taken: what all scores give, with padding masked."""
    # A lowering for a GPU takes this branch; what is in it runs anywhere.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *of, cuda, default: cuda(*of))
    draws = np.random.default_rng(groups)
    query = jnp.asarray(draws.normal(size=(2, 1, 8, 16)), jnp.float32)
    key, value = jnp.asarray(draws.normal(size=(2, 2, 9, groups, 16)), jnp.float32)
    mask = jnp.asarray(draws.random((2, 1, 1, 9)) < 0.7)
    mixed = attend(
        query, key, value, mask=mask, causal=False, softcap=softcap, implementation="chunked"
    )
    query = np.asarray(query, np.float64).reshape(2, groups, 8 // groups, 16)
    scores = np.einsum("bgrd,bsgd->bgrs", query, np.asarray(key, np.float64)) / 4
    scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
    weights = np.where(mask, np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bgrs,bsgd->bgrd", weights, np.asarray(value, np.float64))
    np.testing.assert_allclose(mixed.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("given", "told"),
    [([[1, 2, 3]], "a list"), (IDS[0], r"int32 \[6\]"), (IDS.astype(float), r"float32 \[2, 6\]")],
)
def test_what_is_no_batch_of_token_ids(given, told):
    message = rf"^input_ids is {told}, but integers \[batch, seq\] are needed"
    with pytest.raises(TypeError, match=message):
        decoder()(given)
    with pytest.raises(TypeError, match=message):
        decoder().prefill(given, cache_length=8)
