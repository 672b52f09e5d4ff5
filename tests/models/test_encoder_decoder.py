import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import load_model, save_model
from qlora_jax.data import IGNORE
from qlora_jax.models import (
    EncoderDecoder,
    EncoderDecoderConfig,
    family_of,
    seq2seq_loss,
    shift_right,
    t5_lora,
    unfreeze,
)
from qlora_jax.models.dropped_attention import dropped_attention
from qlora_jax.models.encoder_decoder_layer import FeedForward
from qlora_jax.models.families.t5 import T5
from qlora_jax.models.relative_bias import relative_buckets
from qlora_jax.models.stack import Storage, draw
from qlora_jax.nn import FrozenParam, LoraConfig, QuantDense, TrainedParam
from qlora_jax.quant import QuantConfig

CONFIG = EncoderDecoderConfig(
    vocab_size=40,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    feed_forward_proj="gated-gelu",
    tie_word_embeddings=False,
    scale_decoder_outputs=False,
)
_rng = np.random.default_rng(0)
SOURCE = jnp.asarray(_rng.integers(2, 40, (2, 7)), jnp.int32)
LABELS = jnp.asarray(_rng.integers(2, 40, (2, 5)), jnp.int32).at[1, 3:].set(IGNORE)


@functools.cache
def _parts(config: EncoderDecoderConfig, **options) -> tuple:
    return nnx.split(EncoderDecoder(config, rngs=nnx.Rngs(0), **options))


def t5(config: EncoderDecoderConfig = CONFIG, **options) -> EncoderDecoder:
    """A fresh copy of a random model."""
    return nnx.merge(*_parts(config, **({"quant": None, "lora": None} | options)))


@jax.jit
def logits(model, source, read, mask=None, key=None):
    return model(source, read, mask, dropout_key=key)


@functools.partial(jax.jit, static_argnums=1)
def prefilled(model, cache_length):
    """With padding in front of the source."""
    front = ((0, 0), (2, 0))
    mask = jnp.pad(jnp.ones_like(SOURCE), front)
    ids = jnp.pad(SOURCE, front, constant_values=7)
    return model.prefill(ids, mask, cache_length=cache_length)


READ = shift_right(LABELS, start=0, pad=0)


# --- positions ---


def exact_bucket(steps: int, buckets: int, longest: int) -> int:
    """The bucket of a distance to the left, in whole numbers: bucket e + j holds the steps with
    (steps / e)^n ≥ (longest / e)^j, for e exact buckets and n wide ones."""
    exact, wide = buckets // 2, buckets - buckets // 2
    if steps < exact:
        return steps
    j = max(j for j in range(200) if steps**wide * exact**j >= longest**j * exact**wide)
    return min(exact + j, buckets - 1)


