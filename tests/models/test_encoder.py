import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.checkpoints import load_model, save_model
from qlora_jax.data import IGNORE
from qlora_jax.models import (
    EncoderClassifier,
    EncoderConfig,
    classification_loss,
    family_of,
    unfreeze,
)
from qlora_jax.models.families.roberta import ROBERTA
from qlora_jax.nn import FrozenParam, LoraConfig, TrainedParam
from qlora_jax.quant import QuantConfig
from tests.models.numpy_roberta import scores as scores_in_float64

CONFIG = EncoderConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=20,
    num_labels=3,
)
IDS = jnp.asarray([[0, 5, 9, 30, 7, 2], [0, 11, 2, 1, 1, 1]], jnp.int32)
MASK = CONFIG.pad_token_id != IDS


@functools.cache
def _parts(config: EncoderConfig, **options) -> tuple:
    return nnx.split(EncoderClassifier(config, rngs=nnx.Rngs(0), **options))


def roberta(config: EncoderConfig = CONFIG, **options) -> EncoderClassifier:
    """A fresh copy of a random model."""
    return nnx.merge(*_parts(config, **({"quant": None, "lora": None} | options)))


@jax.jit
def scores(model, ids, mask=None, key=None):
    return model(ids, mask, dropout_key=key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random classifier on disk, its weights large enough that every part shows."""
    model = roberta()
    state = nnx.state(model)
    leaves, treedef = jax.tree.flatten(state)
    rng = np.random.default_rng(3)
    drawn = [jnp.float32(x + 0.3 * rng.normal(size=x.shape)) for x in map(np.asarray, leaves)]
    nnx.update(model, jax.tree.unflatten(treedef, drawn))
    path = tmp_path_factory.mktemp("roberta")
    save_model(path, model)
    return path


def load(path, **options) -> EncoderClassifier:
    return load_model(
        path, **({"quant": None, "lora": None, "compute_dtype": jnp.float32} | options)
    )


@pytest.mark.parametrize("mask", [MASK, None], ids=["masked", "padding is read, too"])
def test_scores_in_float64(mask, folder):
    tensors = load_file(folder / "model.safetensors")
    seen = np.ones(IDS.shape, bool) if mask is None else np.asarray(mask)
    expected = scores_in_float64(tensors, np.asarray(IDS), seen, heads=4, pad=1)
    found = np.asarray(scores(load(folder), IDS, mask))
    # 1.1e-6 of the range seen: float32 rounding.
    assert np.abs(found - expected).max() < 5e-6 * np.ptp(expected)


@pytest.mark.slow
def test_padding_changes_nothing(folder):
    model = load(folder)
    plain = scores(model, IDS[1:, :3])
    padded = scores(model, IDS[1:], MASK[1:])
    np.testing.assert_allclose(padded, plain, atol=2e-5)


@pytest.mark.parametrize("bare", [False, True], ids=["RobertaForMaskedLM", "RobertaModel"])
def test_a_pretrained_model_gets_a_new_head(bare, folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    head = [name for name in tensors if name.startswith("classifier.")]
    for name in head:
        del tensors[name]
    for name, size in (("lm_head.bias", 40), ("roberta.pooler.dense.bias", 32)):
        tensors[name] = np.zeros(size, np.float32)
    # A buffer of transformers before 4.31.
    tensors["roberta.embeddings.position_ids"] = np.arange(20)[None]
    if bare:
        del tensors["lm_head.bias"]
        tensors = {name.removeprefix("roberta."): value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert len(head) == 4
    models = [load(tmp_path, overrides={"num_labels": 5}, seed=seed) for seed in (0, 0, 1)]
    weights = [np.asarray(model.classifier.out_proj.weight[...]) for model in models]
    assert weights[0].shape == (5, 32)
    assert weights[0].std() > 0
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()
    # A head that is there, for another number of labels, is not passed over.
    with pytest.raises(ValueError, match=r"classifier.out_proj.* has shape \[3"):
        load(folder, overrides={"num_labels": 5})


def test_qlora_trains_adapters_and_head(folder):
    model = load(folder, quant=QuantConfig(), lora=LoraConfig(r=4))
    graphdef, trained, rest = nnx.split(model, nnx.LoRAParam, ...)
    labels = jnp.array([2, 0])

    @jax.jit
    def gradient(trained, rest):
        def loss(trained):
            model = nnx.merge(graphdef, trained, rest)
            return classification_loss(model, IDS, labels, MASK).total

        return jax.grad(loss)(jax.tree.map(lambda x: x + 0.1, trained))

    found = gradient(trained, rest)
    assert set(found) == {"layers", "classifier"}
    leaves = jax.tree.leaves(found)
    assert len(leaves) == 2 * 6 + 4
    assert all(np.any(leaf) for leaf in leaves)


def test_adapters_by_name():
    model = roberta(lora=LoraConfig(r=4, target_modules=("query", "value")))
    state = nnx.state(model, nnx.LoRAParam)
    assert set(state["layers"]["attention"]["self"]) == {"query", "value"}
    assert "output" not in state["layers"]
    with pytest.raises(ValueError, match="has query, key, value, dense"):
        roberta(lora=LoraConfig(target_modules=("q_proj",)))


def test_everything_else_is_frozen_until_it_is_not():
    model = roberta()
    assert len(jax.tree.leaves(nnx.state(model, TrainedParam))) == 4
    unfreeze(model)
    assert not jax.tree.leaves(nnx.state(model, FrozenParam))


def test_losses_of_classes_and_of_values():
    model, loss_of = roberta(), jax.jit(classification_loss)
    values = np.asarray(scores(model, IDS, MASK), np.float64)
    loss = loss_of(model, IDS, jnp.array([1, IGNORE]), MASK)
    expected = np.log(np.exp(values[0]).sum()) - values[0, 1]
    assert (float(loss.total), int(loss.examples)) == (pytest.approx(expected, rel=1e-5), 1)
    regression = roberta(dataclasses.replace(CONFIG, num_labels=1))
    value = float(scores(regression, IDS, MASK)[0, 0])

    def total(shift):
        labels = jnp.array([2.5 + shift, jnp.nan], jnp.float32)
        loss = classification_loss(regression, IDS, labels, MASK)
        return loss.total, loss.examples

    (found, count), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(0.0)
    assert (float(found), int(count)) == (pytest.approx((value - 2.5) ** 2, rel=1e-4), 1)
    assert float(slope) == pytest.approx(2 * (2.5 - value), rel=1e-4)
    with pytest.raises(ValueError, match="labels are int32, but a model with 1 label"):
        classification_loss(regression, IDS, jnp.array([1, 0]), MASK)
    with pytest.raises(ValueError, match="takes int32 classes"):
        classification_loss(model, IDS, jnp.array([1.0, 0.0]), MASK)


@pytest.mark.slow
def test_the_models_own_dropout():
    model = roberta()
    keys = [None, jax.random.key(0), jax.random.key(1)]
    still, one, two = (scores(model, IDS, MASK, key) for key in keys)
    np.testing.assert_array_equal(one, scores(model, IDS, MASK, keys[1]))
    assert float(jnp.abs(one - two).max()) > 1e-4
    assert float(jnp.abs(one - still).max()) > 1e-4


def test_more_tokens_than_positions():
    with pytest.raises(ValueError, match="have 19 tokens, but the model has positions for 18"):
        roberta()(jnp.ones((1, 19), jnp.int32))


def test_config_both_ways():
    raw = json.loads(json.dumps(ROBERTA.write_config(CONFIG)))
    named = ROBERTA.read_config(raw)
    assert named == dataclasses.replace(CONFIG, label_names=("LABEL_0", "LABEL_1", "LABEL_2"))
    assert family_of(raw) is ROBERTA
    # A pretrained checkpoint's names no labels: two, as transformers has it.
    del raw["id2label"]
    assert ROBERTA.read_config(raw).num_labels == 2
    assert CONFIG.head_dropout == CONFIG.hidden_dropout_prob


def test_label_names_are_kept_with_their_number():
    # A file may have its keys in the order of text: "10" before "2".
    names = {"10": "last", **{str(label): f"class {label}" for label in range(10)}}
    config = ROBERTA.read_config(ROBERTA.write_config(CONFIG) | {"id2label": names})
    written = ROBERTA.write_config(config)
    assert written["id2label"] == names
    assert written["label2id"] == {name: int(label) for label, name in names.items()}
    other = ROBERTA.write_config(dataclasses.replace(config, num_labels=2))
    assert other["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu', but a RoBERTa here has 'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key'"),
        ({"vocab_size": None}, "no 'vocab_size'"),
        ({"num_attention_heads": 5}, "num_attention_heads, 5, does not divide"),
        ({"hidden_dropout_prob": -0.1}, "hidden_dropout_prob is -0.1"),
        ({"classifier_dropout": 1}, "classifier_dropout is 1"),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        ROBERTA.read_config(ROBERTA.write_config(CONFIG) | change)


@pytest.mark.usefixtures("as_users_run_it")
def test_a_row_alone_is_no_batch():
    with pytest.raises(TypeError, match=r"^input_ids is int32 \[6\], but integers"):
        roberta()(IDS[0])