@settings(max_examples=60)
@given(steps=st.integers(0, 3000), shape=st.sampled_from([(32, 128), (8, 16), (16, 64)]))
def test_buckets_by_whole_numbers(steps, shape):
    buckets, longest = shape
    left, right = np.array([-steps]), np.array([steps])
    options = {"num_buckets": buckets, "max_distance": longest}
    one_way = relative_buckets(left, bidirectional=False, **options)
    assert one_way == exact_bucket(steps, buckets, longest)
    assert relative_buckets(right, bidirectional=False, **options) == 0
    half = exact_bucket(steps, buckets // 2, longest)
    assert relative_buckets(left, bidirectional=True, **options) == half
    both = relative_buckets(right, bidirectional=True, **options)
    assert both == half + (buckets // 2 if steps else 0)


# --- the model ---


def test_the_program_is_as_long_for_many_layers_as_for_few():
    def length(depth: int) -> int:
        config = dataclasses.replace(CONFIG, num_layers=depth, num_decoder_layers=depth)
        model = nnx.eval_shape(lambda: EncoderDecoder(config, rngs=nnx.Rngs(0)))
        return len(str(jax.make_jaxpr(lambda m: m(SOURCE, READ))(model)).splitlines())

    assert length(2) == length(30)


@pytest.mark.slow
def test_padding_of_the_source_and_words_to_come_change_nothing():
    model = t5()
    plain = logits(model, SOURCE, READ)
    for before in (0, 3):  # one shape: compiled once
        pads = ((0, 0), (before, 3 - before))
        ids = jnp.pad(SOURCE, pads, constant_values=7)
        mask = jnp.pad(jnp.ones_like(SOURCE), pads)
        np.testing.assert_allclose(logits(model, ids, READ, mask), plain, atol=2e-5)
    changed = logits(model, SOURCE, READ.at[:, 3:].set(5))
    np.testing.assert_allclose(changed[:, :3], plain[:, :3], atol=1e-6)
    assert float(jnp.abs(changed - plain)[:, 3:].max()) > 1e-3


def test_word_by_word_is_the_same_with_a_longer_cache():
    model = t5()
    whole = logits(model, SOURCE, READ)
    step = jax.jit(lambda model, tokens, cache: model.decode_step(tokens, cache))
    found, cache = prefilled(model, 9)
    for position in range(READ.shape[1]):
        np.testing.assert_allclose(found, whole[:, position], atol=2e-5)
        if position + 1 < READ.shape[1]:
            found, cache = step(model, READ[:, position + 1], cache)
    assert int(cache.filled) == READ.shape[1]


def test_a_token_too_many_is_loud():
    model = t5()
    found, cache = prefilled(model, 1)
    assert np.isfinite(found).all()
    found, _ = model.decode_step(READ[:, 1], cache)
    assert np.isnan(found).all()


def test_weights_that_stay_in_their_stacks(monkeypatch):
    model = t5(quant=QuantConfig(blocksize=32))
    _, cache = prefilled(model, 3)
    sliced = jax.jit(lambda model: model.decode_step(READ[:, 1], cache))(model)
    monkeypatch.setattr(QuantDense, "stays_in_stack", lambda _, rows: rows == len(READ))
    in_place = jax.jit(lambda model: model.decode_step(READ[:, 1], cache))(model)
    jax.tree.map(np.testing.assert_array_equal, in_place, sliced)


def test_loss_is_the_sum_over_real_words():
    model = t5()
    loss = seq2seq_loss(model, SOURCE, LABELS)
    wide = np.asarray(logits(model, SOURCE, READ), np.float64)
    scores = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    judged = np.asarray(LABELS) != IGNORE
    rows, columns = np.nonzero(judged)
    expected = -scores[rows, columns, np.asarray(LABELS)[judged]].sum()
    assert int(loss.tokens) == judged.sum() == 8
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    assert READ.tolist()[1] == [0, *LABELS.tolist()[1][:3], 0]


def test_qlora_gradients_reach_every_adapter():
    model = t5(quant=QuantConfig(), lora=LoraConfig(r=4))
    graphdef, lora, rest = nnx.split(model, nnx.LoRAParam, ...)

    @jax.jit
    def gradient(lora, rest):
        def loss(lora):
            return seq2seq_loss(nnx.merge(graphdef, lora, rest), SOURCE, LABELS).mean

        return jax.grad(loss)(lora)

    # B is zero at first, and A's gradient with it.
    leaves = jax.tree.leaves(gradient(jax.tree.map(lambda x: x + 0.1, lora), rest))
    assert len(leaves) == 2 * (7 + 11)
    assert all(np.any(leaf) for leaf in leaves)


def test_adapters_by_name():
    model = t5(lora=LoraConfig(r=4, target_modules=("q", "EncDecAttention.v")))
    state = nnx.state(model, nnx.LoRAParam)
    assert set(state["encoder"]["layers"]) == {"SelfAttention"}
    assert set(state["decoder"]["layers"]["EncDecAttention"]) == {"q", "v"}
    with pytest.raises(ValueError, match=r"which names no linear layer .* has q, k, v, o, wi_0"):
        t5(lora=LoraConfig(target_modules=("q_proj",)))


@pytest.mark.slow
def test_the_models_own_dropout():
    model = t5()
    keys = [None, jax.random.key(0), jax.random.key(1)]
    still, one, two = (logits(model, SOURCE, READ, key=key) for key in keys)
    np.testing.assert_array_equal(one, logits(model, SOURCE, READ, key=keys[1]))
    assert float(jnp.abs(one - two).max()) > 1e-3
    assert float(jnp.abs(one - still).max()) > 1e-3


def test_written_out_attention_sees_itself_and_no_later_word():
    """In training; each word has a value of its own, so that a row tells whom it sees."""
    still, value = jnp.zeros((1, 3, 1, 3)), jnp.eye(3)[None, :, None]
    options = {"causal": True, "scale": 1.0, "rate": 1e-9, "implementation": "xla"}
    seen = dropped_attention(still, still, value, dropout_key=jax.random.key(0), **options)
    np.testing.assert_allclose(seen[0, :, 0], np.tri(3) / [[1], [2], [3]], rtol=1e-6)


@pytest.mark.slow
def test_written_out_attention_is_attention():
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value = (jax.random.normal(k, (2, 6, 4, 8)) for k in keys[:3])
    options = {
        "bias": jax.random.normal(keys[3], (1, 4, 6, 6)),
        "mask": (jnp.arange(6) < jnp.array([6, 4])[:, None])[:, None, None],
        "causal": True,
        "scale": 0.7,
        "implementation": "xla",
    }

    @jax.jit
    def run(dropout_key):
        return [
            dropped_attention(query, key, value, rate=rate, dropout_key=dropout_key, **options)
            for rate in (1e-9, 0.5)
        ]

    (plain, _), (kept, dropped) = run(None), run(keys[0])
    np.testing.assert_allclose(kept, plain, atol=1e-5)
    assert float(jnp.abs(dropped - plain).max()) > 0.1


@pytest.mark.slow
def test_full_finetuning_trains_every_weight():
    model = t5(remat="none")
    unfreeze(model)
    assert not jax.tree.leaves(nnx.state(model, FrozenParam))
    graphdef, weights, rest = nnx.split(model, TrainedParam, ...)

    @jax.jit
    def gradient(weights):
        def loss(weights):
            return seq2seq_loss(nnx.merge(graphdef, weights, rest), SOURCE, LABELS).mean

        return jax.grad(loss)(weights)

    leaves = jax.tree.leaves(gradient(weights))
    # Embedding, head, two tables and two last norms; linear layers and norms of both stacks.
    assert len(leaves) == 6 + (7 + 2) + (11 + 3)
    assert all(np.any(leaf) for leaf in leaves)


# --- the family ---


def test_saved_and_loaded_with_a_head_of_its_own(tmp_path):
    model = t5()
    save_model(tmp_path, model)
    loaded = load_model(tmp_path, quant=None, lora=None, compute_dtype=jnp.float32)
    assert loaded.config == CONFIG
    np.testing.assert_array_equal(logits(loaded, SOURCE, READ), logits(model, SOURCE, READ))
    # Copies that old checkpoints carry are left out; an unscaled head that is missing is tied.
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    tied = load_model(tmp_path, quant=None, lora=None, compute_dtype=jnp.float32)
    assert tied.lm_head is None
    assert tied.config == dataclasses.replace(CONFIG, tie_word_embeddings=True)


@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": True, "scale_decoder_outputs": True}])
def test_a_tied_head_of_other_numbers_is_read(said, tmp_path):
    """Scaled all the same, as by transformers 5; transformers 4 leaves it out."""
    model = t5()
    save_model(tmp_path, model)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    # What neither says is so in a T5.
    del config["scale_decoder_outputs"], config["tie_word_embeddings"]
    file.write_text(json.dumps(config | said))
    loaded = load_model(tmp_path, quant=None, lora=None, compute_dtype=jnp.float32)
    np.testing.assert_array_equal(loaded.lm_head.weight[...], model.lm_head.weight[...])
    assert loaded.config.scale_decoder_outputs


def test_a_scaled_head_is_the_embedding():
    config = dataclasses.replace(CONFIG, scale_decoder_outputs=True, tie_word_embeddings=True)
    assert T5.for_weights(config, {"lm_head.weight"}).tie_word_embeddings
    # transformers 4 wrote one field for both.
    for tied in (True, False):
        raw = T5.write_config(CONFIG) | {"tie_word_embeddings": tied}
        del raw["scale_decoder_outputs"]
        read = T5.read_config(json.loads(json.dumps(raw)))
        assert (read.tie_word_embeddings, read.scale_decoder_outputs) == (tied, tied)


def test_a_decoder_starts_with_the_padding_and_may_have_a_depth_of_its_own():
    raw = T5.write_config(CONFIG) | {"pad_token_id": 3, "decoder_start_token_id": None}
    read = T5.read_config(raw | {"num_decoder_layers": 5})
    assert (read.num_layers, read.num_decoder_layers) == (CONFIG.num_layers, 5)
    assert read.decoder_start_token_id == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_kv": None}, "no 'd_kv'"),
        ({"feed_forward_proj": "swish"}, "feed_forward_proj is 'swish', but one of relu"),
        ({"relative_attention_num_buckets": 7}, "even number of at least 4 buckets"),
        ({"relative_attention_max_distance": 4}, "more than half as large a distance"),
        ({"dropout_rate": 1.0}, "dropout_rate is 1.0"),
        ({"num_heads": 0}, "num_heads is 0"),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        T5.read_config(T5.write_config(CONFIG) | change)


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("relu", lambda x: np.maximum(x, 0)),
        ("gelu", lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2),
        ("gated-gelu", lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2),
        ("gated-silu", lambda x: x / (1 + np.exp(-x))),
    ],
)
def test_activations(name, activation):
    config = dataclasses.replace(CONFIG, feed_forward_proj=name)
    storage = Storage(None, None, jnp.float32, jnp.float32, None)
    block = FeedForward(config, "", storage, nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(1, 3, 32)).astype(np.float32)
    # Wide enough for the exact one and its approximation to differ.
    first = block.wi_0 if name.startswith("gated") else block.wi
    first.kernel[...] = 2 * first.kernel[...]
    inner = activation(x.astype(np.float64) @ np.asarray(first.kernel[...]).T)
    if name.startswith("gated"):
        inner = inner * (x @ np.asarray(block.wi_1.kernel[...]).T)
    expected = inner @ np.asarray(block.wo.kernel[...]).T
    np.testing.assert_allclose(block(jnp.asarray(x), draw(None, 9)), expected, atol=2e-6)


def test_cudnn_is_refused():
    assert family_of({"model_type": "t5"}).build is EncoderDecoder
    with pytest.raises(ValueError, match="one of xla, chunked is needed: cuDNN's backward"):
        t5(attention="cudnn")


def test_the_papers_ranks():
    shapes = {  # d_model, d_kv, d_ff, layers, heads of T5 v1.1 small to xxl
        16: [(512, 64, 1024, 8, 6), (768, 64, 2048, 12, 12), (1024, 64, 2816, 24, 16)],
        64: [(2048, 64, 5120, 24, 32), (4096, 64, 10240, 24, 64)],
    }
    for rank, sizes in shapes.items():
        for d_model, d_kv, d_ff, layers, heads in sizes:
            config = EncoderDecoderConfig(
                32128, d_model, d_kv, d_ff, layers, layers, heads, feed_forward_proj="gated-gelu"
            )
            assert (t5_lora(config).r, t5_lora(config).alpha) == (rank, 64)
    eleven = EncoderDecoderConfig(32128, 1024, 128, 65536, 24, 24, 128)
    assert t5_lora(eleven).r == 64


@pytest.mark.usefixtures("as_users_run_it")
def test_a_row_alone_is_no_batch():
    with pytest.raises(TypeError, match=r"^input_ids is int32 \[\d+\], but integers"):
        t5()(SOURCE[0], READ)
